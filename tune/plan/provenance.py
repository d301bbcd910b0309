"""What a study's numbers rest on, as hashes and versions: a study that goes on must rest on the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

from train_fn.model.checkpoint import base_hash
from train_fn.model.unchanged import data_hash

__all__ = ["base_hash", "data_hash", "git_state"]

ROOT = Path(__file__).resolve().parents[2]


def git_state() -> dict[str, str | bool]:
    """Revision of this project's working tree and whether it has changes; empty where it is not a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (ROOT / ".git").exists():
            return {}
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}  # no git on this machine, or not its owner
