"""Files and folders that a user names, and the error for what is wrong with them."""

from __future__ import annotations

import contextlib
import os
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tune.config.uris import scrub


class SettingsError(Exception):
    """The command line, or a file that it names, cannot be used. `problems` holds every reason, without credentials."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [scrub(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def user_paths() -> Iterator[None]:
    """Turn the operating system's errors about files and folders into a SettingsError. Other errors pass."""
    try:
        os.getcwd()  # every relative path needs it
        yield
    except OSError as error:
        if error.errno is None:  # a library's own error
            raise
        what = "the working folder or a disk" if error.filename is None else repr(error.filename)
        text = f"{what} must be usable, but {error.strerror}: repair it, or choose another"
        raise SettingsError([text]) from error
    except UnicodeEncodeError as error:
        what = repr(error.object[error.start : error.end])
        raise SettingsError([f"every name must be UTF-8, but one has {what}: rename the file or folder"]) from error


def program() -> list[str]:
    """The words that begin a command line of a study: those of a checkout, or the console script of a wheel."""
    checkout = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
    return ["python", "tune/run.py"] if checkout else ["vlm-tune"]


def import_path() -> str:
    """A PYTHONPATH with which other processes import this project, also where it is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    # Installed packages in front of the standard library would shadow it.
    installed = root in (sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages())
    return os.pathsep.join(before if installed else [root, *before])


def study_directory(name: str, results: str) -> Path | None:
    """The folder of a study, from its name in `results` or from its path; None if no plan.json lies there."""
    return next((folder for folder in (Path(results) / name, Path(name)) if os.path.isfile(folder / "plan.json")), None)
