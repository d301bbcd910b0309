"""Manifests: their samples, and their faults.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question reach the model. The path does not: in BUSI it contains
the class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_fn.data.formats import keys_of, read_records, read_rows
from train_fn.data.images import AS_USUAL, MAX_PIXELS, image_problems
from train_fn.data.rows import DEFAULT_QUESTION, BadRecord, part
from train_fn.data.samples import Sample
from train_fn.data.tables import MAX_ENTRIES, Records
from train_fn.settings import SHOWN, ImageOptions
from train_fn.support.text import shorten

Parts = dict[str, list[Sample] | None]
"""Samples by `data`, `val_data` and `test_data`."""
FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which tokenizers reject


def read_manifest(
    path: Path, image_root: Path, columns: Sequence[str] = (), question: str = ""
) -> tuple[list[Sample], list[str]]:
    """Read the labelled images of a manifest, or of a file or folder in any other format of `formats`.

    Image files must exist, but are not decoded; `image_problems` does that.

    Args:
        image_root: the folder that image paths start from.
        columns: `--columns`: the columns of roles, each "role=column".
        question: what is asked where the data has no questions; "": the default.

    Returns:
        The samples without faults, with absolute image paths; and every problem, at most 20 of them in full. Where the
        data has no labels, the answer is the label.
    """
    records, problems, guides = read_records(path, columns)
    if not records:
        return [], shorten(problems)
    if len(records) > MAX_ENTRIES:
        return [], [
            f"manifest {path} must have at most {MAX_ENTRIES:,} entries, but has {len(records):,}: use a part of it"
        ]
    if not os.path.isdir(image_root):
        return [], [f"image root {image_root} must be a folder: give the folder that the manifest's paths start from"]
    root = image_root.resolve()
    entries, found = guide_entries(records, root) if guides else row_entries(path, records, root, columns, question)
    return entries, shorten(problems + found)


def guide_entries(records: Records, root: Path) -> tuple[list[Sample], list[str]]:
    """The samples of the guide's JSON without faults, and every problem."""
    keys = keys_of(records)
    required = FIELDS if "label" in keys or "answer" not in keys else {k: v for k, v in FIELDS.items() if k != "label"}
    samples, problems = [], []
    for source, entry in records:
        found = [f"{source}{text}" for text in entry_problems(entry, root, required)]
        split = ""
        if "split" in keys and isinstance(entry, dict):
            try:
                split = part(entry.get("split"))
            except BadRecord as error:
                found.append(f"{source}{error}")
        problems += found
        if not found:
            label = entry["label"] if "label" in required else entry["answer"]
            image = os.path.realpath(root / entry["image"])
            samples.append(Sample((image,), entry["text"], entry["answer"], label, split=split, source=source))
    return samples, problems


def row_entries(
    path: Path, records: Records, root: Path, columns: Sequence[str], question: str
) -> tuple[list[Sample], list[str]]:
    """The samples of any other format without faults, and every problem."""
    rows, problems = read_rows(path, records, columns, question)
    samples = []
    for row in rows:
        label = row.answer if row.label is None else row.label
        found = []
        for image in row.images:
            entry = {"image": str(image), "text": row.question, "answer": row.answer, "label": label}
            # Files that were found in a folder, or made of an entry's bytes, may lie anywhere.
            for text in entry_problems(entry, None if isinstance(image, Path) else root):
                found.append(f"{row.source}{text}")
        problems += dict.fromkeys(found)
        if not found:
            images = tuple(os.path.realpath(root / image) for image in row.images)
            samples.append(Sample(images, row.question, row.answer, label, split=row.split, source=row.source))
    return samples, problems


