"""The order of a study's trials, and its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tune.records.goals import Goal, comparison, holds, sign
from tune.records.trials import TrialRecord


def ranked(records: Sequence[TrialRecord], goals: Sequence[Goal], require: Sequence[str] = ()) -> list[TrialRecord]:
    """Completed trials with a finite score, best first.

    The order: trials that satisfy the rules, then trials of the Pareto front, then the first goal, then the lower loss.
    """
    name, mode = goals[0]
    rules = [comparison(text) for text in require]
    scored = [r for r in records if r.state == "COMPLETE" and math.isfinite(r.value(name))]
    satisfying = {r.number for r in scored if all(holds(rule, r.metrics) for rule in rules)}
    best = {r.number for r in front([r for r in scored if r.number in satisfying] or scored, goals)}
    return sorted(
        scored,
        key=lambda r: (r.number not in satisfying, r.number not in best, sign(mode) * r.value(name), r.metrics["loss"]),
    )


def front(
    records: Sequence[TrialRecord],
    goals: Sequence[Goal],
    value: Callable[[TrialRecord, str], float] = TrialRecord.value,
) -> list[TrialRecord]:
    """The Pareto front: completed trials that no other one equals in every goal and beats in one.

    Args:
        value: the value of a goal, by its name, of a trial.
    """
    points = {r.number: [sign(mode) * value(r, name) for name, mode in goals] for r in records if r.state == "COMPLETE"}
    points = {number: point for number, point in points.items() if all(map(math.isfinite, point))}

    def beaten(point: list[float]) -> bool:
        return any(
            other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in points.values()
        )

    return [r for r in records if r.number in points and not beaten(points[r.number])]
