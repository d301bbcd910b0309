"""Training, validation and test parts: made without leaks, and reported.

Shapes: S samples, N different images, M pairs of near-copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.copies import MAX_DISTANCE, MIN_CORRELATION, copy_groups, copy_pairs, largest_groups, leaking_samples
from train_fn.data.dealing import split_indices
from train_fn.data.images import AS_USUAL
from train_fn.data.samples import PARTS, Sample, Splits
from train_fn.data.tasks import TaskRules, find_tasks
from train_fn.settings import SHOWN, ImageOptions
from train_fn.support.text import plain_form

LARGE_GROUP = 0.1  # a group of near-copies with a larger share of the images makes the parts uneven
UNEVEN = 0.2  # a part that misses its share by more is reported
SHOWN_GROUPS, SHOWN_IMAGES = 3, 12  # of the largest groups
MIN_SHARE = 10  # samples of a part below which that says nothing


@dataclass(frozen=True)
class DataReport:
    """Facts about near-copies that decide how far a score can be trusted."""

    num_images: int
    num_pairs: int
    """Pairs of near-copies."""
    num_grouped: int
    """Images that have a near-copy."""
    contradictions: tuple[tuple[str, ...], ...]
    """Groups of near-copies with different answers to one question: image paths, each with its answer."""
    num_left_out: int
    """Images left out for a contradiction (`--contradictions drop`)."""
    leaked: dict[str, int]
    """Images of a part with a near-copy in a part that it must be independent of."""
    leaked_if_random: float
    """Share of the test images that would have a near-copy in train or validation in a random split: mean of 20."""
    test_clean: tuple[int, ...]
    """Indices of the test images without a near-copy in train or validation."""
    largest_group: int = 0
    """Images in the largest group of near-copies. A group stays in one part."""
    num_groups: int = 0
    """Groups that the data names, such as patients."""
    largest_linked: int = 0
    """Images in the largest group of all that stay in one part: near-copies, images of one sample or named group."""
    notes: tuple[str, ...] = ()
    """Further facts about tasks and parts."""
    shown: tuple[tuple[str, ...], ...] = ()
    """Images of the largest groups, if one is large or makes a part uneven: people should look whether they belong
    together."""

    def sentences(self) -> list[str]:
        """The facts as sentences."""
        lines = [
            f"{self.num_grouped} of {self.num_images} images have a near-copy ({self.num_pairs} pairs); a random split "
            f"would leave {self.leaked_if_random:.0%} of the test images with a copy in train or validation"
        ]
        if self.largest_group > LARGE_GROUP * self.num_images:
            lines.append(
                f"{self.largest_group} of {self.num_images} images are one group of near-copies and stay in one part, "
                f"so the parts may have other sizes than requested: raise --copies-correlation, or give "
                f"--copies-distance -1 (no copies), if they are none"
            )
        if self.num_groups:
            lines.append(
                f"{self.num_groups} named groups stay in one part each; the largest linked group has "
                f"{self.largest_linked} of {self.num_images} images"
            )
        what = "an image, a near-copy or a group" if self.num_groups else "a near-copy"
        lines += [f"{count} {name} images have {what} in another part" for name, count in self.leaked.items() if count]
        if self.contradictions:
            left_out = f"; {self.num_left_out} images left out" if self.num_left_out else ""
            lines.append(f"{len(self.contradictions)} groups of near-copies have contradictory answers{left_out}")
        return [*lines, *self.notes]


@dataclass(frozen=True, kw_only=True)
class SplitRules:
    """How data is divided."""

    val_fraction: float
    """Share of validation, unless the user provides that part."""
    test_fraction: float
    seed: int
    contradictions: str = "keep"
    """Treatment of near-copies with different answers to one question: "keep", "drop", or "train" (only there)."""
    copies_distance: int = MAX_DISTANCE
    """See `copies.copy_pairs`, as for `copies_correlation`."""
    copies_correlation: float = MIN_CORRELATION
    images: ImageOptions = AS_USUAL
    """How images are read."""


def make_splits(
    data: Sequence[Sample],
    val_data: Sequence[Sample] | None,
    test_data: Sequence[Sample] | None,
    rules: SplitRules,
    tasks: TaskRules | None = None,
    hash_cache: Path | None = None,
) -> tuple[Splits, DataReport, list[str]]:
    """Make the three parts. Near-copies, and samples that share an image or a group, stay in one part and have the same
    `Sample.unit`.

    Args:
        data: its samples' `label` is the class as the data names it.
        val_data: the validation part, if the user provides it; it stays as it is, as does `test_data`. Copies between
            such parts are counted.
        hash_cache: file with cached thumbnails. Not given: the user's cache.

    Returns:
        The parts, the report on near-copies, and every reason why the parts cannot be used.
    """
    sources = [list(data), list(val_data or []), list(test_data or [])]
    found = find_tasks([sample for part in sources for sample in part], tasks or TaskRules())
    samples, problems = found.samples, found.problems
    paths, uses = different_images(samples)
    pairs = copy_pairs(paths, rules.copies_distance, hash_cache, rules.copies_correlation, rules.images)
    links = Links.between(samples, uses, len(paths), pairs)
    mixed = contradictory_groups(samples, uses, pairs, links.of_sample)
    pool = range(len(sources[0]))
    left_out = [i for i in pool if rules.contradictions == "drop" and links.of_sample[i] in mixed]
    pinned = [i for i in pool if rules.contradictions == "train" and links.of_sample[i] in mixed]
    divided = sorted(set(pool) - set(left_out) - set(pinned))
    fractions = {
        "train": 1.0,
        "validation": 0.0 if val_data is not None else rules.val_fraction,
        "test": 0.0 if test_data is not None else rules.test_fraction,
    }
    fractions["train"] -= fractions["validation"] + fractions["test"]
    strata = strata_of(samples)
    chosen = split_indices(
        [strata[i] for i in divided], fractions, rules.seed, [int(links.of_sample[i]) for i in divided]
    )
    parts = {name: [divided[number] for number in numbers] for name, numbers in chosen.items()}
    parts["train"] = sorted(parts["train"] + pinned)
    if val_data is not None:
        parts["validation"] = list(range(len(sources[0]), len(sources[0]) + len(sources[1])))
    if test_data is not None:
        parts["test"] = list(range(len(samples) - len(sources[2]), len(samples)))
    units = links.of_sample.tolist()
    made = {name: tuple(replace(samples[i], unit=units[i]) for i in numbers) for name, numbers in parts.items()}
    splits = Splits(made["train"], made["validation"], made["test"], found.tasks)
    report = report_copies(samples, uses, pairs, links, mixed, parts, len(left_out))
    divides_freely = len(np.unique(links.of_sample)) == len(samples)
    uneven = [] if divides_freely else uneven_parts(parts, fractions, len(divided), report)
    if unusable := part_problems(splits):
        problems += [*unusable, *uneven]  # why they are so
    if uneven or report.largest_linked > LARGE_GROUP * report.num_images:
        groups = [its[:SHOWN_IMAGES] for its in largest_groups(links.of_image, SHOWN_GROUPS)]
        report = replace(report, shown=tuple(tuple(paths[i] for i in its.tolist()) for its in groups))
    report = replace(report, notes=(*found.notes, *lacking_answers(splits), *uneven))
    return splits, report, problems


def strata_of(samples: Sequence[Sample]) -> list[int]:
    """A number [S] for the class of each sample, or for its task where there are no classes: every part should hold its
    share of each."""
    keys = [(sample.task, int(sample.label)) for sample in samples]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return [numbers[key] for key in keys]


def part_problems(splits: Splits) -> list[str]:
    """Why the parts cannot be used: one is empty, or a single task's answers are not in all of them."""
    problems = []
    for name in PARTS:
        if not getattr(splits, name):
            problems.append(f"the {name} part must hold an image, but is empty: add images or raise its fraction")
        elif splits.candidates and splits.tasks[0].kind in ("closed", "binary"):
            counts = zip(splits.candidates, splits.class_counts(name), strict=True)
            if lacking := [answer for answer, count in counts if not count]:
                problems.append(
                    f"the {name} part must hold every answer, but has no {', '.join(map(SHOWN.repr, lacking))}: add "
                    f"images (an answer needs three at least, not near-copies), correct a misspelt answer, or change "
                    f"the fractions"
                )
    return problems


