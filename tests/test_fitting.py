"""Decisions: probabilities by vector scaling, and rules that choose answers for a score."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from train_fn.data.decision import Decision, log_softmax, operating_point, softmax
from train_fn.data.samples import Sample, Splits, Task
from train_fn.scoring import fitting
from train_fn.scoring.fitting import best_rule, decide, decide_out_of_fold, fit_decision, fit_part, folds, out_of_fold

SHARES = np.array([0.17, 0.56, 0.27])  # of the classes in BUSI


def drawn(num: int, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """True log-probabilities [N, C] of three classes, and labels that follow them [N]."""
    rng = np.random.default_rng(seed)
    logs = log_softmax(rng.normal(0, spread, (num, 3)) + np.log(SHARES))
    return logs, (np.exp(logs).cumsum(1) < rng.random((num, 1))).sum(1)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return -float(np.log(probabilities[np.arange(len(labels)), labels]).mean())


def alone(num: int) -> range:
    """Units of one sample each."""
    return range(num)


def test_scaling_takes_back_a_scale_and_offsets_that_a_model_has_added() -> None:
    logs, labels = drawn(20_000)
    scores = 3.0 * logs + np.array([0.5, -1.0, 0.5])  # overconfident, and against the second class
    scale, offsets = fitting.fit_scaling(scores, labels)
    assert scale == pytest.approx(1 / 3, rel=0.03)
    assert offsets - offsets.mean() == pytest.approx(-np.array([0.5, -1.0, 0.5]) / 3, abs=0.05)
    assert log_loss(Decision("macro_f1", scale, tuple(offsets)).probabilities(scores), labels) == pytest.approx(
        log_loss(np.exp(logs), labels), abs=0.002
    )


def test_forty_images_are_not_learned_by_heart() -> None:
    new, new_labels = drawn(4000, seed=999)
    honest = log_loss(np.exp(new), new_labels)
    losses = []
    for seed in range(40):
        logs, labels = drawn(40, seed)
        scale, offsets = fitting.fit_scaling(logs, labels)
        losses.append(log_loss(Decision("macro_f1", scale, tuple(offsets)).probabilities(new), new_labels))
    assert np.mean(losses) < honest + 0.04  # there is nothing to gain: the probabilities were honest


def test_a_class_that_validation_lacks_keeps_a_finite_offset() -> None:
    logs, labels = drawn(60)
    kept = labels != 0
    scale, offsets = fitting.fit_scaling(logs[kept], labels[kept])
    assert np.isfinite([scale, *offsets]).all() and offsets[0] < offsets[1:].min() and abs(offsets[0]) < 10


@pytest.mark.parametrize(
    ("aim", "score"),
    [
        ("accuracy", sk.accuracy_score),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("macro_f1", lambda y, p: sk.f1_score(y, p, average="macro")),
        ("quadratic_kappa", lambda y, p: sk.cohen_kappa_score(y, p, weights="quadratic")),
    ],
)
def test_the_rule_is_the_best_one(aim: str, score) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        positive = rng.random(60).round(2)  # with ties
        labels = (rng.random(60) < 0.2 + 0.5 * positive).astype(int)
        logs = np.log(np.stack([1 - positive + 1e-3, positive + 1e-3], 1))
        rule = best_rule(logs, labels, aim)
        found = score(labels, (logs + rule).argmax(1))
        edges = np.unique(logs[:, 0] - logs[:, 1])
        tried = [edges[0] - 1, *((edges[1:] + edges[:-1]) / 2), edges[-1] + 1]
        assert found == pytest.approx(max(score(labels, (logs[:, 1] + t > logs[:, 0]).astype(int)) for t in tried))
    logs, labels = drawn(80)
    rule = best_rule(logs, labels, aim)
    assert score(labels, (logs + rule).argmax(1)) >= score(labels, logs.argmax(1))
    assert rule.mean() == pytest.approx(0, abs=1e-12)


def test_a_score_of_new_samples_rises_when_the_rule_is_for_it() -> None:
    """Labels that a class-balanced loss has distorted: the plain argmax calls the rare classes too often."""
    new, new_labels = drawn(6000, seed=99)
    aims = ("macro_f1", "accuracy", "balanced_accuracy")
    found = {aim: [] for aim in ("argmax", *aims)}
    for seed in range(10):
        logs, labels = drawn(60, seed)
        distorted = 2 * logs - np.log(SHARES) * 3
        for aim in found:
            decision = fit_decision(distorted, labels, aim, None, alone(60))
            answers = decision.answers(decision.probabilities(2 * new - np.log(SHARES) * 3))
            called = [sk.f1_score(new_labels, answers, average="macro"), sk.accuracy_score(new_labels, answers)]
            found[aim].append([*called, sk.balanced_accuracy_score(new_labels, answers)])
    means = {aim: np.mean(values, 0) for aim, values in found.items()}
    for column, aim in enumerate(aims):
        assert means[aim][column] > means["argmax"][column] + 0.01
    assert means["accuracy"][1] > means["balanced_accuracy"][1] + 0.02
    assert means["balanced_accuracy"][2] > means["accuracy"][2] + 0.005


@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_an_operating_point_holds_on_new_samples(name: str) -> None:
    new, new_labels = drawn(6000, seed=99)
    reached, other = [], []
    for seed in range(60):
        logs, labels = drawn(120, seed)
        decision = fit_decision(logs, labels, f"{name}>=0.9", 2, alone(120))
        called = decision.answers(decision.probabilities(new)) == 2
        rates = [called[new_labels == 2].mean(), (~called[new_labels != 2]).mean()]
        reached.append(rates[name == "specificity"])
        other.append(rates[name == "sensitivity"])
    assert 0.9 <= np.mean(reached) < 0.93  # at least, and not by giving the other one away
    assert np.mean(other) > 0.3


def test_an_operating_point_with_few_positives_misses_none_of_them() -> None:
    logs, labels = drawn(20)
    decision = fit_decision(logs, labels, "sensitivity>=0.99", 2, alone(20))
    assert (decision.answers(decision.probabilities(logs))[labels == 2] == 2).all()


def test_operating_points_are_read() -> None:
    assert operating_point("sensitivity>=0.95") == ("sensitivity", 0.95)
    assert operating_point(" specificity >= .8 ") == ("specificity", 0.8)
    for text in ("sensitivity>=1", "sensitivity>=0", "sensitivity<=0.9", "auroc>=0.9", "sensitivity>=0.9x", ""):
        assert operating_point(text) is None


def test_argmax_changes_nothing() -> None:
    logs, labels = drawn(50)
    decision = fit_decision(logs, labels, "argmax", 2, alone(50))
    assert decision == Decision()
    assert np.array_equal(decision.probabilities(logs), softmax(logs))
    assert np.array_equal(decision.answers(softmax(logs)), logs.argmax(1))


def test_out_of_fold_answers_do_not_flatter_where_there_is_nothing_to_learn() -> None:
    fitted, held_out = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores, labels = rng.normal(size=(45, 3)), rng.permutation(np.repeat(np.arange(3), 15))
        decision = fit_decision(scores, labels, "accuracy", None, alone(45))
        fitted.append((decision.answers(decision.probabilities(scores)) == labels).mean())
        held_out.append((out_of_fold(scores, labels, "accuracy", None, alone(45)).answers == labels).mean())
    assert np.mean(fitted) > np.mean(held_out) + 0.01 and np.mean(held_out) == pytest.approx(1 / 3, abs=0.03)


def test_folds_have_each_class_in_turn_and_do_not_divide_units() -> None:
    labels = np.repeat([0, 1, 2], [10, 30, 20])
    found = folds(labels, alone(60))
    assert all(np.bincount(found[labels == label], minlength=5).tolist() == [n / 5] * 5 for label, n in
               ((0, 10), (1, 30), (2, 20)))  # fmt: skip
    units = [index // 4 for index in range(60)]
    found = folds(labels, units)
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 60, 4)) and len(set(found)) == 5


@pytest.mark.parametrize(("num_samples", "num_classes"), [(30_000, 3), (2000, 40), (3000, 300)])
def test_many_samples_and_classes_take_seconds(num_samples: int, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_samples)
    scores = rng.normal(size=(num_samples, num_classes)) + 2 * np.eye(num_classes)[labels]
    start = time.process_time()
    decision = fit_decision(scores, labels, "macro_f1", None, alone(num_samples))
    assert time.process_time() - start < 60  # without a limit it would be hours
    assert (decision.answers(decision.probabilities(scores)) == labels).mean() > 1.2 / num_classes


def test_the_same_samples_give_the_same_decision() -> None:
    logs, labels = drawn(48)
    one, two = (fit_decision(logs, labels, "macro_f1", None, alone(48)) for _ in range(2))
    assert one == two and one.rule


def test_each_task_of_a_part_has_a_decision_of_its_own() -> None:
    tasks = (Task("a", "closed", ("x", "y", "z")), Task("b", "binary", ("no", "yes"), "yes"), Task("c", "open"))
    logs, labels = drawn(60)
    samples = [Sample((f"{i}.png",), "?", "xyz"[label], int(label), task="a") for i, label in enumerate(labels)]
    binary = np.log(np.clip(np.random.default_rng(1).random(40), 0.01, 0.99))
    samples += [Sample((f"b{i}.png",), "?", "yes" if p > -0.5 else "no", int(p > -0.5), task="b") for i, p in
                enumerate(binary)]  # fmt: skip
    samples.append(Sample(("c.png",), "?", "words", task="c"))
    scores = np.full((101, 3), np.nan)
    scores[:60] = logs
    scores[60:100, :2] = np.stack([np.log1p(-np.exp(binary)), binary], 1)
    splits = Splits((), tuple(samples), (), tasks, decide="macro_f1")
    decisions = fit_part({"scores": scores}, samples, splits)
    assert decisions.keys() == {"a", "b"} and decisions["a"] == fit_decision(logs, labels, "macro_f1", None, alone(60))
    for aim, wanted in (("sensitivity>=0.9", ["macro_f1", "sensitivity>=0.9"]), ("quadratic_kappa", ["macro_f1"] * 2)):
        fitted = fit_part({"scores": scores}, samples, replace(splits, decide=aim))
        assert [decision.aim for decision in fitted.values()] == wanted  # what a task cannot have is not fitted
    found = decide(decisions, {"scores": scores}, samples, splits)
    assert found["b"].probabilities.shape == (40, 2) and np.isfinite(found["b"].probabilities).all()
    held_out = decide_out_of_fold({"scores": scores}, samples, splits)
    assert held_out["a"].answers.shape == (60,) and not np.array_equal(
        held_out["a"].probabilities, found["a"].probabilities
    )
