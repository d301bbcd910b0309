"""The folder of the study that a command line names, up to date with its copy on object storage."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN
from train_fn.support.storage import Storage
from tune.config.paths import study_directory
from tune.config.settings import NAME, STORAGE, flag
from tune.config.stored import stored_settings
from tune.config.uris import strip_credentials
from tune.records.bucket import refresh
from tune.records.journal import holder
from tune.records.process import named


def locate_study(command: str, values: dict[str, Any], problems: list[str]) -> Path | None:
    """The study's folder; None, with a problem, if there is none.

    Args:
        command: the option that names the study: resume, show or replay.
        values: the command line's values; a URI in them becomes the study's name.

    Raises:
        SettingsError: --resume, and plan.json cannot be read.
    """
    uri, results = values[command], values.get("results", "results")
    if "://" in uri:
        before = len(problems)
        values[command] = download_study(flag(command), uri, Path(results), problems)
        if len(problems) > before:
            return None
    directory = study_directory(values[command], results)
    if directory is None:
        fix = "give its name (and --results), its folder, in which plan.json lies, or its address on object storage"
        found = next(filter(None, map(unfit, (Path(results) / values[command], Path(values[command])))), fix)
        shown = SHOWN.repr(strip_credentials(uri))
        problems.append(f"`{flag(command)}` must name a study, but got {shown}: {found}")
    elif command == "resume" and "://" not in uri:
        problems += update_study(directory)
    return directory


def unfit(folder: Path) -> str:
    """Why a folder that is there is no study, and what to do; "": nothing shows that it is to be one."""
    try:
        if not os.path.lexists(folder / "plan.json") and os.stat(folder / "journal.jsonl").st_size:
            return f"{folder} holds a journal without its plan.json: put that back from a copy"
        if not os.path.lexists(folder / "lock"):
            os.stat(folder / "plan.json")  # what stands in the way?
        elif process := holder(folder):
            return f"{folder} is being prepared {named(process)}: wait until its lanes start"
        else:
            again = "begin it again with the command that you gave"
            return f"{folder} was being prepared when its process ended, so no trial has begun: {again}"
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no path can have this text
        return ""
    except PermissionError as error:
        return f"{SHOWN.repr(str(folder))} cannot be read ({error.strerror}): change its permissions"
    except OSError as error:
        too_long = error.errno == errno.ENAMETOOLONG
        return "" if too_long else f"{SHOWN.repr(str(folder))} cannot be read ({error.strerror}): mend the disk"
    return ""


def download_study(option: str, uri: str, results: Path, problems: list[str]) -> str:
    """The name of a study on object storage. Its files are copied into `results` unless newer ones are there."""
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    shown = strip_credentials(uri)
    where = f"`{option}` must name a study on object storage, such as s3://BUCKET/PREFIX/STUDY, but got {shown!r}"
    if shown != uri:
        problems.append(f"{where} with a key or password: leave them to AWS_ACCESS_KEY_ID and the like")
    elif not STORAGE.holds(uri) or uri.count("/") < 3 or not NAME.holds(name):
        problems.append(f"{where}: fix the address")
    if problems:
        return name
    storage = Storage(results.absolute() / name, uri)
    try:
        problems += refresh(storage)
    except (OSError, ValueError) as error:
        problems.append(f"{where}, which cannot be downloaded ({error}): check the address, your keys and --results")
        return name
    if not os.path.isfile(storage.directory / "plan.json"):
        problems.append(f"{where}, where no plan.json lies: check the address")
    return name


def update_study(directory: Path) -> list[str]:
    """Update a study's folder from its copy on object storage, if it has one. Returns problems."""
    uri = stored_settings(directory)[1].get("storage", "")
    try:
        return refresh(Storage.under(uri, directory.resolve()))
    except (OSError, ValueError) as error:
        return [f"the study's copy on {uri} must be readable, but {error}: check your keys and the network"]
