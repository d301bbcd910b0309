"""Files that survive a full disk and a power loss: written aside, flushed to the disk, then renamed into place.

A reader finds the old content or the new, never a part of it. What is read back is checked, and a file that is not what
it must be is named in one sentence (`DamagedFile`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

Json = TypeVar("Json", dict, list)

# First line of a file that carries its own checksum: the format's version, then the sha256 of what follows.
MAGIC = b"vlm-tune checked 1 sha256 "
HEADER = len(MAGIC) + 64 + 1
SUMS = "SHA256SUMS"


class DamagedFile(ValueError):
    """A file cannot be read as what it must be; the message says rule, value and fix."""


def write_file(path: Path, write: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all.

    Args:
        path: its place; the folder must exist.
        write: the content, or a function that writes it to an open file.

    Raises:
        OSError: the disk is full, or not to be written; the old file, if there is one, is untouched.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write.encode() if isinstance(write, str) else write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all. Raises OSError."""
    write_file(path, json.dumps(value, indent=1))


def read_json(path: Path, kind: type[Json], fix: str = "put it back from a copy") -> Json:
    """The value in a JSON file.

    Args:
        kind: what it must be: dict or list.
        fix: what the user can do about a damaged one.

    Raises:
        OSError: it is not there, or cannot be read.
        DamagedFile: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} must be JSON, but is not ({error}): {fix}") from error
    if not isinstance(value, kind):
        raise DamagedFile(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}: {fix}")
    return value


def write_checked(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that carries its own checksum. Raises OSError, as `write_file`."""

    def with_checksum(file: IO[bytes]) -> None:
        file.write(b" " * HEADER)
        hashing = HashingFile(file)
        try:
            write(hashing)  # type: ignore[arg-type]  # torch.save and the like only call write()
        except RuntimeError as error:
            if hashing.error:  # torch.save finishes its archive all the same, and complains of that
                raise hashing.error from error
            raise
        file.seek(0)
        file.write(MAGIC + hashing.digest.hexdigest().encode() + b"\n")

    write_file(path, with_checksum)


def read_checked(path: Path) -> bytes:
    """The content of a file that `write_checked` has written. Raises OSError, or DamagedFile when a byte differs."""
    content = path.read_bytes()
    head, body = content[:HEADER], content[HEADER:]
    if head != MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DamagedFile(f"{path} must match its checksum, but does not: it is damaged, or no file of this project")
    return body


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, as `sha256sum -c` reads it, over all files of a folder. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in names if name != SUMS]
    write_file(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Compare a folder's files with its SHA256SUMS, if it has one. Raises OSError, or DamagedFile naming the file."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        name = found[2] if found and found[2].isprintable() else SUMS
        # A name may not lead out of the folder, nor to what could be read for ever.
        path = (folder / name).resolve()
        if not found or not path.is_relative_to(folder.resolve()) or not path.is_file() or file_hash(path) != found[1]:
            raise DamagedFile(f"{folder / name} must be as {SUMS} says, but is not: fetch it again (or remove {SUMS})")


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingFile:
    """Passes on what is written, hashes it, and remembers the error of a disk that took no more."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write to the file and to the hash."""
        self.digest.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Pass on."""
        self.file.flush()


def unwritable(folder: Path) -> tuple[Path, str] | None:
    """Why no file can be made in a folder, or the folder itself: the place that was tried and the system's words. None:
    it can."""
    place = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return place, error.strerror or str(error)


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
    """Put a finished folder in place of another one, on the same disk. The old one goes last. Raises OSError."""
    sync_tree(partial)
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a folder, whole or not at all, in place of the one that is there. Raises OSError; then that one stays."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        shutil.copytree(source, partial)
        replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
