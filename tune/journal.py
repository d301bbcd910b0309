"""The study's journal: every event in order, one JSON line each, on disk before anybody hears of it.

It is the one truth of a study. Trial records are folded from it (`tune.results`), tracking stores are told from it
(`tune.tracking`), and a killed study goes on from it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from train_fn.storage import patiently

Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """The events of a journal; none if there is none. A last line that was cut by a kill is no event."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line end is empty, or cut


class Journal:
    """Appends events; `events` holds all of them, those of earlier sessions too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = read_events(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # open as long as the study
        whole = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)

    def write(self, kind: str, **fields: Any) -> Event:
        """Append one event, flushed to the disk. Returns it as it will be read back."""
        line = json.dumps({"event": kind, "time": time.time(), **fields}, default=str)
        patiently(lambda: self._append(line.encode() + b"\n"), lambda text: logging.getLogger(__name__).warning(text))
        event = json.loads(line)
        self.events.append(event)
        return event

    def _append(self, line: bytes) -> None:
        """A line that could be written in part only is taken back, to be tried again."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise


class StudyLock:
    """Held by the one process that runs a study; the system lets go of it however that process ends."""

    def __init__(self, directory: Path) -> None:
        self._file = open(directory / "lock", "a")  # noqa: SIM115  # held until the process ends

    def acquire(self) -> bool:
        """Whether this process holds the study now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
