"""What a study optimises and what its winner must keep: `--metric`, `--require`, `--stop-when`."""

from __future__ import annotations

import re

from train_fn.scoring.metrics import MODES

COSTS = {"trainable_params": "min", "train_s": "min"}  # goals beside the metrics: what a trial costs


def comparison(text: str) -> tuple[str, str, float]:
    """A rule such as sensitivity>=0.9 as (metric, ">=" or "<=", value). Raises ValueError."""
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*", text)
    if not found or found[1] not in MODES:
        raise ValueError(f"must be METRIC>=X or METRIC<=X with one of {', '.join(MODES)}")
    name, sign, value = found[1], found[2], float(found[3])
    most = float("inf") if name == "loss" else 1.0
    if not (0 <= value <= most and value < float("inf")):
        reach = "at least 0" if name == "loss" else "from 0 to 1"
        raise ValueError(f"must compare with a value that {name} can have ({reach})")
    return name, sign, value


def holds(rule: tuple[str, str, float], metrics: dict[str, float]) -> bool:
    """Whether metrics keep a `comparison`."""
    name, sign, value = rule
    found = metrics.get(name, float("nan"))
    return found >= value if sign == ">=" else found <= value


def goal(text: str) -> tuple[str, str]:
    """A --metric such as auroc or -trainable_params as its name and "max" or "min". Raises ValueError."""
    name = text.removeprefix("-")
    if name not in MODES and name not in COSTS:
        raise ValueError(f"must be one of {', '.join([*MODES, *COSTS])}")
    return name, "min" if text.startswith("-") else {**MODES, **COSTS}[name]


Goal = tuple[str, str]  # a metric or cost, and "max" or "min"


def sign(mode: str) -> int:
    """1 where less is better, else -1: what makes sorting put the best first."""
    return 1 if mode == "min" else -1
