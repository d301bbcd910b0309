"""Rows: the common form of every data format, and which column holds what.

A record is an entry as its file has it: a dict of values by column (or key). A source says where a record comes from,
such as "m.csv line 3".
"""

from __future__ import annotations

import ast
import base64
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train_fn.data.samples import PLACEHOLDER
from train_fn.data.stored_images import store_image
from train_fn.settings import SHOWN, matching

DEFAULT_QUESTION = "What does this image show?"
# The usual names of each role's column. The first one wins over the others; two others are ambiguous.
USUAL = {
    "image": ("image", "images", "image_path", "image_name", "file_name", "filename", "file_path", "filepath", "path",
              "img", "img_path", "img_name", "image_file_name", "file_names", "images_file_names"),
    "question": ("question", "text", "prompt", "query"),
    "answer": ("answer", "response", "caption", "class", "category", "target"),
    "label": ("label",),
    "split": ("split",),
    # Of these, an earlier name wins over a later one: a patient has several studies, and a study several cases.
    "id": ("id", "qid", "question_id", "sample_id", "uid"),
    "question_type": ("question_type", "qtype", "q_type"),
    "group": ("group", "group_id", "patient_id", "patient", "patientid", "subject_id", "subjectid", "study_id",
              "case_id"),
    "system": ("system", "system_prompt"),
}  # fmt: skip
RANKED = ("id", "question_type", "group", "system")
CONVERSATION_ROLES = ("image", "split", *RANKED)  # the others are within the conversation
COLUMN = matching(f"({'|'.join(USUAL)})=.+", f"ROLE=COLUMN, with one of the roles {', '.join(USUAL)}")
OTHER_MEDIA = ("videos", "audios")
EARLIER = ("turns", "history")  # lists of earlier questions with their answers
BESIDE = (*EARLIER, *OTHER_MEDIA)  # columns without a role that change what an entry says
PARTS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One question of a data set, whatever its format."""

    images: tuple[str | Path, ...]
    """Paths as they are written, or (Path) files that were found in a folder or made of an entry's bytes."""
    question: Any
    answer: Any
    label: Any = None
    """None: not given."""
    source: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier questions with their answers."""
    split: str = ""
    """train, validation, test, or "" where the data has no parts."""
    id: str = ""
    question_type: str = ""
    group: str = ""
    system: str = ""


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


def plain_name(column: str) -> str:
    """A column's name as the usual names are written."""
    return column.strip().casefold().replace(" ", "_").replace("-", "_")


# ------------------------------------------------------------------------------------------------ columns


def resolve(
    names: Sequence[str], columns: Sequence[str] = (), roles: Iterable[str] = tuple(USUAL)
) -> tuple[dict[str, str], list[str]]:
    """The column of each role, by `--columns` or by its usual names.

    Args:
        names: the columns of the data.
        columns: `--columns`, each "role=column"; "image=a+b" names several.
        roles: those to look for by their usual names.

    Returns:
        Column by role, without the roles that no column has; and every problem. A label is the answer where there is no
        other. Further columns of images have the roles "image 2", "image 3" and so on.
    """
    chosen = dict(text.split("=", 1) for text in columns)
    if (several := chosen.get("image", "")) not in names and "+" in several:
        for number, column in enumerate(several.split("+"), 1):
            chosen["image" if number == 1 else f"image {number}"] = column
    problems = [
        f"`--columns` must name columns of the data, but got {role}={column}; it has {listed(names)}: correct the name"
        for role, column in chosen.items()
        if column not in names
    ]
    for role in roles:
        if role in chosen:
            continue
        usual = USUAL[role]
        free = [(plain_name(name), name) for name in names if name not in chosen.values()]
        found = [name for plain, name in free if plain in usual]
        first = [name for plain, name in free if plain == usual[0]]
        if len(first) == 1 or len(found) == 1:
            chosen[role] = (first or found)[0]
        elif found and role in RANKED:
            chosen[role] = min(found, key=lambda name: usual.index(plain_name(name)))
        elif found:
            problems.append(
                f"one column must hold the {role}, but {listed(found)} could: add --columns "
                f"{shlex.quote(f'{role}={found[0]}')}"
            )
    if "answer" not in chosen and "label" in chosen:
        chosen["answer"] = chosen.pop("label")
    return chosen, problems


