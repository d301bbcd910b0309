"""On-disk cache of vision-tower features, shared by all workers, lanes and studies of a node.

Each image has one safetensors file: `vlm-tune/features/<key>/<sha256 of the image file>.safetensors` in the user's
cache. The key covers everything else that the features depend on, to the last bit. A variant of an image
(`train_fn.data.augment`) has a file of its own, whose name also has the variant's key. A file is written under another
name and then renamed, so no process reads an unfinished file. Reading maps the file, so all processes share the
kernel's copy of it.

A process that computes an image's features claims the image by a file `<sha256>.claim` beside it, and others wait. A
claim saves work and guards nothing: two processes that compute the same image write the same bytes.

Shapes: P patches of one image, D width of the vision tower.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from train_fn.data.augment import Variant, path_of
from train_fn.data.images import READING
from train_fn.settings import ImageOptions
from train_fn.support.cache import cache_folder
from train_fn.support.files import file_hash
from train_fn.support.profile import count_work

WRITES_PER_COUNT = 16  # files that a process writes before it measures the cache's size again
GRACE_S = 60  # a file used up to this long before a process began counts as used by it; covers coarse file clocks
CLAIM_S = 60.0  # after this a claim is void, though its process lives: it may be frozen, or on another host
POLL_S = 0.02  # between two looks at an image that another process computes


def features_key(
    tower: torch.nn.Module, tower_config: Any, image_processor: Any, device: torch.device, options: ImageOptions
) -> str:
    """A hash [64 hexadecimal digits] of everything that features depend on beside the image.

    These are the tower's weights and configuration, the preparation of images (settings and code), library versions,
    and the hardware: GPU and CPU round differently, and so does a CPU with another number of threads.
    """

    def weights(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    with ThreadPoolExecutor(8) as pool:  # sha256 lets other threads run
        parts = [
            *pool.map(weights, sorted(tower.state_dict().items())),
            tower_config.to_json_string(),
            json.dumps(image_processor.to_dict(), sort_keys=True, default=str),
            inspect.getsource(type(image_processor)),
            f"torch {torch.__version__}, transformers {transformers.__version__}, Pillow {PIL.__version__}",
            f"{device.type}: {hardware}",
            f"pixels: {READING}, {options}",  # as `images.read_image` reads them
        ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FeatureStore:
    """The cached features of one key. All keys together have one size limit.

    When space is needed, the least recently used files are removed. Files used since this process began are not: a
    study larger than the cache keeps what fits, instead of removing each image shortly before it is needed again. Where
    the disk cannot be written, features are kept in this process's memory, with the same limit.
    """

    def __init__(self, key: str, limit_bytes: int) -> None:
        self.directory = cache_folder() / "features" / key
        self.limit = self.room = limit_bytes
        self.started = time.time() - GRACE_S
        self.contents: dict[str, str] = {}  # image path -> sha256 of the file, which a process reads once
        self.memory: dict[str, torch.Tensor] = {}  # stem of the file -> [P, D], where the disk cannot be written
        self.prepared: set[str | Variant] = set()  # what `preparation.prepare_features` has seen to
        self.on_disk = True
        self.num_writes = 0

    def file(self, image: str | Variant) -> Path:
        """The file for the features of an image or variant, whether it exists or not."""
        path = path_of(image)
        if path not in self.contents:
            self.contents[path] = file_hash(path)
        variant = "" if isinstance(image, str) else f"-{image.key}"
        return self.directory / f"{self.contents[path]}{variant}.safetensors"

    def find(self, image: str | Variant, shape: tuple[int, int]) -> torch.Tensor | None:
        """The features of an image, on the CPU; None if the cache has none of this shape [P, D].

        The file stays mapped as long as the tensor lives. Opening it takes 0.1 ms, and a process may hold only about
        65,000 mappings.
        """
        file = self.file(image)
        if file.stem in self.memory:
            return self.memory[file.stem]
        try:
            with safe_open(file, "pt") as opened:
                features = opened.get_tensor("features")
        except (OSError, SafetensorError):  # missing or damaged: it is computed and written again
            return None
        with contextlib.suppress(OSError):  # a read-only cache works as well
            os.utime(file)
        return features if tuple(features.shape) == shape else None

    def find_or_claim(self, image: str | Variant, shape: tuple[int, int], num_bytes: int) -> torch.Tensor | None:
        """As `find`. None: this process must compute the features, `keep` them, and `release` the image.

        Waits while another process computes them, at most about as long as a claim holds.
        """
        claimed, give_up_at = False, time.monotonic() + CLAIM_S
        while (features := self.find(image, shape)) is None and not claimed and time.monotonic() < give_up_at:
            claimed = self.claim(image, num_bytes)  # then one more look: another process may just have written them
            if not claimed:
                count_work()
                time.sleep(POLL_S)
        if claimed and features is not None:
            self.release(image)
        return features

    def can_write(self, num_bytes: int) -> bool:
        """Whether features of so many bytes would be written, as far as this process knows."""
        return self.on_disk and num_bytes <= self.room

    def claim(self, image: str | Variant, num_bytes: int) -> bool:
        """Claim an image for this process. False: another process computes its features now. Features that will not be
        written need no claim, because nobody should wait for them."""
        if not self.can_write(num_bytes):
            return True
        claim = self.file(image).with_suffix(".claim")
        try:
            if is_void(claim):
                claim.unlink(missing_ok=True)
            claim.parent.mkdir(parents=True, exist_ok=True)
            with open(claim, "x") as file:
                file.write(f"{os.getpid()} {start_time(os.getpid())} {socket.gethostname()}")
        except FileExistsError:
            return False
        except OSError as error:
            self.use_memory(error)
        return True

    def release(self, image: str | Variant) -> None:
        """Remove this process's claim, after the features are written or computing them failed."""
        with contextlib.suppress(OSError):
            self.file(image).with_suffix(".claim").unlink()

    def keep(self, image: str | Variant, features: torch.Tensor) -> None:
        """Store an image's features [P, D] if there is space."""
        file, features = self.file(image), features.detach().cpu().contiguous()
        if self.on_disk:
            try:
                return self.write(file, features)
            except OSError as error:
                self.use_memory(error)
        if features.nbytes <= self.room:
            self.memory[file.stem] = features
            self.room -= features.nbytes

    def use_memory(self, error: OSError) -> None:
        """From now on keep features in this process's memory."""
        self.on_disk, self.room = False, self.limit
        reason = f"vision features are kept in memory only: {self.directory} cannot be written ({error})"
        warnings.warn(reason, stacklevel=3)

    def write(self, file: Path, features: torch.Tensor) -> None:
        """Write a file under another name, then rename it. Raises OSError."""
        if self.num_writes % WRITES_PER_COUNT == 0:
            self.room = self.make_room(WRITES_PER_COUNT * features.nbytes)
        self.num_writes += 1
        if features.nbytes > self.room:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            self.room -= partial.write_bytes(save({"features": features}))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def make_room(self, wanted: int) -> int:
        """Remove the least recently used files of any key until `wanted` bytes are free. Returns the free bytes."""
        files = sorted(sizes(self.directory.parent.glob("*/*")))
        free = self.limit - sum(size for _, size, _ in files)
        for used, size, file in files:
            if free >= wanted or used >= self.started:
                break
            file.unlink(missing_ok=True)
            free += size
        return free


def is_void(claim: Path) -> bool:
    """Whether a claim exists and is void: its process is gone, or it is older than `CLAIM_S`. Raises OSError."""
    try:
        age_s, owner = time.time() - claim.stat().st_mtime, claim.read_text(errors="replace").split(" ", 2)
    except FileNotFoundError:
        return False
    if age_s > CLAIM_S:
        return True
    if (
        len(owner) < 3 or not owner[0].isdecimal() or owner[2] != socket.gethostname()
    ):  # not written yet, or on another host
        return False
    return start_time(int(owner[0])) != owner[1]


def start_time(pid: int) -> str:
    """When a process of this host started, in clock ticks since boot; empty if there is no such process. A number of a
    process that has ended may belong to another one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def sizes(files: Iterable[Path]) -> Iterable[tuple[float, int, Path]]:
    """Time of the last use, bytes and path of each file. Another process may remove files meanwhile."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            state = file.stat()
            yield state.st_mtime, state.st_size, file
