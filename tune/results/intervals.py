"""Test scores with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from train_fn.scoring.metrics import bootstrap_intervals

Scorer = Callable[[np.ndarray], dict[str, float]]  # metrics of test images, given by index


def with_intervals(score: Scorer, images: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each metric as {"value", "interval"}: 95 % percentile bootstrap over these test images."""
    values = score(images)

    def of_drawn(drawn: np.ndarray) -> dict[str, float]:
        found = score(images[drawn])
        return {name: found.get(name, np.nan) for name in values}  # a small task may be in no image that was drawn

    intervals = bootstrap_intervals(of_drawn, len(images))
    return {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}


def difference(one: Scorer, other: Scorer) -> Scorer:
    """One model's metrics minus another's on the same images, which makes the bootstrap a paired one."""

    def score(images: np.ndarray) -> dict[str, float]:
        first, second = one(images), other(images)
        return {name: first[name] - second[name] for name in first.keys() & second.keys()}

    return score
