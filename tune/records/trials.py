"""The record of each trial, from the journal's events."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train_fn.jobs import TrialFacts
from train_fn.settings import PROFILE_PREFIX, TrialSettings
from tune.records.end_state import EndState
from tune.records.goals import Goal
from tune.records.journal import Event


@dataclass
class TrialRecord(TrialFacts):
    """One trial, from its events in the journal.

    `seconds` has two more entries than the reports: `wall`, seconds of the lane since its last job ended, and `waited`,
    the part of them before this trial came.
    """

    number: int
    searched: dict[str, Any]  # the values that the search chose, by the names under which the space asks for them
    settings: dict[str, Any]  # all settings of the trial
    distributions: dict[str, str] = field(default_factory=dict)
    """Optuna's JSON of the range of each searched value; empty in journals of older versions."""
    state: EndState = EndState.RUNNING
    epochs: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics and training loss after each epoch; `metrics` are those of the one that counts."""
    rungs: list[dict[str, Any]] = field(default_factory=list)
    """Reports within epochs, at rungs of early stopping: each with `progress` (epochs trained), `metrics` and `seq`."""
    report_seqs: list[int] = field(default_factory=list)
    """Sequence number in the journal of each epoch's report: which reports came first."""
    attempt_s: float | None = None
    """Seconds from the start of the last attempt to its last report; None before the first report."""
    error: str = ""
    started_at: float = 0.0  # seconds since 1970 at the trial's first start
    ended_at: float = 0.0
    device_seconds: float = 0.0
    """Seconds of a device (GPU, or CPU worker) over all workers, lost attempts and earlier sessions included."""
    spent_before: float = 0.0  # those of earlier sessions
    incomplete: bool = False
    """Whether the journal lost an event of this trial. Later events do not count until the trial is started again."""
    repeats: int | None = None
    """The earlier trial of the same point, when this one trains it with another seed."""

    @classmethod
    def of(cls, started: Event) -> TrialRecord:
        """The record of a trial that starts."""
        return cls(
            number=started["number"],
            searched=started["searched"],
            settings=started["settings"],
            distributions=started.get("distributions", {}),
            repeats=started.get("repeats"),
        )

    def apply(self, event: Event) -> None:
        """Apply one event of this trial."""
        if event["event"] == "distributions":
            self.distributions = event["distributions"]
            return
        if event["event"] == "report" and progress_of(event) <= self.progress:
            return  # the record has this report
        self.incomplete |= self.contradicts(event)
        if event["event"] == "started":
            self.state, self.error, self.incomplete = EndState.RUNNING, "", False
            self.started_at = self.started_at or event["time"]
            self.spent_before = self.device_seconds
        elif self.incomplete:
            return
        elif event["event"] == "report":
            if progress_of(event) < event["epoch"]:
                at_rung = {"progress": progress_of(event), "metrics": event["metrics"], "seq": event.get("seq", 0)}
                self.rungs.append(at_rung)
            else:
                self.epochs.append(event["metrics"])
                self.report_seqs.append(event.get("seq", 0))
            for fact in dataclasses.fields(TrialFacts):  # journals of earlier versions lack some of them
                setattr(self, fact.name, event.get(fact.name, getattr(self, fact.name)))
            self.attempt_s = event["wall_s"] - event["waited_s"]
            # The phases of a resumed trial include earlier attempts; `wall_s` is of this attempt alone.
            phases = sum(s for name, s in event["seconds"].items() if not name.startswith(PROFILE_PREFIX))
            wall = event["waited_s"] + max(self.attempt_s, phases)
            self.seconds = event["seconds"] | {"wall": wall, "waited": event["waited_s"]}
            self.device_seconds = self.spent_before + event["device_s"]
        elif event["event"] == "ended":
            self.state, self.error, self.ended_at = EndState(event["state"]), event["error"], event["time"]
            self.device_seconds = event["device_s"]
            self.notes = event.get("notes", self.notes)

    def contradicts(self, event: Event) -> bool:
        """Whether an event cannot follow those before it, because one between them is lost."""
        if event["event"] == "report":
            return event["epoch"] > len(self.epochs) + 1 or not 0 <= event.get("best_epoch", 0) <= event["epoch"]
        if event["event"] == "ended":
            unfinished = event["state"] == EndState.COMPLETE and not self.finished
            unknown = event["state"] not in list(EndState)
            return unfinished or unknown or event.get("step", self.step) != self.step
        return False

    def value(self, name: str) -> float:
        """A metric or a cost of the trial; NaN when the trial has none of that name."""
        costs = {"trainable_params": self.applied.get("trainable_params"), "train_s": self.seconds.get("train")}
        value = {**costs, **self.metrics}.get(name)
        return math.nan if value is None else value

    @property
    def progress(self) -> float:
        """Epochs trained at the last report; 0.0 before the first."""
        return max([float(len(self.epochs)), *(rung["progress"] for rung in self.rungs)])

    @property
    def reports(self) -> list[dict[str, Any]]:
        """All reports in their order, those after epochs and those at rungs, each as in `rungs`."""
        after_epochs = [
            {"progress": float(epoch), "metrics": metrics, "seq": seq}
            for epoch, (metrics, seq) in enumerate(itertools.zip_longest(self.epochs, self.report_seqs, fillvalue=0), 1)
        ]
        return sorted([*after_epochs, *self.rungs], key=lambda report: report["progress"])

    def values(self, goal: Goal) -> np.ndarray:
        """The values of a metric by which the trial counted at each of its `reports` [R]: the best of that report and
        the epochs before or, in studies that select no epoch, that report's. NaN where there is none."""
        name, mode = goal
        better = np.fmin if mode == "min" else np.fmax
        values, best = [], math.nan  # of the epochs so far
        for report in self.reports:
            own = report["metrics"].get(name, math.nan)
            values.append(better(own, best) if self.best_epoch else own)
            if report["progress"].is_integer():
                best = better(own, best)
        return np.array(values)

    def typed_settings(self, **changes: Any) -> TrialSettings:
        """The trial's settings with some of them changed. Raises ValueError for a setting that this version lacks."""
        return TrialSettings.from_dict(self.settings | changes)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by which trials are ranked: of the best epoch or, in studies that select no epoch, the last. Of a
        trial that was stopped within its first epoch, those at the last rung."""
        if self.epochs:
            return self.epochs[self.best_epoch - 1]
        return self.rungs[-1]["metrics"] if self.rungs else {}

    @property
    def overhead_s(self) -> float:
        """Seconds of the lane that the trial took without training or evaluating."""
        return self.seconds.get("wall", 0.0) - self.seconds.get("train", 0.0) - self.seconds.get("evaluation", 0.0)


def point_key(searched: Mapping[str, Any]) -> str:
    """The values of a point as text, the same for the same point."""
    return json.dumps(searched, sort_keys=True)


def progress_of(report: Event) -> float:
    """Epochs trained at a "report" event. Those of earlier versions come after epochs alone."""
    return report.get("progress", float(report["epoch"]))


def trial_records(events: Sequence[Event]) -> dict[int, TrialRecord]:
    """The record of every trial in a journal, by number. A trial whose "started" event is lost has none: it runs
    again."""
    records: dict[int, TrialRecord] = {}
    for event in events:
        if event["event"] in ("started", "distributions", "report", "ended"):
            number = event["number"]
            if number not in records and event["event"] == "started":
                records[number] = TrialRecord.of(event)
            if number in records:
                records[number].apply(event)
    return records
