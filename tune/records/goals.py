"""Goals (`--metric`) and rules on scores (`--require`, `--stop-when`), read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from train_fn.scoring.metrics import METRICS
from train_fn.scoring.own_metric import is_own_metric

COSTS = {"trainable_params": "min", "train_s": "min"}  # goals that are no metrics
Goal = tuple[str, str]  # a metric or cost, and "max" or "min"


def goal(text: str) -> Goal:
    """A --metric such as auroc or -trainable_params, as its name and "max" or "min". Raises ValueError."""
    name = text.removeprefix("-")
    if is_own_metric(name):
        return name.rpartition(":")[2], "min" if text.startswith("-") else "max"
    if metric_of(name) not in METRICS and name not in COSTS:
        raise ValueError(f"{text!r} is no goal")
    return name, "min" if text.startswith("-") else COSTS.get(name) or mode_of(name)


def metric_of(name: str) -> str:
    """The metric of a name: auroc, open/token_f1 (of all open questions), modality/accuracy (of one task)."""
    return name.rpartition("/")[2]


def mode_of(name: str) -> str:
    """The direction, "max" or "min", in which a metric gets better; "max" for a user's own."""
    metric = METRICS.get(metric_of(name))
    return metric.mode if metric else "max"


def epoch_goal(goals: Sequence[Goal], select: str) -> Goal | None:
    """The goal by which a trial's best epoch is chosen; None where the last epoch counts: for `--select last`, and for
    costs, which only grow."""
    return goals[0] if select == "best" and goals[0][0] not in COSTS else None


def sign(mode: str) -> int:
    """1 for "min", -1 for "max": values times this sort with the best first."""
    return 1 if mode == "min" else -1


def comparison(text: str) -> tuple[str, str, float]:
    """A rule such as sensitivity>=0.9, as (metric, ">=" or "<=", value). Raises ValueError."""
    match = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=)\s*(\S+)\s*", text)
    if not match or metric_of(match[1]) not in METRICS:
        raise ValueError(f"{text!r} is no rule")
    name, relation, value = match[1], match[2], float(match[3])
    metric = METRICS[metric_of(name)]
    if not metric.low <= value <= metric.high or value == float("inf"):
        raise ValueError(f"{name} never has the value {value}")
    return name, relation, value


def holds(rule: tuple[str, str, float], metrics: dict[str, float]) -> bool:
    """Whether metrics satisfy a `comparison`."""
    name, relation, value = rule
    score = metrics.get(name, float("nan"))
    return score >= value if relation == ">=" else score <= value
