"""Training, validation and test parts: made without leaks, reported, stored and read again.

Shapes: S samples, N different images, M pairs of near-copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.copies import MAX_DISTANCE, copy_groups, copy_pairs, leaking_samples
from train_fn.data.images import AS_USUAL
from train_fn.data.manifest import answer_set, plain_form
from train_fn.data.samples import Sample, Splits
from train_fn.settings import SHOWN, ImageOptions
from train_fn.support.files import DamagedFile, read_json, write_json

LARGE_GROUP = 0.1  # a group of near-copies with a larger share of the images makes the parts uneven


def split_indices(
    labels: Sequence[int], fractions: dict[str, float], seed: int, groups: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """Divide all indices among the parts, each label in proportion to `fractions`.

    Args:
        fractions: by part, with sum 1; the first part (train) also gets what rounding leaves. A part with a positive
            fraction should get at least one image of every label.
        groups: group number of each index; a group is never divided. Large groups come first, each into the part that
            lacks most of its labels; single images then balance the parts.
    """
    labels_array = np.asarray(labels)
    kinds = sorted(set(labels))
    wanted = [name for name, fraction in fractions.items() if fraction > 0]
    lacking = np.zeros((len(wanted), len(kinds)))  # images that a part still needs, by label
    for column, kind in enumerate(kinds):
        total = int((labels_array == kind).sum())
        for row, name in enumerate(wanted[1:], 1):
            spare = total - lacking[1:row, column].sum() - 1
            lacking[row, column] = max(0, min(max(1, round(fractions[name] * total)), spare))
        lacking[0, column] = total - lacking[1:, column].sum()
    members: dict[int, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(labels)).tolist():
        members.setdefault(index if groups is None else int(groups[index]), []).append(index)
    parts: dict[str, list[int]] = {name: [] for name in fractions}
    for indices in sorted(members.values(), key=len, reverse=True):
        counts = np.array([sum(labels[index] == kind for index in indices) for kind in kinds])
        # The part with the smallest sum of squares of what it would lack: an overfull part costs more than a short one.
        after = ((lacking - counts) ** 2 - lacking**2).sum(1)
        row = int(after.argmin())
        lacking[row] -= counts
        parts[wanted[row]] += indices
    return {name: sorted(indices) for name, indices in parts.items()}


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

    def sentences(self) -> list[str]:
        """The facts as sentences."""
        lines = [
            f"{self.num_grouped} of {self.num_images} images have a near-copy ({self.num_pairs} pairs); a random split "
            f"would leave {self.leaked_if_random:.0%} of the test images with a copy in train or validation"
        ]
        if self.largest_group > LARGE_GROUP * self.num_images:
            lines.append(
                f"{self.largest_group} of {self.num_images} images are one group of near-copies and stay in one part, "
                f"so the parts may have other sizes than requested: lower --copies-distance (-1: no copies)"
            )
        lines += [
            f"{count} {name} images have a near-copy in another part" for name, count in self.leaked.items() if count
        ]
        if self.contradictions:
            left_out = f"; {self.num_left_out} images left out" if self.num_left_out else ""
            lines.append(f"{len(self.contradictions)} groups of near-copies have contradictory answers{left_out}")
        return lines


def make_splits(
    entries: Sequence[dict[str, Any]],
    val_entries: Sequence[dict[str, Any]] | None,
    test_entries: Sequence[dict[str, Any]] | None,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    contradictions: str = "keep",
    copies_distance: int = MAX_DISTANCE,
    hash_cache: Path | None = None,
    options: ImageOptions = AS_USUAL,
) -> tuple[Splits, DataReport, list[str]]:
    """Make the three parts, without near-copies across them.

    Args:
        val_entries: the validation part, if the user provides it; it stays as it is, as does `test_entries`. Copies
            between such parts are counted.
        contradictions: the treatment of near-copies with different answers to one question: "keep", "drop", or "train"
            (only there).
        copies_distance: see `copies.copy_pairs`.
        hash_cache: file with cached thumbnails. Not given: the user's cache.
        options: how images are read.

    Returns:
        The parts, the report on near-copies, and every reason why the parts cannot be used.
    """
    sources = [list(entries), list(val_entries or []), list(test_entries or [])]
    everything = [entry for part in sources for entry in part]
    candidates, problems = answer_set(everything)
    index = {answer: number for number, answer in enumerate(candidates)}
    samples = [Sample(e["image"], e["text"], e["answer"], index.get(e["answer"], -1)) for e in everything]
    paths, images = different_images(samples)
    pairs = copy_pairs(paths, copies_distance, hash_cache, options)
    image_groups = copy_groups(len(paths), pairs)
    groups = image_groups[images]
    mixed = contradictory_groups(samples, images, pairs, image_groups)
    pool = range(len(sources[0]))
    left_out = [i for i in pool if contradictions == "drop" and groups[i] in mixed]
    pinned = [i for i in pool if contradictions == "train" and groups[i] in mixed]
    divided = sorted(set(pool) - set(left_out) - set(pinned))
    fractions = {
        "train": 1.0,
        "validation": 0.0 if val_entries is not None else val_fraction,
        "test": 0.0 if test_entries is not None else test_fraction,
    }
    fractions["train"] -= fractions["validation"] + fractions["test"]
    chosen = split_indices([samples[i].label for i in divided], fractions, seed, [int(groups[i]) for i in divided])
    parts = {name: [divided[number] for number in numbers] for name, numbers in chosen.items()}
    parts["train"] = sorted(parts["train"] + pinned)
    if val_entries is not None:
        parts["validation"] = list(range(len(sources[0]), len(sources[0]) + len(sources[1])))
    if test_entries is not None:
        parts["test"] = list(range(len(samples) - len(sources[2]), len(samples)))
    made = {name: tuple(samples[i] for i in numbers) for name, numbers in parts.items()}
    splits = Splits(made["train"], made["validation"], made["test"], candidates)
    for name in ("train", "validation", "test"):
        lacking = [answer for answer, count in zip(candidates, splits.class_counts(name), strict=True) if not count]
        if lacking:
            problems.append(
                f"the {name} part must hold every answer, but has no {', '.join(map(SHOWN.repr, lacking))}: add images "
                f"(an answer needs three at least, not near-copies), correct a misspelt answer, or change the fractions"
            )
        elif not parts[name]:
            problems.append(f"the {name} part must hold an image, but is empty: add images or raise its fraction")
    report = report_copies(samples, images, pairs, image_groups, mixed, parts, len(left_out))
    return splits, report, problems


def different_images(samples: Sequence[Sample]) -> tuple[list[str], np.ndarray]:
    """The different images of the samples, and each sample's image [S] as an index into them."""
    numbers: dict[str, int] = {}
    images = [numbers.setdefault(sample.image, len(numbers)) for sample in samples]
    return list(numbers), np.array(images, dtype=np.int64)


