"""The study's journal: every event in order, one JSON line each, on disk before anything else happens with it.

It is the one truth of a study. Trial records are made from it (`tune.results`), tracking stores are fed from it
(`tune.tracking`), and a killed study goes on from it.

A line ends with its sequence number and a checksum of what stands before:

    {"event": "ended", "time": ..., ..., "seq": 12, "crc": "1a2b3c4d"}

so that a line that is cut off, changed, missing or doubled is noticed. Journals of the first version have neither.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.support.files import sync_folder
from train_fn.support.storage import retry_on_os_error

Event = dict[str, Any]

# What a line without a checksum must hold to be taken for an event.
NUMBER: Any = (int, float)
REQUIRED: dict[str, dict[str, Any]] = {
    "session": {"params": dict, "tags": dict},
    "started": {"number": int, "searched": dict, "settings": dict, "params": dict},
    "report": {"number": int, "epoch": int, "step": int, "metrics": dict, "seconds": dict, "wall_s": NUMBER,
               "waited_s": NUMBER, "device_s": NUMBER},
    "ended": {"number": int, "state": str, "error": str, "step": int, "seconds": dict, "applied": dict,
              "device_s": NUMBER, "notes": list},
    "confirmed": {"number": int, "run": int, "value": NUMBER},
    "tested": {"tests": dict, "predictions": dict, "adapters": dict, "num_trials": int},
    "study_ended": {"state": str, "tags": dict, "metrics": dict, "num_trials": int, "artifacts": list},
}  # fmt: skip
MARK = b', "crc": "'  # stands before the checksum


@dataclass
class JournalContent:
    """What a journal file holds."""

    events: list[Event] = field(default_factory=list)
    """The sound ones, each with its `seq`."""
    num_whole_bytes: int = 0
    """Bytes up to the last line end: what follows was cut off."""
    cut_off: bool = False
    """Whether the last line has no end."""
    damaged: list[int] = field(default_factory=list)
    """Lines, from 1, that are no events of this journal."""
    num_missing: int = 0
    """Events whose lines are gone."""
    num_doubled: int = 0
    """Lines that repeat an earlier event."""
    next_seq: int = 0
    """Sequence number of the next event: no number that a lost line may have had is used again."""

    def notes(self) -> list[str]:
        """What was left out, for people; empty when nothing was. A last line that was cut off is no news: so a journal
        looks after a kill."""
        parts = []
        if self.damaged:
            lines = ", ".join(map(str, self.damaged[:5])) + (", ..." if len(self.damaged) > 5 else "")
            parts.append(f"{plural(len(self.damaged), 'damaged line')} ({lines}) left out")
        if self.num_missing:
            parts.append(f"{plural(self.num_missing, 'event')} missing")
        if self.num_doubled:
            parts.append(f"{plural(self.num_doubled, 'doubled line')} left out")
        again = "; what they were about is done again when the study goes on"
        return [f"journal.jsonl is damaged: {', '.join(parts)}{again}"] if parts else []


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def encode(event: Event) -> bytes:
    """An event as its line, without the line end."""
    line = json.dumps(event, default=str)[:-1].encode()
    return line + MARK + f'{zlib.crc32(line):08x}"}}'.encode()


def decode(line: bytes) -> Event | None:
    """The event of a line that has a checksum; None when it has none, or another one."""
    body, mark, crc = line.rpartition(MARK)
    if not mark or crc != f'{zlib.crc32(body):08x}"}}'.encode():
        return None
    try:
        event = json.loads(body + b"}")
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("seq"), int) and "event" in event else None


def decode_unchecked(line: bytes) -> Event | None:
    """The event of a line of the first version, or None."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("time"), int | float) or MARK in line:
        return None
    kind = event.get("event")
    rules = REQUIRED.get(kind) if isinstance(kind, str) else None
    return event if rules and all(isinstance(event.get(name), rule) for name, rule in rules.items()) else None


def read_journal(path: Path) -> JournalContent:
    """Read a journal; nothing if there is none. Damage leaves out lines, never raises. Raises OSError."""
    if not path.exists():
        return JournalContent()
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    found = JournalContent(num_whole_bytes=len(content) - len(rest), cut_off=bool(rest))
    checked, last_line = False, 0
    for number, line in enumerate(lines, 1):
        event = decode(line)
        checked |= event is not None
        if event is None and not checked:
            event = decode_unchecked(line)
            if event is not None:
                event["seq"] = number - 1
        if event is None:
            found.damaged.append(number)
            continue
        seq = event["seq"]
        if seq < found.next_seq:
            found.num_doubled += 1
            continue
        found.num_missing += seq - found.next_seq
        found.next_seq = seq + 1
        last_line = number
        found.events.append(event)
    found.next_seq += sum(number > last_line for number in found.damaged)
    # A damaged line was an event once, unless somebody else put it there.
    found.num_missing = max(0, found.num_missing - len(found.damaged))
    return found


def read_events(path: Path) -> list[Event]:
    """The sound events of a journal; see `read_journal`."""
    return read_journal(path).events


class Journal:
    """Appends events; `events` holds all of them, those of earlier sessions too, and `notes` what was left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = read_journal(path)
        self.events, self.notes = found.events, found.notes()
        self._next_seq = found.next_seq
        new = not path.exists()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # open as long as the study
        self._file.truncate(found.num_whole_bytes)
        if new:
            sync_folder(path.parent)

    def write(self, kind: str, **fields: Any) -> Event:
        """Append one event, flushed to the disk. Returns it as it will be read back."""
        line = encode({"event": kind, "time": time.time(), **fields, "seq": self._next_seq})
        retry_on_os_error(lambda: self._append(line + b"\n"), lambda text: logging.getLogger(__name__).warning(text))
        event = decode(line)
        assert event is not None
        self._next_seq += 1
        self.events.append(event)
        return event

    def _append(self, line: bytes) -> None:
        """Append a whole line. What could be written in part only is taken back, to be tried again."""
        end = self._file.seek(0, os.SEEK_END)
        left = memoryview(line)
        try:
            while left:  # a nearly full disk takes a part of it and raises nothing
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise


class StudyLock:
    """Held by the one process that runs a study; the system releases it however that process ends."""

    def __init__(self, directory: Path) -> None:
        self._file = open(directory / "lock", "a")  # noqa: SIM115  # held until the process ends

    def acquire(self) -> bool:
        """Whether this process holds the study now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
