"""What a study found, as one object: the console, MLflow's note and report.html only lay it out."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tune.config.paths import program
from tune.config.uris import default_uri
from tune.records.end_state import EndState
from tune.records.goals import Goal, sign
from tune.records.ranking import ranked
from tune.records.trials import TrialRecord
from tune.results.comparison import (
    BASELINES,
    CLEAN,
    GAIN,
    MAJORITY,
    OVER_PROBE,
    PROBE,
    UNTUNED,
    Score,
    adapters_sentence,
    comparison_sentence,
    num_runs,
    others_sentence,
    probe_sentence,
)
from tune.results.transferred import transfer_sentences

LOOK_AGAIN = "Look again"  # the next step with a study that runs
KNOWN_FOR = {
    "closed": "auroc", "binary": "auroc", "ordinal": "quadratic_kappa", "multilabel": "label_f1", "open": "token_f1",
    "numeric": "mae",
}  # fmt: skip
"""The score that each kind of task is known for."""


@dataclass(frozen=True)
class Summary:
    """What a study found. Its texts are plain: no markup, nothing escaped."""

    study: Mapping[str, Any]
    """The content of study.json, or what `Outcome.to_dict` returns."""
    directory: Path
    """The study's folder."""

    @cached_property
    def goals(self) -> list[Goal]:
        return [(name, mode) for name, mode in self.study["goals"]]

    @property
    def metric(self) -> str:
        """The first goal's name."""
        return self.goals[0][0]

    @cached_property
    def records(self) -> list[TrialRecord]:
        """All trials, by number."""
        return [read_record(trial) for trial in self.study["trials"]]

    @cached_property
    def test_metrics(self) -> list[str]:
        """The rows of a short table of test scores. Of several tasks: the plain names, and of each task its accuracy
        and the score that its kind is known for."""
        names = dict.fromkeys(name for scores in self.study["test"].values() for name in scores)
        tasks = self.study.get("tasks", [])
        if len(tasks) < 2:
            return list(names)
        shown = {f"{task['name']}/{metric}" for task in tasks for metric in ("accuracy", KNOWN_FOR[task["kind"]])}
        return [name for name in names if "/" not in name or name in shown or name == self.metric]

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """Completed trials with a score, best first."""
        return ranked(self.records, self.goals, self.study.get("require", ()))

    @cached_property
    def order(self) -> list[TrialRecord]:
        """All trials: `ranked`, then the others with a score, best first, then the rest."""
        ranks = {record.number: rank for rank, record in enumerate(self.ranked)}

        def key(record: TrialRecord) -> tuple[int, float]:
            score = sign(self.goals[0][1]) * record.value(self.metric)
            if record.number in ranks:
                return 0, ranks[record.number]
            return (1, score) if math.isfinite(score) else (2, 0.0)

        return sorted(self.records, key=key)

    @cached_property
    def winner(self) -> TrialRecord | None:
        return next((record for record in self.records if record.number == self.study["winner"]), None)

    @cached_property
    def guide(self) -> TrialRecord | None:
        """Trial 0: the fine-tuning guide's defaults."""
        return next((record for record in self.records if record.number == 0), None)

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the searched parameters."""
        return list(dict.fromkeys(name for record in self.records for name in record.searched))

    @cached_property
    def metrics(self) -> list[str]:
        """Columns of a table of trials: the goals, and some metrics beside them that any trial has."""
        names = dict.fromkeys([*(name for name, _ in self.goals), "macro_f1", "auroc", "loss"])
        return [name for name in names if any(math.isfinite(record.value(name)) for record in self.records)]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of trials by state, without zeros."""
        counts = Counter(record.state for record in self.records)
        return {state: counts[state] for state in EndState if counts[state]}

    @property
    def counts_text(self) -> str:
        return ", ".join(f"{count} {state.lower()}" for state, count in self.counts.items())

    @cached_property
    def errors(self) -> dict[str, int]:
        """First lines of the failed trials' errors, and how many trials ended with each."""
        errors = [record.error.strip() or "unknown error" for record in self.records if record.state == "FAILED"]
        return Counter(error.splitlines()[0] for error in errors)

    @cached_property
    def confirmations(self) -> dict[int, list[float]]:
        """Values of the first goal over fresh seeds or folds, by trial (`--confirm`)."""
        stored = self.study["confirmations"].items()
        return {int(number): [math.nan if v is None else v for v in values] for number, values in stored}

    @cached_property
    def test_tables(self) -> list[list[str]]:
        """Who has a column in each table of test scores: winner, guide and difference, on all test images and, if some
        have a copy in training, on the others."""
        tables = [[who + suffix for who in ("winner", "guide", GAIN)] for suffix in ("", CLEAN)]
        there = [[who for who in table if who in self.study["test"]] for table in tables]
        return [table for table in there if table]

    @cached_property
    def compared(self) -> list[str]:
        """Who has a row in the table of baselines; empty in studies of earlier versions."""
        whose = ("winner", "guide", UNTUNED, MAJORITY, PROBE, OVER_PROBE)
        found = [who for who in whose if who in self.study["test"]]
        return found if set(found) & set(BASELINES) else []

    @cached_property
    def compared_metrics(self) -> list[str]:
        """Columns of the table of baselines: the first goal, and scores of the same tasks."""
        prefix = f"{self.metric.rpartition('/')[0]}/".removeprefix("/")
        others = ("auroc", "accuracy", "balanced_accuracy", "macro_f1")
        names = dict.fromkeys([self.metric, *(prefix + name for name in others)])
        return [name for name in names if any(name in scores for scores in self.study["test"].values())]

    def test_score(self, who: str) -> Score | None:
        """The first goal's test score of "winner", "guide", a baseline or a difference, if it has an interval."""
        score = self.study["test"].get(who, {}).get(self.metric)
        return score if score and score["interval"] and is_number(score["value"]) else None

    @cached_property
    def forest(self) -> list[tuple[str, Score]]:
        """Whose test score of the first goal is drawn with its interval, from top to bottom, and the score."""
        whose = ("winner", "guide", *BASELINES)
        return [(who, score) for who in whose if (score := self.test_score(who))]

    @property
    def headline(self) -> str:
        """The outcome in one sentence, without its full stop."""
        interrupted = self.study["state"] == "INTERRUPTED"
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
        """How the winner compares on the test with the linear probe, if it does not beat it, and with the guide's
        defaults, or why that is unknown."""
        return " ".join(filter(None, (self.probe_sentence, self.guide_sentence)))

    @property
    def probe_sentence(self) -> str:
        """That the winner does not beat the linear probe; "" if it does, or if that is unknown."""
        clean, whole = self.test_score(OVER_PROBE + CLEAN), self.test_score(OVER_PROBE)
        ours, probe = self.test_score("winner"), self.test_score(PROBE)
        if not (whole and ours and probe):
            return ""
        mode = self.goals[0][1]
        return probe_sentence(clean or whole, ours, probe, self.metric, mode, whole if clean else None)

    @property
    def transfer_sentences(self) -> str:
        """How well another base's ranking of settings held, and what it saved; "" if this study took none over."""
        return transfer_sentences(self.study.get("transfer"), self.study.get("device_seconds") or 0.0)

    @property
    def guide_sentence(self) -> str:
        """How the winner compares with the guide's defaults on the test, or why that is unknown."""
        optimistic = "what is shown are validation scores, and they are optimistic"
        clean, whole = self.test_score(GAIN + CLEAN), self.test_score(GAIN)
        if gain := clean or whole:
            metric, mode = self.goals[0]
            sentences = [comparison_sentence(gain, metric, mode, whole if clean else None)]
            sentences += [others_sentence(self.study["test"][GAIN + CLEAN if clean else GAIN], metric, mode)]
            return " ".join(filter(None, [*sentences, adapters_sentence(gain)]))
        if self.study["state"] == "INTERRUPTED" and not self.study["test"]:
            return f"The study was interrupted, so the test images were not looked at: {optimistic}."
        if self.winner is self.guide:
            return "No trial of the search did better on the validation images than the guide's own settings."
        if not self.study["test"]:
            return f"The test images were not scored: {optimistic}."
        reason = f"{self.metric} is undefined on these test images"
        if is_number(self.study["test"].get(GAIN, {}).get(self.metric, {}).get("value")):
            reason = "the test has too few patients, groups or images that count once, for an interval"
        if self.guide and self.guide.state != "COMPLETE":
            reason = f"trial 0 ended as {self.guide.state.lower()}"
        return f"There is no comparison with the guide's defaults: {reason}."

    @cached_property
    def commands(self) -> dict[str, str]:
        """Shell commands to type next, by what they are for. The last one goes on with the study."""
        address = self.study.get("runs_address", "")
        commands = {"Compare trials": mlflow_command(self.study["tracking_uri"])}
        if address:
            served = self.study["tracking_uri"].startswith("http")  # a server runs already
            commands = {"Compare trials": address} if served else commands | {"and open": address}
        if adapter := self.study["adapter"]:
            predict = shlex.join(["python", "-m", "train_fn.predict", "--adapter", adapter])
            commands |= {"Use it": f"{predict} IMAGE_OR_FOLDER", "Merge it": f"{predict} --merge-into NEW_FOLDER"}
        next_step, name = self.study.get("next_step", "Go on"), self.study["name"]
        if next_step == LOOK_AGAIN:  # a replay is refused while the study runs
            control = ["python", "-m", "tune.control", "--results", str(self.directory.parent)]
            commands["Pause it"] = shlex.join([*control, name, "pause"])
        elif self.winner:
            replay = ["--replay", name, "--trial", str(self.winner.number)]
            if run_number := (self.study.get("delivered") or {}).get("run"):
                replay += ["--run", str(run_number)]
            run = [*program(), "--results", str(self.directory.parent)]
            commands["Reproduce it"] = shlex.join([*run, *replay])
        return commands | {next_step: self.study["next_command"]}

    def title(self, who: str) -> str:
        """The name for people of whose test scores they are."""
        number = self.study["winner"]
        winner = "winner = the guide's defaults" if number == 0 else f"winner (trial {number})"
        counts, kind = num_runs(self.study["test"].get(who, {}).get(self.metric, {}))  # none but for a difference
        paired = f"paired, mean of {max(counts)} {kind}" if counts and max(counts) > 1 else "paired"
        names = {"winner": winner, "guide": "guide's defaults", GAIN: f"winner minus guide, {paired}"}
        names[GAIN + CLEAN] = f"winner minus guide, {paired}, clean part"
        return names.get(who, f"{who}, {paired}" if who == OVER_PROBE else who)


def read_record(trial: Mapping[str, Any]) -> TrialRecord:
    """A trial of study.json. JSON has no NaN: a missing metric becomes one again."""
    fields = {field.name for field in dataclasses.fields(TrialRecord)}
    record = TrialRecord(**{name: trial[name] for name in fields & trial.keys()})
    record.epochs = [{m: math.nan if v is None else v for m, v in epoch.items()} for epoch in record.epochs]
    return record


def is_number(value: float | None) -> bool:
    """Whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def format_score(score: Score | None) -> str:
    """A test score and its 95 % interval."""
    if score is None:
        return "-"
    if not is_number(score["value"]):
        return "undefined"
    interval = " ({:.3f} to {:.3f})".format(*score["interval"]) if score["interval"] else ""
    return f"{score['value']:.3f}{interval}"


def format_metric(value: float | None) -> str:
    """A metric or cost in a table."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def format_spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


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
