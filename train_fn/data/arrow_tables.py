"""Parquet, arrow files, and data sets saved by `datasets.save_to_disk`, read through pyarrow, which Ray installs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.conversations import KEYS
from train_fn.data.rows import BESIDE, CONVERSATION_ROLES, BadRecord, image_columns, image_paths, resolve
from train_fn.data.tables import Records
from train_fn.support.files import DamagedFile, read_json

if TYPE_CHECKING:
    import pyarrow

BEGINNINGS = (
    b"PAR1",
    b"ARROW1",
    b"\xff\xff\xff\xff",
)  # of parquet, an arrow file, an arrow stream
STATE, PARTS_FILE = "state.json", "dataset_dict.json"  # of a saved data set; of several, by the part's name
BATCH = 64  # rows at once: their images are bytes in memory until they are written


def read_arrow_records(
    path: Path, columns: Sequence[str], split: str = "", answers_optional: bool = False
) -> tuple[Records, list[str]]:
    """The records of a parquet or arrow file, and every problem. Image bytes become files in the user's cache.

    Only the columns with a role are read. If image or answer has no column, all are, for the first rows.

    Args:
        columns: `--columns`.
        split: the part that the file belongs to; "" if that is not known.
        answers_optional: whether the data may have no answers.
    """
    import pyarrow

    records: Records = []
    problems = []
    number = 0
    try:
        schema, batches = open_table(path)
        wanted = wanted_columns(schema.names, columns, answers_optional)
        roles = resolve(schema.names, columns)[0] if wanted else {}
        images = image_columns(roles)
        kept = {*roles.values(), *KEYS, *BESIDE} - {*images}
        classes = class_names(schema)
        for batch in batches(wanted or schema.names):
            batch.validate(full=True)  # pyarrow itself would read beyond the memory of a damaged file
            for record in batch.to_pylist():
                source = f"{path.name} row {number}"
                number += 1
                fault = ""
                for name, value in record.items():
                    if name in classes and isinstance(value, int | list):
                        record[name] = class_name(value, classes[name])
                    elif isinstance(value, bytes | dict | list) and name not in kept:
                        try:  # of columns without a role, such values would fill the memory
                            record[name] = list(image_paths(value)) if name in images else ""
                        except BadRecord as error:
                            fault = f"{source}{error}"
                if fault:
                    problems.append(fault)
                else:
                    records.append((source, record | ({"split": split} if split else {})))
            if not wanted:
                break
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        problems.append(f"manifest {path} must be a whole parquet or arrow file, but {what}: write it again")
    if not records and not problems:
        problems.append(f"manifest {path} must have rows, but has none: check the path")
    return records, problems


def open_table(path: Path) -> tuple[pyarrow.Schema, Callable[[list[str]], Iterator[pyarrow.RecordBatch]]]:
    """A file's schema, and a function that returns the batches of some of its columns."""
    import pyarrow.ipc
    import pyarrow.parquet

    with open(path, "rb") as file:
        beginning = file.read(8)
    if beginning.startswith(b"PAR1"):
        table = pyarrow.parquet.ParquetFile(path)
        return table.schema_arrow, lambda names: table.iter_batches(BATCH, columns=names)
    mapped = pyarrow.memory_map(str(path))
    if beginning.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(mapped)
        whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = pyarrow.ipc.open_stream(mapped)
        whole = iter(reader)
    return reader.schema, lambda names: (
        batch.select(names).slice(start, BATCH) for batch in whole for start in range(0, batch.num_rows, BATCH)
    )


def wanted_columns(names: list[str], columns: Sequence[str], answers_optional: bool) -> list[str]:
    """The columns to read: those with a role, or all if none has the questions. None if image or answer has none."""
    conversation = KEYS.keys() & set(names)
    roles, problems = resolve(names, columns, CONVERSATION_ROLES) if conversation else resolve(names, columns)
    required = {"image"} if answers_optional else {"image", "answer"}
    if problems or not (conversation or required <= roles.keys()):
        return []
    if not conversation and "question" not in roles:
        return list(names)
    return [name for name in names if name in (*roles.values(), *KEYS, *BESIDE)]


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """The classes of each column that holds them as numbers, from the notes of `datasets` in the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        found = {}
        for name, feature in features.items():
            if isinstance(feature, dict):
                feature = feature.get("feature", feature)  # of a list
            if isinstance(feature, list) and feature:
                feature = feature[0]
            if isinstance(feature, dict) and isinstance(feature.get("names"), list):
                found[name] = list(map(str, feature["names"]))
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # no such notes


def class_name(number: Any, names: list[str]) -> Any:
    """The name of a class by its number, or of each in a list. None: -1, which `datasets` writes for no class."""
    if isinstance(number, list):
        return [class_name(one, names) for one in number]
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def read_saved(folder: Path, columns: Sequence[str], answers_optional: bool = False) -> tuple[Records, list[str]]:
    """The records of a folder of `save_to_disk`, one data set or several by the part's name, and every problem."""
    try:
        if not (folder / PARTS_FILE).is_file():
            return read_saved_one(folder, columns, "", answers_optional)
        names = read_json(folder / PARTS_FILE, dict, "save the data set again")["splits"]
        records: Records = []
        problems: list[str] = []
        for name in names:
            found, its = read_saved_one(folder / Path(name).name, columns, name, answers_optional)
            records += found
            problems += its
        return records, problems
    except (OSError, DamagedFile, KeyError, TypeError) as error:
        return [], [f"manifest {folder} must be a whole saved data set, but {error}: save it again"]


def read_saved_one(
    folder: Path, columns: Sequence[str], split: str, answers_optional: bool
) -> tuple[Records, list[str]]:
    """The records of one saved data set. Raises OSError, DamagedFile, KeyError or TypeError for other content."""
    state = read_json(folder / STATE, dict, "save the data set again")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        return [], [f"manifest {folder} must have no indices of its own: call flatten_indices() and save it again"]
    records: Records = []
    problems: list[str] = []
    for entry in state["_data_files"]:
        file = folder / Path(entry["filename"]).name
        found, its = read_arrow_records(file, columns, split, answers_optional)
        records += [(f"{folder.name}/{source}", record) for source, record in found]
        problems += its
    return records, problems
