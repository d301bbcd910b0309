"""Metrics from predictions, as functions of sample weights, in plain numpy.

A weight is how often a sample counts: a row of ones gives the metrics of the samples, and each row of counts those of a
bootstrap resample, or of the samples without some of them. All rows are computed at once.

Shapes: N samples, R rows of weights, C classes (grades, label sets), L labels. `weights` [R, N] are at least 0;
`probabilities` [N, C] sum to 1 over C; `labels` and `answers` [N] hold class indices. Each metric is an array [R]. One
that a row cannot give is NaN there. Metrics of text are in train_fn/scoring/text_metrics.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

TASKS = ("closed", "binary", "ordinal", "multilabel", "open", "numeric")
CHOICE = ("closed", "binary", "ordinal")  # one answer from a set


@dataclass(frozen=True)
class Metric:
    """What a metric is, whatever its value."""

    mode: Literal["max", "min"]
    """The direction in which it gets better."""
    tasks: tuple[str, ...]
    """The kinds of task that give it, of TASKS."""
    description: str
    low: float = 0.0
    """Its lowest possible value."""
    high: float = 1.0
    """Its highest possible value."""


METRICS = {
    "loss": Metric("min", TASKS, "mean negative log-likelihood of a true answer's tokens", high=np.inf),
    "accuracy": Metric("max", CHOICE, "share of samples whose answer is the true one"),
    "balanced_accuracy": Metric("max", CHOICE, "mean recall of the classes"),
    "macro_f1": Metric("max", CHOICE, "mean F1 of the classes"),
    "auroc": Metric("max", CHOICE, "mean area under the ROC curve of each class against the rest, within a question"),
    "sensitivity": Metric("max", CHOICE, "recall of the positive class (--positive-label)"),
    "specificity": Metric("max", CHOICE, "recall of all other classes together"),
    "ppv": Metric("max", CHOICE, "share of true positives among those called positive (at --prevalence)"),
    "npv": Metric("max", CHOICE, "share of true negatives among those called negative (at --prevalence)"),
    "sensitivity_at_specificity_90": Metric("max", CHOICE, "highest sensitivity where the specificity is at least 0.9"),
    "specificity_at_sensitivity_90": Metric("max", CHOICE, "highest specificity where the sensitivity is at least 0.9"),
    "log_loss": Metric("min", CHOICE, "mean negative log-probability of the true answer", high=np.inf),
    "brier": Metric("min", CHOICE, "mean squared error of the probabilities, summed over the classes", high=2.0),
    "ece": Metric("min", CHOICE, "mean distance of confidence and share of right answers, in equally large bins"),
    "quadratic_kappa": Metric("max", ("ordinal",), "Cohen's kappa with quadratic weights", low=-1.0),
    "grade_mae": Metric("min", ("ordinal",), "mean distance of predicted and true grade, in grades", high=np.inf),
    "exact_match": Metric(
        "max", ("multilabel", "open"), "share of answers equal to the truth (sets, normalised words)"
    ),
    "label_f1": Metric("max", ("multilabel",), "mean F1 of the labels"),
    "label_auroc": Metric("max", ("multilabel",), "mean area under the ROC curve of each label, within a question"),
    "token_f1": Metric("max", ("open",), "mean F1 of an answer's words (SQuAD)"),
    "rouge_l": Metric("max", ("open",), "mean F1 of the longest common subsequence of words (ROUGE-L)"),
    "bleu": Metric("max", ("open",), "corpus BLEU with one to four words"),
    "mae": Metric(
        "min",
        ("numeric",),
        "mean absolute error; an answer that is no number counts with the range of the training values",
        high=np.inf,
    ),
    "rmse": Metric("min", ("numeric",), "root of the mean squared error, with the same rule", high=np.inf),
    "pearson_r": Metric("max", ("numeric",), "Pearson correlation of the answers that are numbers", low=-1.0),
    "parsed": Metric("max", ("numeric",), "share of answers that are numbers"),
}
NAMED = tuple(METRICS)
OF_POSITIVE = tuple(NAMED[NAMED.index("sensitivity") : NAMED.index("log_loss")])  # need a positive class
RAW = (
    *("accuracy", "balanced_accuracy", "macro_f1", "sensitivity", "specificity", "ppv", "npv"),
    *("quadratic_kappa", "grade_mae", "log_loss", "brier", "ece"),
)
"""Metrics that a fitted decision changes. With one, each also has a twin without it, such as accuracy_raw."""
for _name in RAW:
    _twin = f"{METRICS[_name].description}, without the fitted decision"
    METRICS[f"{_name}_raw"] = dataclasses.replace(METRICS[_name], description=_twin)
MODES: dict[str, str] = {name: metric.mode for name, metric in METRICS.items()}


# ------------------------------------------------------------------------------------------------ weighted sums


def ratio(above: np.ndarray | float, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient; NaN where the divisor is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean [R] of values [N] or [R, N]."""
    return ratio((weights * values).sum(1), weights.sum(1))


def mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean [R] of the finite values of each row [R, K]; NaN where there are none."""
    finite = np.isfinite(values)
    return ratio(np.where(finite, values, 0.0).sum(1), finite.sum(1))


def sums_by(keys: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Sums [R, size] of the weights [R, N] of equal keys [N], which are from 0 to size - 1."""
    order = np.argsort(keys, kind="stable")
    present, starts = np.unique(keys[order], return_index=True)
    sums = np.take(weights, order, axis=1)
    if len(present) < len(keys):
        sums = np.add.reduceat(sums, starts, axis=1)
    if len(present) == size:
        return sums
    table = np.zeros((len(weights), size))
    table[:, present] = sums
    return table


# ------------------------------------------------------------------------------------------------ area under the curve


def binary_auroc(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, questions: np.ndarray | None = None
) -> np.ndarray:
    """Probability that a positive sample scores above a negative one, ties half (Mann-Whitney).

    With `questions`, only samples of the same question are compared: the wins of all questions are divided by their
    comparable pairs. A predictor that sees no image and knows each question's prior then has exactly 0.5. Without
    `questions` it would score above 0.5, because it knows which questions have more positives.

    Args:
        positive: [N] bool.
        scores: [N].
        weights: [R, N].
        questions: index of each sample's question [N], counted from 0; None: all samples have the same.

    Returns:
        The area under the ROC curve [R]; NaN if no question has samples of both kinds.
    """
    if not positive.any() or positive.all():
        return np.full(len(weights), np.nan)
    values, level = np.unique(scores, return_inverse=True)  # a level: equal scores of one question
    question_of_level = np.zeros(len(values), dtype=int)
    if questions is not None:
        keys, level = np.unique(questions.astype(int) * len(values) + level, return_inverse=True)
        question_of_level = np.unique(keys // len(values), return_inverse=True)[1]
    num_levels, num_questions = len(question_of_level), int(question_of_level[-1]) + 1
    yes, no = np.flatnonzero(positive), np.flatnonzero(~positive)
    positives, its = np.take(weights, yes, axis=1), level[yes]  # [R, positives], [positives]
    negatives = sums_by(level[no], np.take(weights, no, axis=1), num_levels)
    of_question = sums_by(question_of_level, negatives, num_questions)
    pairs = (sums_by(question_of_level[its], positives, num_questions) * of_question).sum(1)
    below = np.cumsum(negatives, 1) - negatives / 2  # of equal scores a half
    below = np.take(below, its, axis=1) - (np.cumsum(of_question, 1) - of_question)[:, question_of_level[its]]
    return ratio((positives * below).sum(1), pairs)


def macro_auroc(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, questions: np.ndarray | None = None
) -> np.ndarray:
    """Mean `binary_auroc` [R] over the columns that have one; NaN if none has. positive [N, K] bool; scores [N, K]."""
    columns = zip(positive.T, scores.T, strict=True)
    return mean_of_finite(np.stack([binary_auroc(*column, weights, questions) for column in columns], 1))


def operating_points(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Highest sensitivity with a specificity of at least 0.9, and the reverse, over all thresholds on the scores [N].

    Samples of equal scores are called positive together.
    """
    values, level = np.unique(-scores, return_inverse=True)  # from the highest score down
    called = [
        np.pad(np.cumsum(sums_by(level[kind], weights[:, kind], len(values)), 1), ((0, 0), (1, 0)))
        for kind in (positive, ~positive)
    ]  # weight of the positive and negative samples that are called positive at each threshold [R, levels + 1]
    sensitivity = ratio(called[0], called[0][:, -1:])
    specificity = 1 - ratio(called[1], called[1][:, -1:])
    defined = np.isfinite(sensitivity[:, 0] + specificity[:, 0])
    enough = 0.9 - 1e-9
    found = {
        "sensitivity_at_specificity_90": np.where(specificity >= enough, sensitivity, 0.0).max(1),
        "specificity_at_sensitivity_90": np.where(sensitivity >= enough, specificity, 0.0).max(1),
    }
    return {name: np.where(defined, value, np.nan) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------ one answer of a set


def confusion(
    labels: np.ndarray, answers: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Weights, without weights counts: row = true class, column = answered class. [R, C, C], without weights [C, C]."""
    cells = labels * num_classes + answers
    if weights is None:
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return sums_by(cells, weights, num_classes**2).reshape(-1, num_classes, num_classes)


def macro_f1s(tables: np.ndarray) -> np.ndarray:
    """Mean F1 [R] over the classes that occur in labels or answers (as scikit-learn's), from tables [R, C, C]."""
    return mean_of_finite(ratio(2 * np.diagonal(tables, axis1=1, axis2=2), tables.sum(1) + tables.sum(2)))


def macro_f1(table: np.ndarray) -> float:
    """`macro_f1s` of one confusion table [C, C]."""
    return float(macro_f1s(table[None])[0])


def decision_metrics(
    answers: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    num_classes: int,
    positive: int | None = None,
    prevalence: float = 0.0,
) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy and macro-F1; with a `positive` class also its sensitivity, specificity and
    predictive values.

    Args:
        prevalence: share of positive cases where the predictive values hold; 0: as in the samples.
    """
    tables = confusion(labels, answers, num_classes, weights)
    hits, sizes = np.diagonal(tables, axis1=1, axis2=2), tables.sum(2)
    metrics = {
        "accuracy": ratio(hits.sum(1), sizes.sum(1)),
        "balanced_accuracy": mean_of_finite(ratio(hits, sizes)),
        "macro_f1": macro_f1s(tables),
    }
    if positive is None:
        return metrics
    true_positives, num_positive, called = hits[:, positive], sizes[:, positive], tables[:, :, positive].sum(1)
    num_negative = sizes.sum(1) - num_positive
    false_positives, false_negatives = called - true_positives, num_positive - true_positives
    true_negatives = num_negative - false_positives
    metrics["sensitivity"] = ratio(true_positives, num_positive)
    metrics["specificity"] = ratio(true_negatives, num_negative)
    if prevalence:  # instead of the samples' own
        of_positive, of_negative = ratio(prevalence, num_positive), ratio(1 - prevalence, num_negative)
        true_positives, false_negatives = true_positives * of_positive, false_negatives * of_positive
        true_negatives, false_positives = true_negatives * of_negative, false_positives * of_negative
    metrics["ppv"] = ratio(true_positives, true_positives + false_positives)
    metrics["npv"] = ratio(true_negatives, true_negatives + false_negatives)
    return metrics


def probability_metrics(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Log-loss, Brier score and expected calibration error of the most probable answer.

    The bins of the calibration error are equally large groups by confidence among all samples, whatever their weights.
    """
    true = probabilities[np.arange(len(labels)), labels]
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = calibration_bins(confidence)
    distances = np.abs(sums_by(bins, weights * (confidence - right), int(bins.max(initial=0)) + 1))
    return {
        "log_loss": mean(-np.log(np.maximum(true, np.finfo(float).eps)), weights),
        "brier": mean(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1), weights),
        "ece": ratio(distances.sum(1), weights.sum(1)),
    }


def num_calibration_bins(num_samples: int) -> int:
    """2 to 10 bins, of at least 10 samples where possible."""
    return min(10, max(2, num_samples // 10))


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each sample [N]: equally large groups by confidence."""
    groups = np.array_split(np.argsort(confidence, kind="stable"), num_calibration_bins(len(confidence)))
    bins = np.empty(len(confidence), dtype=int)
    for number, group in enumerate(groups):
        bins[group] = number
    return bins


def ordinal_metrics(
    answers: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_grades: int
) -> dict[str, np.ndarray]:
    """Quadratic weighted kappa and mean absolute error of the answered grade.

    The classes are the grades in their order, also those that no sample has; the distance of neighbours is 1. The kappa
    is that of scikit-learn's `cohen_kappa_score(weights="quadratic")` over all grades; NaN if all samples have the same
    true and answered grade, where it is 0/0.
    """
    tables = confusion(labels, answers, num_grades, weights)
    distance = np.abs(np.arange(num_grades)[:, None] - np.arange(num_grades))
    mass = tables.sum((1, 2))
    by_chance = ratio((tables.sum(2)[:, :, None] * tables.sum(1)[:, None] * distance**2).sum((1, 2)), mass)
    return {
        "quadratic_kappa": 1 - ratio((tables * distance**2).sum((1, 2)), by_chance),
        "grade_mae": ratio((tables * distance).sum((1, 2)), mass),
    }


# ------------------------------------------------------------------------------------------------ sets of labels


def membership(sets: Sequence[Collection[str]], names: Sequence[str]) -> np.ndarray:
    """Which set holds which label [len(sets), L] bool. `names` must hold every label of the sets."""
    column = {name: index for index, name in enumerate(names)}
    table = np.zeros((len(sets), len(names)), dtype=bool)
    for row, labels in enumerate(sets):
        table[row, [column[label] for label in labels]] = True
    return table


def label_probabilities(probabilities: np.ndarray, members: np.ndarray) -> np.ndarray:
    """A label's probability [N, L]: the sum over the sets that hold it.

    Args:
        probabilities: of the sets [N, C].
        members: which set holds which label [C, L], from `membership`.
    """
    # No matrix product: it may round equal rows differently, which would untie them in the AUROC.
    return np.stack([probabilities[:, holds].sum(1) for holds in members.T], 1)


def set_metrics(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Exact match of label sets, and mean F1 of the labels that occur in a true or predicted set.

    The F1 is that of scikit-learn's `f1_score(average="macro")` over these labels.

    Args:
        truth: [N, L] bool, from `membership`.
        predicted: [N, L] bool.
    """
    hits = weights @ (truth & predicted).astype(float)
    sizes = weights @ (truth.astype(float) + predicted)
    return {
        "exact_match": mean((truth == predicted).all(1), weights),
        "label_f1": mean_of_finite(ratio(2 * hits, sizes)),
    }


def multilabel_metrics(
    probabilities: np.ndarray,
    members: np.ndarray,
    truth: np.ndarray,
    weights: np.ndarray,
    questions: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """`set_metrics` of the most probable set, and the mean AUROC of the labels that some samples have and others lack.

    Args:
        probabilities: of the candidate sets [N, C].
        members: which candidate set holds which label [C, L], from `membership`.
        truth: which labels each sample has [N, L], from `membership`.
        questions: index of each sample's question [N]: the AUROC compares only samples of the same question.
    """
    scores = label_probabilities(probabilities, members)
    found = set_metrics(truth, members[probabilities.argmax(1)], weights)
    return found | {"label_auroc": macro_auroc(truth, scores, weights, questions)}


# ------------------------------------------------------------------------------------------------ numbers


def numeric_metrics(
    answers: np.ndarray, truths: np.ndarray, weights: np.ndarray, worst: float | None = None
) -> dict[str, np.ndarray]:
    """Errors and correlation over the samples whose answer and truth are numbers, and the share of answers that are.

    Args:
        answers: [N], NaN where the answer is no number (`train_fn.support.numbers.parse_number`).
        truths: [N] in the same way.
        worst: error of an answer that is no number, such as the range of the training part's values: otherwise a model
            that answers only what is easy would look best. None: such answers are left out of the errors.

    Returns:
        `mae` and `rmse` in the answers' unit; `pearson_r`, NaN where answers or truths are all equal; `parsed`, the
        share among the samples whose truth is a number.
    """
    asked = np.isfinite(truths)
    answers, truths, weights = answers[asked], truths[asked], weights[:, asked]
    numbers = np.isfinite(answers)
    errors = np.where(numbers, answers - truths, 0.0 if worst is None else worst)
    counted = weights * numbers if worst is None else weights
    scale = float(np.abs(errors).max(initial=0)) or 1.0  # against overflow and underflow of the squares
    return {
        "mae": mean(np.abs(errors), counted),
        "rmse": scale * np.sqrt(mean((errors / scale) ** 2, counted)),
        "pearson_r": pearson_r(answers[numbers], truths[numbers], weights[:, numbers]),
        "parsed": mean(numbers, weights),
    }


def pearson_r(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation [R], from -1 to 1; NaN if a row has no values, or those [N] of either are all equal."""
    if not len(x):
        return np.full(len(weights), np.nan)
    deviations, same = [], np.zeros(len(weights), dtype=bool)
    for values in (x, y):
        there = np.where(weights > 0, values, np.nan)
        with np.errstate(all="ignore"):
            lowest, highest = np.fmin.reduce(there, 1), np.fmax.reduce(there, 1)
        same |= ~(lowest < highest)
        off = np.where(weights > 0, values - mean(values, weights)[:, None], 0.0)
        deviations.append(off / np.maximum(np.abs(off).max(1, keepdims=True), np.finfo(float).tiny))
    of_x, of_y = deviations
    products = [(weights * a * b).sum(1) for a, b in ((of_x, of_y), (of_x, of_x), (of_y, of_y))]
    return np.where(same, np.nan, np.clip(ratio(products[0], np.sqrt(products[1] * products[2])), -1, 1))
