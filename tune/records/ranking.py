"""Trials in order: rules kept, Pareto front, score."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tune.records.goals import Goal, comparison, holds, sign
from tune.records.trials import TrialRecord


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
