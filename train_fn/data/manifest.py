"""Manifests: their samples, and their faults.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question reach the model. The path does not: in BUSI it contains
the class.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train_fn.data.formats import keys_of, read_records, read_rows
from train_fn.data.images import AS_USUAL, MAX_PIXELS, image_problems
from train_fn.data.rows import (
    DEFAULT_QUESTION,
    RANKED,
    BadRecord,
    Row,
    answer_text,
    earlier_turns,
    missing,
    place_images,
    resolve,
    texts_beside,
)
from train_fn.data.samples import Sample
from train_fn.data.tables import MAX_ENTRIES, Records
from train_fn.settings import SHOWN, ImageOptions
from train_fn.support.text import shorten

Parts = dict[str, list[Sample] | None]
"""Samples by `data`, `val_data` and `test_data`."""
FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which tokenizers reject
FEWEST_GROUPS = 3  # one for each part


@dataclass(frozen=True)
class Reading:
    """What was read of a manifest."""

    samples: list[Sample]
    """Those without faults, with absolute image paths. Where the data has no labels, the answer is the label."""
    problems: list[str]
    """At most 20 of them in full."""
    notes: list[str] = field(default_factory=list)
    """Facts that the user should know, such as the columns that were taken by their usual names."""


def read_manifest(
    path: Path,
    image_root: Path | None = None,
    columns: Sequence[str] = (),
    question: str = "",
    *,
    multilabel: str = "",
    answers_optional: bool = False,
) -> Reading:
    """Read the labelled images of a manifest, or of a file or folder in any other format of `formats`.

    Image files must exist, but are not decoded; `image_problems` does that.

    Args:
        image_root: the folder that image paths start from. None: the folder of the manifest, or the folder that `path`
            is.
        columns: `--columns`: the columns of roles, each "role=column".
        question: what is asked where the data has no questions; "": the default.
        multilabel: what joins the labels of answers that are lists; "": such answers are refused.
        answers_optional: whether a sample without an answer gets the answer "" instead of a problem.
    """
    content = read_records(path, columns, answers_optional)
    records = content.records
    if not records:
        return Reading([], shorten(content.problems), content.notes)
    if len(records) > MAX_ENTRIES:
        return Reading([], [
            f"manifest {path} must have at most {MAX_ENTRIES:,} entries, but has {len(records):,}: use a part of it"
        ])  # fmt: skip
    if image_root is None:
        image_root = path if path.is_dir() else path.parent
    if not os.path.isdir(image_root):
        return Reading([], [
            f"image root {image_root} must be a folder: give the folder that the manifest's paths start from"
        ])  # fmt: skip
    root = ImageRoot(image_root)
    if content.is_guides:
        names, _ = resolve(keys_of(records), (), ("split", *RANKED))
        rows, problems = guide_rows(records, names, root, multilabel, answers_optional)
        notes: list[str] = []
    else:
        rows, problems, notes, names = read_rows(path, records, columns, question, multilabel, answers_optional)
    samples, found = to_samples(rows, root)
    if samples and "group" in names:
        notes.append(group_note(samples, names["group"], any(text.startswith("group=") for text in columns)))
    return Reading(samples, shorten(content.problems + problems + found), content.notes + notes)


def guide_rows(
    records: Records, names: Mapping[str, str], root: ImageRoot, multilabel: str, answers_optional: bool
) -> tuple[list[Row], list[str]]:
    """The rows of the guide's JSON without faults, and every problem.

    Args:
        names: the columns of what stands beside question and answer.
    """
    keys = keys_of(records)
    required = [key for key in FIELDS if key != "label" or "label" in keys or "answer" not in keys]
    rows, problems = [], []
    for source, entry in records:
        needed = required
        if isinstance(entry, dict):
            if answers_optional:
                needed = ["image", "text", *(k for k in ("answer", "label") if not missing(entry.get(k)))]
            try:
                if isinstance(entry.get("answer"), list):
                    entry = entry | {"answer": answer_text(entry["answer"], multilabel)}
            except BadRecord as error:
                problems.append(f"{source}{error}")
                continue
        found = [f"{source}{text}" for text in entry_problems(entry, needed, root)]
        if isinstance(entry, dict):
            try:
                beside = texts_beside(entry, names)
                if not found:
                    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
                    answer = entry["answer"] if "answer" in needed else ""
                    label = entry["label"] if "label" in needed else None
                    row = Row(tuple(images), entry["text"], answer, label, source, earlier_turns(entry), **beside)
                    rows.append(place_images(row))
            except BadRecord as error:
                found.append(f"{source}{error}")
        problems += found
    return rows, problems


def entry_problems(entry: Any, required: Sequence[str], root: ImageRoot) -> list[str]:
    """Every problem of one entry of the guide's JSON, as the end of a sentence that begins with its name.

    Empty if its fields are sound; their text and images are checked then as those of other formats.

    Args:
        required: the fields that must be there.
    """
    rule = f" must be an object with {', '.join(FIELDS)}, but"
    if not isinstance(entry, dict):
        return [f"{rule} is {SHOWN.repr(entry)}"]
    problems = []
    if lacking := [key for key in required if key not in entry]:
        problems.append(f"{rule} lacks {', '.join(sorted(lacking))}")
    wrong = {key: entry[key] for key in required if key in entry and not is_sound(key, entry[key])}
    if wrong:
        values = ", ".join(f"{key}={SHOWN.repr(value)}" for key, value in wrong.items())
        sets = ': add --multilabel ";" if the answer is a list of labels' if type(wrong.get("answer")) is list else ""
        problems.append(f" must hold non-empty text (label: a number or text), but got {values}{sets}")
    if not problems:
        return []
    sound = {key: entry[key] for key in required if key in entry and key not in wrong}
    images = sound.pop("image", [])
    problems += text_problems(sound)
    found = [root.find(image)[1] for image in ([images] if isinstance(images, str) else images)]
    return problems + list(filter(None, found))


def is_sound(key: str, value: Any) -> bool:
    """Whether a field of the guide's JSON holds what it must; an image may be a list of images."""
    if key == "image" and isinstance(value, list):
        return bool(value) and all(isinstance(image, str) and image.strip() for image in value)
    return isinstance(value, FIELDS[key]) and not isinstance(value, bool) and bool(str(value).strip())


