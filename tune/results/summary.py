"""What a study found, as one object: the console, MLflow's note and report.html only lay it out."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.scoring.metrics import MODES
from tune.config.uris import default_uri
from tune.records.goals import Goal, sign
from tune.records.ranking import ranked
from tune.records.trials import END_STATES, TrialRecord

Score = dict[str, Any]  # "value" and "interval" (low, high) of a test metric; None where undefined


@dataclass(frozen=True)
class Confirmation:
    """A trial's values of the first goal over fresh seeds or folds (`--confirm`)."""

    number: int
    values: list[float]
    mean: float
    deviation: float
    """Sample standard deviation; NaN for fewer than two values."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a study found. The text is plain: no markup, and no escaping done yet."""

    name: str
    state: str
    """COMPLETE, INTERRUPTED or FAILED."""
    goals: list[Goal]
    records: list[TrialRecord]
    """By number."""
    ranked: list[TrialRecord]
    """Completed trials with a score, best first."""
    order: list[TrialRecord]
    """All trials: `ranked`, then unfinished ones with a score, best first, then the rest."""
    winner: TrialRecord | None
    guide: TrialRecord | None
    """Trial 0: the fine-tuning guide's defaults."""
    front: list[int]
    """Trials on the Pareto front; empty with one goal."""
    confirmations: list[Confirmation]
    tests: dict[str, dict[str, Score]]
    """Test scores by "winner", "guide" and "difference", and by metric."""
    test_note: str
    comparison: str
    """The test's verdict on winner and guide; empty: they cannot be compared."""
    error: str
    ended_by: str
    notes: list[str]
    wall_s: float
    busy_share: float
    """Share of the lanes' wall time that was training or evaluation."""
    lanes: int
    profile: dict[str, float]
    """Share of the trials' time by phase (`--profile`)."""
    results: Path
    """The file that holds all trials."""
    adapter: str
    """The winner's adapter; empty: none can be used."""
    next_step: str
    """What to do next, in two words: a key of `commands`."""
    commands: dict[str, str]
    """Shell commands by what they are for."""

    @property
    def metric(self) -> str:
        """The first goal's name."""
        return self.goals[0][0]

    @property
    def parameters(self) -> list[str]:
        """The searched parameters."""
        return list(dict.fromkeys(name for record in self.records for name in record.searched))

    @property
    def metrics(self) -> list[str]:
        """The columns of a table of trials: the goals, and some metrics beside them that any trial has."""
        names = dict.fromkeys([*(name for name, _ in self.goals), "macro_f1", "auroc", "loss"])
        return [name for name in names if any(math.isfinite(record.value(name)) for record in self.records)]

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials by state, without zeros."""
        counts = Counter(record.state for record in self.records)
        return {state: counts[state] for state in (*END_STATES, "RUNNING") if counts[state]}

    @property
    def counts_text(self) -> str:
        """`counts` in words."""
        return ", ".join(f"{count} {state.lower()}" for state, count in self.counts.items())

    @property
    def errors(self) -> dict[str, int]:
        """First lines of the failed trials' errors, and how many trials ended with each."""
        errors = [record.error.strip() or "unknown error" for record in self.records if record.state == "FAILED"]
        return Counter(error.splitlines()[0] for error in errors)

    @property
    def headline(self) -> str:
        """The outcome in one sentence, without its full stop."""
        interrupted = self.state == "INTERRUPTED"
        if not self.winner and self.ranked:
            return "No adapter: those of the completed trials cannot be used"
        if not self.winner:
            return f"No adapter: {'interrupted before a trial was completed' if interrupted else 'no trial completed'}"
        found = "so far" if interrupted else "found"
        if self.winner is self.guide:
            return f"The guide's defaults (trial 0) are the best {found}"
        return f"Trial {self.winner.number} is the best adapter {found}"

    @property
    def explanation(self) -> str:
        """How the winner compares with the guide's defaults, or why that is unknown; empty without a winner."""
        optimistic = "what is shown are validation scores, and they are optimistic"
        if self.comparison or not self.winner:
            return self.comparison
        if self.state == "INTERRUPTED" and not self.tests:
            return f"The study was interrupted, so the test images were not looked at: {optimistic}."
        if self.winner is self.guide:
            return "No trial of the search did better on the validation images than the guide's own settings."
        if not self.tests:
            return f"The test images were not scored: {optimistic}."
        failed = self.guide and self.guide.state != "COMPLETE"
        reason = f"trial 0 ended as {self.guide.state.lower()}" if self.guide and failed else ""
        reason = reason or f"{self.metric} is undefined on these test images"
        return f"There is no comparison with the guide's defaults: {reason}."

    def title(self, who: str) -> str:
        """The name of a key of `tests` for people."""
        if who == "winner" and self.winner:
            return (
                "winner = the guide's defaults" if self.winner is self.guide else f"winner (trial {self.winner.number})"
            )
        return {"guide": "guide's defaults", "difference": "winner minus guide, paired"}.get(who, who)

    def label(self, record: TrialRecord) -> str:
        """A trial's number, and whether it is the winner or the guide."""
        roles = [role for role in ("winner", "guide") if record is getattr(self, role)]
        return f"{record.number}" + (f" ({', '.join(roles)})" if roles else "")

    def test_score(self, who: str) -> Score | None:
        """The first goal's test score, if it is a number with an interval."""
        score = self.tests.get(who, {}).get(self.metric)
        return score if score and has_interval(score) else None