def image_columns(names: Mapping[str, str]) -> list[str]:
    """The columns of images, given the column of each role."""
    return [column for role, column in names.items() if role.startswith("image")]


def columns_taken(names: Mapping[str, str], columns: Sequence[str]) -> str:
    """A sentence about the columns that have other than the first usual name; "" if there are none.

    Args:
        names: the column of each role, from `resolve` of `columns`.
    """
    given = {text.partition("=")[0] for text in columns}
    taken = [
        f"{column} as {role.replace('_', ' ')}"
        for role, column in names.items()
        if role not in given
        and role in USUAL
        and (role == "system" or plain_name(column) not in (USUAL[role][0], "label"))
    ]
    return f"Columns taken: {', '.join(taken)} (--columns ROLE=COLUMN names others)" if taken else ""


# ------------------------------------------------------------------------------------------------ rows


def table_row(source: str, record: Mapping[str, Any], names: Mapping[str, str], question: str, separator: str) -> Row:
    """The row of a record with one question and answer.

    Args:
        names: the column of each role, from `resolve`.
        question: what is asked where no column has a question.
        separator: `--multilabel`.

    Raises:
        BadRecord: a cell holds what its role cannot be.
    """
    refuse_other_media(record)
    if len(columns := image_columns(names)) == 1:
        images = image_paths(record.get(columns[0]))
    else:
        images = tuple(image for column in columns for image in image_paths(record.get(column)))
    asked = record.get(names["question"]) if "question" in names else question
    answer = answer_text(record.get(names["answer"]), separator) if "answer" in names else None
    label = record.get(names["label"]) if "label" in names else None
    if missing(label):
        label = None
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas turns whole numbers into floats where one is missing
    return place_images(Row(images, asked, answer, label, source, earlier_turns(record), **texts_beside(record, names)))


