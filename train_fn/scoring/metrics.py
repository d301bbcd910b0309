"""Metrics from class probabilities, in plain numpy: fast enough for thousands of bootstrap resamples in a second.

Shapes: N images, C classes. `probabilities` [N, C] sum to 1 over C; `labels` [N] hold class indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Direction in which a metric gets better.
MODES = {
    "loss": "min",
    "accuracy": "max",
    "balanced_accuracy": "max",
    "macro_f1": "max",
    "macro_f1_prior_corrected": "max",
    "auroc": "max",
    "sensitivity": "max",
    "specificity": "max",
}


def binary_auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive image scores above a negative one, ties half (Mann-Whitney). NaN if one kind lacks.

    positive: [N] bool. scores: [N].
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]  # equal scores share the mean of their ranks
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [C, C]: row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 over the classes that occur in labels or predictions, from a confusion table (as scikit-learn's)."""
    hits, sizes = np.diag(table), table.sum(0) + table.sum(1)
    present = sizes > 0
    return float((2 * hits[present] / sizes[present]).mean())


def classification_metrics(
    probabilities: np.ndarray, labels: np.ndarray, prior: np.ndarray, positive: int | None = None
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1 (plain and prior-corrected), macro one-vs-rest AUROC and, with a
    `positive` class, its sensitivity and specificity. A metric is NaN if the data lacks a class that it needs.

    Args:
        prior: weight of each class in the training loss [C]. The corrected decision divides by it, so that a model
            trained on imbalanced data does not prefer its majority class.
    """
    num_classes = probabilities.shape[1]
    table = confusion(labels, probabilities.argmax(1), num_classes)
    corrected = confusion(labels, (probabilities / prior).argmax(1), num_classes)
    sizes = table.sum(1)
    recalls = np.diag(table)[sizes > 0] / sizes[sizes > 0]
    aurocs = np.array([binary_auroc(labels == c, probabilities[:, c]) for c in range(num_classes)])
    metrics = {
        "accuracy": float(np.diag(table).sum() / table.sum()),
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": macro_f1(table),
        "macro_f1_prior_corrected": macro_f1(corrected),
        "auroc": float(np.nanmean(aurocs)) if np.isfinite(aurocs).any() else float("nan"),
    }
    if positive is not None:
        is_positive, called = labels == positive, probabilities.argmax(1) == positive
        metrics["sensitivity"] = float(called[is_positive].mean()) if is_positive.any() else float("nan")
        metrics["specificity"] = float((~called[~is_positive]).mean()) if (~is_positive).any() else float("nan")
    return metrics


def bootstrap_intervals(
    score: Callable[[np.ndarray], dict[str, float]], num_images: int, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """95 % percentile intervals (Efron 1979) of every value that `score(indices [N])` returns.

    Each resample draws `num_images` images with replacement. A value's interval skips resamples in which it is NaN.
    """
    rng = np.random.default_rng(seed)
    draws = [score(rng.integers(0, num_images, num_images)) for _ in range(resamples)]
    intervals = {}
    for name in draws[0]:
        values = np.array([draw[name] for draw in draws])
        values = values[np.isfinite(values)]
        intervals[name] = [float(bound) for bound in np.percentile(values, [2.5, 97.5])] if len(values) else None
    return intervals
