"""The user's cache: what is kept between studies, and can always be computed again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder `vlm-tune` in the user's cache. A user without a home gets a private temporary folder.

    Raises:
        OSError: that temporary folder cannot be made, or belongs to another user.
    """
    if os.path.isabs(home := os.environ.get("XDG_CACHE_HOME", "")):  # the XDG standard ignores relative paths
        return Path(home) / "vlm-tune"
    try:
        return Path.home() / ".cache" / "vlm-tune"
    except RuntimeError:  # no HOME, and no entry in the password file
        folder = Path(tempfile.gettempdir()) / f"vlm-tune-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            why = "the cache must be the user's own: set XDG_CACHE_HOME"
            raise PermissionError(errno.EPERM, why, str(folder)) from None
        return folder


def read_cache(path: Path) -> dict[str, Any]:
    """The values in a cache file; none if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_cache(path: Path, values: dict[str, Any]) -> None:
    """Replace a cache file. An error costs the next study time only, and is ignored."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(values))
        partial.replace(path)
