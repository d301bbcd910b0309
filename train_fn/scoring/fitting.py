"""Fits decisions (`train_fn.data.decision`) on samples that the model was not trained on.

Shapes: N samples, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from train_fn.data.decision import ARGMAX, SMALLEST, Decision, log_softmax, operating_point
from train_fn.data.samples import Sample, Splits, Task, units_of

NUM_FOLDS = 5
NUM_BAGS = 20
NUM_ROUNDS = 3  # of the coordinate ascent
MAX_WORK = 5 * 10**7  # numbers that fitting a rule handles; 10**7 take about half a second
# Standard deviations of the normal priors of the offsets and of the log of the scale. Of 0.5 to 5 and 0.5 to 2 these
# gave the smallest log-loss on new images after 48 validation images, and made no difference after 126.
OFFSET_SD, SCALE_SD = 1.0, 0.5
DECIDED = ("closed", "binary", "ordinal")  # kinds of task with a decision


@dataclass(frozen=True)
class Decided:
    """What a decision makes of the scores of a task's samples in a part, in their order."""

    probabilities: np.ndarray
    """Of the candidates [N, C]."""
    answers: np.ndarray
    """Index of the chosen candidate [N]."""


def fit_decision(
    scores: np.ndarray, labels: np.ndarray, aim: str, positive: int | None, units: Sequence[int]
) -> Decision:
    """The decision for a task, fitted on samples that the model was not trained on.

    Args:
        scores: log-likelihoods of the candidates [N, C].
        labels: index of each true candidate [N].
        aim: as `Decision.aim`.
        positive: index of the positive candidate, which an operating point needs.
        units: number of each sample's unit [N], see `units_of`.
    """
    sound = np.isfinite(scores).all(1)
    scores, labels, units = scores[sound], labels[sound], np.asarray(units)[sound].tolist()
    if aim == ARGMAX or not len(labels):
        return Decision()
    scale, offsets = fit_scaling(scores, labels)
    scaled = Decision(aim, scale, tuple(offsets.tolist()))
    probabilities, point = scaled.probabilities(scores), operating_point(aim)
    if point:
        assert positive is not None
        return replace(scaled, positive=positive, threshold=fit_threshold(probabilities, labels, positive, *point))
    rule = fit_rule(probabilities, labels, aim, units)
    return replace(scaled, rule=tuple(rule.tolist()))


