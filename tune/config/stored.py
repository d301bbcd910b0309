"""The settings of a study that exists, from its plan.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, TrialSettings, broken_rules
from train_fn.support.files import DamagedFile
from train_fn.support.storage import Storage
from tune.config.paths import SettingsError, is_file
from tune.config.settings import GROUPS, NAME, STORAGE, flag, show
from tune.config.space import is_own
from tune.config.trust import check_trust
from tune.config.uris import strip_credentials
from tune.records.bucket import refresh
from tune.records.budgets import seconds
from tune.records.plan import PARTS, read_plan

# What may change when a study goes on: how it is run and shown, and these, upwards only.
FREE = ("results", "hang_timeout", "lanes", "lanes_per_gpu", "device", "verbose", "profile", "trace", "report_to",
        "stop_when", "confirm", "confirm_seeds", "folds", "require", "register")  # fmt: skip
BUDGETS = ("trials", "time_budget", "gpu_hours", "max_failures")


def fetch(option: str, uri: str, results: Path, problems: list[str]) -> str:
    """The name of a study that lies on object storage, its files fetched into `results` unless newer ones are there."""
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    shown = strip_credentials(uri)
    where = f"`{option}` must name a study on object storage, such as s3://BUCKET/PREFIX/STUDY, but got {shown!r}"
    if shown != uri:
        problems.append(f"{where} with a key or password: leave them to AWS_ACCESS_KEY_ID and the like")
    elif not STORAGE.holds(uri) or uri.count("/") < 3 or not NAME.holds(name):
        problems.append(f"{where}: mend the address")
    if problems:
        return name
    storage = Storage(results.absolute() / name, uri)
    try:
        problems += refresh(storage)
    except (OSError, ValueError) as error:
        problems.append(f"{where}, which cannot be fetched ({error}): check the address, your keys and --results")
        return name
    if not is_file(storage.directory / "plan.json"):
        problems.append(f"{where}, where no plan.json lies: check the address")
    return name


def refresh_stored(directory: Path) -> list[str]:
    """Bring a study's folder up to date with its copy on object storage, if it has one. Returns problems."""
    place = stored_settings(directory)[1].get("storage", "")
    try:
        return refresh(Storage.under(place, directory.resolve()))
    except (OSError, ValueError) as error:
        return [f"the study's copy on {place} must be readable, but {error}: check your keys and the network"]


def part_label(part: str) -> Callable[[str], str]:
    """How a message names a setting in plan.json."""
    return lambda name: f"settings.{part}.{name}"


def stored_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study's plan, and the settings in it by field. A setting that an older version did not know is not among them.
    Raises SettingsError."""
    path = directory / "plan.json"
    try:
        plan = read_plan(directory)
    except OSError as error:
        raise SettingsError([f"the study's plan must be readable, but {path}: {error.strerror}"]) from error
    except DamagedFile as error:
        raise SettingsError([str(error)]) from error
    fix = "put it back from a copy, or go on with the version that wrote it"
    stored = plan["settings"]
    problems: list[str] = []
    values: dict[str, Any] = {}
    for part, group in zip(PARTS, GROUPS, strict=False):
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in stored[part].items()}
        names = [field.name for field in dataclasses.fields(group)]
        if unknown := [name for name in found if name not in names]:
            problems.append(f"{path} must hold known settings, but has {SHOWN.repr(unknown)}: {fix}")
        found = {name: value for name, value in found.items() if name in names}
        problems += [f"{path}: {text}" for text in broken_rules(group(**found), part_label(part), fix).values()]
        values |= found
    pinned = stored.get("pinned")
    known = [field.name for field in dataclasses.fields(TrialSettings)]
    if not isinstance(pinned, list) or not all(name in known for name in pinned):
        problems.append(f"{path} must hold a list of settings as settings.pinned, but has {SHOWN.repr(pinned)}: {fix}")
    points = plan.get("first_points", [])
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        problems.append(f"{path} must hold a list of objects as first_points, but has {SHOWN.repr(points)}: {fix}")
    if problems:
        raise SettingsError(problems)
    return plan, values


def resumed_values(
    given: dict[str, Any], directory: Path, problems: list[str]
) -> tuple[dict[str, Any], tuple[str, ...], list[dict[str, Any]] | None]:
    """The stored settings of a study with those of the command line over them, which of them are pinned, and the first
    points, or None when an older version has not stored them. Adds a problem for every setting that must not change.

    Raises:
        SettingsError: plan.json cannot be read.
    """
    plan, stored = stored_settings(directory)
    defaults = {field.name: field.default for group in GROUPS for field in dataclasses.fields(group)}
    values = stored | {"results": str(directory.parent)}
    for name, value in given.items():
        old = values.get(name, defaults[name])
        if name in BUDGETS:
            try:
                before, now = (seconds(limit) if name == "time_budget" else limit for limit in (old, value))
            except ValueError:
                continue  # `check` reports it
            if (before and now and now < before) or (before == 0 and now and name != "trials"):
                was = old or "none"
                problems.append(f"`{flag(name)}` must not fall when a study goes on, but {was} became {value}")
        elif name not in (*FREE, "space", "resume", "replay", "trial") and old != value:
            problems.append(
                f"`{flag(name)}` must stay what the study was begun with, {show(old)!r}, but got {show(value)!r}: "
                f"leave it out, or begin a new study"
            )
    problems += check_trust(plan, values.get("space", defaults["space"]), given.get("space", ""))
    values |= given
    if is_own(given.get("space", "")):
        values["space"] = str(Path(given["space"]).absolute())
    return values, tuple(plan["settings"]["pinned"]), plan.get("first_points")
