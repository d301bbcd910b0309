"""What a study has found: the record of each trial, from the journal's events; the winner and its adapter; its test
score with intervals; table and study.json."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data import Sample, Splits
from train_fn.files import copy_folder, file_hash, write_json
from train_fn.metrics import MODES, bootstrap_intervals
from train_fn.scores import metrics_of
from train_fn.settings import PROFILE_PREFIX
from train_fn.storage import Storage
from train_fn.text import plain
from tune.journal import Event
from tune.settings import StudySettings, comparison, holds, seconds

Goal = tuple[str, str]  # a metric or cost, and "max" or "min"
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
    state: str = "RUNNING"
    epochs: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics and training loss after each epoch."""
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
                records[number] = TrialRecord(number, event["searched"], event["settings"])
            if number in records:
                records[number].hear(event)
    return records


def sign(mode: str) -> int:
    """1 where less is better, else -1: what makes sorting put the best first."""
    return 1 if mode == "min" else -1


def ranked(records: Sequence[TrialRecord], goals: Sequence[Goal], require: Sequence[str] = ()) -> list[TrialRecord]:
    """Completed trials, best first: those that keep the rules, those of the Pareto front, then by the first goal; ties
    go to the lower loss. A score that is not a number is no score."""
    name, mode = goals[0]
    rules = [comparison(text) for text in require]
    scored = [r for r in records if r.state == "COMPLETE" and math.isfinite(r.value(name))]
    keeping = {r.number for r in scored if all(holds(rule, r.metrics) for rule in rules)}
    best = {r.number for r in front([r for r in scored if r.number in keeping] or scored, goals)}
    return sorted(
        scored,
        key=lambda r: (r.number not in keeping, r.number not in best, sign(mode) * r.value(name), r.metrics["loss"]),
    )


def front(records: Sequence[TrialRecord], goals: Sequence[Goal]) -> list[TrialRecord]:
    """The Pareto front: completed trials to which no other is as good in every goal and better in one."""
    points = {r.number: [sign(mode) * r.value(name) for name, mode in goals] for r in records if r.state == "COMPLETE"}
    points = {number: point for number, point in points.items() if all(map(math.isfinite, point))}

    def beaten(point: list[float]) -> bool:
        return any(
            other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in points.values()
        )

    return [r for r in records if r.number in points and not beaten(points[r.number])]


def spent(
    records: Iterable[TrialRecord], events: Sequence[Event], study: StudySettings, until: float | None = None
) -> str:
    """Which budget of the study is used up, as a sentence; empty if none is. until: as for `wall_seconds`."""
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
    """Seconds that a study has run, over all its sessions.

    Args:
        until: when the last session ends, in seconds since the epoch. None: it runs now.
    """
    return sum(session_s for _, session_s in sessions(events, until))


def sessions(events: Sequence[Event], until: float | None = None) -> list[tuple[Event, float]]:
    """The first event of each session and the session's seconds, up to its last event; the start before the first event
    is included."""
    starts = [number for number, event in enumerate(events) if event["event"] == "session"]
    ends = [events[number - 1]["time"] for number in starts[1:]] + [time.time() if until is None else until]
    return [
        (events[number], end - events[number]["time"] + events[number].get("startup_s", 0.0))
        for number, end in zip(starts, ends, strict=False)
    ]


Score = Callable[[np.ndarray], dict[str, float]]


def make_scorer(predicted: dict[str, np.ndarray], splits: Splits, class_balanced: bool, positive: str) -> Score:
    """The metrics of any choice of test images, by index, from a model's predictions for all of them."""

    def score(images: np.ndarray) -> dict[str, float]:
        chosen = {name: values[images] for name, values in predicted.items()}
        samples: list[Sample] = [splits.test[image] for image in images]
        return metrics_of(chosen, samples, splits, class_balanced, positive)

    return score


