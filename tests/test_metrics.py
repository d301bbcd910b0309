"""Our numpy metrics against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from train_fn.scoring.metrics import binary_auroc, bootstrap_intervals, classification_metrics


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, 80, p=[0.2, 0.5, 0.3])
    probabilities = rng.dirichlet(np.ones(3), 80).round(2) + 1e-9  # rounded: ties
    probabilities /= probabilities.sum(1, keepdims=True)
    found = classification_metrics(probabilities, labels, np.full(3, 1 / 3), positive=2)
    called = probabilities.argmax(1)
    aurocs = [sk.roc_auc_score(labels == c, probabilities[:, c]) for c in range(3)]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, called))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, called))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, called, average="macro"))
    assert found["macro_f1"] == found["macro_f1_prior_corrected"]
    assert found["auroc"] == pytest.approx(np.mean(aurocs))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(labels == 2, called == 2))
    assert found["specificity"] == pytest.approx(sk.recall_score(labels != 2, called != 2))


def test_prior_correction_finds_the_rare_class() -> None:
    labels = np.array([0] * 9 + [1])
    probabilities = np.array([[0.95, 0.05]] * 9 + [[0.8, 0.2]])
    found = classification_metrics(probabilities, labels, np.array([0.9, 0.1]))
    assert found["macro_f1"] < 0.5 < found["macro_f1_prior_corrected"] == 1.0
    assert "sensitivity" not in found


def test_always_the_majority_of_busi_gives_024() -> None:
    labels = np.repeat([0, 1, 2], [22, 71, 33])
    probabilities = np.tile([0.2, 0.6, 0.2], (126, 1))
    assert classification_metrics(probabilities, labels, np.full(3, 1 / 3))["macro_f1"] == pytest.approx(0.24, abs=1e-3)


def test_one_sided_auroc_is_undefined() -> None:
    assert np.isnan(binary_auroc(np.ones(4, bool), np.arange(4.0)))


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_intervals(lambda chosen: {"mean": values[chosen].mean()}, 400, resamples=2000)["mean"]
    half = 1.96 * values.std() / 20
    assert found == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)
