"""Paths that a user gives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tune.config.uris import scrub


class SettingsError(Exception):
    """The command line or what it names is wrong; holds every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [scrub(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def user_paths() -> Iterator[None]:
    """Turn what the operating system says of a file or folder into a SettingsError. Other errors pass."""
    try:
        os.getcwd()  # every relative path needs it
        yield
    except OSError as error:
        if error.errno is None:  # a library's own error
            raise
        what = "the working folder or a disk" if error.filename is None else repr(error.filename)
        text = f"{what} must be usable, but {error.strerror}: mend it, or choose another place"
        raise SettingsError([text]) from error
    except UnicodeEncodeError as error:
        what = repr(error.object[error.start : error.end])
        raise SettingsError([f"every name must be UTF-8, but one has {what}: rename the file or folder"]) from error


def is_file(path: str | Path) -> bool:
    """Whether a path that a user gives is a regular file; what cannot be looked at is none."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Whether a path that a user gives is a folder; what cannot be looked at is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def study_directory(name: str, results: str) -> Path | None:
    """The folder of a study that was begun, by its name under `results` or by its path."""
    return next((folder for folder in (Path(results) / name, Path(name)) if is_file(folder / "plan.json")), None)
