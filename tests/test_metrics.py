"""Our numpy metrics against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from train_fn.scoring.metrics import binary_auroc, decision_metrics, macro_auroc, operating_points, probability_metrics

ONES = np.ones((1, 80))


def random_predictions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [80, 3] with ties, and labels [80]."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, 80, p=[0.2, 0.5, 0.3])
    probabilities = rng.dirichlet(np.ones(3), 80).round(2) + 1e-9  # rounded: ties
    return probabilities / probabilities.sum(1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed: int) -> None:
    probabilities, labels = random_predictions(seed)
    called = probabilities.argmax(1)
    found = {name: value[0] for name, value in decision_metrics(called, labels, ONES, 3, positive=2).items()}
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, called))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, called))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, called, average="macro"))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(labels == 2, called == 2))
    assert found["specificity"] == pytest.approx(sk.recall_score(labels != 2, called != 2))
    assert found["ppv"] == pytest.approx(sk.precision_score(labels == 2, called == 2))
    assert found["npv"] == pytest.approx(sk.precision_score(labels != 2, called != 2))
    one_of_each = labels[:, None] == np.arange(3)
    aurocs = [sk.roc_auc_score(labels == c, probabilities[:, c]) for c in range(3)]
    assert macro_auroc(one_of_each, probabilities, ONES) == pytest.approx(np.mean(aurocs))
    proper = {name: value[0] for name, value in probability_metrics(probabilities, labels, ONES).items()}
    assert proper["log_loss"] == pytest.approx(sk.log_loss(labels, probabilities))
    assert proper["brier"] == pytest.approx(((probabilities - one_of_each) ** 2).sum(1).mean())
    false, true, _ = sk.roc_curve(labels == 2, probabilities[:, 2], drop_intermediate=False)
    points = operating_points(labels == 2, probabilities[:, 2], ONES)
    assert points["sensitivity_at_specificity_90"] == pytest.approx(true[false <= 0.1 + 1e-9].max())
    assert points["specificity_at_sensitivity_90"] == pytest.approx(1 - false[true >= 0.9 - 1e-9].min())


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_scikit_learn(seed: int) -> None:
    (probabilities, labels), weights = random_predictions(seed), np.random.default_rng(seed).random(80)
    called = probabilities.argmax(1)
    found = decision_metrics(called, labels, weights[None], 3, positive=2)
    found |= probability_metrics(probabilities, labels, weights[None])
    found["auroc"] = macro_auroc(labels[:, None] == np.arange(3), probabilities, weights[None])
    aurocs = [sk.roc_auc_score(labels == c, probabilities[:, c], sample_weight=weights) for c in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(aurocs))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, called, sample_weight=weights))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, called, average="macro", sample_weight=weights))
    assert found["ppv"] == pytest.approx(sk.precision_score(labels == 2, called == 2, sample_weight=weights))
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, probabilities, sample_weight=weights))


def test_predictive_values_at_a_prevalence() -> None:
    labels, called = np.repeat([0, 1], [20, 10]), np.repeat([0, 1, 0, 1], [18, 2, 1, 9])
    found = decision_metrics(called, labels, np.ones((1, 30)), 2, positive=1, prevalence=0.1)
    assert (found["sensitivity"][0], found["specificity"][0]) == (0.9, 0.9)
    assert found["ppv"] == pytest.approx(0.5)  # of 100: 9 true, 9 false
    assert found["npv"] == pytest.approx(81 / 82)
    of_samples = decision_metrics(called, labels, np.ones((1, 30)), 2, positive=1)
    assert (of_samples["ppv"][0], of_samples["npv"][0]) == pytest.approx((9 / 11, 18 / 19))
    nobody = decision_metrics(np.zeros(30, int), labels, np.ones((1, 30)), 2, positive=1, prevalence=0.1)
    assert np.isnan(nobody["ppv"][0]) and nobody["npv"] == pytest.approx(0.9)


def test_calibration_error_by_hand() -> None:
    confidence = np.repeat([0.6, 0.9], 10)  # two bins
    right = np.concatenate([np.repeat([1, 0], [6, 4]), np.repeat([1, 0], [7, 3])])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    assert probability_metrics(probabilities, 1 - right, np.ones((1, 20)))["ece"] == pytest.approx(0.1)
    halves = np.repeat([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]], 10, axis=1)  # the bins stay when a half counts more
    assert probability_metrics(probabilities, 1 - right, halves)["ece"] == pytest.approx([0.0, 0.2, 0.05])


def test_operating_points_call_equal_scores_together() -> None:
    positive, scores = np.array([1, 1, 0, 0, 0], bool), np.array([0.9, 0.5, 0.5, 0.2, 0.1])
    found = operating_points(positive, scores, np.ones((1, 5)))
    assert found["sensitivity_at_specificity_90"] == 0.5
    assert found["specificity_at_sensitivity_90"] == pytest.approx(2 / 3)
    without = operating_points(positive, scores, np.array([[1.0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]))
    assert without["sensitivity_at_specificity_90"][0] == without["specificity_at_sensitivity_90"][0] == 1
    assert np.isnan(without["sensitivity_at_specificity_90"][1])


def test_always_the_majority_of_busi_gives_024() -> None:
    labels = np.repeat([0, 1, 2], [22, 71, 33])
    found = decision_metrics(np.ones(126, int), labels, np.ones((1, 126)), 3)
    assert found["macro_f1"] == pytest.approx(0.24, abs=1e-3) and "sensitivity" not in found


def test_one_sided_auroc_is_undefined() -> None:
    assert np.isnan(binary_auroc(np.ones(4, bool), np.arange(4.0), np.ones((1, 4)))).all()