def entry_problems(entry: Any, root: Path | None, required: Mapping[str, Any] = FIELDS) -> Iterator[str]:
    """Every problem of one entry of a manifest, as the end of a sentence that begins with its name.

    Args:
        root: the folder that the image must lie in. None: the image is not checked.
        required: the fields that must be there.
    """
    rule = f" must be an object with {', '.join(FIELDS)}, but"
    if not isinstance(entry, dict):
        yield f"{rule} is {SHOWN.repr(entry)}"
        return
    if missing := required.keys() - entry.keys():
        yield f"{rule} lacks {', '.join(sorted(missing))}"
    present = {key: entry[key] for key in required if key in entry}
    wrong = {
        key: value
        for key, value in present.items()
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or not str(value).strip()
    }
    if wrong:
        values = ", ".join(f"{key}={SHOWN.repr(value)}" for key, value in wrong.items())
        yield f" must hold non-empty text (label: a number or text), but got {values}"
    for key in present.keys() & {"text", "answer", "label"} - wrong.keys():
        if unprintable := UNPRINTABLE.search(str(present[key])):
            yield (
                f" must hold Unicode text, but {key}={SHOWN.repr(present[key])} has the character "
                f"{unprintable[0]!a}: take it out"
            )
    if root and "image" in present and "image" not in wrong:
        file, shown = root / present["image"], SHOWN.repr(present["image"])
        if not os.path.isfile(file):  # False also for names that no file can have
            yield f": image {shown} must be an existing file under the image root {root}: check path and root"
        elif not Path(os.path.realpath(file)).is_relative_to(root):  # links are followed: none may lead out of the root
            yield f": image must lie under the image root, but got {shown}: move it there"


def divide(parts: Mapping[str, list[Sample] | None], question: str = "") -> tuple[Parts, list[str]]:
    """Divide `data` by its own splits, if it has any.

    Args:
        parts: the samples of `data`, `val_data` and `test_data`; None where there are none.
        question: `--question`, which some of the samples must use.

    Returns:
        The parts with those of the splits; and every contradiction between the samples and the options.
    """
    divided, problems = with_equal_labels(parts), []
    data = divided.get("data") or []
    for name, its in (("val_data", "validation"), ("test_data", "test")):
        option, given = f"--{name.replace('_', '-')}", parts.get(name)
        if other := [sample.split for sample in given or [] if sample.split not in ("", its)]:
            problems.append(
                f"`{option}` must hold the split {its} only, but {len(other):,} entries are of {other[0]}: take them "
                f"out, or give all as --data"
            )
        if found := [sample for sample in data if sample.split == its]:
            divided[name] = found
            if given is not None:
                problems.append(
                    f"`{option}` must be left out, since --data has {len(found):,} entries of the split {its}: leave "
                    f"it out, or take them out"
                )
    everything = [sample for samples in parts.values() for sample in samples or []]
    if question and everything and all(sample.question != question for sample in everything):
        problems.append("`--question` must go with data without questions, but each entry has its own: leave it out")
    if data:
        divided["data"] = [sample for sample in data if sample.split in ("", "train")]
        if not divided["data"]:
            problems.append("`--data` must have entries of the split train, but has none: correct the splits")
    return divided, problems


def with_equal_labels(parts: Mapping[str, list[Sample] | None]) -> Parts:
    """The parts; where one has no labels of its own, but others have, its answers get theirs."""
    own = {name for name, samples in parts.items() if samples and any(s.label != s.answer for s in samples)}
    labels = {sample.answer: sample.label for name in own for sample in parts[name] or []}
    return {
        name: samples
        if name in own or not samples
        else [replace(sample, label=labels.get(sample.answer, sample.label)) for sample in samples]
        for name, samples in parts.items()
    }


def asked_by_default(parts: Mapping[str, list[Sample] | None]) -> str:
    """A sentence when the default question is asked about each image; else ""."""
    texts = {sample.question for samples in parts.values() for sample in samples or []}
    return (
        f"Asking {DEFAULT_QUESTION!r} about each image (--question asks another)" if texts == {DEFAULT_QUESTION} else ""
    )


def unreadable_images(
    paths: Iterable[str],
    max_pixels: int = MAX_PIXELS,
    log: Callable[[str], None] = lambda text: None,
    options: ImageOptions = AS_USUAL,
) -> list[str]:
    """The `image_problems`, shortened. `log` is called with lines of progress."""
    return shorten(list(image_problems(paths, max_pixels, log, options=options).values()))
