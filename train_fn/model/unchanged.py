"""Whether what a study rests on, its images and the files of its base, is still what the driver saw.

The content of all of it is hashed when a study begins. Later, a file whose size and time of change are the same counts
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
from train_fn.model.checkpoint import base_files
from train_fn.support.files import file_hash

Stamps = dict[str, tuple[int, int]]


def data_hash(splits: Splits) -> str:
    """sha256 over every image's content, question and answer, in the order of the splits; file names do not count."""
    samples = [*splits.train, *splits.validation, *splits.test]
    with ThreadPoolExecutor(8) as pool:
        contents = pool.map(lambda sample: file_hash(sample.image), samples)
    told = [[content, sample.text, sample.answer] for content, sample in zip(contents, samples, strict=True)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def image_stamps(images: Iterable[str]) -> Stamps:
    """Size in bytes and time of change (ns) of each image; -1 and 0 where there is none that can be read."""
    found: Stamps = {}
    for image in images:
        try:
            state = os.stat(image)
            found[image] = state.st_size, state.st_mtime_ns
        except OSError:
            found[image] = -1, 0
    return found


@dataclass
class Inputs:
    """What the driver saw of images and base when the study began."""

    data_hash: str
    base_hash: str
    base_files: dict[str, str]
    stamps: Stamps

    @classmethod
    def seen(cls, splits: Splits, directory: Path, data_hash: str, base_hash: str) -> Inputs:
        """As they are now. The hashes are those of the study's plan."""
        samples = (*splits.train, *splits.validation, *splits.test)
        return cls(data_hash, base_hash, base_files(directory), image_stamps(sample.image for sample in samples))

    def changed_base(self, directory: Path) -> str:
        """Why the base is not the study's, with the file's name; empty if it is."""
        now = base_files(directory)
        other = sorted(name for name in now.keys() | self.base_files if now.get(name) != self.base_files.get(name))
        return changed(f"{directory / other[0]}", len(other), "files of the base") if other else ""

    def changed_images(self, splits: Splits) -> str:
        """Why the images are not the study's, with a path; empty if they are. Reads only what a look at sizes and times
        leaves open, and once."""
        now = image_stamps(self.stamps)
        other = [image for image, stamp in now.items() if stamp != self.stamps[image]]
        resized = [image for image in other if now[image][0] != self.stamps[image][0]]
        if not resized and other and data_hash(splits) == self.data_hash:
            self.stamps = now  # touched or copied, with the same content
            other = []
        return changed((resized or other)[0], len(other), "images") if other else ""


def changed(path: str, count: int, what: str) -> str:
    """The message for files that have changed."""
    others = f" (and {count - 1} more {what})" if count > 1 else ""
    return (
        f"{path}{others} must stay as the study was begun with, but has changed: put it back and go on with --resume, "
        f"or begin a new study"
    )