def lacking_answers(splits: Splits) -> list[str]:
    """A sentence for each task, of several, whose answers are not in all parts."""
    lines = []
    for task in splits.tasks if len(splits.tasks) > 1 else ():
        for name in PARTS:
            counts = zip(task.candidates, splits.class_counts(name, task), strict=True)
            if lacking := [answer for answer, count in counts if not count]:
                shown = ", ".join(map(SHOWN.repr, lacking[:5])) + (" ..." if len(lacking) > 5 else "")
                lines.append(f"The {name} part of task {task.name} has no {shown}")
    return lines


def uneven_parts(
    parts: dict[str, list[int]], fractions: dict[str, float], num_divided: int, report: DataReport
) -> list[str]:
    """A sentence for each part that misses its share by more than a fifth, because groups are not divided."""
    largest = f"the largest of what stays together has {report.largest_linked:,} of {report.num_images:,} images"
    lines = []
    for name, fraction in fractions.items():
        wanted = fraction * num_divided
        if wanted >= MIN_SHARE and abs(len(parts[name]) - wanted) > UNEVEN * wanted:
            lines.append(
                f"The {name} part has {len(parts[name]):,} of {num_divided:,} samples instead of {wanted:,.0f}: "
                f"near-copies, images of one question and groups stay together, and {largest}: see whether they belong "
                f"together, raise --copies-correlation, or change --split-seed"
            )
    return lines


