"""Test scores with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
import numpy as np
from train_fn.data.samples import Sample
from train_fn.data.samples import Splits
from train_fn.scoring.scores import metrics_of
from typing import Any
from train_fn.scoring.metrics import bootstrap_intervals
from train_fn.scoring.metrics import MODES




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
