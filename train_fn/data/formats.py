"""The formats of labelled image data, recognised by their content: files and folders become records, records rows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.data.arrow_tables import BEGINNINGS, PARTS_FILE, STATE, read_arrow_records, read_saved
from train_fn.data.conversations import KEYS, conversation_rows
from train_fn.data.folders import DataFile, data_files, read_class_folders
from train_fn.data.rows import (
    CONVERSATION_ROLES,
    DEFAULT_QUESTION,
    BadRecord,
    Row,
    columns_taken,
    grouped,
    image_columns,
    listed,
    resolve,
    row_problems,
    table_row,
)
from train_fn.data.tables import SUPPORTED, Records, read_text_records
from train_fn.settings import SHOWN

GUIDE = {"image", "text", "answer"}  # the keys of the guide's JSON, beside label


@dataclass
class Content:
    """The records of a file or folder."""

    records: Records
    problems: list[str]
    """Every problem with the form of the file."""
    is_guides: bool = False
    """Whether it has the guide's own form."""
    notes: list[str] = field(default_factory=list)


def read_records(path: Path, columns: Sequence[str], answers_optional: bool = False) -> Content:
    """The records of a file or folder of any format.

    Args:
        columns: `--columns`.
        answers_optional: whether the data may have no answers.
    """
    if not os.path.isdir(path):
        return read_file(path, columns, answers_optional)
    if is_saved(path):
        return Content(*read_saved(path, columns, answers_optional))
    try:
        files, problems, note = data_files(path)
    except OSError as error:
        return Content([], [f"manifest {path} must be a folder that can be read, but {error}: check its permissions"])
    if problems or not files:
        return Content([], problems) if problems else Content(*read_class_folders(path))
    contents = [read_part(file, columns, answers_optional) for file in files]
    return Content(
        [record for content in contents for record in content.records],
        [problem for content in contents for problem in content.problems],
        all(content.is_guides for content in contents),
        [note] if note else [],
    )


def read_part(file: DataFile, columns: Sequence[str], answers_optional: bool) -> Content:
    """The records of one file of a folder. Their image paths start from that folder, and they have their split."""
    content = read_file(file.path, columns, answers_optional)
    keys = keys_of(content.records)
    images = image_columns(resolve(keys, columns, ["image"])[0]) if file.below else []
    for number, (source, record) in enumerate(content.records):
        if not isinstance(record, dict):
            continue
        more = {name: below(file.below, record[name]) for name in images if name in record}
        if file.split and "split" not in keys:
            more["split"] = file.split
        content.records[number] = (f"{file.below}/{source}" if file.below else source, record | more)
    return content


def below(folder: str, image: Any) -> Any:
    """The path of an image, or of several, that start from a folder."""
    if isinstance(image, list):
        return [below(folder, one) for one in image]
    is_path = isinstance(image, str) and image.strip() and not image.startswith(("/", "data:", "http:", "https:", "["))
    return f"{folder}/{image}" if is_path else image


def read_file(path: Path, columns: Sequence[str], answers_optional: bool) -> Content:
    """The records of a file of any format."""
    if not os.path.isfile(path):  # reading a pipe or a device could go on for ever
        return Content([], [f"manifest {path} must be an existing file: check the path"])
    try:
        with open(path, "rb") as file:
            if (beginning := file.read(8)).startswith(BEGINNINGS):
                return Content(*read_arrow_records(path, columns, answers_optional=answers_optional))
            content = beginning + file.read()
    except OSError as error:
        return Content([], [f"manifest {path} must be a readable file: {error.strerror}; check the path"])
    records, problems = read_text_records(path, content, columns)
    is_json = content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"[", b"{")
    return Content(records, problems, is_json and is_guides(records, columns, answers_optional))


def format_name(path: Path) -> str:
    """What a file or folder that `read_records` has read is, by its first bytes."""
    if os.path.isdir(path):
        if is_saved(path):
            return "a data set saved by `datasets`"
        return "a folder with data files" if data_files(path)[0] else "a folder of images by class"
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith(BEGINNINGS):
        return "parquet" if beginning.startswith(b"PAR1") else "an Arrow file"
    first = beginning.lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
    if first in (b"[", b"{"):
        return "a JSON list" if first == b"[" else "JSON Lines"
    return "TSV" if b"\t" in beginning.partition(b"\n")[0] else "CSV"


