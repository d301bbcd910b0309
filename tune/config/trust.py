"""Whether a user's own search space, which is a program, may run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN
from train_fn.support.cache import cache_folder
from train_fn.support.files import write_file
from tune.config.space import SpaceError, is_own, space_hash


def remembered(digest: str) -> Path:
    """The mark that this user has begun a study with a space of this hash, on this machine."""
    return cache_folder() / "spaces" / digest


def remember_space(space: str) -> None:
    """Leave that mark for a user's own space. Raises OSError."""
    if is_own(space):
        mark = remembered(space_hash(space))
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, b"")


def check_trust(plan: dict[str, Any], stored: str, given: str) -> list[str]:
    """Whether the space of a study that goes on may run.

    A study's folder, plan.json with it, may come from somebody else, and a space is a program. Its file must have the
    hash that the plan names; and the user must have begun a study with a file of that hash on this machine, or name the
    file on the command line.

    Args:
        stored: the space that the plan names.
        given: --space.
    """
    if not given and not is_own(stored):
        return []
    space = given or stored
    try:
        digest = space_hash(space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    if digest != plan.get("space_hash"):
        return [
            f"`--space` must have the content that the study was begun with (sha256 "
            f"{SHOWN.repr(plan.get('space_hash'))}), but {space!r} has {digest!r}: put it back, or begin a new study"
        ]
    if given or remembered(digest).exists():
        return []
    return [
        f"`--space` must be given for a study that you have not begun on this machine, since its space is a program, "
        f"but got none: look at {space!r}, then add --space {shlex.quote(space)}"
    ]