def fit_scaling(scores: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and offsets [C] with the smallest log-loss, drawn a little towards 1 and 0: a few dozen samples must not be
    learned by heart."""
    from scipy.optimize import minimize

    logs, num_classes = log_softmax(scores), scores.shape[1]
    truth = np.eye(num_classes)[labels]  # [N, C]

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        scale, offsets = np.exp(values[0]), values[1:]
        found = log_softmax(scale * logs + offsets)
        error = np.exp(found) - truth  # [N, C], the derivative of the log-loss by the scaled scores
        penalty = (values[0] / SCALE_SD) ** 2 / 2 + ((offsets / OFFSET_SD) ** 2).sum() / 2
        slope = np.concatenate([[scale * (error * logs).sum() + values[0] / SCALE_SD**2],
                                error.sum(0) + offsets / OFFSET_SD**2])  # fmt: skip
        return float(-(found * truth).sum() + penalty), slope

    found = minimize(objective, np.zeros(1 + num_classes), jac=True, method="L-BFGS-B").x
    return float(np.exp(found[0])), found[1:]


def fit_rule(probabilities: np.ndarray, labels: np.ndarray, aim: str, units: Sequence[int]) -> np.ndarray:
    """The rule [C] for a score of AIMS; see `fit_decision`.

    A score of answers is a staircase of the rule, and its highest step on a few dozen samples is partly luck. So the
    rule is the mean of the best rules of resamples (bagging), in which units are drawn as a whole.
    """
    logs = np.log(np.maximum(probabilities, SMALLEST))
    num_bags = min(NUM_BAGS, MAX_WORK // (NUM_ROUNDS * logs.shape[1] * logs.size))
    if not num_bags:
        return np.zeros(logs.shape[1])  # the most probable answer: hundreds of thresholds could not be fitted anyway
    rng, order = np.random.default_rng(0), np.argsort(units, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(np.asarray(units)[order])) + 1)  # samples of each unit
    rules = []
    for _ in range(num_bags):
        drawn = np.concatenate([members[unit] for unit in rng.integers(0, len(members), len(members))])
        rules.append(best_rule(logs[drawn], labels[drawn], aim))
    return np.mean(rules, 0)


def best_rule(logs: np.ndarray, labels: np.ndarray, aim: str) -> np.ndarray:
    """A rule [C], with mean 0, that no change of one offset makes better on these samples (coordinate ascent).

    Args:
        logs: log-probabilities [N, C].
        labels: index of each true candidate [N].
        aim: one of AIMS.
    """
    num_samples, num_classes = logs.shape
    rule, sizes, one_hot = np.zeros(num_classes), np.bincount(labels, minlength=num_classes), np.eye(num_classes)
    for _ in range(NUM_ROUNDS):
        before = rule.copy()
        for index in range(num_classes):
            others = logs + rule
            others[:, index] = -np.inf
            second = others.argmax(1)  # what is chosen unless this candidate is
            needed = others.max(1) - logs[:, index]  # the offset at which it is
            order = np.argsort(needed, kind="stable")
            needed, second, truth = needed[order], second[order], labels[order]
            # With the offset between the s-th and the next of `needed`, it is chosen for the first s samples.
            moved = one_hot[index] - one_hot[second]  # [N, C]
            right = (truth == index)[:, None] * one_hot[index] - (second == truth)[:, None] * one_hot[second]
            called = np.vstack([np.zeros(num_classes), moved.cumsum(0)]) + one_hot[second].sum(0)  # [N + 1, C]
            hits = np.vstack([np.zeros(num_classes), right.cumsum(0)]) + one_hot[second[second == truth]].sum(0)
            cost = np.zeros(num_samples + 1)
            if aim == "quadratic_kappa":
                distance = (index - truth) ** 2 - (second - truth) ** 2
                cost[1:] = distance.cumsum()
                cost += ((second - truth) ** 2).sum()
            value = value_of(aim, hits, called, sizes, cost)
            steps = np.concatenate([[needed[0] - 1], (needed[1:] + needed[:-1]) / 2, [needed[-1] + 1]])
            possible = np.concatenate([[True], needed[1:] > needed[:-1], [True]])
            best = np.flatnonzero(possible & (value >= value[possible].max() - 1e-12))
            rule[index] = steps[best[np.abs(steps[best] - rule[index]).argmin()]]
        if np.array_equal(rule, before):
            break
    return rule - rule.mean()


def value_of(aim: str, hits: np.ndarray, called: np.ndarray, sizes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """A score [S] of S confusion tables.

    Args:
        hits: right answers by class [S, C].
        called: answers by class [S, C].
        sizes: samples by class [C].
        cost: sum of the squared distances of answer and truth [S], for quadratic_kappa.
    """
    if aim == "accuracy":
        return hits.sum(1) / sizes.sum()
    if aim == "balanced_accuracy":
        return (hits / np.maximum(sizes, 1)).sum(1) / (sizes > 0).sum()
    if aim == "quadratic_kappa":
        grades = np.arange(len(sizes))
        by_chance = called @ ((grades[:, None] - grades) ** 2 @ sizes) / sizes.sum()
        return 1 - cost / np.maximum(by_chance, SMALLEST)
    assert aim == "macro_f1"
    total = sizes + called
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0).sum(1) / (total > 0).sum(1)


def fit_threshold(probabilities: np.ndarray, labels: np.ndarray, positive: int, name: str, value: float) -> float:
    """The probability of the positive candidate from which it is the answer, so that an operating point holds.

    A threshold on this probability, not on its distance to the next candidate's: among all ways to call a share of the
    positive samples it calls fewest of the others (Neyman and Pearson), as far as the probabilities are right.

    Args:
        probabilities: [N, C].
        name: sensitivity or specificity, which is to be at least `value` on new samples like these.
    """
    of_positive = probabilities[:, positive]
    ordered = np.sort(of_positive[labels == positive] if name == "sensitivity" else -of_positive[labels != positive])
    if not len(ordered):
        return 0.0 if name == "sensitivity" else 1.0
    # Of k - 1 misses among n samples follows an expected share of k / (n + 1) on new ones (order statistics).
    last = float(ordered[max(1, int((1 - value) * (len(ordered) + 1))) - 1])
    return last if name == "sensitivity" else float(np.nextafter(-last, 1.0))


# ------------------------------------------------------------------------------------------------ parts


def out_of_fold(
    scores: np.ndarray, labels: np.ndarray, aim: str, positive: int | None, units: Sequence[int]
) -> Decided:
    """Probabilities and answers of each sample under a decision that was fitted without it.

    A decision that was fitted on all samples would look better on these than on new ones. Units are not divided.
    """
    fold_of = folds(labels, units)
    probabilities, answers = np.empty(scores.shape), np.empty(len(labels), dtype=int)
    for fold in range(NUM_FOLDS):
        held = fold_of == fold
        its = [unit for unit, out in zip(units, held, strict=True) if not out]
        decision = fit_decision(scores[~held], labels[~held], aim, positive, its)
        probabilities[held] = decision.probabilities(scores[held])
        answers[held] = decision.answers(probabilities[held])
    return Decided(probabilities, answers)


def folds(labels: np.ndarray, units: Sequence[int]) -> np.ndarray:
    """The fold of each sample [N], by class in turn; a unit stays in one."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold_of: dict[int, int] = {}
    for index in order.tolist():
        fold_of.setdefault(units[index], len(fold_of) % NUM_FOLDS)
    return np.array([fold_of[unit] for unit in units])


def task_scores(task: Task, samples: Sequence[Sample], predicted: Mapping[str, Any]) -> tuple[list[Sample], np.ndarray]:
    """A task's samples in a part, and the scores of its candidates [N, C]."""
    members = [index for index, sample in enumerate(samples) if sample.task == task.name]
    return [samples[index] for index in members], np.asarray(predicted["scores"])[members, : len(task.candidates)]


def aim_of(task: Task, splits: Splits) -> str:
    """What a task's answers are chosen for: `Splits.decide`, or macro_f1 where that needs grades or a positive answer
    that the task lacks."""
    aim = splits.decide or ARGMAX
    fits = bool(task.positive) if operating_point(aim) else aim != "quadratic_kappa" or task.kind == "ordinal"
    return aim if fits else "macro_f1"


def fitted_from(
    task: Task, predicted: Mapping[str, Any], samples: Sequence[Sample], splits: Splits
) -> tuple[np.ndarray, np.ndarray, str, int | None, list[int]]:
    """What a task's decision is fitted from: the arguments of `fit_decision` and of `out_of_fold`."""
    its, scores = task_scores(task, samples, predicted)
    labels = np.array([sample.label for sample in its], dtype=int)
    return scores, labels, aim_of(task, splits), task.indices.get(task.positive), units_of(its)


def fit_part(predicted: Mapping[str, Any], samples: Sequence[Sample], splits: Splits) -> dict[str, Decision]:
    """The decision of each task with one answer of a set, fitted on a part; by the task's name."""
    return {
        task.name: fit_decision(*fitted_from(task, predicted, samples, splits))
        for task in splits.tasks
        if task.kind in DECIDED
    }


def decide_out_of_fold(predicted: Mapping[str, Any], samples: Sequence[Sample], splits: Splits) -> dict[str, Decided]:
    """Probabilities and answers of the part on which decisions are fitted, see `out_of_fold`; by the task's name."""
    return {
        task.name: out_of_fold(*fitted_from(task, predicted, samples, splits))
        for task in splits.tasks
        if task.kind in DECIDED
    }


def decide(
    decisions: Mapping[str, Decision], predicted: Mapping[str, Any], samples: Sequence[Sample], splits: Splits
) -> dict[str, Decided]:
    """Probabilities and answers of a part under decisions; by the task's name."""
    found = {}
    for task in splits.tasks:
        if task.name in decisions:
            _, scores = task_scores(task, samples, predicted)
            probabilities = decisions[task.name].probabilities(scores)
            found[task.name] = Decided(probabilities, decisions[task.name].answers(probabilities))
    return found
