"""From predictions to the metrics of a part. Without torch: the study scores the test with the same code as a trial.

Shapes: N images, C candidate answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train_fn.data.order import class_weights
from train_fn.data.samples import Sample, Splits
from train_fn.scoring.metrics import classification_metrics


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax [N, C] over the candidates' log-likelihoods."""
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def training_prior(splits: Splits, class_balanced: bool) -> np.ndarray:
    """Weight of each class in the training loss [C], with sum 1. Uniform for a class-balanced loss."""
    counts = np.array(splits.class_counts("train"), dtype=float)
    weights = np.array(class_weights(splits.class_counts("train"))) if class_balanced else np.ones(len(counts))
    return counts * weights / (counts * weights).sum()


def metrics_of(
    predicted: dict[str, np.ndarray], samples: Sequence[Sample], splits: Splits, class_balanced: bool, positive: str
) -> dict[str, float]:
    """All metrics of one part: the loss and, for a closed set of answers, those of `classification_metrics`."""
    metrics = {"loss": float(predicted["losses"].mean())}
    if splits.candidates:
        labels = np.array([sample.label for sample in samples])
        metrics |= classification_metrics(
            probabilities(predicted["scores"]),
            labels,
            training_prior(splits, class_balanced),
            splits.candidates.index(positive) if positive in splits.candidates else None,
        )
    return metrics
