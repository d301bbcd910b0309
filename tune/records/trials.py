"""The record of each trial, made from the journal's events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train_fn.settings import PROFILE_PREFIX
from tune.records.journal import Event

DONE_STATES = ("COMPLETE", "STOPPED", "FAILED")  # of which none is run again
END_STATES = (*DONE_STATES, "INTERRUPTED")


@dataclass
class TrialRecord:
    """One trial as the journal tells it."""

    number: int
    searched: dict[str, Any]
    """The values that the search chose, by the names it asked for."""
    settings: dict[str, Any]
    """All settings that the trial was given."""
    distributions: dict[str, str] = field(default_factory=dict)
    """Optuna's JSON of the range of each searched value; empty in journals of older versions."""
    state: str = "RUNNING"
    epochs: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics and training loss after each epoch."""
    report_seqs: list[int] = field(default_factory=list)
    """Sequence number in the journal of each epoch's report: which reports came first."""
    applied: dict[str, Any] = field(default_factory=dict)
    """What the live engine said it trains with."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, those before a loss or a kill included. `wall`: of the lane, from the end of its trial before
    to the end of this one; `waited`: the part of it before this one came."""
    attempt_s: float | None = None
    """Seconds from the begin of the last attempt on its lane to the last report; None before the first report."""
    lane: int | None = None
    turn: int | None = None
    """How many assignments the lane's worker group had had before this one."""
    device: str = ""
    num_threads: int = 0
    """torch threads of each worker; 0: torch's default."""
    notes: list[str] = field(default_factory=list)
    """What was changed so that the trial could run, such as a smaller micro-batch."""
    base_gib: float = 0.0
    """GiB of the base's weights in each worker."""
    base_16_bit_gib: float = 0.0
    """GiB that they would be at 2 bytes a weight."""
    base_hash: str = ""
    """sha256 of the base's files as the trial's workers saw them."""
    data_hash: str = ""
    """sha256 of images, questions and answers."""
    step: int = 0
    """Optimizer steps done."""
    finished: bool = False
    """Whether the last report was the trial's own last."""
    error: str = ""
    started_at: float = 0.0
    """Seconds since the epoch at which it was begun first."""
    ended_at: float = 0.0
    device_seconds: float = 0.0
    """Seconds of a device (GPU, or CPU worker), over all its workers, lost attempts and earlier sessions too."""
    spent_before: float = 0.0
    """Those of earlier sessions."""
    incomplete: bool = False
    """Whether the journal lost an event of this trial: those after it do not count, until it is begun again."""

    @classmethod
    def of(cls, started: Event) -> TrialRecord:
        """The record of a trial that begins."""
        return cls(started["number"], started["searched"], started["settings"], started.get("distributions", {}))

    def hear(self, event: Event) -> None:
        """Take in one event of this trial."""
        if event["event"] == "report" and event["epoch"] <= len(self.epochs):
            return  # of an epoch that is known
        self.incomplete |= self.contradicts(event)
        if event["event"] == "started":
            self.state, self.error, self.incomplete = "RUNNING", "", False
            self.started_at = self.started_at or event["time"]
            self.spent_before = self.device_seconds
        elif self.incomplete:
            return
        elif event["event"] == "report":
            self.epochs.append(event["metrics"])
            self.report_seqs.append(event.get("seq", 0))
            for name in ("finished", "applied", "lane", "turn", "device", "num_threads", "notes", "base_gib",
                         "base_16_bit_gib", "base_hash", "data_hash", "step"):  # fmt: skip
                # An older journal may not know every one of them.
                setattr(self, name, event.get(name, getattr(self, name)))
            self.attempt_s = event["wall_s"] - event["waited_s"]
            # The phases of a trial that goes on include those before its loss or kill; `wall_s` is of this attempt.
            phases = sum(s for name, s in event["seconds"].items() if not name.startswith(PROFILE_PREFIX))
            wall = event["waited_s"] + max(self.attempt_s, phases)
            self.seconds = event["seconds"] | {"wall": wall, "waited": event["waited_s"]}
            self.device_seconds = self.spent_before + event["device_s"]
        elif event["event"] == "ended":
            self.state, self.error, self.ended_at = event["state"], event["error"], event["time"]
            self.device_seconds = event["device_s"]

    def contradicts(self, event: Event) -> bool:
        """Whether an event cannot follow those before it, because one between them is lost."""
        if event["event"] == "report":
            return event["epoch"] > len(self.epochs) + 1
        if event["event"] == "ended":
            return event.get("step", self.step) != self.step or (event["state"] == "COMPLETE" and not self.finished)
        return False

    def value(self, name: str) -> float:
        """A metric or a cost of the trial; not a number when it has none."""
        costs = {"trainable_params": self.applied.get("trainable_params"), "train_s": self.seconds.get("train")}
        found = {**costs, **self.metrics}.get(name)
        return math.nan if found is None else found

    @property
    def metrics(self) -> dict[str, float]:
        """The last epoch's metrics: what the trial counts by."""
        return self.epochs[-1] if self.epochs else {}

    @property
    def overhead_s(self) -> float:
        """Seconds of the lane that the trial took without training or evaluating."""
        return self.seconds.get("wall", 0.0) - self.seconds.get("train", 0.0) - self.seconds.get("evaluation", 0.0)


def fold(events: Sequence[Event]) -> dict[int, TrialRecord]:
    """The record of every trial in a journal. A trial whose begin the journal has lost has none: it runs again."""
    records: dict[int, TrialRecord] = {}
    for event in events:
        if event["event"] in ("started", "report", "ended"):
            number = event["number"]
            if number not in records and event["event"] == "started":
                records[number] = TrialRecord.of(event)
            if number in records:
                records[number].hear(event)
    return records
