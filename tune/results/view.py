"""A study as its pictures need it: its summary, its search, its test, and the range of the score axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.samples import Splits, Task
from train_fn.data.splits_file import load_splits
from tune.records.optuna_study import as_optuna
from tune.records.trials import TrialRecord
from tune.results.summary import Summary

# Okabe and Ito's colours, which every kind of colour blindness tells apart; each state has a marker of its own as well.
STATES = {
    "COMPLETE": ("#0072B2", "o"),
    "STOPPED": ("#E69F00", "v"),
    "FAILED": ("#D55E00", "X"),
    "INTERRUPTED": ("#777777", "s"),
}
WINNER, GUIDE = "#009E73", "#000000"


@dataclass(frozen=True)
class TestedTask:
    """The test of one task with candidate answers.

    Shapes: n test samples of the task, C candidates.
    """

    task: Task
    indices: np.ndarray
    """Its samples in the test part [n]."""
    truth: np.ndarray
    """The true class of each [n]."""
    probabilities: dict[str, np.ndarray]
    """Of the candidates [n, C], by "winner" and "guide"; calibrated if a decision was fitted."""
    answers: dict[str, np.ndarray]
    """Index of the chosen candidate [n], by "winner" and "guide"."""
    raw: dict[str, np.ndarray]
    """The probabilities before calibration [n, C]; without those for whom nothing was fitted."""


ADAPTERS = ("winner", "guide")


def tested_tasks(splits: Splits, predictions: dict[str, dict[str, Any]]) -> list[TestedTask]:
    """The tasks with candidate answers whose test was scored, those with most samples first."""
    found = []
    parts = {who: predictions[who] for who in ADAPTERS if who in predictions}
    for task in splits.tasks if parts else ():
        indices = np.array([i for i, s in enumerate(splits.test) if s.task == task.name], dtype=int)
        if task.candidates and len(indices):
            truth = np.array([splits.test[i].label for i in indices], dtype=int)
            probabilities = {who: np.array([part["probabilities"][i] for i in indices]) for who, part in parts.items()}
            answers = {who: chosen(part, indices, probabilities[who]) for who, part in parts.items()}
            raw = {who: raw_probabilities(part, indices) for who, part in parts.items()}
            fitted = {w: p for w, p in raw.items() if p is not None and not np.array_equal(p, probabilities[w])}
            found.append(TestedTask(task, indices, truth, probabilities, answers, fitted))
    return sorted(found, key=lambda tested: -len(tested.indices))


def raw_probabilities(part: dict[str, Any], indices: np.ndarray) -> np.ndarray | None:
    """Probabilities of a task's samples before calibration [n, C]; None: not stored."""
    rows = [part["raw_probabilities"][i] for i in indices] if part.get("raw_probabilities") else [None]
    return np.array(rows, dtype=float) if all(rows) else None


def chosen(part: dict[str, Any], indices: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Index of the chosen candidate [n]: as stored, else the most probable one (studies of earlier versions)."""
    decided = part.get("decided") or [None] * (int(indices.max()) + 1)
    best = probabilities.argmax(1).tolist()
    return np.array([b if (d := decided[i]) is None or d < 0 else d for i, b in zip(indices, best, strict=True)])


class View:
    """A study as its pictures need it.

    Args:
        study: the content of study.json.
        directory: the study's folder, with splits.json.
    """

    def __init__(self, study: dict[str, Any], directory: Path) -> None:
        self.summary = summary = Summary(study, directory)
        self.search = as_optuna({record.number: record for record in summary.records}, summary.goals)
        self.metric, self.records, self.parameters = summary.metric, summary.records, summary.parameters
        splits = directory / "splits.json"
        self.splits = load_splits(splits, study.get("positive_label", "")) if splits.exists() else None
        self.predictions: dict[str, dict[str, Any]] = study.get("predictions") or {}  # by "winner" and "guide"
        self.tested = tested_tasks(self.splits, self.predictions) if self.splits else []
        self.better = -1 if summary.goals[0][1] == "min" else 1
        self.scored = [record for record in self.records if math.isfinite(self.score(record))]
        # A score far below the worst completed trial is drawn on the edge, so that the completed trials stay apart.
        completed = summary.ranked if len(summary.ranked) > 2 else self.scored
        ends = [self.score(record) for record in completed] or [0.0, 1.0]
        self.worst, self.best = (max(ends), min(ends)) if self.better < 0 else (min(ends), max(ends))
        edge = self.worst - 1.5 * (self.best - self.worst)
        inside = [s for record in self.scored if ((s := self.score(record)) - edge) * self.better >= 0] or ends
        pad = 0.08 * (max(inside) - min(inside)) or 0.01
        self.low, self.high = min(inside) - pad, max(inside) + pad

    def score(self, record: TrialRecord) -> float:
        """The trial's last validation score; NaN: none."""
        return record.value(self.metric)

    def height(self, score: float) -> float:
        """Where a score is drawn; NaN is drawn on the worse edge."""
        edge = self.low if self.better > 0 else self.high
        return min(max(score, self.low), self.high) if math.isfinite(score) else edge

    def highlight(self, record: TrialRecord) -> tuple[str, str] | None:
        """Label and colour of winner and guide, which every picture highlights; None for other trials."""
        if record is self.summary.winner:
            return f"winner (trial {record.number})", WINNER
        return ("guide's defaults (trial 0)", GUIDE) if record is self.summary.guide else None