def with_intervals(score: Score, images: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each metric as {"value", "interval"}: 95 % percentile bootstrap over these test images."""
    values = score(images)
    intervals = bootstrap_intervals(lambda drawn: score(images[drawn]), len(images))
    return {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}


def difference(one: Score, other: Score) -> Score:
    """One model's metrics less another's on the same images: the bootstrap is then a paired one."""

    def score(images: np.ndarray) -> dict[str, float]:
        first, second = one(images), other(images)
        return {name: first[name] - second[name] for name in first}

    return score


def verdict(gain: dict[str, Any], metric: str) -> str:
    """A plain sentence on the winner's gain over the guide's defaults on the test."""
    low, high = gain["interval"]
    sure = low > 0 or high < 0
    better = (gain["value"] < 0) == (MODES[metric] == "min")
    says = ("better than" if better else "worse than") if sure else "not distinguishable from"
    return (
        f"On the test images the winner is {says} the guide's defaults: {metric} {gain['value']:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, paired bootstrap)."
    )


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
        records = fold(events)
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


def lanes_of(session: Event) -> int:
    """The lanes of a session, from its first event."""
    return int(session.get("params", {}).get("lanes", 0))


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


# ------------------------------------------------------------------------------------------------ for people


def number_text(value: Any) -> str:
    """A setting or score, short."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def score_text(value: float) -> str:
    """A score or cost in a table."""
    return "-" if not math.isfinite(value) else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def defined(score: dict[str, Any] | None) -> bool:
    """Whether a test score is a number with an interval."""
    return bool(score and score["interval"] and score["value"] is not None and math.isfinite(score["value"]))


def with_interval(score: dict[str, Any]) -> str:
    """A test score and its 95 % interval."""
    if score["value"] is None or not math.isfinite(score["value"]):
        return "undefined"
    if score["interval"] is None:
        return f"{score['value']:.3f}"
    low, high = score["interval"]
    return f"{score['value']:.3f} ({low:.3f} to {high:.3f})"


def print_summary(outcome: Outcome, most: int = 10) -> None:
    """Print the table of trials, the test scores, where everything is, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    def tell(text: str) -> None:
        print(plain(text))

    # Names, values and answers are the user's: no markup, and nothing that commands the terminal.
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 160
    best = outcome.best()
    shown = best[:most]
    guide = next((r for r in outcome.records if r.number == 0), None)
    if guide and guide not in shown:
        shown.append(guide)
    counts = Counter(record.state.lower() for record in outcome.records)
    counted = ", ".join(
        f"{counts[state]} {state}" for state in map(str.lower, (*END_STATES, "RUNNING")) if counts[state]
    )
    names = list(dict.fromkeys(name for r in outcome.records for name in r.searched))
    scores = list(dict.fromkeys([*(name for name, _ in outcome.goals), "macro_f1", "auroc", "loss"]))
    scores = [m for m in scores if any(math.isfinite(r.value(m)) for r in outcome.records)]
    title = f"Study {outcome.name}: {counted}. Validation scores, best first by {outcome.metric}"
    table = Table(title=plain(title))
    table.add_column("trial", justify="right")
    for name in (*names, *scores, "train s", "state"):
        table.add_column(plain(name), justify="right", overflow="fold")
    for record in shown:
        label = f"{record.number}" + (" (guide)" if record.number == 0 else "")
        cells = [number_text(record.searched[name]) if name in record.searched else "-" for name in names]
        cells += [score_text(record.value(m)) for m in scores]
        cells += [f"{record.seconds.get('train', 0):.1f}", record.state.lower()]
        table.add_row(label, *map(plain, cells))
    everything = "study.json" if (outcome.directory / "study.json").is_file() else "journal.jsonl"
    if shown:
        console.print(table)
        if len(outcome.goals) > 1:
            numbers = ", ".join(str(r.number) for r in front(outcome.records, outcome.goals))
            tell(f"Pareto front of {', '.join(f'{name} ({mode})' for name, mode in outcome.goals)}: trials {numbers}")
        if len(best) > most:
            tell(f"(the best {most} of {len(best)}; all of them are in {everything} and MLflow)")
    if len(best) > 1:
        low, high = (f(r.value(outcome.metric) for r in best) for f in (min, max))
        tell(f"Spread of {outcome.metric} over the completed trials: {low:.3f} to {high:.3f}")
    for error, count in failures(outcome.records).items():
        tell(f"{count} failed: {error}")
    for number, values in outcome.confirmations.items():
        label = f"trial {number}" + (" (guide)" if number == 0 else "")
        spread = f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
        tell(f"Confirmed {len(values)} times: {label}: validation {outcome.metric} {spread}")
    if outcome.tests:
        table = Table(title="Test scores (95 % bootstrap interval), computed once, after the search")
        table.add_column("metric")
        winner = f"winner (trial {outcome.winner.number})" if outcome.winner else "winner"
        if outcome.winner and outcome.winner.number == 0:
            winner = "winner = the guide's defaults"
        titles = {"winner": winner, "guide": "guide", "difference": "winner less guide, paired"}
        for who in outcome.tests:
            table.add_column(plain(titles.get(who, who)))
        for name in next(iter(outcome.tests.values())):
            table.add_row(plain(name), *(with_interval(scores[name]) for scores in outcome.tests.values()))
        console.print(table)
        gain = outcome.tests.get("difference", {}).get(outcome.metric)
        if gain and defined(gain):
            tell(verdict(gain, outcome.metric))
    if outcome.error:
        tell(f"Ended by an error: {outcome.error}.")
    if outcome.ended_by:
        tell(f"Ended because {outcome.ended_by}.")
    for note in outcome.notes:
        tell(f"Note: {note}")
    if outcome.running and outcome.winner:
        tell(f"Best so far: trial {outcome.winner.number}")
    tell(
        f"Wall time {outcome.seconds.get('wall', 0):.0f} s, {outcome.busy_share:.0%} of it training and evaluation "
        f"on {outcome.lanes} lane{'s' if outcome.lanes != 1 else ''}."
    )
    if outcome.profile:
        tell(f"Profile: {', '.join(f'{name} {share:.1%}' for name, share in outcome.profile.items())}.")
    tell(f"Results        {outcome.directory / everything}")
    if outcome.adapter:
        tell(f"Adapter        {outcome.adapter}")
    tell("Compare trials " + next_mlflow(outcome.tracking_uri))
    if outcome.adapter:
        predict = shlex.join(["python", "-m", "train_fn.predict", "--adapter", str(outcome.adapter)])
        tell(f"Use it         {predict} IMAGE_OR_FOLDER")
        tell(f"Merge it       {predict} --merge-into NEW_FOLDER")
    label, command = next_step(outcome)
    tell(f"{label:15}{command}")
    if not outcome.winner and not outcome.unfinished:
        reason = "No trial completed" if not best else "No adapter can be used"
        tell(f"{reason}, so there is no winner. The first error is above; all are in {everything}.")


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


def next_mlflow(uri: str) -> str:
    """The command that shows the trials."""
    from tune.uris import default_uri

    return "mlflow ui" if uri == default_uri() else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def failures(records: Sequence[TrialRecord]) -> dict[str, int]:
    """First lines of the errors, with how many trials ended by each."""
    errors = [record.error.strip() or "unknown error" for record in records if record.state == "FAILED"]
    return Counter(error.splitlines()[0] for error in errors)
