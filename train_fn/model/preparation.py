"""Vision features before training: the processes of a node share the work."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from train_fn.data.augment import Variant
from train_fn.model.base import Base
from train_fn.model.batches import blames_images, compute_and_keep, features_size
from train_fn.model.features import POLL_S
from train_fn.support import profile
from train_fn.support.profile import count_work
from train_fn.support.ranks import gather

READERS = 4  # threads that read images for a GPU: reading one takes several times as long as its features
ROUND_S = 10.0  # after this, the ranks of a trial tell each other whether they still prepare features


def prepare_features(
    base: Base, images: Iterable[str | Variant], preempted: Callable[[], bool] = lambda: False
) -> None:
    """Compute the features that the cache lacks, together with the other processes of this node.

    All lanes train in the same order. Without this, all would need the same image at the same time, and compute it
    twice or wait. Here each process goes through the images in an order of its own, skips those that another has
    computed or claimed, and waits for these at the end. Features that the cache has no space for are left to training.
    Without a cache that can be written, nothing is prepared.

    Args:
        images: paths, or variants of images; those of an earlier call cost nothing. Every rank of a trial calls this,
            with the same images.
        preempted: whether this process must shut down soon; then it prepares no more.

    Raises:
        BatchFailed: an image cannot be read or prepared.
    """
    store = base.features if base.takes_features else None
    if store is None:
        return

    def is_missing(image: str | Variant) -> bool:
        count_work()
        return store.find(image, features_size(base, image)[0]) is None

    def must_wait(image: str | Variant) -> bool:
        """Compute the features of an image unless another process computes them; whether it does."""
        with blames_images([image]):
            num_bytes = features_size(base, image)[1]
            if preempted() or not store.can_write(num_bytes) or not is_missing(image):
                return False
            if not store.claim(image, num_bytes):
                return True
            if is_missing(image):
                compute_and_keep(base, image)
            else:  # another process has just written them
                store.release(image)
            return False

    new = sorted(set(images) - store.prepared, key=str)
    # A CPU has no core to spare, and a profile's phases follow each other.
    num_threads = READERS if base.device.type == "cuda" and not profile.active else 0
    with ThreadPoolExecutor(READERS, initializer=torch.cuda.set_device, initargs=(base.device,)) as pool:
        each = pool.map if num_threads else map
        with blames_images(new):
            # The files that exist count as used from here on. So they are not removed to make room for the others.
            queue = deque(image for image, missing in zip(new, each(is_missing, new), strict=True) if missing)
        random.Random().shuffle(queue)  # not the global generator, which training uses
        # In rounds, because a rank that waited for another node's rank in one long collective would seem to hang.
        while any(gather(bool(queue))):
            ends_at = time.monotonic() + ROUND_S
            while queue and time.monotonic() < ends_at:
                taken = [queue.popleft() for _ in range(min(len(queue), max(1, 4 * num_threads)))]
                held = [image for image, waits in zip(taken, each(must_wait, taken), strict=True) if waits]
                queue.extend(held)
                if len(held) == len(taken):
                    time.sleep(POLL_S)
            count_work()
    store.prepared.update(new)