def contradictory_groups(
    samples: Sequence[Sample], images: np.ndarray, pairs: np.ndarray, groups: np.ndarray
) -> set[int]:
    """Groups in which one image, or two near-copies, have different answers to the same question.

    Args:
        images: each sample's image [S], as an index.
        pairs: near-copies among the images [M, 2].
        groups: each image's group [N].
    """
    answers: dict[int, dict[str, set[str]]] = {}  # by image and question
    for image, sample in zip(images.tolist(), samples, strict=True):
        answers.setdefault(image, {}).setdefault(plain_form(sample.text), set()).add(sample.answer)
    mixed = {image for image, asked in answers.items() if any(len(several) > 1 for several in asked.values())}
    for one, two in pairs.tolist():
        if any(len(several | answers[two].get(question, several)) > 1 for question, several in answers[one].items()):
            mixed.add(one)
    return {int(groups[image]) for image in mixed}


def report_copies(
    samples: Sequence[Sample],
    images: np.ndarray,
    pairs: np.ndarray,
    groups: np.ndarray,
    mixed: set[int],
    parts: dict[str, list[int]],
    num_left_out: int,
) -> DataReport:
    """The report on the parts that `make_splits` has made; images, pairs, groups: as in `contradictory_groups`."""
    part = np.full(len(samples), -1)
    for number, name in enumerate(("train", "validation", "test")):
        part[parts[name]] = number
    dirty = set(leaking_samples(part, images, pairs, 2, [0, 1]).tolist())
    leaked = {"validation": len(leaking_samples(part, images, pairs, 1, [0])), "test": len(dirty)}
    image_part = np.full(len(groups), -1)
    np.maximum.at(image_part, images, part)
    used = np.flatnonzero(image_part >= 0)
    rng = np.random.default_rng(0)
    share = (image_part == 2).sum() / max(1, len(used))
    random_leaks = []
    for _ in range(20):
        random_part = np.full(len(image_part), -1)
        random_part[used] = np.where(rng.permutation(len(used)) < share * len(used), 2, 0)
        leaks = leaking_samples(random_part, np.arange(len(image_part)), pairs, 2, [0])
        random_leaks.append(len(leaks) / max(1, int((random_part == 2).sum())))
    return DataReport(
        num_images=len(groups),
        num_pairs=len(pairs),
        num_grouped=len(np.unique(pairs)),
        contradictions=tuple(
            tuple(f"{samples[i].image}: {samples[i].answer}" for i in np.flatnonzero(groups[images] == group).tolist())
            for group in sorted(mixed)
        ),
        num_left_out=num_left_out,
        leaked=leaked,
        leaked_if_random=float(np.mean(random_leaks)),
        test_clean=tuple(index for index, i in enumerate(parts["test"]) if i not in dirty),
        largest_group=int(np.bincount(groups).max()),
    )


