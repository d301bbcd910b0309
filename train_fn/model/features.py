"""What the frozen vision tower makes of an image, kept on disk for all workers, lanes and studies of a node.

One safetensors file an image: `vlm-tune/features/<key>/<sha256 of the image file>.safetensors` in the user's cache. The
key stands for everything else that the features depend on, to the last bit. A file is written aside and renamed, so
nobody reads half of one; two workers that need the same image at once write the same bytes. Reading maps the file, so
all processes share the kernel's one copy of it.

Shapes: P patches of one image, D width of the vision tower.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
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

from train_fn.data.copies import default_cache
from train_fn.support.files import file_hash

WRITES_PER_COUNT = 16  # files that a process writes before it looks again how full the cache is
# Seconds before its start in which what others have touched still counts as in use; also covers coarse file clocks.
GRACE_S = 60


def features_key(tower: torch.nn.Module, tower_config: Any, image_processor: Any, device: torch.device) -> str:
    """Name [64 hexadecimal digits] of all that features depend on beside the image.

    That is the tower's weights and configuration, how images are prepared (settings, and the code where it may be
    ours), library versions, and what computes: GPU and CPU round differently, and a CPU so with its number of threads.
    """

    def weights(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    with ThreadPoolExecutor(8) as pool:  # sha256 lets other threads run
        parts = [
            *pool.map(weights, sorted(tower.state_dict().items())),
            tower_config.to_json_string(),
            json.dumps(image_processor.to_dict(), sort_keys=True, default=str),
            inspect.getsource(type(image_processor)),
            f"torch {torch.__version__}, transformers {transformers.__version__}, Pillow {PIL.__version__}",
            f"{device.type}: {place}",
            "pixels: upright",  # how `images.read_image` reads them
        ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FeatureStore:
    """The features of one key, bounded together with those of all other keys.

    When room is needed, the files longest unused go first. What was used after this process began stays: a study larger
    than the cache keeps what fits, instead of removing each image shortly before it comes round again. Where nothing
    can be written, features are kept in this process' memory, under the same bound.
    """

    def __init__(self, key: str, limit_bytes: int) -> None:
        self.directory = default_cache().with_name("features") / key
        self.limit = self.room = limit_bytes
        self.started = time.time() - GRACE_S
        self.contents: dict[str, str] = {}  # image path -> sha256 of the file, read once in a process
        self.memory: dict[str, torch.Tensor] = {}  # sha256 -> [P, D], where the disk cannot be written
        self.on_disk = True
        self.num_writes = 0

    def file(self, image: str) -> Path:
        """Where an image's features are, if they are."""
        if image not in self.contents:
            self.contents[image] = file_hash(image)
        return self.directory / f"{self.contents[image]}.safetensors"

    def find(self, image: str, shape: tuple[int, int]) -> torch.Tensor | None:
        """The features of an image, on the CPU; None when there are none of this shape [P, D].

        The file stays mapped only as long as the tensor lives: opening it takes 0.1 ms, and a process may hold no more
        than some 65,000 mappings.
        """
        file = self.file(image)
        if file.stem in self.memory:
            return self.memory[file.stem]
        try:
            with safe_open(file, "pt") as opened:
                features = opened.get_tensor("features")
        except (OSError, SafetensorError):  # not there or not whole: it is computed and written anew
            return None
        with contextlib.suppress(OSError):  # a cache that can only be read is as good
            os.utime(file)
        return features if tuple(features.shape) == shape else None

    def keep(self, image: str, features: torch.Tensor) -> None:
        """Keep an image's features [P, D] while there is room."""
        file, features = self.file(image), features.detach().cpu().contiguous()
        if self.on_disk:
            try:
                return self.write(file, features)
            except OSError as error:
                self.on_disk, self.room = False, self.limit
                told = f"vision features are kept in memory only: {self.directory} cannot be written ({error})"
                warnings.warn(told, stacklevel=2)
        if features.nbytes <= self.room:
            self.memory[file.stem] = features
            self.room -= features.nbytes

    def write(self, file: Path, features: torch.Tensor) -> None:
        """Write a file, aside at first. Raises OSError."""
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
        """Remove files of any key, the longest unused first, until `wanted` bytes are free; the bytes that are free."""
        found = sorted(sizes(self.directory.parent.glob("*/*")))
        free = self.limit - sum(size for _, size, _ in found)
        for used, size, file in found:
            if free >= wanted or used >= self.started:
                break
            file.unlink(missing_ok=True)
            free += size
        return free


def sizes(files: Iterable[Path]) -> Iterable[tuple[float, int, Path]]:
    """Time of the last use, bytes and path of each file that another process has not removed by now."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            told = file.stat()
            yield told.st_mtime, told.st_size, file