def is_saved(path: str | Path) -> bool:
    """Whether a folder is a data set saved by `datasets`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (STATE, PARTS_FILE))


def is_class_folder(path: str | Path) -> bool:
    """Whether a path is a folder of images by class: no file, no saved data set, and no folder with a data file."""
    try:
        return os.path.isdir(path) and not is_saved(path) and not data_files(Path(path))[0]
    except OSError:
        return True  # its reader reports the error


def keys_of(records: Records) -> list[str]:
    """The keys of all records, in the order in which they come."""
    return list(dict.fromkeys(key for _, record in records if isinstance(record, dict) for key in record))


def is_guides(records: Records, columns: Sequence[str], answers_optional: bool = False) -> bool:
    """Whether records of JSON are the guide's, also with faults: then its own rules give the messages."""
    keys = set(keys_of(records))
    if columns or not keys:
        return not columns
    if keys >= GUIDE:
        return True
    if answers_optional:
        return keys >= {"image", "text"}
    if keys & {"image", "text", "answer", "label"} == {"image", "label"}:
        return False
    with_label = {"image", "answer", "label"} <= keys  # without its question
    return keys <= {*GUIDE, "label", "split"} and (with_label or not {"image", "answer"} <= keys)


def questions_elsewhere(records: Records, used: set[str]) -> str:
    """A column without a role that holds a sentence; "" if there is none."""
    for _, record in records:
        for name, value in record.items() if isinstance(record, dict) else ():
            if name in used or not isinstance(value, str):
                continue
            if len(value.split()) > 2 or value.rstrip().endswith(("?", "？")):
                return name
    return ""


def read_rows(
    path: Path,
    records: Records,
    columns: Sequence[str],
    question: str,
    multilabel: str = "",
    answers_optional: bool = False,
) -> tuple[list[Row], list[str], list[str], dict[str, str]]:
    """The rows that can be used, every problem, what the user should know, and the column of each role.

    Args:
        path: names the data in messages.
        question: what is asked where the data has no questions; "": the default.
        multilabel, answers_optional: as in `read_manifest`.
    """
    keys = keys_of(records)
    key = next((name for name in KEYS if name in keys), None)
    names, problems = resolve(keys, columns, CONVERSATION_ROLES) if key else resolve(keys, columns)
    if key and (wrong := [text for text in columns if text.partition("=")[0] not in CONVERSATION_ROLES]):
        roles = ", ".join(CONVERSATION_ROLES)
        problems.append(f"`--columns` must name {roles} only for {key}, but got {wrong[0]}: leave it out")
    if problems:
        return [], problems, [], {}
    required = ("image",) if answers_optional else ("image", "answer")
    if not key and (lacking := [role for role in required if role not in names]):
        line = ",".join(f"{role}=COLUMN" for role in ("image", "question", "answer") if role not in names)
        return [], [
            f"manifest {path} must have a column for {' and '.join(lacking)}, but its columns are {listed(keys)}: "
            f"name them, as in --columns {line} (or use another format: {SUPPORTED})"
        ], [], {}  # fmt: skip
    used = set(names.values())
    if not key and "question" not in names and not question and (likely := questions_elsewhere(records, used)):
        return [], [
            f"manifest {path} must have a column for the question, and {SHOWN.repr(likely)} may be it: add --columns "
            f'{shlex.quote("question=" + likely[:60])}, or --question "..." to ask the same about each image'
        ], [], {}  # fmt: skip
    rows = []
    found: list[tuple[str, str]] = []
    for source, record in records:
        try:
            if not isinstance(record, dict):
                raise BadRecord(f" must be an object, but is {SHOWN.repr(record)}: correct it")
            if key:
                made = conversation_rows(source, record, key, names)
            else:
                made = [table_row(source, record, names, question or DEFAULT_QUESTION, multilabel)]
        except BadRecord as error:
            found.append((source, str(error)))
            continue
        for row in made:
            its = list(row_problems(row, answers_optional))
            found += [(row.source, text) for text in its]
            if not its:
                rows.append(row)
    if len({row.label is None for row in rows}) > 1 and not answers_optional:
        found += [
            (row.source, " must have a label, as others have, but has none: add it, or take all labels out")
            for row in rows
            if row.label is None
        ]
        rows = [row for row in rows if row.label is not None]
    taken = columns_taken(names, columns)
    return rows, grouped(found), [taken] if taken else [], names
