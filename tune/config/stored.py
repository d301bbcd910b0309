"""The settings of a study that exists, from its plan.json, and which of them `--resume` may change."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, TrialSettings, broken_rules
from train_fn.support.files import DamagedFile
from tune.config.base_shape import BaseShape
from tune.config.paths import SettingsError
from tune.config.settings import GROUPS, REMOVED_METRICS, REMOVED_SAMPLERS, flag, show
from tune.config.space import is_own
from tune.config.trust import check_trust
from tune.records.budgets import seconds
from tune.records.control import asked_trials
from tune.records.journal import read_events
from tune.records.plan import PARTS, read_plan

# What may change when a study goes on: how it is run and shown; and the budgets, upwards only.
FREE = ("results", "hang_timeout", "lanes", "lanes_per_gpu", "device", "verbose", "profile", "trace", "report_to",
        "stop_when", "confirm", "confirm_seeds", "folds", "require", "register",
        "save_state_every")  # fmt: skip
BUDGETS = ("trials", "time_budget", "gpu_hours", "max_failures")


def resumed_values(
    values: dict[str, Any], directory: Path, problems: list[str]
) -> tuple[dict[str, Any], tuple[str, ...], list[dict[str, Any]] | None, BaseShape | None]:
    """The settings with which a study goes on. Adds a problem for every setting that must not change.

    Args:
        values: those of the command line.

    Returns:
        The stored values with those of the command line over them; which trial settings the search does not choose; the
        first points, and what the space may know of the base, each None when an older version has not stored it.

    Raises:
        SettingsError: plan.json cannot be read.
    """
    plan, stored = stored_settings(directory)
    defaults = {field.name: field.default for group in GROUPS for field in dataclasses.fields(group)}
    merged = stored | {"results": str(directory.parent)}
    if "trials" in stored:
        with contextlib.suppress(OSError, DamagedFile):  # `resume` reports a journal that cannot be read
            merged["trials"] = asked_trials(read_events(directory / "journal.jsonl"), stored["trials"])
    for name, value in values.items():
        before = merged.get(name, defaults[name])
        if name in BUDGETS:
            try:
                old, new = (seconds(limit) if name == "time_budget" else limit for limit in (before, value))
            except ValueError:
                continue  # `check` reports it
            if (old and new and new < old) or (old == 0 and new and name != "trials"):
                was = before or "none"
                problems.append(f"`{flag(name)}` must not fall when a study goes on, but {was} became {value}")
        elif name not in (*FREE, "space", "resume", "replay", "trial", "run") and before != value:
            problems.append(
                f"`{flag(name)}` must stay what the study was begun with, {show(before)!r}, but got {show(value)!r}: "
                f"leave it out, or begin a new study"
            )
    sampler = plan["settings"]["study"].get("sampler")
    if values.get("resume") and sampler in REMOVED_SAMPLERS:
        problems.append(
            f"`--sampler` must be one of this version's, but the study was begun with {sampler}: go on with the "
            f"version that began it, or begin a new study (this one as its --warm-start)"
        )
    if values.get("resume") and (gone := removed_metrics(plan["settings"]["study"])):
        problems.append(
            f"`--metric`, `--require` and `--stop-when` must name metrics of this version, but the study was begun "
            f"with {', '.join(gone)}: go on with the version that began it, or begin a new study"
        )
    space = values.get("space", "")
    problems += check_trust(plan, merged.get("space", defaults["space"]), space)
    merged |= values
    if is_own(space):
        merged["space"] = str(Path(space).absolute())
    base = BaseShape.from_dict(plan["base"]) if "base" in plan else None
    return merged, tuple(plan["settings"]["pinned"]), plan.get("first_points"), base


def removed_metrics(study: Mapping[str, Any]) -> list[str]:
    """The metrics that an earlier version's study is tuned on or ruled by, and that no trial reports any more."""
    texts = [*study.get("metric", ()), *study.get("require", ()), study.get("stop_when", "")]
    return [name for name in REMOVED_METRICS if any(re.search(rf"\b{name}\b", text) for text in texts)]


def without_removed(study: Mapping[str, Any]) -> dict[str, Any]:
    """The search's settings without what only earlier versions had: --show and --replay need none of it."""
    if study.get("sampler") in REMOVED_SAMPLERS:
        study = {**study, "sampler": "tpe"}
    if removed_metrics(study):
        gone = re.compile(rf"\b({'|'.join(REMOVED_METRICS)})\b")
        lists = {name: tuple(text for text in study.get(name, ()) if not gone.search(text)) for name in
                 ("metric", "require")}  # fmt: skip
        stop_when = study.get("stop_when", "")
        study = {**study, **lists, "stop_when": "" if gone.search(stop_when) else stop_when}
    return dict(study)


def stored_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study's plan, and the settings in it by field. Settings that its version did not have are missing.

    Raises:
        SettingsError: plan.json cannot be read, or holds what no version writes.
    """
    path = directory / "plan.json"
    try:
        plan = read_plan(directory)
    except OSError as error:
        raise SettingsError([f"the study's plan must be readable, but {path}: {error.strerror}"]) from error
    except DamagedFile as error:
        raise SettingsError([str(error)]) from error
    fix = "put it back from a copy, or go on with the version that wrote it"
    problems: list[str] = []
    stored: dict[str, Any] = {}
    for part, group in zip(PARTS, GROUPS, strict=False):
        names = {field.name for field in dataclasses.fields(group)}
        values = plan["settings"][part]
        if unknown := [name for name in values if name not in names]:
            problems.append(f"{path} must hold known settings, but has {SHOWN.repr(unknown)}: {fix}")
        values = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items() if n in names}
        if part == "study":
            values = without_removed(values)
        broken = broken_rules(group(**values), f"settings.{part}.{{}}".format, fix)
        problems += [f"{path}: {text}" for text in broken.values()]
        stored |= values
    pinned = plan["settings"].get("pinned")
    names = {field.name for field in dataclasses.fields(TrialSettings)}
    if not isinstance(pinned, list) or not all(isinstance(name, str) and name in names for name in pinned):
        problems.append(f"{path} must hold a list of settings as settings.pinned, but has {SHOWN.repr(pinned)}: {fix}")
    points = plan.get("first_points", [])
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        problems.append(f"{path} must hold a list of objects as first_points, but has {SHOWN.repr(points)}: {fix}")
    try:
        BaseShape.from_dict(plan.get("base", dataclasses.asdict(BaseShape())))
    except ValueError as error:
        problems.append(f"{path}: base {error}, but has {SHOWN.repr(plan['base'])}: {fix}")
    if problems:
        raise SettingsError(problems)
    return plan, stored
