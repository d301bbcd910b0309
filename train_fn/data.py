"""Manifests, splits and batches.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question ever reach the model; the path never does (in BUSI
the class can be read off it).

Shapes: B images in a batch, S tokens of the longest sequence, P vision patches.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.copies import MAX_DISTANCE, copy_groups, copy_pairs, leaking_samples
from train_fn.files import DamagedFile, read_json, write_json
from train_fn.images import MAX_PIXELS, image_problems
from train_fn.settings import SHOWN

Say = Callable[[str], None]
FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
MAX_CANDIDATES = 20  # more distinct answers than this are not a closed set: such data is tuned on the loss
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which no tokenizer takes
LARGE_GROUP = 0.1  # share of the images from which a group of near-copies makes the parts uneven
MAX_ENTRIES = 1_000_000  # near-copies are looked for in all pairs of images


@dataclass(frozen=True)
class Sample:
    """One question about one image. `label` is the index of `answer` among the candidates, -1 without a closed set."""

    image: str
    text: str
    answer: str
    label: int


@dataclass(frozen=True)
class Splits:
    """The three parts of a study's data, fixed before its first trial, and the closed set of answers (or none)."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    candidates: tuple[str, ...]

    def class_counts(self, part: str) -> list[int]:
        """Images per candidate answer in a part, in the candidates' order."""
        counts = Counter(sample.label for sample in getattr(self, part))
        return [counts[index] for index in range(len(self.candidates))]


# ------------------------------------------------------------------------------------------------ reading


