"""Which process holds a study: its work, machine, number, and when it began. The study's lock and the journal's
"session" events name it, so that it can be found from elsewhere."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUDY, REPLAY, SYNC = "study", "replay", "sync"
"""What a process does that holds a study's lock."""


def this_process(work: str = STUDY) -> dict[str, Any]:
    """This process, as JSON holds it."""
    return {"work": work, "host": socket.gethostname(), "boot": boot(), "pid": os.getpid(), "since": time.time()}


def as_process(value: Any) -> dict[str, Any] | None:
    """A process from JSON; None if it is none. Studies of earlier versions name none."""
    kinds = {"work": str, "host": str, "boot": str, "pid": int, "since": int | float}
    whole = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    return value if whole else None


def runs_study(process: Mapping[str, Any] | None) -> bool:
    """Whether the holder of a study's lock, from `journal.holder`, runs the study. Earlier versions name no work."""
    return process is not None and process.get("work", STUDY) == STUDY


def was_here(process: Mapping[str, Any]) -> bool:
    """Whether a process ran on this machine, before or after its last restart. Then its lock shows whether it runs."""
    return process["boot"] == boot() != "" or process["host"] == socket.gethostname()


def named(process: Mapping[str, Any]) -> str:
    """A process in words."""
    return f"on {process['host']} (process {process['pid']}) since {clock(process['since'])}"


def clock(seconds: float) -> str:
    """A time of this machine's clock, to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


def boot() -> str:
    """An identifier of this machine's current boot; "" if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
