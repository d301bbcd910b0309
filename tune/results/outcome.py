"""A study's outcome: its records, the winner and its adapter, the test, study.json."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.settings import PROFILE_PREFIX
from train_fn.support.files import copy_folder, file_hash, write_json
from train_fn.support.storage import Storage
from tune.records.budgets import lanes_of, sessions
from tune.records.end_state import DONE_STATES
from tune.records.goals import Goal, comparison, holds, sign
from tune.records.journal import Event
from tune.records.ranking import front, ranked
from tune.records.trials import TrialRecord, trial_records


@dataclass
class Outcome:
    """A study's results: at its end, however it ended, or so far."""

    name: str
    directory: Path
    goals: tuple[Goal, ...]
    records: list[TrialRecord]
    require: tuple[str, ...] = ()
    num_trials: int = 0
    """How many trials were asked for."""
    running: bool = False
    """Whether a process runs the study now (`--show`)."""
    interrupted: bool = False
    error: str = ""
    """The error of the space or of the storage that ended the study before its time."""
    ended_by: str = ""
    winner: TrialRecord | None = None
    adapter: Path | None = None
    """Where the winner's adapter lies: `best_adapter/`, or its trial's own folder as long as that is not written."""
    rejected: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Trials whose adapter cannot be used, by number: the reason, and the sha256 of the adapter that it holds for."""
    kept: dict[str, str] = field(default_factory=dict)
    """Of the adapter in `best_adapter/`: its `source`, from the study's folder, and its `sha256` ("": not known)."""
    incomplete: bool = False
    """Whether something that follows the search is missing, such as the report; `--resume` makes it."""
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Test metrics by "winner" and "guide", and "difference": winner less guide, paired."""
    tested: int = 0
    """How often the test images were scored: again only when a study that went on has a new winner."""
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By "winner" and "guide": the `answers` (class indices) and `probabilities` of the test images."""
    confirmations: dict[int, list[float]] = field(default_factory=dict)
    """The first goal's values over fresh seeds or folds, by trial number (`--confirm`)."""
    confirmed_runs: dict[int, list[int]] = field(default_factory=dict)
    """Which of the seeds or folds, from 1, those values are of."""
    tested_winner: str = ""
    """The adapter that `tests` are of, from the study's folder."""
    seconds: dict[str, float] = field(default_factory=dict)
    lane_seconds: float = 0.0
    """Seconds of all lanes over all sessions, idle or not; 0: the lanes times the wall time."""
    lanes: int = 0
    notes: list[str] = field(default_factory=list)
    tracking_uri: str = ""
    storage: Storage | None = None

    @property
    def metric(self) -> str:
        """The first goal's name."""
        return self.goals[0][0]

    @property
    def state(self) -> str:
        """How the study ended: INTERRUPTED (also by an error), COMPLETE (there is a winner) or FAILED."""
        return "INTERRUPTED" if self.interrupted or self.error else "COMPLETE" if self.winner else "FAILED"

    @property
    def exit_code(self) -> int:
        """0: there is a winner whose adapter can be used; 1: there is none; 3: an error of the space or of the storage
        ended the study; 130: interrupted."""
        return 130 if self.interrupted else 3 if self.error else 0 if self.winner and self.adapter else 1

    @property
    def unfinished(self) -> bool:
        """Whether `--resume` has something left to do without more trials or larger budgets."""
        states = [record.state for record in self.records]
        left = not self.ended_by and sum(state in DONE_STATES for state in states) < self.num_trials
        return self.interrupted or bool(self.error) or self.incomplete or left or "INTERRUPTED" in states

    @property
    def busy_share(self) -> float:
        """Share of the lanes' wall time, start-up included, that was training or evaluation."""
        busy = sum(r.seconds.get("train", 0) + r.seconds.get("evaluation", 0) for r in self.records)
        there = self.lane_seconds or self.seconds.get("wall", 0.0) * max(1, self.lanes)
        return busy / there if there else 0.0

    @property
    def profile(self) -> dict[str, float]:
        """Share of the trials' time by phase, the largest first (`--profile`); empty: not measured."""
        found: dict[str, float] = defaultdict(float)
        for record in self.records:
            for name, value in record.seconds.items():
                if name.startswith(PROFILE_PREFIX):
                    found[name.removeprefix(PROFILE_PREFIX)] += value
        if found:
            found["idle"] += sum(r.seconds.get("waited", 0.0) for r in self.records)
        return {name: value / sum(found.values()) for name, value in sorted(found.items(), key=lambda one: -one[1])}

    def read(self, events: Sequence[Event], until: float | None = None) -> None:
        """Take in a whole journal. until: as for `wall_seconds`."""
        records = trial_records(events)
        self.records = [records[number] for number in sorted(records)]
        self.confirmations, self.confirmed_runs, self.tests, self.predictions = {}, {}, {}, {}
        self.tested = 0
        for event in events:
            self.hear(event)
        self.measure(events, until)

    def measure(self, events: Sequence[Event], until: float | None = None) -> None:
        """Take the study's wall time and that of its lanes from its journal. until: as for `wall_seconds`."""
        ran = sessions(events, until)
        self.seconds["wall"] = sum(session_s for _, session_s in ran)
        self.lane_seconds = sum(session_s * max(1, lanes_of(start)) for start, session_s in ran)

    def hear(self, event: Event) -> None:
        """Take in one event that is not a trial's own."""
        if event["event"] == "session":
            self.lanes, self.ended_by, self.rejected, self.incomplete = lanes_of(event), "", {}, False
        elif event["event"] == "confirmed":
            self.confirmations.setdefault(event["number"], []).append(event["value"])
            self.confirmed_runs.setdefault(event["number"], []).append(event["run"])
        elif event["event"] == "tested":
            self.tests, self.predictions = event["tests"], event["predictions"]
            self.tested_winner = event["adapters"]["winner"]
            self.tested += 1
        elif event["event"] == "study_ended":
            self.ended_by = event["tags"].get("ended_by", "")
            self.incomplete = event.get("incomplete", False)
            self.rejected = {int(number): (why, sha) for number, (why, sha) in event.get("rejected", {}).items()}
            self.kept = event.get("kept") or self.kept_before(event["tags"])

    @staticmethod
    def kept_before(tags: dict[str, Any]) -> dict[str, str]:
        """`kept` from the tags of an older journal."""
        winner = tags.get("winner", "none")
        known = isinstance(winner, int) and tags.get("adapter", "none") != "none"
        return {"source": f"trials/{winner:04d}/final_model", "sha256": ""} if known else {}

    def mean_confirmed(self, record: TrialRecord) -> float:
        """The mean of the first goal over fresh seeds or folds; NaN without any that is a number."""
        values = [value for value in self.confirmations.get(record.number, []) if math.isfinite(value)]
        return float(np.mean(values)) if values else math.nan

    def best(self) -> list[TrialRecord]:
        """Completed trials, best first: those that keep the rules, then those with fresh seeds, by their means."""
        rules = [comparison(text) for text in self.require]

        def order(record: TrialRecord) -> tuple[bool, bool, float]:
            breaks = not all(holds(rule, record.metrics) for rule in rules)
            mean = self.mean_confirmed(record)
            confirmed = math.isfinite(mean)
            return breaks, not confirmed, sign(self.goals[0][1]) * mean if confirmed else 0.0

        return sorted(ranked(self.records, self.goals, self.require), key=order)  # stable: the rest stays as ranked

    def choose_winner(self) -> None:
        """Name the winner and keep its adapter in `best_adapter/`. Raises OSError as `pick_winner`."""
        self.pick_winner()
        self.keep_adapter()

    def pick_winner(self) -> None:
        """Name the winner: the best trial whose adapter is there. Raises OSError when storage does not answer, or when
        the study's folder is gone."""
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is gone, or has another name now: put it back")
        self.winner = self.adapter = None
        for record in self.best():
            if self.is_rejected(record):
                continue
            if found := self.find_adapter(record):
                self.winner, self.adapter = record, found
                break
            self.reject(record, f"its adapter {self.adapter_of(record)} is missing")
        if self.winner is None:
            return
        self.forget_old_tests()
        if broken := [rule for rule in self.require if not holds(comparison(rule), self.winner.metrics)]:
            self.note(f"no trial keeps every rule: the winner breaks {', '.join(broken)}")

    def reject(self, record: TrialRecord, reason: str) -> None:
        """Take a trial out of the choice, because its adapter cannot be used."""
        self.rejected[record.number] = (reason, adapter_hash(self.adapter_of(record)))
        self.note(f"trial {record.number} cannot be the winner: {reason}")

    def is_rejected(self, record: TrialRecord) -> bool:
        """Whether a trial's adapter was found to be of no use, and is still the same."""
        _, digest = self.rejected.get(record.number, ("", None))
        return digest is not None and digest == adapter_hash(self.adapter_of(record))

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def find_adapter(self, record: TrialRecord) -> Path | None:
        """Where a trial's adapter lies: `best_adapter/` if that holds it undamaged, else the trial's own folder."""
        source, best = self.adapter_of(record), self.directory / "best_adapter"
        kept = self.kept if self.kept.get("source") == self.relative(source) and best.is_dir() else {}
        in_bucket = self.storage is not None and bool(self.storage.uri)
        if kept and not in_bucket and kept["sha256"] in ("", adapter_hash(best)):
            return best
        if self.storage:
            self.storage.pull(source)
        return source if source.is_dir() else best if kept else None

    def keep_adapter(self) -> None:
        """Copy the winner's adapter to `best_adapter/`. What cannot be copied stays where it is, with a note."""
        best = self.directory / "best_adapter"
        if self.winner is None or self.adapter is None or (self.adapter == best and self.kept["sha256"]):
            return
        source = self.relative(self.adapter_of(self.winner))
        try:
            if self.adapter != best:
                old = self.kept.get("source", "")
                if best.is_dir() and old not in ("", source) and not (self.directory / old).is_dir():
                    best.rename(self.directory / f"best_adapter-{old.replace('/', '-')}")  # there is no other copy
                copy_folder(self.adapter, best)
            self.adapter = best
            self.kept = {"source": source, "sha256": adapter_hash(best)}
        except OSError as error:
            self.incomplete = True
            self.note(f"best_adapter could not be written ({error}): the winner's adapter is {self.adapter}")

    def relative(self, path: Path) -> str:
        """A path from the study's folder."""
        return path.relative_to(self.directory).as_posix()

    def forget_old_tests(self) -> None:
        """Test scores of another winner are not this one's."""
        assert self.winner
        if self.tests and self.directory / self.tested_winner != self.adapter_of(self.winner):
            self.tests, self.predictions = {}, {}

    def adapter_of(self, record: TrialRecord) -> Path:
        """Where a trial's adapter lies. With confirmation it is the first fresh seed's (or fold's): nothing chose that
        one for its score."""
        trial = self.directory / "trials" / f"{record.number:04d}"
        runs = self.confirmed_runs.get(record.number)
        return (trial / f"confirm-{min(runs)}" if runs else trial) / "final_model"

    def save(self, plan: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
        """Write study.json: all of this, and the study's plan. Returns it. Raises OSError; the old one then stays."""
        whom = "the winner and the guide's defaults" if "guide" in self.tests else "the winner"
        often = "once" if self.tested < 2 else f"{self.tested} times, as the study went on after it had been scored,"
        content = clean(
            {
                "name": self.name,
                "state": self.state,
                "ended_by": self.ended_by,
                "error": self.error,
                "metric": self.metric,
                "mode": self.goals[0][1],
                "goals": self.goals,
                "winner": self.winner.number if self.winner else None,
                "adapter": self.adapter,
                "test": self.tests,
                "test_note": f"scored {often} after the search, for {whom} only",
                "predictions": self.predictions,
                "front": [r.number for r in front(self.records, self.goals)] if len(self.goals) > 1 else [],
                "confirmations": self.confirmations,
                "seconds": self.seconds,
                "share_training_and_evaluation": self.busy_share,
                "profile": self.profile,
                "device_seconds": sum(r.device_seconds for r in self.records),
                "lanes": self.lanes,
                "lane_seconds": self.lane_seconds,
                "layout": layout,
                "notes": self.notes,
                "next_command": next_step(self)[1],
                "trials": [dataclasses.asdict(r) | {"overhead_s": r.overhead_s} for r in self.records],
                **plan,
            }
        )
        write_json(self.directory / "study.json", content)
        return content


def adapter_hash(folder: Path) -> str:
    """sha256 of an adapter's weights; empty where there are none."""
    path = folder / "adapter_model.safetensors"
    return file_hash(path) if path.is_file() else ""


def clean(value: Any) -> Any:
    """The value with what JSON does not know (NaN, infinities, tuples, paths) made plain."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def next_step(outcome: Outcome) -> tuple[str, str]:
    """What to do next with a study, in two words, and its command: to look again while it runs, else to resume it."""
    command = ["python", "tune/run.py", "--results", str(outcome.directory.parent)]
    if outcome.running:
        return "Look again", shlex.join([*command, "--show", outcome.name])
    command += ["--resume", outcome.name]
    if outcome.unfinished:
        return "Go on", shlex.join(command)
    more = max(outcome.num_trials, len(outcome.records)) + 10
    return "Extend it", shlex.join([*command, "--trials", str(more)])