def read_manifest(path: Path, image_root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The faultless entries of a manifest with absolute image paths, and every problem (at most 20 are spelled out).

    Images are looked up but not decoded: see `image_problems`.
    """
    if not os.path.isfile(path):  # a pipe or a device would be read for ever
        return [], [f"manifest {path} must be an existing file: check the path"]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin a file with a mark
    except OSError as error:
        return [], [f"manifest {path} must be a readable file: {error.strerror}; check the path"]
    except UnicodeDecodeError as error:
        return [], [f"manifest {path} must be UTF-8 text, but byte {error.start} is not: save it as UTF-8"]
    except (ValueError, RecursionError) as error:
        return [], [f"manifest {path} must be JSON: {error}; mend it at that place"]
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else f"a {type(content).__name__}"
        return [], [f"manifest {path} must be a JSON list of at least one entry, but holds {kind}"]
    if len(content) > MAX_ENTRIES:
        return [], [
            f"manifest {path} must have at most {MAX_ENTRIES:,} entries, but has {len(content):,}: use a part of it"
        ]
    if not os.path.isdir(image_root):
        return [], [f"image root {image_root} must be a folder: give the folder that the manifest's paths start from"]
    root = image_root.resolve()
    entries, problems = [], []
    for number, entry in enumerate(content):
        found = [f"{path.name} entry {number}{text}" for text in entry_problems(entry, root)]
        problems += found
        if not found:
            entries.append({**entry, "image": os.path.realpath(root / entry["image"])})
    return entries, shorten(problems)


def entry_problems(entry: Any, root: Path) -> Iterator[str]:
    """Every problem of one entry of a manifest, to be put behind its name."""
    rule = f" must be an object with {', '.join(FIELDS)}, but"
    if not isinstance(entry, dict):
        yield f"{rule} is {SHOWN.repr(entry)}"
        return
    if missing := FIELDS.keys() - entry.keys():
        yield f"{rule} lacks {', '.join(sorted(missing))}"
    given = {key: entry[key] for key in FIELDS if key in entry}
    wrong = {
        key: value
        for key, value in given.items()
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or not str(value).strip()
    }
    if wrong:
        values = ", ".join(f"{key}={SHOWN.repr(value)}" for key, value in wrong.items())
        yield f" must hold non-empty text (label: a number or text), but got {values}"
    for key in given.keys() & {"text", "answer", "label"} - wrong.keys():
        if unprintable := UNPRINTABLE.search(str(given[key])):
            yield (
                f" must hold Unicode text, but {key}={SHOWN.repr(given[key])} has the character "
                f"{unprintable[0]!a}: take it out"
            )
    if "image" in given and "image" not in wrong:
        file, shown = root / given["image"], SHOWN.repr(given["image"])
        if not os.path.isfile(file):  # also says no to names that no file can have
            yield f": image {shown} must be an existing file under the image root {root}: check path and root"
        elif not Path(os.path.realpath(file)).is_relative_to(root):  # links are followed: none may lead out of the root
            yield f": image must lie under the image root, but got {shown}: move it there"


def shorten(problems: list[str], most: int = 20) -> list[str]:
    """The first problems and a count of the rest: a thousand lines of the same fault help nobody."""
    return problems if len(problems) <= most else [*problems[:most], f"... and {len(problems) - most} more like these"]


def unreadable_images(paths: Iterable[str], max_pixels: int = MAX_PIXELS, say: Say = lambda text: None) -> list[str]:
    """What `image_problems` finds, for people. `say` is given lines of progress."""
    return shorten(list(image_problems(paths, max_pixels, say).values()))


def plain_form(text: str) -> str:
    """A text without what two people write differently: case, spaces, Unicode form, invisible characters."""
    composed = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def answer_set(entries: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """The candidate answers in the order of their labels, and every contradiction between answers and labels.

    Answers form a closed set when there are at most 20 and each is given at least three times on average; otherwise
    there are no candidates, and the data is tuned on the loss. Answers of a closed set that differ in case, spaces or
    Unicode form only would be classes of their own, and are refused.
    """
    answers = Counter(entry["answer"] for entry in entries)
    variants: dict[str, list[str]] = {}
    for answer in answers:
        variants.setdefault(plain_form(answer), []).append(answer)
    if len(variants) > MAX_CANDIDATES or len(variants) * 3 > len(entries) or len(answers) < 2:
        return (), []
    if mixed := [same for same in variants.values() if len(same) > 1]:
        return (), shorten([
            "answers that differ in case, spaces or Unicode form only must be written alike, but got "
            + ", ".join(f"{SHOWN.repr(answer)} ({answers[answer]}x)" for answer in same)
            + ": make them equal"
            for same in mixed
        ])  # fmt: skip
    pairs = Counter((entry["label"], entry["answer"]) for entry in entries)
    problems = []
    for side, other in ((0, 1), (1, 0)):
        partners: dict[Any, list[tuple[Any, int]]] = {}
        for pair, count in pairs.items():
            partners.setdefault(pair[side], []).append((pair[other], count))
        name, its = (("label", "answers"), ("answer", "labels"))[side]
        problems += [
            f"each {name} must go with one of the {its}, but {name} {SHOWN.repr(value)} goes with "
            + " and ".join(
                f"{SHOWN.repr(partner)} ({count}x)" for partner, count in sorted(found, key=lambda pair: -pair[1])
            )
            + ": mend the rarer one"
            for value, found in partners.items()
            if len(found) > 1
        ]
    order = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    return tuple(dict.fromkeys(answer for _, answer in order)), shorten(problems)


# ------------------------------------------------------------------------------------------------ splitting


def split_indices(
    labels: Sequence[int], fractions: dict[str, float], seed: int, groups: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """Disjoint index lists by part, together all indices, each label shared out in proportion to `fractions`.

    fractions: by part, sum to 1; the first part (train) takes what rounding leaves over. A part with a positive
        fraction is meant to get at least one image of every label.
    groups: group number of each index; a group is never divided. Large groups are dealt first, each to the part that
        lacks most of its labels, so that the single images can even out what groups have made uneven.
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
        # Overfilling a part costs more than leaving another short: squares of what would be lacking afterwards.
        after = ((lacking - counts) ** 2 - lacking**2).sum(1)
        row = int(after.argmin())
        lacking[row] -= counts
        parts[wanted[row]] += indices
    return {name: sorted(indices) for name, indices in parts.items()}


@dataclass(frozen=True)
class DataReport:
    """What is to be known of the images' near-copies before a score is believed."""

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
    """Images of a part that have a near-copy in another part on which it must not depend."""
    leaked_if_random: float
    """Share of the test images that would have a near-copy in train or validation in a random split: mean of 20."""
    test_clean: tuple[int, ...]
    """Indices of the test images without a near-copy in train or validation."""
    largest_group: int = 0
    """Images in the largest group of near-copies, which stays in one part."""

    def sentences(self) -> list[str]:
        """For people."""
        told = [
            f"{self.num_grouped} of {self.num_images} images have a near-copy ({self.num_pairs} pairs); a random split "
            f"would leave {self.leaked_if_random:.0%} of the test images with a copy in train or validation"
        ]
        if self.largest_group > LARGE_GROUP * self.num_images:
            told.append(
                f"{self.largest_group} of {self.num_images} images are one group of near-copies and stay in one part, "
                f"so the parts may have other sizes than were asked for: lower --copies-distance (-1: no copies)"
            )
        told += [
            f"{count} {name} images have a near-copy in another part" for name, count in self.leaked.items() if count
        ]
        if self.contradictions:
            left_out = f"; {self.num_left_out} images left out" if self.num_left_out else ""
            told.append(f"{len(self.contradictions)} groups of near-copies have contradictory answers{left_out}")
        return told


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
) -> tuple[Splits, DataReport, list[str]]:
    """Train, validation and test without near-copies across them, what was found, and every reason why they cannot be
    made. Parts that the user gives stay whole; copies between them are counted.

    contradictions: what becomes of near-copies with different answers to one question: keep, drop, or train (only
        there).
    copies_distance: see `copies.copy_pairs`.
    hash_cache: file of known thumbnails. Not given: the user's cache.
    """
    given = [list(entries), list(val_entries or []), list(test_entries or [])]
    everything = [entry for part in given for entry in part]
    candidates, problems = answer_set(everything)
    index = {answer: number for number, answer in enumerate(candidates)}
    samples = [Sample(e["image"], e["text"], e["answer"], index.get(e["answer"], -1)) for e in everything]
    paths, images = different_images(samples)
    pairs = copy_pairs(paths, copies_distance, hash_cache)
    image_groups = copy_groups(len(paths), pairs)
    groups = image_groups[images]
    mixed = contradictory_groups(samples, images, pairs, image_groups)
    pool = range(len(given[0]))
    left_out = [i for i in pool if contradictions == "drop" and groups[i] in mixed]
    pinned = [i for i in pool if contradictions == "train" and groups[i] in mixed]
    dealt = sorted(set(pool) - set(left_out) - set(pinned))
    fractions = {
        "train": 1.0,
        "validation": 0.0 if val_entries is not None else val_fraction,
        "test": 0.0 if test_entries is not None else test_fraction,
    }
    fractions["train"] -= fractions["validation"] + fractions["test"]
    chosen = split_indices([samples[i].label for i in dealt], fractions, seed, [int(groups[i]) for i in dealt])
    parts = {name: [dealt[number] for number in numbers] for name, numbers in chosen.items()}
    parts["train"] = sorted(parts["train"] + pinned)
    if val_entries is not None:
        parts["validation"] = list(range(len(given[0]), len(given[0]) + len(given[1])))
    if test_entries is not None:
        parts["test"] = list(range(len(samples) - len(given[2]), len(samples)))
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
    """The different images of samples, and each sample's image [S] as an index of them."""
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
    found = {image for image, asked in answers.items() if any(len(given) > 1 for given in asked.values())}
    for one, two in pairs.tolist():
        if any(len(given | answers[two].get(question, given)) > 1 for question, given in answers[one].items()):
            found.add(one)
    return {int(groups[image]) for image in found}


