"""How often sets of answers (`train_fn.scoring.conformal`) hold the true answer of test samples.

Shapes: R rows of weights, N test samples of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train_fn.data.samples import Sample, Splits, units_of
from train_fn.model.adapters import ClassScores
from train_fn.scoring.conformal import answer_sets, coverage_of
from train_fn.scoring.fitting import Decided
from tune.results.intervals import with_intervals

COVERAGES = (0.8, 0.9, 0.95)
SHARE = "/accuracy"  # a share of samples, and so has such an interval


def coverage_rows(
    decided: Mapping[str, Decided], conformal: Mapping[str, Sequence[ClassScores]], splits: Splits
) -> list[dict[str, Any]]:
    """What the sets of an adapter are worth on the test samples, for each task with sets and each of COVERAGES.

    Args:
        decided: probabilities of the test samples by task.
        conformal: calibration scores by task, from the adapter's task.json.

    Returns:
        Dicts of `task`, `coverage` (the share that is asked for), `covered` (the share of sets with the true answer,
        with its interval), `by_class` (the same for each true answer), `single` (sets of exactly one answer) and
        `mean_size` (answers in a set).
    """
    rows = []
    for task in splits.tasks:
        samples = [sample for sample in splits.test if sample.task == task.name]
        if task.name in conformal and task.name in decided and samples:
            for coverage in COVERAGES:
                sets = answer_sets(decided[task.name].probabilities, conformal[task.name], coverage)  # [N, C]
                rows.append({"task": task.name, "coverage": coverage} | worth_of(sets, samples, task.candidates))
    return rows


def worth_of(sets: np.ndarray, samples: Sequence[Sample], candidates: Sequence[str]) -> dict[str, Any]:
    """What sets [N, C] are worth, see `coverage_rows`."""
    labels, units = np.array([sample.label for sample in samples], dtype=int), units_of(samples)

    def score(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        found = coverage_of(sets, labels, units, weights)
        shares = {"covered": found["covered"], "single": found["one_answer"]}
        by_class = zip(candidates, found["covered_by_class"].T, strict=True)
        shares |= {f"of {answer}": its for answer, its in by_class}
        return {name + SHARE: share for name, share in shares.items()}

    scores = {name.removesuffix(SHARE): its for name, its in with_intervals(score, units).items()}
    return {
        "covered": scores["covered"],
        "by_class": {answer: scores[f"of {answer}"] for answer in candidates},
        "single": scores["single"],
        "mean_size": float(coverage_of(sets, labels, units)["set_size"][0]),
    }
