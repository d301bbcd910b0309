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
from tune.config.paths import program
from tune.records.budgets import lanes_of, sessions
from tune.records.end_state import DONE_STATES
from tune.records.goals import Goal, comparison, holds, sign
from tune.records.journal import Event
from tune.records.ranking import front, ranked
from tune.records.trials import TrialRecord, trial_records
from tune.results.summary import LOOK_AGAIN
from tune.results.transferred import transfer_facts

# What to do next with a study.
RESUME = "Go on"
EXTEND = "Extend it"


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
    status: str = ""
    """Whether the study runs, was interrupted or has ended, and how far it has come, in words (`--show`)."""
    interrupted: bool = False
    error: str = ""
    """The error of the space or of the storage that ended the study before its time."""
    ended_by: str = ""
    winner: TrialRecord | None = None
    adapter: Path | None = None
    """The winner's adapter: `best_adapter/`, or the trial's own folder until that is written."""
    rejected: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Trials whose adapter cannot be used, by number: the reason, and the sha256 of the rejected adapter."""
    kept: dict[str, str] = field(default_factory=dict)
    """The adapter in `best_adapter/`: its `source`, relative to the study's folder, and its `sha256` ("": unknown)."""
    incomplete: bool = False
    """Whether a step after the search is missing, such as the report; `--resume` does it."""
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Test metrics by "winner", "guide" and "difference" (winner minus guide, paired)."""
    tested: int = 0
    """How often the test images were scored: more than once only when a resumed study has a new winner."""
    num_tested: list[int] = field(default_factory=list)
    """With how many adapters each time."""
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By "winner" and "guide": the `answers` (class indices) and `probabilities` of the test images."""
    coverage: list[dict[str, Any]] = field(default_factory=list)
    """What the winner's sets of answers are worth on the test images, as `tune.results.coverage.coverage_rows`."""
    confirmations: dict[int, list[float]] = field(default_factory=dict)
    """The first goal's values over fresh seeds or folds, by trial number (`--confirm`)."""
    confirmed_runs: dict[int, list[int]] = field(default_factory=dict)
    """The seed or fold, from 1, of each of those values."""
    confirmed: dict[int, dict[int, Event]] = field(default_factory=dict)
    """The "confirmed" events, by trial number and by seed or fold. Those of earlier versions have only the value."""
    tested_winner: str = ""
    """The winner's adapter that `tests` belong to, relative to the study's folder."""
    seconds: dict[str, float] = field(default_factory=dict)
    lane_seconds: float = 0.0
    """Seconds of all lanes over all sessions, idle or not; 0: lanes times wall time."""
    lanes: int = 0
    notes: list[str] = field(default_factory=list)
    tracking_uri: str = ""
    runs_address: str = ""
    """Where MLflow's pages show the trials; empty: not known."""
    storage: Storage | None = None
    prior: Event = field(default_factory=dict)
    """The event "warm_start": what another study gave."""

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
        """Whether `--resume` has work left without more trials or larger budgets."""
        states = [record.state for record in self.records]
        left = not self.ended_by and sum(state in DONE_STATES for state in states) < self.num_trials
        return self.interrupted or bool(self.error) or self.incomplete or left or "INTERRUPTED" in states

    @property
    def busy_share(self) -> float:
        """Share of the lanes' wall time, start-up included, that was training or evaluation."""
        busy = sum(r.seconds.get("train", 0) + r.seconds.get("evaluation", 0) for r in self.records)
        total = self.lane_seconds or self.seconds.get("wall", 0.0) * max(1, self.lanes)
        return busy / total if total else 0.0

    @property
    def profile(self) -> dict[str, float]:
        """Share of the trials' time by phase, the largest first (`--profile`); empty: not measured."""
        totals: dict[str, float] = defaultdict(float)
        for record in self.records:
            for name, value in record.seconds.items():
                if name.startswith(PROFILE_PREFIX):
                    totals[name.removeprefix(PROFILE_PREFIX)] += value
        if totals:
            totals["idle"] += sum(r.seconds.get("waited", 0.0) for r in self.records)
        return {name: value / sum(totals.values()) for name, value in sorted(totals.items(), key=lambda item: -item[1])}

    def read(self, events: Sequence[Event], until: float | None = None) -> None:
        """Read a whole journal. until: as for `wall_seconds`."""
        records = trial_records(events)
        self.records = [records[number] for number in sorted(records)]
        self.confirmations, self.confirmed_runs, self.tests, self.predictions, self.coverage = {}, {}, {}, {}, []
        self.confirmed, self.tested, self.num_tested = {}, 0, []
        for event in events:
            self.apply(event)
        self.measure(events, until)

    def measure(self, events: Sequence[Event], until: float | None = None) -> None:
        """Sum up the wall time of the study and of its lanes. until: as for `wall_seconds`."""
        ran = sessions(events, until)
        self.seconds["wall"] = sum(session_s for _, session_s in ran)
        self.lane_seconds = sum(session_s * max(1, lanes_of(start)) for start, session_s in ran)

    def apply(self, event: Event) -> None:
        """Apply one event of the study; those of trials are in `records`."""
        if event["event"] == "session":
            self.lanes, self.ended_by, self.rejected, self.incomplete = lanes_of(event), "", {}, False
        elif event["event"] == "warm_start":
            self.prior = event
        elif event["event"] == "confirmed":
            self.confirmations.setdefault(event["number"], []).append(event["value"])
            self.confirmed_runs.setdefault(event["number"], []).append(event["run"])
            self.confirmed.setdefault(event["number"], {})[event["run"]] = event
        elif event["event"] == "tested":
            self.tests, self.predictions = event["tests"], event["predictions"]
            self.coverage = event.get("coverage", [])
            self.tested_winner = event["adapters"]["winner"]
            self.tested += 1
            self.num_tested.append(event.get("num_adapters", len(event["adapters"])))
        elif event["event"] == "study_ended":
            self.ended_by = event["tags"].get("ended_by", "")
            self.incomplete = event.get("incomplete", False)
            self.rejected = {int(number): (why, sha) for number, (why, sha) in event.get("rejected", {}).items()}
            self.kept = event.get("kept") or {}
            tags = event["tags"]
            if not self.kept and isinstance(tags.get("winner"), int) and tags.get("adapter", "none") != "none":
                # A journal of the first version.
                self.kept = {"source": f"trials/{tags['winner']:04d}/final_model", "sha256": ""}

    def best(self) -> list[TrialRecord]:
        """Completed trials, best first: those that keep the rules come first, then those confirmed, by their means."""
        rules = [comparison(text) for text in self.require]

        def order(record: TrialRecord) -> tuple[bool, bool, float]:
            breaks = not all(holds(rule, self.delivered_metrics(record)) for rule in rules)
            values = [value for value in self.confirmations.get(record.number, []) if math.isfinite(value)]
            return breaks, not values, sign(self.goals[0][1]) * float(np.mean(values)) if values else 0.0

        return sorted(ranked(self.records, self.goals, self.require), key=order)  # stable: the rest stays as ranked

    def choose_winner(self) -> None:
        """Pick the winner and copy its adapter to `best_adapter/`. Raises OSError as `pick_winner`."""
        self.pick_winner()
        self.keep_adapter()

    def pick_winner(self) -> None:
        """Make the best trial whose adapter exists the winner.

        Raises:
            OSError: the storage does not answer, or the study's folder is gone.
        """
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is gone, or has another name now: put it back")
        self.winner = self.adapter = None
        for record in self.best():
            if self.is_rejected(record):
                continue
            if adapter := self.find_adapter(record):
                self.winner, self.adapter = record, adapter
                break
            self.reject(record, f"its adapter {self.adapter_of(record)} is missing")
        if self.winner is None:
            return
        self.forget_old_tests()
        for record in self.records:
            self.note_broken_rules(record)
        metrics = self.delivered_metrics(self.winner)
        if broken := [rule for rule in self.require if not holds(comparison(rule), metrics)]:
            self.note(f"no trial keeps every rule: the winner breaks {', '.join(broken)}")

    def note_broken_rules(self, record: TrialRecord) -> None:
        """Add a note on each rule that a trial kept in the search, and that its delivered adapter breaks."""
        metrics = self.delivered_metrics(record)
        for rule in map(comparison, self.require):
            if holds(rule, record.metrics) and not holds(rule, metrics):
                name, relation, value = rule
                self.note(
                    f"trial {record.number} kept {name}{relation}{value:g} in the search ({record.metrics[name]:.3f}), "
                    f"but its adapter of seed {self.delivered_seed(record)} breaks it "
                    f"({metrics.get(name, math.nan):.3f})"
                )

    def reject(self, record: TrialRecord, reason: str) -> None:
        """Exclude a trial from the choice of the winner: its adapter cannot be used."""
        self.rejected[record.number] = (reason, adapter_hash(self.adapter_of(record)))
        self.note(f"trial {record.number} cannot be the winner: {reason}")

    def is_rejected(self, record: TrialRecord) -> bool:
        """Whether a trial's adapter was rejected, and its file is unchanged since."""
        _, digest = self.rejected.get(record.number, ("", None))
        return digest is not None and digest == adapter_hash(self.adapter_of(record))

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def find_adapter(self, record: TrialRecord) -> Path | None:
        """The folder with a trial's adapter: `best_adapter/` if that holds it undamaged, else the trial's."""
        source, best = self.adapter_of(record), self.directory / "best_adapter"
        kept = self.kept if self.kept.get("source") == self.relative(source) and best.is_dir() else {}
        in_bucket = self.storage is not None and bool(self.storage.uri)
        if kept and not in_bucket and kept["sha256"] in ("", adapter_hash(best)):
            return best
        if self.storage:
            self.storage.pull(source)
        return source if source.is_dir() else best if kept else None

    def keep_adapter(self) -> None:
        """Copy the winner's adapter to `best_adapter/`. If that fails, the adapter stays where it is, with a note."""
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
        """A path relative to the study's folder."""
        return path.relative_to(self.directory).as_posix()

    def forget_old_tests(self) -> None:
        """Drop test scores that belong to another winner."""
        assert self.winner
        if self.tests and self.directory / self.tested_winner != self.adapter_of(self.winner):
            self.tests, self.predictions, self.coverage = {}, {}, []

    def adapter_of(self, record: TrialRecord) -> Path:
        """The folder that a trial's adapter is written to. With `--confirm`, the first fresh seed's or fold's: that
        one was not chosen for its score."""
        return self.adapters_of(record)[0]

    def adapters_of(self, record: TrialRecord) -> list[Path]:
        """The folders of all adapters of a trial that its score stands for, the delivered one first: of every fresh
        seed or fold or, without `--confirm`, the search's own."""
        trial = self.directory / "trials" / f"{record.number:04d}"
        runs = sorted(self.confirmed_runs.get(record.number, []))
        return [trial / f"confirm-{run}" / "final_model" for run in runs] or [trial / "final_model"]

    def delivered_run(self, record: TrialRecord) -> int:
        """Which training of a trial its delivered adapter is of: 0 is the search's own, 1 the first fresh seed or
        fold."""
        return min(self.confirmed_runs.get(record.number, [0]))

    def delivered_seed(self, record: TrialRecord) -> int:
        """The seed of that training."""
        return int(record.settings.get("seed", 0)) + self.delivered_run(record)

    def delivered_metrics(self, record: TrialRecord) -> dict[str, float]:
        """The validation metrics of a trial's delivered adapter. Earlier versions recorded them of the search's own
        only."""
        event = self.confirmed.get(record.number, {}).get(self.delivered_run(record), {})
        return event.get("metrics", record.metrics)

    def value(self, record: TrialRecord, name: str) -> float:
        """A goal's value: its mean over the fresh seeds or folds, if they were recorded, else the search's own."""
        events = self.confirmed.get(record.number, {}).values()
        values = [event["metrics"][name] for event in events if name in event.get("metrics", {})]
        return float(np.mean(values)) if values else record.value(name)

    def front(self) -> list[TrialRecord]:
        """The Pareto front. With `--confirm`, that of the confirmed trials, by their means: a single score that was
        chosen for its height would keep them off it."""
        if len(self.goals) < 2:
            return []
        measured = [r for r in self.records if any("metrics" in e for e in self.confirmed.get(r.number, {}).values())]
        return front(measured or self.records, self.goals, self.value)

    def delivered(self) -> dict[str, Any] | None:
        """The delivered adapter: the winner's trial, the training of it (0: the search's own) and its seed, the folder,
        relative to the study's, and its validation metrics. None without a winner."""
        if self.winner is None:
            return None
        return {
            "trial": self.winner.number,
            "seed": self.delivered_seed(self.winner),
            "run": self.delivered_run(self.winner),
            "folder": self.relative(self.adapter_of(self.winner)),
            "metrics": self.delivered_metrics(self.winner),
        }

    def test_note(self) -> str:
        """How often the test was scored, and with how many adapters."""
        adapters = f"with {' + '.join(map(str, self.num_tested)) or 0} adapter{'' if self.num_tested == [1] else 's'}"
        if self.tested < 2:
            return f"scored once, after the search, {adapters}"
        return f"scored {self.tested} times after the search, because the study was resumed after scoring, {adapters}"

    def to_dict(self) -> dict[str, Any]:
        """The outcome as study.json holds it, without the study's plan."""
        next_step, next_command = self.next_step()
        return to_json(
            {
                "name": self.name,
                "state": self.state,
                "ended_by": self.ended_by,
                "error": self.error,
                "metric": self.metric,
                "mode": self.goals[0][1],
                "goals": self.goals,
                "require": self.require,
                "winner": self.winner.number if self.winner else None,
                "adapter": self.adapter,
                "test": self.tests,
                "test_note": self.test_note(),
                "predictions": self.predictions,
                "coverage": self.coverage,
                "delivered": self.delivered(),
                "front": [record.number for record in self.front()],
                "transfer": transfer_facts(self.prior, self.records, self.goals[0]),
                "confirmations": self.confirmations,
                "seconds": self.seconds,
                "share_training_and_evaluation": self.busy_share,
                "profile": self.profile,
                "device_seconds": sum(r.device_seconds for r in self.records),
                "lanes": self.lanes,
                "lane_seconds": self.lane_seconds,
                "notes": self.notes,
                "next_step": next_step,
                "next_command": next_command,
                "tracking_uri": self.tracking_uri,
                "runs_address": self.runs_address,
                "trials": [dataclasses.asdict(r) | {"overhead_s": r.overhead_s} for r in self.records],
            }
        )

    def save(self, plan: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
        """Write study.json: the outcome and the study's plan. Returns it. Raises OSError; the old file then stays."""
        content = self.to_dict() | to_json({"layout": layout, **plan})
        write_json(self.directory / "study.json", content)
        return content

    def next_step(self) -> tuple[str, str]:
        """What to do next with the study, in two words, and its command."""
        command = [*program(), "--results", str(self.directory.parent)]
        if self.running:
            return LOOK_AGAIN, shlex.join([*command, "--show", self.name])
        command += ["--resume", self.name]
        if self.unfinished:
            return RESUME, shlex.join(command)
        num_trials = max(self.num_trials, len(self.records)) + 10
        return EXTEND, shlex.join([*command, "--trials", str(num_trials)])


def adapter_hash(folder: Path) -> str:
    """sha256 of an adapter's weights; empty where there are none."""
    path = folder / "adapter_model.safetensors"
    return file_hash(path) if path.is_file() else ""


def to_json(value: Any) -> Any:
    """A value with JSON's types only: NaN and infinities become None, tuples lists, anything else text."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
