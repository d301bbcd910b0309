"""The formats of labelled image data, recognised by their content: files and folders become records, records rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from train_fn.data.arrow_tables import BEGINNINGS, PARTS_FILE, STATE, read_arrow_records, read_saved
from train_fn.data.conversations import KEYS, conversation_row
from train_fn.data.folders import read_class_folders
from train_fn.data.rows import DEFAULT_QUESTION, BadRecord, Row, grouped, listed, resolve, row_problems, table_row
from train_fn.data.tables import SUPPORTED, Records, read_text_records
from train_fn.settings import SHOWN

GUIDE = {"image", "text", "answer"}  # the keys of the guide's JSON, beside label


def read_records(path: Path, columns: Sequence[str]) -> tuple[Records, list[str], bool]:
    """The records of a file or folder of any format.

    Args:
        columns: `--columns`.

    Returns:
        The records; every problem with the form of the file; and whether it has the guide's own form.
    """
    if os.path.isdir(path):
        return *(read_class_folders(path) if is_class_folder(path) else read_saved(path, columns)), False
    if not os.path.isfile(path):  # reading a pipe or a device could go on for ever
        return [], [f"manifest {path} must be an existing file: check the path"], False
    try:
        with open(path, "rb") as file:
            if (beginning := file.read(8)).startswith(BEGINNINGS):
                return *read_arrow_records(path, columns), False
            content = beginning + file.read()
    except OSError as error:
        return [], [f"manifest {path} must be a readable file: {error.strerror}; check the path"], False
    records, problems = read_text_records(path, content, columns)
    is_json = content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"[", b"{")
    return records, problems, is_json and is_guides(records, columns)


def is_class_folder(path: str | Path) -> bool:
    """Whether a path is a folder of images by class: no file, and no saved data set."""
    return os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in (STATE, PARTS_FILE))


def keys_of(records: Records) -> list[str]:
    """The keys of all records, in the order in which they come."""
    return list(dict.fromkeys(key for _, record in records if isinstance(record, dict) for key in record))


def is_guides(records: Records, columns: Sequence[str]) -> bool:
    """Whether records of JSON are the guide's, also with faults: then its own rules give the messages."""
    keys = set(keys_of(records))
    if columns or not keys:
        return not columns
    if keys >= GUIDE:
        return True
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


def read_rows(path: Path, records: Records, columns: Sequence[str], question: str) -> tuple[list[Row], list[str]]:
    """The rows that can be trained with, and every problem.

    Args:
        path: names the data in messages.
        question: what is asked where the data has no questions; "": the default.
    """
    keys = keys_of(records)
    key = next((name for name in KEYS if name in keys), None)
    names, problems = resolve(keys, columns, ("image", "split")) if key else resolve(keys, columns)
    if key and (wrong := [text for text in columns if text.partition("=")[0] not in ("image", "split")]):
        problems.append(f"`--columns` must name image or split for {key}, but got {wrong[0]}: leave it out")
    if problems:
        return [], problems
    if not key and not {"image", "answer"} <= names.keys():
        lacking = [role for role in ("image", "question", "answer") if role not in names]
        missing = " and ".join(role for role in lacking if role != "question")
        line = ",".join(f"{role}=COLUMN" for role in lacking)
        return [], [
            f"manifest {path} must have a column for {missing}, but its columns are {listed(keys)}: name them, as "
            f"in --columns {line} (or use another format: {SUPPORTED})"
        ]
    if not key and not question and (likely := questions_elsewhere(records, set(names.values()))):
        return [], [
            f"manifest {path} must have a column for the question, and {SHOWN.repr(likely)} may be it: add --columns "
            f'question={likely[:60]}, or --question "..." to ask the same about each image'
        ]
    rows = []
    found: list[tuple[str, str]] = []
    for source, record in records:
        try:
            if not isinstance(record, dict):
                raise BadRecord(f" must be an object, but is {SHOWN.repr(record)}: correct it")
            if key:
                row = conversation_row(source, record, key, names)
            else:
                row = table_row(source, record, names, question or DEFAULT_QUESTION)
        except BadRecord as error:
            found.append((source, str(error)))
            continue
        its = list(row_problems(row))
        found += [(source, text) for text in its]
        if not its:
            rows.append(row)
    if len({row.label is None for row in rows}) > 1:
        found += [
            (row.source, " must have a label, as others have, but has none: add it, or take all labels out")
            for row in rows
            if row.label is None
        ]
        rows = [row for row in rows if row.label is not None]
    return rows, grouped(found)
