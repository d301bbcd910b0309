"""Manifests: their entries, their faults, and the set of answers.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question reach the model. The path does not: in BUSI it contains
the class.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train_fn.data.formats import keys_of, read_records, read_rows
from train_fn.data.images import AS_USUAL, MAX_PIXELS, image_problems
from train_fn.data.rows import DEFAULT_QUESTION, BadRecord, part
from train_fn.data.tables import MAX_ENTRIES, Records
from train_fn.settings import SHOWN, ImageOptions

FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
MAX_CANDIDATES = 20  # more different answers are no closed set: such data is tuned on the loss
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which tokenizers reject


def read_manifest(
    path: Path, image_root: Path, columns: Sequence[str] = (), question: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the labelled images of a manifest, or of a file or folder in any other format of `formats`.

    Image files must exist, but are not decoded; `image_problems` does that.

    Args:
        image_root: the folder that image paths start from.
        columns: `--columns`: the columns of roles, each "role=column".
        question: what is asked where the data has no questions; "": the default.

    Returns:
        The entries without faults, with absolute image paths, and the part as `split` if the data has parts; and every
        problem, at most 20 of them in full. Where the data has no labels, the answer is the label.
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


def guide_entries(records: Records, root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries without faults of the guide's JSON, and every problem."""
    keys = keys_of(records)
    required = FIELDS if "label" in keys or "answer" not in keys else {k: v for k, v in FIELDS.items() if k != "label"}
    entries, problems = [], []
    for source, entry in records:
        found = [f"{source}{text}" for text in entry_problems(entry, root, required)]
        if "split" in keys and isinstance(entry, dict):
            try:
                entry = {**entry, "split": part(entry.get("split"))}
            except BadRecord as error:
                found.append(f"{source}{error}")
        problems += found
        if not found:
            derived = {} if "label" in required else {"label": entry["answer"]}
            entries.append({**entry, **derived, "image": os.path.realpath(root / entry["image"])})
    return entries, problems


def row_entries(
    path: Path, records: Records, root: Path, columns: Sequence[str], question: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries without faults of any other format, and every problem."""
    rows, problems = read_rows(path, records, columns, question)
    entries = []
    for row in rows:
        (image,) = row.images
        label = row.answer if row.label is None else row.label
        entry = {"image": str(image), "text": row.question, "answer": row.answer, "label": label}
        # Files that were found in a folder, or made of an entry's bytes, may lie anywhere.
        found = [f"{row.source}{text}" for text in entry_problems(entry, None if isinstance(image, Path) else root)]
        problems += found
        if not found:
            entries.append(
                {**entry, "image": os.path.realpath(root / image)} | ({"split": row.split} if row.split else {})
            )
    return entries, problems


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


def divide(
    parts: Mapping[str, list[dict[str, Any]] | None], question: str = ""
) -> tuple[dict[str, list[dict[str, Any]] | None], list[str]]:
    """Divide `data` by its own splits, if it has any.

    Args:
        parts: the entries of `data`, `val_data` and `test_data`; None where there are none.
        question: `--question`, which some of the entries must use.

    Returns:
        The parts with those of the splits; and every contradiction between the entries and the options.
    """
    divided, problems = with_equal_labels(parts), []
    data = divided.get("data") or []
    for name, its in (("val_data", "validation"), ("test_data", "test")):
        option, given = f"--{name.replace('_', '-')}", parts.get(name)
        if other := [entry["split"] for entry in given or [] if entry.get("split", its) != its]:
            problems.append(
                f"`{option}` must hold the split {its} only, but {len(other):,} entries are of {other[0]}: take them "
                f"out, or give all as --data"
            )
        if found := [entry for entry in data if entry.get("split") == its]:
            divided[name] = found
            if given is not None:
                problems.append(
                    f"`{option}` must be left out, since --data has {len(found):,} entries of the split {its}: leave "
                    f"it out, or take them out"
                )
    everything = [entry for entries in parts.values() for entry in entries or []]
    if question and everything and all(entry["text"] != question for entry in everything):
        problems.append("`--question` must go with data without questions, but each entry has its own: leave it out")
    if data:
        divided["data"] = [entry for entry in data if entry.get("split", "train") == "train"]
        if not divided["data"]:
            problems.append("`--data` must have entries of the split train, but has none: correct the splits")
    return divided, problems


def with_equal_labels(parts: Mapping[str, list[dict[str, Any]] | None]) -> dict[str, list[dict[str, Any]] | None]:
    """The parts; where one has no labels of its own, but others have, its answers get theirs."""
    own = {
        name
        for name, entries in parts.items()
        if entries and any(entry["label"] != entry["answer"] for entry in entries)
    }
    labels = {entry["answer"]: entry["label"] for name in own for entry in parts[name] or []}
    return {
        name: entries
        if name in own or not entries
        else [{**entry, "label": labels.get(entry["answer"], entry["label"])} for entry in entries]
        for name, entries in parts.items()
    }


def asked_by_default(parts: Mapping[str, list[dict[str, Any]] | None]) -> str:
    """A sentence when the default question is asked about each image; else ""."""
    texts = {entry["text"] for entries in parts.values() for entry in entries or []}
    return (
        f"Asking {DEFAULT_QUESTION!r} about each image (--question asks another)" if texts == {DEFAULT_QUESTION} else ""
    )


def shorten(problems: list[str], most: int = 20) -> list[str]:
    """The first problems, and the number of the others."""
    return problems if len(problems) <= most else [*problems[:most], f"... and {len(problems) - most} more like these"]


def unreadable_images(
    paths: Iterable[str],
    max_pixels: int = MAX_PIXELS,
    log: Callable[[str], None] = lambda text: None,
    options: ImageOptions = AS_USUAL,
) -> list[str]:
    """The `image_problems`, shortened. `log` is called with lines of progress."""
    return shorten(list(image_problems(paths, max_pixels, log, options=options).values()))


def plain_form(text: str) -> str:
    """A text without differences in case, spaces, Unicode form and invisible characters."""
    composed = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def answer_set(entries: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """The candidate answers in the order of their labels, and every contradiction between answers and labels.

    Answers form a closed set if there are at most 20 and each occurs at least three times on average. Otherwise there
    are no candidates, and the data is tuned on the loss. In a closed set, answers that differ only in case, spaces or
    Unicode form are a problem: they would count as different classes.
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
                f"{SHOWN.repr(partner)} ({count}x)" for partner, count in sorted(counts, key=lambda pair: -pair[1])
            )
            + ": correct the rarer one"
            for value, counts in partners.items()
            if len(counts) > 1
        ]
    order = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    return tuple(dict.fromkeys(answer for _, answer in order)), shorten(problems)
