"""The study's journal: every event in order, one JSON line each, on disk before the program acts on it.

The journal is the one truth of a study: trial records and results are computed from it, tracking stores receive its
events, and a killed study goes on from it.

A line ends with its sequence number and a checksum of the bytes before it:

    {"event": "ended", "time": ..., ..., "seq": 12, "crc": "1a2b3c4d"}

They reveal a line that is cut off, changed, missing or doubled. Journals of the first version have neither.
"""

from __future__ import annotations

import contextlib
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
from tune.records.process import STUDY, as_process, runs_study, this_process

Event = dict[str, Any]

# The fields, with their types, that a line without a checksum must hold to count as an event.
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
MARK = b', "crc": "'  # before the checksum
LOCK_ATTEMPTS = 5
MAX_HOLDER = 10_000  # bytes of a lock's file that are read


@dataclass
class JournalContent:
    """The content of a journal file."""

    events: list[Event] = field(default_factory=list)
    """The undamaged events, each with its `seq`."""
    num_whole_bytes: int = 0
    """Bytes up to the last line end. A line after it was cut off."""
    cut_off: bool = False
    """Whether the last line has no line end."""
    damaged: list[int] = field(default_factory=list)
    """Numbers, from 1, of the lines that are no events of this journal."""
    num_missing: int = 0
    """How many events have lost their lines."""
    num_doubled: int = 0
    """How many lines repeat an earlier event."""
    next_seq: int = 0
    """Sequence number of the next event; the number of a lost line is never used again."""

    def notes(self) -> list[str]:
        """Sentences on the damage; empty if there is none. A last line that was cut off is normal after a kill."""
        parts = []
        if self.damaged:
            lines = ", ".join(map(str, self.damaged[:5])) + (", ..." if len(self.damaged) > 5 else "")
            parts.append(f"{plural(len(self.damaged), 'damaged line')} ({lines}) left out")
        if self.num_missing:
            parts.append(f"{plural(self.num_missing, 'event')} missing")
        if self.num_doubled:
            parts.append(f"{plural(self.num_doubled, 'doubled line')} left out")
        again = "; when the study goes on, it repeats the work that they recorded"
        return [f"journal.jsonl is damaged: {', '.join(parts)}{again}"] if parts else []


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def encode(event: Event) -> bytes:
    """An event's line, without the line end."""
    line = json.dumps(event, default=str)[:-1].encode()
    return line + MARK + f'{zlib.crc32(line):08x}"}}'.encode()


def decode(line: bytes) -> Event | None:
    """The event of a line with a checksum; None when the checksum is missing or wrong."""
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
    """Read a journal; empty if there is no file. Damaged lines are left out. Raises OSError."""
    if not path.exists():
        return JournalContent()
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    journal = JournalContent(num_whole_bytes=len(content) - len(rest), cut_off=bool(rest))
    checked, last_line = False, 0
    for number, line in enumerate(lines, 1):
        event = decode(line)
        checked |= event is not None
        if event is None and not checked:
            event = decode_unchecked(line)
            if event is not None:
                event["seq"] = number - 1
        if event is None:
            journal.damaged.append(number)
            continue
        seq = event["seq"]
        if seq < journal.next_seq:
            journal.num_doubled += 1
            continue
        journal.num_missing += seq - journal.next_seq
        journal.next_seq = seq + 1
        last_line = number
        journal.events.append(event)
    journal.next_seq += sum(number > last_line for number in journal.damaged)
    # A damaged line counts as one of the missing events.
    journal.num_missing = max(0, journal.num_missing - len(journal.damaged))
    return journal


def read_events(path: Path) -> list[Event]:
    """The undamaged events of a journal; see `read_journal`."""
    return read_journal(path).events


class Journal:
    """A journal that is open for writing. `events` holds all events, those of earlier sessions too; `notes` names the
    damage in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_journal(path)
        self.events, self.notes = content.events, content.notes()
        self._next_seq = content.next_seq
        new = not path.exists()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # open as long as the study
        self._file.truncate(content.num_whole_bytes)
        if new:
            sync_folder(path.parent)

    def write(self, kind: str, **fields: Any) -> Event:
        """Append an event and flush it to the disk; retry while the disk fails. Returns the event as it reads back."""
        line = encode({"event": kind, "time": time.time(), **fields, "seq": self._next_seq})
        retry_on_os_error(lambda: self._append(line + b"\n"), lambda text: logging.getLogger(__name__).warning(text))
        event = decode(line)
        assert event is not None
        self._next_seq += 1
        self.events.append(event)
        return event

    def _append(self, line: bytes) -> None:
        """Append a whole line. If the disk fails midway, remove the part that was written and raise OSError."""
        end = self._file.seek(0, os.SEEK_END)
        left = memoryview(line)
        try:
            while left:  # a nearly full disk writes a part and raises nothing
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise


class StudyLock:
    """The lock of the one process that runs a study. The system releases it whenever that process ends. Its file names
    the last process that took it."""

    def __init__(self, directory: Path) -> None:
        self._file = open(directory / "lock", "a")  # noqa: SIM115  # held until the process ends

    def acquire(self, work: str = STUDY) -> bool:
        """Take the lock. Returns whether this process has it now.

        Args:
            work: what for, as in `tune.records.process`.
        """
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # `holder` has it for less than a millisecond
                if attempt + 1 == LOCK_ATTEMPTS:
                    return False
                time.sleep(0.02)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            self._file.truncate(0)
            self._file.write(json.dumps(this_process(work)))
            self._file.flush()
        return True


def holder(directory: Path) -> dict[str, Any] | None:
    """The process that holds a study's lock now; {} if it does not say who it is, None if there is none.

    Needs no right to write in the folder. A process on another machine is only seen if the folder's file system tells
    all machines of its locks. Raises OSError.
    """
    try:
        handle = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                return as_process(json.loads(file.read(MAX_HOLDER))) or {}
            except (ValueError, RecursionError):
                return {}
    return None


def is_running(directory: Path) -> bool:
    """Whether a process runs the study. Raises OSError."""
    return runs_study(holder(directory))