def fold_splits(
    splits: Splits,
    num_folds: int,
    seed: int,
    copies_distance: int = MAX_DISTANCE,
    options: ImageOptions = AS_USUAL,
) -> list[Splits]:
    """Splits for cross-validation: training and validation images are divided into folds, near-copies together, and
    each fold is the validation part once. The test part stays."""
    samples = [*splits.train, *splits.validation]
    paths, images = different_images(samples)
    groups = copy_groups(len(paths), copy_pairs(paths, copies_distance, options=options))[images]
    shares = {str(fold): 1 / num_folds for fold in range(num_folds)}
    folds = split_indices([sample.label for sample in samples], shares, seed, [int(group) for group in groups])
    chosen = [set(indices) for indices in folds.values()]
    return [
        Splits(
            train=tuple(sample for index, sample in enumerate(samples) if index not in fold),
            validation=tuple(sample for index, sample in enumerate(samples) if index in fold),
            test=splits.test,
            candidates=splits.candidates,
        )
        for fold in chosen
    ]


def save_splits(splits: Splits, path: Path) -> None:
    """Write the splits to a JSON file."""
    write_json(path, asdict(splits))


def load_splits(path: Path) -> Splits:
    """Read a file of `save_splits`. Raises OSError, or DamagedFile if it holds anything else."""
    parts = read_json(path, dict)
    try:
        read = {name: tuple(Sample(**sample) for sample in parts[name]) for name in ("train", "validation", "test")}
        splits = Splits(**read, candidates=tuple(parts["candidates"]))
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{path} must hold the parts of a study's data, but {error}: put it back") from error
    samples = (*splits.train, *splits.validation, *splits.test)
    sound = all(
        all(isinstance(text, str) for text in (sample.image, sample.text, sample.answer))
        and isinstance(sample.label, int)
        and (-1 <= sample.label < len(splits.candidates) or not splits.candidates)
        for sample in samples
    )
    if not (sound and splits.train and splits.validation and all(isinstance(c, str) for c in splits.candidates)):
        raise DamagedFile(f"{path} must hold sound samples in every part, but does not: put it back from a copy")
    return splits