def report_copies(
    samples: Sequence[Sample],
    images: np.ndarray,
    pairs: np.ndarray,
    groups: np.ndarray,
    mixed: set[int],
    parts: dict[str, list[int]],
    num_left_out: int,
) -> DataReport:
    """The report on what `make_splits` has found and made. images, pairs, groups: as in `contradictory_groups`."""
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
        test_clean=tuple(place for place, i in enumerate(parts["test"]) if i not in dirty),
        largest_group=int(np.bincount(groups).max()),
    )


def fold_splits(splits: Splits, num_folds: int, seed: int, copies_distance: int = MAX_DISTANCE) -> list[Splits]:
    """Training and validation images dealt out again into folds, near-copies together: each fold is the validation part
    once, the others train. The test part stays."""
    samples = [*splits.train, *splits.validation]
    paths, images = different_images(samples)
    groups = copy_groups(len(paths), copy_pairs(paths, copies_distance))[images]
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
    """Write the splits to JSON, for people and for `load_splits`."""
    write_json(path, asdict(splits))


def load_splits(path: Path) -> Splits:
    """Read what `save_splits` wrote. Raises OSError; DamagedFile when it holds something else."""
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


def class_weights(counts: Sequence[int]) -> list[float]:
    """Loss weight per class: inverse frequency, scaled so that the mean over the images is 1."""
    return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]


# ------------------------------------------------------------------------------------------------ order


def epoch_order(num_images: int, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of one epoch as [steps, global_batch_size] indices, shuffled by seed and epoch.

    The last batch is filled up from the epoch's beginning, so that every step has the same number of images.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    steps = -(-num_images // global_batch_size)
    return np.resize(order, (steps, global_batch_size))


def micro_batches(step: np.ndarray, micro_batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This worker's micro-batches of one step's [global_batch_size] indices."""
    mine = step.reshape(-1, world_size, micro_batch_size)[:, rank]
    yield from mine
