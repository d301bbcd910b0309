"""Rows: the common form of every data format, and which column holds what.

A record is an entry as its file has it: a dict of values by column (or key). A source says where a record comes from,
such as "m.csv line 3".
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.data.stored_images import store_image
from train_fn.settings import SHOWN, matching

DEFAULT_QUESTION = "What does this image show?"
PLACEHOLDER = "<image>"
# The usual names of each role's column. The first one wins over the others; two others are ambiguous.
USUAL = {
    "image": ("image", "images", "image_path", "image_name", "file_name", "filename", "file_path", "filepath", "path",
              "img", "img_path"),
    "question": ("question", "text", "prompt", "query"),
    "answer": ("answer", "response", "caption", "class", "category", "target"),
    "label": ("label",),
    "split": ("split",),
}  # fmt: skip
COLUMN = matching(f"({'|'.join(USUAL)})=.+", f"ROLE=COLUMN, with one of the roles {', '.join(USUAL)}")
OTHER_MEDIA = ("videos", "audios")
BESIDE = ("system", "history", *OTHER_MEDIA)  # columns without a role that change what an entry says
PARTS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One entry of a data set, whatever its format."""

    images: tuple[str | Path, ...]
    """Paths as they are written, or (Path) files that were found in a folder or made of an entry's bytes."""
    question: Any
    answer: Any
    label: Any = None
    """None: not given."""
    split: str = ""
    """train, validation, test, or "" where the data has no parts."""
    source: str = ""
    system: str = ""
    turns: int = 1
    """Questions with their answers."""


class BadRecord(ValueError):
    """A record cannot become a row. The message continues a sentence that begins with its source."""


def missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or blank text."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def listed(names: Iterable[str]) -> str:
    """Names of columns, shortened for a message."""
    text = SHOWN.repr(list(names))
    return text if len(text) <= 200 else f"{text[:200]}..."


def resolve(
    names: Sequence[str], columns: Sequence[str] = (), roles: Iterable[str] = tuple(USUAL)
) -> tuple[dict[str, str], list[str]]:
    """The column of each role, by `--columns` or by its usual names.

    Args:
        names: the columns of the data.
        columns: `--columns`, each "role=column".
        roles: those to look for by their usual names.

    Returns:
        Column by role, without the roles that no column has; and every problem. A label is the answer where there is no
        other.
    """
    chosen = dict(text.split("=", 1) for text in columns)
    problems = [
        f"`--columns` must name columns of the data, but got {role}={column}; it has {listed(names)}: correct the name"
        for role, column in chosen.items()
        if column not in names
    ]
    for role in roles:
        if role in chosen:
            continue
        usual = USUAL[role]
        free = [(name, name.strip().casefold().replace(" ", "_")) for name in names if name not in chosen.values()]
        found = [name for name, plain in free if plain in usual]
        first = [name for name, plain in free if plain == usual[0]]
        if len(first) == 1 or len(found) == 1:
            chosen[role] = (first or found)[0]
        elif found:
            problems.append(
                f"one column must hold the {role}, but {listed(found)} could: add --columns {role}={found[0]}"
            )
    if "answer" not in chosen and "label" in chosen:
        chosen["answer"] = chosen.pop("label")
    return chosen, problems


