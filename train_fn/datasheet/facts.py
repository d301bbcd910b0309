"""Facts about labelled image data: files, tasks, parts, near-copies, groups. `tables` and `page` show them.

Shapes: N different images, M pairs of near-copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from train_fn.data.copies import CACHE, cache_key, copy_groups, copy_pairs, thumbnail_entry
from train_fn.data.images import (
    AS_USUAL,
    ImageFacts,
    image_facts,
    image_problems,
    image_size,
    opened_facts,
    picture,
)
from train_fn.data.samples import PARTS, Sample, Splits, Task
from train_fn.data.splitting import DataReport, SplitRules, contradictory_groups, different_images
from train_fn.settings import ImageOptions
from train_fn.support.cache import cache_folder, read_cache, write_cache
from train_fn.support.text import plain_form

if TYPE_CHECKING:
    from train_fn.datasheet.tokens import TokenLengths


@dataclass(frozen=True)
class FileFacts(ImageFacts):
    """An image file. Its size is that of the frame that is used."""

    num_bytes: int


@dataclass(frozen=True)
class Copies:
    """Near-copies among the images."""

    num_pairs: int
    groups: list[list[str]]
    """The images of each group of two at least, the largest group first."""
    contradictory: list[list[Sample]]
    """Of each group in which the same question has several answers, the samples with such a question."""


@dataclass(frozen=True)
class NamedGroup:
    """A group that the data names, such as a patient."""

    name: str
    samples: list[Sample]
    parts: tuple[str, ...]
    """The parts that hold its samples."""


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """All that is shown of a data set."""

    name: str
    root: Path
    """The folder that shown paths start from."""
    recognised: list[str]
    """What was recognised in the files: format, columns, usual names."""
    samples: list[Sample]
    """Those without faults."""
    tasks: tuple[Task, ...]
    splits: Splits | None
    report: DataReport | None
    files: dict[str, FileFacts]
    unreadable: dict[str, str]
    """The problem of each image that cannot be used, by path."""
    copies: Copies
    groups: list[NamedGroup]
    """The largest first."""
    tokens: TokenLengths | None
    problems: list[str]
    """Every reason why a study cannot start."""
    remarks: list[str]
    """Further facts that the user should know."""
    images: ImageOptions = AS_USUAL
    """How images are read."""
    asked: dict[str, float] = field(default_factory=dict)
    """Share of each part that was asked for."""
    allow_flips: bool = False
    """Whether augmentation may flip images from left to right."""

    def of_task(self, task: Task) -> list[Sample]:
        """The samples of a task."""
        return [sample for sample in self.samples if sample.task == task.name]

    def shown(self, image: str) -> str:
        """An image's path from the image root. Images from bytes lie elsewhere."""
        path = Path(image)
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path.name)


# ------------------------------------------------------------------------------------------------ files


def read_files(
    paths: Iterable[str], max_pixels: int, log: Callable[[str], None], options: ImageOptions = AS_USUAL
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Facts about each image file, and the problem of each that cannot be used, in one pass over the files.

    Each file is decoded once (DICOM twice): the thumbnails that near-copies are compared by go into the cache.

    Args:
        max_pixels: the most pixels an image may have.
        log: called with lines of progress.
        options: how images are read.
    """
    paths = list(dict.fromkeys(paths))
    cache = cache_folder() / CACHE
    cached = read_cache(cache)
    fresh: dict[str, Any] = {}
    facts: dict[str, FileFacts] = {}

    def see(path: str, image: Image.Image) -> None:
        facts[path] = FileFacts(**vars(opened_facts(image, path)), num_bytes=Path(path).stat().st_size)
        if (content := cache_key(path, options)) not in cached:
            fresh[content] = thumbnail_entry(picture(image, options))

    problems = image_problems(paths, max_pixels, log, options=options, seen=see)
    if fresh:
        write_cache(cache, cached | fresh)
    for path in paths:  # DICOM, and those that there was no time to decode
        if path not in facts and path not in problems:
            its = replace(image_facts(path), size=image_size(path, options))
            facts[path] = FileFacts(**vars(its), num_bytes=Path(path).stat().st_size)
    return facts, problems


# ------------------------------------------------------------------------------------------------ copies, groups


def find_copies(samples: Sequence[Sample], rules: SplitRules) -> Copies:
    """Near-copies among the images of samples, by the rules of the split."""
    paths, uses = different_images(samples)
    pairs = copy_pairs(paths, rules.copies_distance, None, rules.copies_correlation, rules.images)
    numbers = copy_groups(len(paths), pairs)
    sizes = Counter(numbers.tolist())
    groups = [np.flatnonzero(numbers == number).tolist() for number, size in sizes.most_common() if size > 1]
    of_sample = numbers[[its[0] for its in uses]]
    mixed = sorted(contradictory_groups(samples, uses, pairs, of_sample))
    members: dict[int, list[Sample]] = {number: [] for number in mixed}
    for number, sample in zip(of_sample.tolist(), samples, strict=True):
        if number in members:
            members[number].append(sample)
    contradictory = list(map(contradicting, members.values()))
    return Copies(len(pairs), [[paths[index] for index in group] for group in groups], contradictory)


def contradicting(samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose question has several answers among them."""
    answers: dict[str, set[str]] = {}
    for sample in samples:
        answers.setdefault(plain_form(sample.question), set()).add(sample.answer)
    return [sample for sample in samples if len(answers[plain_form(sample.question)]) > 1]


def named_groups(samples: Sequence[Sample], splits: Splits | None) -> list[NamedGroup]:
    """The groups that the data names, the largest first."""
    members: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.group:
            members.setdefault(sample.group, []).append(sample)
    held: dict[str, list[str]] = {name: [] for name in members}
    for part in PARTS if splits else ():
        for name in {sample.group for sample in getattr(splits, part)} & held.keys():
            held[name].append(part)
    groups = [NamedGroup(name, its, tuple(held[name])) for name, its in members.items()]
    return sorted(groups, key=lambda group: -len(group.samples))
