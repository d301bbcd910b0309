"""Whether a user's own search space, or own metric, may run.

A space is a program, and a study's folder, with its plan.json, may come from somebody else. So `--resume` and
`--replay` run a user's own space only if its content has the hash in plan.json, and if this user has begun a study with
that content on this machine or names the file with `--space`.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

from train_fn.data.samples import OwnMetric
from train_fn.settings import SHOWN
from train_fn.support.cache import cache_folder
from train_fn.support.files import write_file
from tune.config.space import SpaceError, is_own, space_hash


def remembered(digest: str) -> Path:
    """The file that marks a space, by its hash, as one with which this user has begun a study on this machine."""
    return cache_folder() / "spaces" / digest


def remember_space(space: str) -> None:
    """Mark a user's own space. Raises OSError."""
    if is_own(space):
        mark = remembered(space_hash(space))
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, b"")


def remember_metric(metric: OwnMetric | None) -> None:
    """Mark a user's own metric. Raises OSError."""
    if metric:
        mark = remembered(source_hash(metric.source))
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, b"")


def check_metric_trust(metric: OwnMetric | None) -> list[str]:
    """Problems with the metric of a study that goes on: splits.json holds its source, and may be a stranger's."""
    if metric is None or remembered(source_hash(metric.source)).exists():
        return []
    return [
        f"the study's own metric {metric.name!r} is a program, with which you have begun no study on this machine: "
        f"look at `own_metric` in splits.json, and begin a study with that file and --metric "
        f"{shlex.quote(metric.path)}:{metric.name} first"
    ]


def source_hash(source: str) -> str:
    """sha256 of a program's text."""
    return hashlib.sha256(source.encode()).hexdigest()


def check_trust(plan: dict[str, Any], stored: str, named: str) -> list[str]:
    """Problems with the space of a study that goes on.

    Args:
        stored: the space in plan.json.
        named: the space of --space, or "".
    """
    if not named and not is_own(stored):
        return []
    space = named or stored
    try:
        digest = space_hash(space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    if digest != plan.get("space_hash"):
        return [
            f"`--space` must have the content that the study was begun with (sha256 "
            f"{SHOWN.repr(plan.get('space_hash'))}), but {space!r} has {digest!r}: put it back, or begin a new study"
        ]
    if named or remembered(digest).exists():
        return []
    return [
        f"`--space` must be given for a study that you have not begun on this machine, since its space is a program, "
        f"but got none: look at {space!r}, then add --space {shlex.quote(space)}"
    ]