def table_row(source: str, record: Mapping[str, Any], names: Mapping[str, str], question: str) -> Row:
    """The row of a record with one question and answer.

    Args:
        names: the column of each role, from `resolve`.
        question: what is asked where no column has a question.

    Raises:
        BadRecord: a cell holds what its role cannot be.
    """
    refuse_other_media(record)
    cells = {role: record.get(name) for role, name in names.items()}
    images = image_paths(cells.get("image"))
    asked = cells["question"] if "question" in names else question
    if isinstance(asked, str) and PLACEHOLDER in asked:
        asked = without_placeholders(asked, asked.count(PLACEHOLDER), len(images))
    answer = cells["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool) and not missing(answer):
        answer = str(answer)  # a class by its number
    label = None if missing(cells.get("label")) else cells["label"]
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas turns whole numbers into floats where one is missing
    split = part(cells["split"]) if "split" in names else ""
    # ms-swift also writes query and response, with a system prompt and the turns before beside them.
    system = record.get("system") if names.get("question") == "query" else ""
    earlier = record.get("history")
    turns = 1 + (len(earlier) if isinstance(earlier, list) else 0)
    return Row(images, asked, answer, label, split, source, system if isinstance(system, str) else "", turns)


def refuse_other_media(record: Mapping[str, Any]) -> None:
    """Raise BadRecord for an entry with videos or sounds."""
    if other := [name for name in OTHER_MEDIA if isinstance(record.get(name), list) and record[name]]:
        raise BadRecord(f" must have images only, but has {other[0]}: take the entry out")


def part(value: Any) -> str:
    """The part of a study that a split's name means. Raises BadRecord."""
    name = PARTS.get(value.strip().casefold(), "") if isinstance(value, str) else ""
    if not name:
        raise BadRecord(
            f" must have the split train, validation or test, but has {SHOWN.repr(value)}: rename it, or take the "
            f"column out"
        )
    return name


def without_placeholders(text: str, num_placeholders: int, num_images: int, at_end: bool = False) -> str:
    """A question without the placeholder that stands for its image.

    Args:
        num_placeholders: placeholders of the whole entry.
        at_end: the image may also stand at the end.

    Raises:
        BadRecord: as many images must be there as placeholders, and the image must stand at the beginning.
    """
    if num_placeholders != num_images:
        raise BadRecord(
            f" must have as many images as {PLACEHOLDER} placeholders, but has {num_images} and {num_placeholders}: "
            f"write {PLACEHOLDER} once for each image"
        )
    stripped = text.strip()
    while stripped.startswith(PLACEHOLDER):
        stripped = stripped.removeprefix(PLACEHOLDER).lstrip()
    while at_end and stripped.endswith(PLACEHOLDER):
        stripped = stripped.removesuffix(PLACEHOLDER).rstrip()
    if PLACEHOLDER in stripped:
        raise BadRecord(
            f" must have {PLACEHOLDER} at the beginning of its question, but has {SHOWN.repr(text)}: move it there"
        )
    return stripped


def image_paths(value: Any) -> tuple[str | Path, ...]:
    """The images in a cell: a path, a data: URL, {"bytes", "path"}, bytes, or a list of these. Bytes become files.

    Raises:
        BadRecord: the cell holds anything else, or bytes that are no image.
    """
    if isinstance(value, Path):
        return (value,)
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return tuple(path for item in value for path in image_paths(item))
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else path
    if missing(value):
        return ()
    try:
        if isinstance(value, bytes):
            return (store_image(value),)
        if isinstance(value, str) and value.startswith("data:"):
            return (store_image(base64.b64decode(value.partition(",")[2], validate=True)),)
    except ValueError as error:  # BadImage, and base64's own
        raise BadRecord(f" must have an image in bytes, but {error}: replace it or take the entry out") from error
    if not isinstance(value, str):
        raise BadRecord(f" must have an image's path or bytes, but has {SHOWN.repr(value)}: correct it")
    if value.startswith(("http://", "https://")):
        raise BadRecord(f" must have an image on this machine, but has {SHOWN.repr(value)}: download it first")
    return (value,)


def row_problems(row: Row) -> Iterator[str]:
    """Why a row cannot be trained with, each as the end of a sentence that begins with its source."""
    if row.system:
        yield " must have no system prompt, which this version does not train with yet: take it out"
    if row.turns > 1:
        yield f" must have one question and answer, but has {row.turns}: make an entry of each"
    if len(row.images) > 1:
        yield f" must have one image, but has {len(row.images)}: this version trains with one image a question"
    elif not row.images:
        yield " must have an image, but has none: add it or take the entry out"
    for name, value in (("question", row.question), ("answer", row.answer)):
        if missing(value):
            yield f" must have {'an' if name == 'answer' else 'a'} {name}, but has none: add it or take the entry out"
        elif not isinstance(value, str):
            yield f" must have text as its {name}, but has {SHOWN.repr(value)}: write it as text"
    if row.label is not None and (isinstance(row.label, bool) or not isinstance(row.label, int | str)):
        yield f" must have a number or text as its label, but has {SHOWN.repr(row.label)}: correct it"


def grouped(found: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences from pairs of source and text; equal texts become one sentence with the first source."""
    sources: dict[str, list[str]] = {}
    for source, text in found:
        sources.setdefault(text, []).append(source)
    return [f"{first}{f' (and {len(more):,} more)' if more else ''}{text}" for text, (first, *more) in sources.items()]
