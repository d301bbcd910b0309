"""Text files of records: JSON, JSON Lines, CSV and TSV, recognised by their content."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_fn.data.rows import PARTS, listed, resolve
from train_fn.settings import SHOWN

Records = list[tuple[str, Any]]
"""Source and record of each entry."""
MAX_ENTRIES = 1_000_000  # near-copies are searched among all pairs of images
HEADER = 65_536  # bytes in which a table's header must end
SUPPORTED = (
    "JSON (a list of objects with image, text and answer, with conversations, or with messages), JSON Lines, CSV or "
    "TSV with a header, parquet, a data set saved by `datasets`, a folder of images by class, or a folder with such "
    "files"
)
AS_CSV = "save it as CSV with the header image,question,answer"


def read_text_records(path: Path, content: bytes, columns: Sequence[str]) -> tuple[Records, list[str]]:
    """The records of a text file, and every problem with its form.

    Args:
        path: names the file in messages.
        columns: `--columns`.
    """
    if fix := unpacked(path, content[:300]):
        return [], [f"manifest {path} must be {SUPPORTED}, but begins with {content[:4]!r}: {fix[:300]}"]
    try:
        text = content.decode("utf-8-sig")  # editors on Windows write a mark at the beginning
    except UnicodeDecodeError as error:
        fault = f"manifest {path} must be UTF-8 text, but byte {error.start} is not"
        if content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"[":
            return [], [f"{fault}: save it as UTF-8"]
        return [], [f"{fault} (the file begins with {content[:8]!r}; supported: {SUPPORTED}): save text as UTF-8"]
    if text[:HEADER].lstrip()[:1] not in ("[", "{", ""):
        if found := read_table(path, text, columns):
            return found
        try:
            kind = type(json.loads(text)).__name__
        except (ValueError, RecursionError) as error:
            begins = SHOWN.repr(text[:40])
            return [], [f"manifest {path} must be {SUPPORTED}, but begins with {begins} ({error}): {AS_CSV}"]
        return [], [f"manifest {path} must be a JSON list of at least one entry, but holds a {kind}: {AS_CSV}"]
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # for the line numbers in messages
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) > 1 and isinstance(read_line(lines[0][1]), dict):
            return read_json_lines(path, lines)
        return [], [f"manifest {path} must be JSON: {error}; correct it there"]
    if isinstance(value, list) and len(value) > MAX_ENTRIES:
        return [], [
            f"manifest {path} must have at most {MAX_ENTRIES:,} entries, but has {len(value):,}: use a part of it"
        ]
    if isinstance(value, list) and value:
        return [(f"{path.name} entry {number}", entry) for number, entry in enumerate(value)], []
    problem = f"manifest {path} must be a JSON list of at least one entry, but holds "
    if not isinstance(value, dict):
        return [], [problem + ("an empty list" if value == [] else f"a {type(value).__name__}")]
    if path.suffix in (".jsonl", ".ndjson") and value:
        return [(f"{path.name} line 1", value)], []
    return [], [f"{problem}a dict with {listed(value)} (supported: {SUPPORTED}): {list_of(path.name, value)[:300]}"]


def list_of(name: str, value: dict[str, Any]) -> str:
    """How the dict that a JSON file holds becomes a list of entries.

    Args:
        name: the file's name.
    """
    lists = [key for key, entries in value.items() if isinstance(entries, list) and entries]
    has_roles = bool(resolve(list(value))[0])
    if value and all(isinstance(its, dict) for its in value.values()):
        columns = "[dict(zip(d, r)) for r in zip(*(c.values() for c in d.values()))]"  # as pandas writes a table
        entries = columns if has_roles else "[{'id': k} | d[k] for k in d]"
    elif len(lists) > 1 and all(key.casefold() in PARTS for key in value):
        entries = "[e | {'split': k} for k in d for e in d[k]]"
    elif len(lists) > 1 and len(lists) == len(value) and has_roles:
        entries = "[dict(zip(d, r)) for r in zip(*d.values())]"
    elif len(lists) == 1:
        program = f"import json; json.dump(json.load(open({name!r}))[{lists[0]!r}], open('list.json', 'w'))"
        return f'write its list as a file, with python -c "{program}"'
    elif lists:
        return "write a list of {image, text, answer}"
    else:
        return "write [ before it and ] behind it" if value else AS_CSV
    program = f"import json; d = json.load(open({name!r})); json.dump({entries}, open('list.json', 'w'))"
    return f'write a list of its entries, with python -c "{program}"'


def unpacked(path: Path, content: bytes) -> str:
    """How a file that is packed or a spreadsheet becomes one that is read; "" for any other."""
    name = shlex.quote(path.name)
    if content.startswith(b"PK\x03\x04") and path.suffix.lower() in (".xlsx", ".xlsm"):
        program = f"import pandas; pandas.read_excel({path.name!r}).to_csv('table.csv', index=False)"
        return f'save it as CSV there, or with python -c "{program}"'
    kinds = ((0, b"PK\x03\x04", "unzip"), (0, b"\x1f\x8b", "gunzip -k"), (257, b"ustar", "tar -xf"))
    return next((f"unpack it with {tool} {name}" for at, mark, tool in kinds if content[at:].startswith(mark)), "")


def read_line(line: str) -> Any:
    """The value of a line of JSON, or the error."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def read_json_lines(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[Records, list[str]]:
    """The records of a file of JSON Lines, given as number and text of each line that is not blank."""
    records: Records = []
    problems = []
    for number, line in lines:
        value = read_line(line)
        if isinstance(value, Exception):
            problems.append(f"{path.name} line {number} must be JSON, but is {SHOWN.repr(line)}: {value}; correct it")
        else:
            records.append((f"{path.name} line {number}", value))
    return records, problems