@dataclass(frozen=True)
class Links:
    """What stays in one part: near-copies, the images of one sample, the samples of one image and of one group."""

    of_sample: np.ndarray
    """Number of each sample's linked group [S]."""
    of_image: np.ndarray
    """Number of each image's linked group [N]."""

    @classmethod
    def between(
        cls, samples: Sequence[Sample], uses: Sequence[Sequence[int]], num_images: int, pairs: np.ndarray
    ) -> Links:
        """The links of samples.

        Args:
            uses: each sample's images, as indices.
            pairs: near-copies among the images [M, 2].
        """
        names = {name: num_images + n for n, name in enumerate(dict.fromkeys(s.group for s in samples if s.group))}
        edges = [[its[0], other] for its in uses for other in its[1:]]
        edges += [[its[0], names[s.group]] for s, its in zip(samples, uses, strict=True) if s.group]
        joined = np.concatenate([pairs, np.array(edges, dtype=np.int64).reshape(-1, 2)])
        numbers = copy_groups(num_images + len(names), joined)
        return cls(numbers[[its[0] for its in uses]], numbers[:num_images])


def different_images(samples: Sequence[Sample]) -> tuple[list[str], list[tuple[int, ...]]]:
    """The different images of the samples, and each sample's images as indices into them."""
    numbers: dict[str, int] = {}
    uses = [tuple(numbers.setdefault(image, len(numbers)) for image in sample.images) for sample in samples]
    return list(numbers), uses


def contradictory_groups(
    samples: Sequence[Sample], uses: Sequence[tuple[int, ...]], pairs: np.ndarray, groups: np.ndarray
) -> set[int]:
    """Groups in which the same images, or near-copies, have different answers to the same question.

    Args:
        uses: each sample's images, as indices.
        pairs: near-copies among the images [M, 2]. They count for questions about one image.
        groups: each sample's group [S].
    """
    answers: dict[tuple[int, ...], dict[Any, set[str]]] = {}  # by images and words
    homes: dict[tuple[int, ...], int] = {}
    for its, sample, group in zip(uses, samples, groups.tolist(), strict=True):
        words = (plain_form(sample.question), sample.system, sample.turns)
        answers.setdefault(its, {}).setdefault(words, set()).add(sample.answer)
        homes[its] = group
    mixed = {its for its, asked in answers.items() if any(len(several) > 1 for several in asked.values())}
    for one, two in pairs.tolist():
        first, second = answers.get((one,), {}), answers.get((two,), {})
        if any(len(several | second.get(words, several)) > 1 for words, several in first.items()):
            mixed.add((one,))
    return {homes[its] for its in mixed}


