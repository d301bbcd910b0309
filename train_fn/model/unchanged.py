"""Whether the images and base files of a study have changed since it began.

The content of all of them is hashed when a study begins. Later, an image with the same size and time of change counts
as unchanged; where only the time differs, the content decides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from train_fn.data.samples import Splits
from train_fn.model.checkpoint import base_files, resolve_model
from train_fn.support.files import file_hash

Stamps = dict[str, tuple[int, int]]


def data_hash(splits: Splits) -> str:
    """sha256 over every image's content and all words, in the order of the splits; file names do not count."""
    images = splits.images
    with ThreadPoolExecutor(8) as pool:
        contents = dict(zip(images, pool.map(file_hash, images), strict=True))
    entries = []
    for sample in splits.samples:
        more = [[contents[image] for image in sample.images[1:]], sample.system, sample.turns]
        # A single question about one image hashes as in earlier versions.
        entries.append([contents[sample.image], sample.question, sample.answer, *(more if any(more) else [])])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def image_stamps(images: Iterable[str]) -> Stamps:
    """Size in bytes and time of change in ns of each image; -1 and 0 for an image that cannot be read."""
    stamps: Stamps = {}
    for image in images:
        try:
            state = os.stat(image)
            stamps[image] = state.st_size, state.st_mtime_ns
        except OSError:
            stamps[image] = -1, 0
    return stamps


@dataclass
class Inputs:
    """Images and base files on the driver when the study began."""

    data_hash: str
    base_hash: str
    base_files: dict[str, str]
    stamps: Stamps

    @classmethod
    def seen(cls, splits: Splits, model: str | Path, data_hash: str, base_hash: str) -> Inputs:
        """Their present state; the two hashes come from the study's plan."""
        return cls(data_hash, base_hash, base_files(model), image_stamps(splits.images))

    def changed_base(self, model: str | Path) -> str:
        """A message with the name of a base file that differs from the study's; "" if all are the same."""
        now, directory = base_files(model), resolve_model(model)
        other = sorted(name for name in now.keys() | self.base_files if now.get(name) != self.base_files.get(name))
        return changed(f"{directory / other[0]}", len(other), "files of the base") if other else ""

    def changed_images(self, splits: Splits) -> str:
        """A message with the path of an image that differs from the study's; "" if all are the same.

        Reads contents only where sizes are equal and times differ, and then once.
        """
        now = image_stamps(self.stamps)
        other = [image for image, stamp in now.items() if stamp != self.stamps[image]]
        resized = [image for image in other if now[image][0] != self.stamps[image][0]]
        if not resized and other and data_hash(splits) == self.data_hash:
            self.stamps = now  # touched or copied, with the same content
            other = []
        return changed((resized or other)[0], len(other), "images") if other else ""


def changed(path: str, count: int, what: str) -> str:
    """The message about changed files."""
    others = f" (and {count - 1} more {what})" if count > 1 else ""
    return (
        f"{path}{others} must stay as the study was begun with, but has changed: put it back and go on with --resume, "
        f"or begin a new study"
    )
