"""What the user asks of a study with `python -m tune.control`: files in its folder, and the journal's "control" events.

The command writes one file for each action into control/. The process that runs the study takes them in order: it
writes an event that names the file, acts, and removes the file. The event is the truth. A file that an event names has
been taken; what its action means after a kill is computed from the events.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.support.files import read_json, write_json
from tune.records.journal import Event

ACTIONS = ("stop", "add", "trials", "pause")
MAX_BYTES = 1_000_000  # of a request's file


@dataclass(frozen=True)
class Request:
    """An action that the user asks for."""

    action: str
    """One of ACTIONS."""
    value: Any = None
    """stop: a trial's number; add: a point, as in --first-points; trials: how many; pause: None."""


def write_request(directory: Path, request: Request) -> str:
    """Ask a study for an action. Returns the name of the file, which no other has. Raises OSError."""
    folder = directory / "control"
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    write_json(folder / name, {"action": request.action, "value": request.value})
    return name


def waiting_requests(directory: Path) -> list[str]:
    """The names of the files that wait in a study's folder, the oldest first. Files that are being written have no such
    name yet."""
    return sorted(path.name for path in (directory / "control").glob("[0-9]*.json") if path.is_file())


def read_request(directory: Path, name: str) -> Request:
    """A request from its file. Raises OSError, or ValueError if the file holds none."""
    path = directory / "control" / name
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES:,} bytes, but has more: use python -m tune.control")
    content = read_json(path, dict, "use python -m tune.control")
    if content.get("action") not in ACTIONS:
        raise ValueError(f"{path} must hold one of {', '.join(ACTIONS)}, but does not: use python -m tune.control")
    return Request(content["action"], content.get("value"))


def is_control(event: Event) -> bool:
    """Whether an event is a whole "control" event. A study's folder, with its journal, may come from a stranger."""
    kind = {"stop": int, "add": dict}.get(str(event.get("action")), object)
    texts = all(isinstance(event.get(name), str) for name in ("file", "action", "refused", "done"))
    whole = isinstance(event.get("value"), kind) or bool(event.get("refused"))
    return event["event"] == "control" and texts and whole and isinstance(event.get("trials"), int)


def taken(events: Sequence[Event]) -> list[Event]:
    """The "control" events of the actions that were taken, without those that were refused."""
    return [event for event in events if is_control(event) and not event["refused"]]


def asked_trials(events: Sequence[Event], planned: int) -> int:
    """How many trials a study is to have.

    Args:
        planned: the number in plan.json, which is written before each session's first event.
    """
    last = next((event for event in reversed(events) if event["event"] == "session" or is_control(event)), None)
    return last["trials"] if last and last["event"] == "control" else planned


def stopped_trials(events: Sequence[Event]) -> set[int]:
    """The numbers of the trials that the user has stopped."""
    return {event["value"] for event in taken(events) if event["action"] == "stop"}


def added_points(events: Sequence[Event]) -> dict[str, dict[str, Any]]:
    """The points that the user has added and no trial has begun with yet, by the name of the request's file."""
    begun = {event.get("added") for event in events if event["event"] == "started"}
    added = [event for event in taken(events) if event["action"] == "add"]
    return {event["file"]: event["value"] for event in added if event["file"] not in begun}


def sentence(event: Event) -> str:
    """A "control" event in words."""
    value = "" if event.get("value") is None else f" {json.dumps(event['value'])}"
    return f"{event['action']}{value}: {event['refused'] or event['done']}"
