"""Files that survive a full disk and a power loss: written under another name, flushed to the disk, then renamed.

A reader sees the old content or the new, never a part of it. Content that is read is checked, and a damaged file is
reported in one sentence (`DamagedFile`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

Json = TypeVar("Json", dict, list)

# First line of a file that carries its own checksum: the format's version, then the sha256 of what follows.
MAGIC = b"vlm-tune checked 1 sha256 "
HEADER = len(MAGIC) + 64 + 1
SUMS = "SHA256SUMS"


class DamagedFile(ValueError):
    """A file does not have the content that it must have; the message has rule, value and fix."""


def write_file(path: Path, *parts: bytes | memoryview | str) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file; its folder must exist.
        parts: the content.

    Raises:
        OSError: the disk is full or cannot be written; an old file stays as it was.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, completely or not at all. Raises OSError."""
    write_file(path, json.dumps(value, indent=1))


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a line of JSON for each value, completely or not at all. Raises OSError."""
    write_file(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json(path: Path, kind: type[Json], fix: str = "put it back from a copy") -> Json:
    """The value in a JSON file.

    Args:
        kind: the type of the value: dict or list.
        fix: advice for the user about a damaged file.

    Raises:
        OSError: the file is missing or cannot be read.
        DamagedFile: it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} must be JSON, but is not ({error}): {fix}") from error
    if not isinstance(value, kind):
        raise DamagedFile(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}: {fix}")
    return value


def write_checked(path: Path, content: bytes | memoryview) -> None:
    """Write a file that begins with its own checksum. Raises OSError, as `write_file`."""
    write_file(path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n", content)


def read_checked(path: Path) -> bytes:
    """The content of a file of `write_checked`. Raises OSError, or DamagedFile if a byte differs."""
    content = path.read_bytes()
    head, body = content[:HEADER], content[HEADER:]
    if head != MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DamagedFile(f"{path} must match its checksum, but does not: it is damaged, or no file of this project")
    return body


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, in the format of `sha256sum`, over all files of a folder. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in names if name != SUMS]
    write_file(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Compare a folder's files with its SHA256SUMS, if it has one. Raises OSError, or DamagedFile naming the file."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        name = match[2] if match and match[2].isprintable() else SUMS
        # A name may not lead out of the folder, nor to a pipe or device, which could be read for ever.
        path = (folder / name).resolve()
        if not match or not path.is_relative_to(folder.resolve()) or not path.is_file() or file_hash(path) != match[1]:
            raise DamagedFile(f"{folder / name} must be as {SUMS} says, but is not: fetch it again (or remove {SUMS})")


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(folder: Path) -> tuple[Path, str] | None:
    """Why a file in a folder, or the folder itself, cannot be made: the folder that was tried and the system's message.
    None if it can be made."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return existing, error.strerror or str(error)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (names, renames) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below, and the folder itself, to the disk. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Replace a folder with a finished one on the same disk. The old folder is deleted last. Raises OSError."""
    sync_tree(partial)
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a folder completely or not at all, replacing an existing one. Raises OSError; then the old one stays."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        shutil.copytree(source, partial)
        replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