def answer_text(value: Any, separator: str) -> Any:
    """An answer as text where it can be: numbers are classes, and with a separator (`--multilabel`) lists are sets.

    Raises:
        BadRecord: a label holds the separator.
    """
    if isinstance(value, str):
        if not (separator and value.lstrip().startswith("[")):
            return value
        value = listed_texts(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not missing(value):
        return str(value)
    if not (separator and isinstance(value, list)):
        return value
    labels = [answer_text(label, "") for label in value if not missing(label)]
    if wrong := [label for label in labels if not isinstance(label, str) or separator in label]:
        raise BadRecord(
            f" must have labels of text without {separator!r} in its answer, but has {SHOWN.repr(wrong[0])}: choose "
            f"another --multilabel"
        )
    return (separator if separator[-1:].isspace() else f"{separator} ").join(labels)


def listed_texts(text: str) -> Any:
    """The list of texts that a cell holds as JSON, or as Python writes it (pandas does); else the cell."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
    return text


def texts_beside(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Split, id, question type, group and system prompt of a record, where there are columns for them.

    Raises:
        BadRecord: the split is no part, or the system prompt no text.
    """
    found = {role: plain_value(record.get(names[role])) for role in RANKED if role in names}
    if found.get("system") and not isinstance(record.get(names["system"]), str):
        raise BadRecord(f" must have text as its system prompt, but has {SHOWN.repr(found['system'])}: correct it")
    if "split" in names:
        found["split"] = part(record.get(names["split"]))
    return found


def plain_value(value: Any) -> str:
    """A cell that identifies something, as text."""
    if isinstance(value, str):
        return value.strip()
    if missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas turns whole numbers into floats where one is missing
    return ", ".join(map(plain_value, value)) if isinstance(value, list) else str(value)


def earlier_turns(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The earlier questions of a record with their answers: pairs in its key turns or history. Raises BadRecord."""
    for name in EARLIER:
        value = record.get(name)
        if isinstance(value, str) and value.startswith("[["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if not isinstance(value, list) or not value:
            continue  # a column of this name may hold anything, such as a patient's history
        pairs = [pair if isinstance(pair, list) else [] for pair in value]
        if any(len(pair) != 2 or missing(pair[0]) or missing(pair[1]) for pair in pairs) or any(
            not isinstance(text, str) for pair in pairs for text in pair
        ):
            raise BadRecord(
                f" must have pairs of question and answer as its {name}, but has {SHOWN.repr(value)}: correct it"
            )
        return tuple((question, answer) for question, answer in pairs)
    return ()


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


def place_images(row: Row, at_end: bool = False) -> Row:
    """A row whose placeholders match its images. If all stand before the first question, the row is without them.

    Args:
        at_end: images behind the first question are moved to its beginning, as LLaVA does.

    Raises:
        BadRecord: there are placeholders, but not as many as images, or outside the questions.
    """
    first = row.turns[0][0] if row.turns else row.question
    texts = [row.question, row.answer, row.system, *(text for turn in row.turns for text in turn)]
    total = sum(text.count(PLACEHOLDER) for text in texts if isinstance(text, str))
    if not total:
        return row
    check_placeholders(total, len(row.images))
    refuse_placeholders(row.answer, row.system, *(answer for _, answer in row.turns))
    stripped = first.strip()
    while stripped.startswith(PLACEHOLDER):
        stripped = stripped.removeprefix(PLACEHOLDER).lstrip()
    while at_end and stripped.endswith(PLACEHOLDER):
        stripped = stripped.removesuffix(PLACEHOLDER).rstrip()
    if PLACEHOLDER in stripped or first.count(PLACEHOLDER) < total or (row.turns and not stripped):
        return row
    if row.turns:
        return replace(row, turns=((stripped, row.turns[0][1]), *row.turns[1:]))
    return replace(row, question=stripped)


def refuse_placeholders(*texts: Any) -> None:
    """Raise BadRecord if a text that is no question has a placeholder."""
    if wrong := [text for text in texts if isinstance(text, str) and PLACEHOLDER in text]:
        raise BadRecord(
            f" must have {PLACEHOLDER} in its questions only, but has it in {SHOWN.repr(wrong[0])}: take it out there"
        )


def check_placeholders(num_placeholders: int, num_images: int) -> None:
    """Raise BadRecord if there are not as many images as placeholders."""
    if num_placeholders != num_images:
        raise BadRecord(
            f" must have as many images as {PLACEHOLDER} placeholders, but has {num_images} and {num_placeholders}: "
            f"write {PLACEHOLDER} once for each image"
        )


def image_paths(value: Any) -> tuple[str | Path, ...]:
    """The images in a cell: a path, a data: URL, {"bytes", "path"}, bytes, or a list of these, which may
    be written as JSON. Bytes become files.

    Raises:
        BadRecord: the cell holds anything else, or bytes that are no image.
    """
    if isinstance(value, Path):
        return (value,)
    if isinstance(value, str) and value.startswith("["):
        value = listed_texts(value)
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


def row_problems(row: Row, answers_optional: bool) -> Iterator[str]:
    """Why a row cannot be used, each as the end of a sentence that begins with its source."""
    if not row.images:
        yield " must have an image, but has none: add it or take the entry out"
    for name, value in (("question", row.question), ("answer", row.answer)):
        if missing(value):
            if name == "answer" and answers_optional:
                continue
            yield f" must have {'an' if name == 'answer' else 'a'} {name}, but has none: add it or take the entry out"
        elif not isinstance(value, str):
            sets = 'add --multilabel ";" if these are labels, or ' if isinstance(value, list) else ""
            yield f" must have text as its {name}, but has {SHOWN.repr(value)}: {sets}write it as text"
    if row.label is not None and (isinstance(row.label, bool) or not isinstance(row.label, int | str)):
        yield f" must have a number or text as its label, but has {SHOWN.repr(row.label)}: correct it"


def grouped(found: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences from pairs of source and text; equal texts become one sentence with the first source."""
    sources: dict[str, list[str]] = {}
    for source, text in found:
        sources.setdefault(text, []).append(source)
    return [f"{first}{f' (and {len(more):,} more)' if more else ''}{text}" for text, (first, *more) in sources.items()]