def read_table(path: Path, text: str, columns: Sequence[str]) -> tuple[Records, list[str]] | None:
    """The records of a CSV or TSV file, and every problem with its form. None: the text is no table."""
    if not (found := find_header(text, columns)):
        return None
    delimiter, names, label = found
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return [], [f"manifest {path} must name each column once, but has {SHOWN.repr(twice)} again: rename one"]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    records: Records = []
    problems = []
    line = 1
    try:
        next(reader)
        line = reader.line_num + 1
        for cells in reader:
            source, line = f"{path.name} line {line}", reader.line_num + 1
            if len(cells) == len(names):
                records.append((source, dict(zip(names, cells, strict=True))))
            elif cells:  # none: a blank line
                problems.append(
                    f"{source} must have {len(names)} cells, as the header has, but has {len(cells)}: put text that "
                    f"holds {delimiter!r} in double quotes"
                )
    except csv.Error as error:
        problems.append(f"{path.name} line {line} must be CSV, but {error}: double the quotes within a quoted cell")
    if not records and not problems:
        problems.append(f"manifest {path} must have entries, but has a header only: add a line for each image")
    if label and all(re.fullmatch(r"-?[0-9]{1,9}", record[label].strip()) for _, record in records):
        records = [(source, record | {label: int(record[label])}) for source, record in records]
    return records, problems


def find_header(text: str, columns: Sequence[str]) -> tuple[str, list[str], str] | None:
    """Delimiter, names and label column ("": none) of a table: under the delimiter that finds most of its roles.

    None: the text is no table. A table has an image and an answer in its header, or a second line with as many cells.
    """
    best: tuple[tuple[bool, int, int], str, list[str], str] | None = None
    if not re.search("[\r\n]", text[:HEADER]):
        return None
    for delimiter in ",;\t|":
        try:
            lines = csv.reader(io.StringIO(text[:HEADER], newline=""), delimiter=delimiter, skipinitialspace=True)
            head = list(itertools.islice(lines, 2))
        except csv.Error:
            continue
        if not head or len(head[0]) < 2:
            continue
        names = [name.strip() for name in head[0]]
        roles, _ = resolve(names, [text for text in columns if text.partition("=")[2] in names])
        usable = {"image", "answer"} <= roles.keys()
        rank = (usable, len(roles), len(names))
        if (usable or (len(head) == 2 and len(head[1]) == len(names))) and (best is None or rank > best[0]):
            best = rank, delimiter, names, roles.get("label", "")
    return best and best[1:]