def report_copies(
    samples: Sequence[Sample],
    uses: Sequence[tuple[int, ...]],
    pairs: np.ndarray,
    links: Links,
    mixed: set[int],
    parts: dict[str, list[int]],
    num_left_out: int,
) -> DataReport:
    """The report on the parts that `make_splits` has made; uses, pairs: as in `contradictory_groups`."""
    part = np.full(len(samples), -1)
    for number, name in enumerate(PARTS):
        part[parts[name]] = number
    # Each sample once for each of its images, and once for its group: whatever it shares with another part is a leak.
    names = {name: len(links.of_image) + number for number, name in enumerate({s.group: 0 for s in samples if s.group})}
    nodes = [(*its, *([names[s.group]] if s.group else [])) for s, its in zip(samples, uses, strict=True)]
    owner = np.repeat(np.arange(len(samples)), [len(its) for its in nodes])
    flat = np.array([node for its in nodes for node in its], dtype=np.int64)

    def leaks(of: int, into: list[int]) -> set[int]:
        return set(owner[leaking_samples(part[owner], flat, pairs, of, into)].tolist())

    dirty = leaks(2, [0, 1])
    image_part = np.full(len(links.of_image), -1)
    of_image = flat < len(links.of_image)
    np.maximum.at(image_part, flat[of_image], part[owner[of_image]])
    used = np.flatnonzero(image_part >= 0)
    rng = np.random.default_rng(0)
    share = (image_part == 2).sum() / max(1, len(used))
    random_leaks = []
    for _ in range(20):
        random_part = np.full(len(image_part), -1)
        random_part[used] = np.where(rng.permutation(len(used)) < share * len(used), 2, 0)
        leaking = leaking_samples(random_part, np.arange(len(image_part)), pairs, 2, [0])
        random_leaks.append(len(leaking) / max(1, int((random_part == 2).sum())))
    copies = copy_groups(len(image_part), pairs)
    return DataReport(
        num_images=len(image_part),
        num_pairs=len(pairs),
        num_grouped=len(np.unique(pairs)),
        contradictions=tuple(
            tuple(f"{samples[i].image}: {samples[i].answer}" for i in np.flatnonzero(links.of_sample == group).tolist())
            for group in sorted(mixed)
        ),
        num_left_out=num_left_out,
        leaked={"validation": len(leaks(1, [0])), "test": len(dirty)},
        leaked_if_random=float(np.mean(random_leaks)),
        test_clean=tuple(index for index, i in enumerate(parts["test"]) if i not in dirty),
        largest_group=int(np.bincount(copies).max()),
        num_groups=len(names),
        largest_linked=int(np.bincount(links.of_image).max()),
    )


def fold_splits(splits: Splits, num_folds: int, rules: SplitRules) -> list[Splits]:
    """Splits for cross-validation: training and validation samples are divided into folds, linked ones together, and
    each fold is the validation part once. The test part stays."""
    samples = [*splits.train, *splits.validation]
    units = [sample.unit for sample in samples]
    if min(units) < 0:  # of a study of an earlier version
        paths, uses = different_images(samples)
        pairs = copy_pairs(paths, rules.copies_distance, None, rules.copies_correlation, rules.images)
        units = Links.between(samples, uses, len(paths), pairs).of_sample.tolist()
    shares = {str(fold): 1 / num_folds for fold in range(num_folds)}
    folds = split_indices(strata_of(samples), shares, rules.seed, units)
    chosen = [set(indices) for indices in folds.values()]
    return [
        replace(
            splits,
            train=tuple(sample for index, sample in enumerate(samples) if index not in fold),
            validation=tuple(sample for index, sample in enumerate(samples) if index in fold),
        )
        for fold in chosen
    ]
