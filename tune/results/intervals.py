"""Test scores with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from train_fn.data.samples import Splits
from train_fn.scoring.metrics import bootstrap_intervals
from train_fn.scoring.scores import metrics_of

Scorer = Callable[[np.ndarray], dict[str, float]]  # metrics of test images, given by index


def make_scorer(predicted: dict[str, np.ndarray], splits: Splits, class_balanced: bool, positive: str) -> Scorer:
    """A function from test images, by index, to a model's metrics on them.

    Args:
        predicted: the model's predictions for all test images.
    """

    def score(images: np.ndarray) -> dict[str, float]:
        chosen = {name: values[images] for name, values in predicted.items()}
        samples = [splits.test[image] for image in images]
        return metrics_of(chosen, samples, splits, class_balanced, positive)

    return score


def with_intervals(score: Scorer, images: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each metric as {"value", "interval"}: 95 % percentile bootstrap over these test images."""
    values = score(images)
    intervals = bootstrap_intervals(lambda drawn: score(images[drawn]), len(images))
    return {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}


def difference(one: Scorer, other: Scorer) -> Scorer:
    """One model's metrics minus another's on the same images, which makes the bootstrap a paired one."""

    def score(images: np.ndarray) -> dict[str, float]:
        first, second = one(images), other(images)
        return {name: first[name] - second[name] for name in first}

    return score