def summarize(study: Mapping[str, Any], directory: Path) -> Summary:
    """The summary of a study.

    Args:
        study: what `Outcome.to_dict` returns, or the content of study.json.
        directory: the study's folder.
    """
    records = [read_record(trial) for trial in study["trials"]]
    by_number = {record.number: record for record in records}
    goals = [(name, mode) for name, mode in study["goals"]]
    metric, mode = goals[0]
    best = ranked(records, goals, study.get("require", ()))
    scored = [record for record in records if math.isfinite(record.value(metric))]
    unfinished = [record for record in scored if record.state != "COMPLETE"]
    unfinished.sort(key=lambda record: sign(mode) * record.value(metric))
    confirmations = []
    for number, stored in study["confirmations"].items():
        values = [math.nan if value is None else value for value in stored]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        confirmations.append(Confirmation(int(number), values, float(np.mean(values)), deviation))
    gain = study["test"].get("difference", {}).get(metric)
    winner, adapter = by_number.get(study["winner"]), study["adapter"] or ""
    next_step, next_command = study.get("next_step", "Go on"), study["next_command"]
    commands = {"Compare trials": mlflow_command(study["tracking_uri"])}
    if adapter:
        predict = shlex.join(["python", "-m", "train_fn.predict", "--adapter", adapter])
        commands |= {"Use it": f"{predict} IMAGE_OR_FOLDER", "Merge it": f"{predict} --merge-into NEW_FOLDER"}
    if winner:
        run = ["python", "tune/run.py", "--results", str(directory.parent)]
        commands["Reproduce it"] = shlex.join([*run, "--replay", study["name"], "--trial", str(winner.number)])
    everything = directory / "study.json"
    return Summary(
        name=study["name"],
        state=study["state"],
        goals=goals,
        records=records,
        ranked=best,
        order=[*best, *unfinished, *(record for record in records if record not in scored)],
        winner=winner,
        guide=by_number.get(0),
        front=study.get("front", []),
        confirmations=confirmations,
        tests=study["test"],
        test_note=study["test_note"],
        comparison=comparison_sentence(gain, metric) if gain and has_interval(gain) else "",
        error=study["error"],
        ended_by=study["ended_by"],
        notes=study["notes"],
        wall_s=study["seconds"].get("wall", 0.0),
        busy_share=study["share_training_and_evaluation"],
        lanes=study["lanes"],
        profile=study.get("profile", {}),
        results=everything if everything.is_file() else directory / "journal.jsonl",
        adapter=adapter,
        next_step=next_step,
        commands=commands | {next_step: next_command},
    )


def read_record(trial: Mapping[str, Any]) -> TrialRecord:
    """A trial of study.json. JSON has no NaN: a missing metric becomes one again."""
    fields = {field.name for field in dataclasses.fields(TrialRecord)}
    record = TrialRecord(**{name: trial[name] for name in fields & trial.keys()})
    record.epochs = [{m: math.nan if v is None else v for m, v in epoch.items()} for epoch in record.epochs]
    return record


def comparison_sentence(gain: Score, metric: str) -> str:
    """Whether the winner beats the guide's defaults on the test.

    Args:
        gain: the paired difference, winner minus guide, with its interval.
        metric: its metric.
    """
    low, high = gain["interval"]
    better = (gain["value"] < 0) == (MODES[metric] == "min")
    significant = low > 0 or high < 0
    text = ("better than" if better else "worse than") if significant else "not distinguishable from"
    return (
        f"On the test images the winner is {text} the guide's defaults: {metric} {gain['value']:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, paired bootstrap)."
    )


def is_number(value: float | None) -> bool:
    """Whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def has_interval(score: Score) -> bool:
    """Whether a test score is a number with an interval."""
    return bool(score["interval"]) and is_number(score["value"])


def format_score(score: Score) -> str:
    """A test score and its 95 % interval."""
    if not is_number(score["value"]):
        return "undefined"
    interval = " ({:.3f} to {:.3f})".format(*score["interval"]) if score["interval"] else ""
    return f"{score['value']:.3f}{interval}"


def format_metric(value: float | None) -> str:
    """A metric or cost in a table."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def format_value(value: Any) -> str:
    """A setting, short."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def mlflow_command(uri: str) -> str:
    """The command that shows the trials in MLflow."""
    return "mlflow ui" if uri == default_uri() else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
