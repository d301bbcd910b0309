"""Budgets of a study (time, GPU-hours, failures, a score to reach), and how much of them its events have used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from tune.records.goals import comparison, holds
from tune.records.journal import Event
from tune.records.trials import TrialRecord

MAX_SECONDS = 10**6 * 3600


def seconds(text: str) -> float:
    """A duration such as 30s, 90m or 2h, in seconds; 0 for an empty text. Raises ValueError."""
    if not text:
        return 0.0
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    value = float(text[:-1]) * unit if unit else float(text)
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{text!r} is no time above 0 and at most {MAX_SECONDS} s")
    return value


class Budgets(Protocol):
    """The fields of `StudySettings` that limit a study."""

    @property
    def time_budget(self) -> str: ...
    @property
    def gpu_hours(self) -> float: ...
    @property
    def max_failures(self) -> int: ...
    @property
    def stop_when(self) -> str: ...


def exhausted_budget(
    records: Iterable[TrialRecord], events: Sequence[Event], study: Budgets, until: float | None = None
) -> str:
    """A sentence on the first budget that is used up; "" if none is. until: see `wall_seconds`."""
    records = list(records)
    if study.time_budget and wall_seconds(events, until) >= seconds(study.time_budget):
        return f"the time budget of {study.time_budget} is used up"
    hours = sum(record.device_seconds for record in records) / 3600
    if study.gpu_hours and hours >= study.gpu_hours:
        return f"the budget of {study.gpu_hours:g} GPU-hours is used up"
    failed = sum(record.state == "FAILED" for record in records)
    if study.max_failures and failed >= study.max_failures:
        return f"{failed} trials have failed (--max-failures {study.max_failures})"
    if study.stop_when:
        rule = comparison(study.stop_when)
        for record in records:
            if record.state == "COMPLETE" and holds(rule, record.metrics):
                return f"trial {record.number} has reached {study.stop_when}"
    return ""


def wall_seconds(events: Sequence[Event], until: float | None = None) -> float:
    """Seconds that a study has run, in all its sessions.

    Args:
        until: the end of the last session, in seconds since the epoch. None: it runs now.
    """
    return sum(session_s for _, session_s in sessions(events, until))


def sessions(events: Sequence[Event], until: float | None = None) -> list[tuple[Event, float]]:
    """The first event of each session, and the session's seconds: from its start (before that event) to its end."""
    starts = [number for number, event in enumerate(events) if event["event"] == "session"]
    ends = [events[number - 1]["time"] for number in starts[1:]] + [time.time() if until is None else until]
    return [
        (events[number], end - events[number]["time"] + events[number].get("startup_s", 0.0))
        for number, end in zip(starts, ends, strict=False)
    ]


def lanes_of(session: Event) -> int:
    """The number of lanes of a session, from its first event."""
    return int(session.get("params", {}).get("lanes", 0))


def last_time(events: list[Event]) -> float:
    """The time of the last event, in seconds since the epoch: when a study that does not run has ended."""
    return events[-1]["time"] if events else 0.0