class ImageRoot:
    """The folder that image paths start from."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.beginning = os.path.join(self.root, "")
        self.folders: dict[str, str] = {}
        """The real path of each folder seen before."""

    def find(self, image: str | Path) -> tuple[str, str]:
        """The real path of an image file, links followed; and its problem, or ""."""
        if isinstance(image, Path):  # it was found in a folder or made of an entry's bytes, and may lie anywhere
            return os.path.realpath(image), ""
        file, shown = self.real_path(image), SHOWN.repr(image)
        if not file:
            return "", (
                f": image {shown} must be an existing file under the image root {self.root}: check path and root"
            )
        if not file.startswith(self.beginning):
            return "", f": image must lie under the image root, but got {shown}: move it there"
        return file, ""

    def real_path(self, image: str) -> str:
        """The real path of a file; "" if there is none."""
        path = self.beginning + image if image[:1] != "/" else image
        folder, name = os.path.split(path)
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                if folder not in self.folders:
                    self.folders[folder] = os.path.realpath(folder)
                return os.path.join(self.folders[folder], name)
        except (OSError, ValueError):  # also names that no file can have
            return ""
        return os.path.realpath(path) if os.path.isfile(path) else ""  # a link


def to_samples(rows: Sequence[Row], root: ImageRoot) -> tuple[list[Sample], list[str]]:
    """The samples of rows whose text is Unicode and whose images are under the root, and every problem."""
    samples, problems = [], []
    for row in rows:
        texts = {"text": row.question, "answer": row.answer, "label": row.label, "system": row.system, "id": row.id,
                 "question_type": row.question_type, "group": row.group}  # fmt: skip
        texts |= {f"turns {number}": "\n".join(turn) for number, turn in enumerate(row.turns)}
        found = list(text_problems(texts))
        images = []
        for image in row.images:
            file, problem = root.find(image)
            images.append(file)
            if problem:
                found.append(problem)
        problems += [f"{row.source}{text}" for text in dict.fromkeys(found)]
        if not found:
            answer = row.answer if isinstance(row.answer, str) else ""
            label = row.label if row.label is not None else (answer or -1)
            samples.append(Sample(
                tuple(images), row.question, answer, label, row.system, row.turns, row.id, row.question_type,
                group=row.group, split=row.split, source=row.source,
            ))  # fmt: skip
    return samples, problems


def text_problems(texts: Mapping[str, Any]) -> Iterator[str]:
    """Each text that tokenizers reject."""
    for key, value in texts.items():
        if not isinstance(value, str) or (value.isascii() and "\0" not in value):
            continue
        if unprintable := UNPRINTABLE.search(value):
            yield (
                f" must hold Unicode text, but {key}={SHOWN.repr(value)} has the character {unprintable[0]!a}: take "
                f"it out"
            )


def group_note(samples: Sequence[Sample], column: str, given: bool) -> str:
    """A sentence about the groups of samples.

    Args:
        given: whether the user has named the column.
    """
    num_groups = len({sample.group for sample in samples} - {""})
    if num_groups < FEWEST_GROUPS and not given:
        return (
            f"Column {column} has {num_groups} different values only and groups nothing if other data has no more: add "
            f"--group-field {shlex.quote(column)} if entries with the same value must stay in one part"
        )
    without = sum(not sample.group for sample in samples)
    return (
        f"Grouped by {column}: entries with the same value ({num_groups:,} different"
        f"{f'; {without:,} entries have none' if without else ''}) stay in one part"
        f"{'' if given else ' (--group-field names another column)'}"
    )


def divide(
    parts: Mapping[str, list[Sample] | None], question: str = "", groups_given: bool = False
) -> tuple[Parts, list[str]]:
    """Divide `data` by its own splits, if it has any.

    Args:
        parts: the samples of `data`, `val_data` and `test_data`; None where there are none.
        question: `--question`, which some of the samples must use.
        groups_given: whether the user has named the column of the groups. If not, too few of them are none.

    Returns:
        The parts with those of the splits; and every contradiction between the samples and the options.
    """
    divided, problems = with_equal_labels(parts), []
    groups = {sample.group for samples in parts.values() for sample in samples or []} - {""}
    if groups and len(groups) < FEWEST_GROUPS and not groups_given:
        divided = {name: its and [replace(sample, group="") for sample in its] for name, its in divided.items()}
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
