"""Metrics from predictions, in plain numpy: fast enough for thousands of bootstrap resamples in a second.

Shapes: N samples, C classes (grades, label sets), L labels. `probabilities` [N, C] sum to 1 over C; `labels` [N] hold
class indices. A metric that the data cannot give is NaN. Metrics of text are in train_fn/scoring/text_metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    "accuracy": Metric("max", CHOICE, "share of samples whose most probable answer is the true one"),
    "balanced_accuracy": Metric("max", CHOICE, "mean recall of the classes"),
    "macro_f1": Metric("max", CHOICE, "mean F1 of the classes"),
    "macro_f1_prior_corrected": Metric("max", CHOICE, "mean F1 of the classes, probabilities divided by their prior"),
    "auroc": Metric("max", CHOICE, "mean area under the ROC curve of each class against the rest, within a question"),
    "sensitivity": Metric("max", CHOICE, "recall of the positive class (--positive-label)"),
    "specificity": Metric("max", CHOICE, "recall of all other classes together"),
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
MODES: dict[str, str] = {name: metric.mode for name, metric in METRICS.items()}


# ------------------------------------------------------------------------------------------------ area under the curve


def binary_auroc(positive: np.ndarray, scores: np.ndarray, questions: np.ndarray | None = None) -> float:
    """Probability that a positive sample scores above a negative one, ties half (Mann-Whitney).

    With `questions`, only samples of the same question are compared: the wins of all questions are divided by their
    comparable pairs. A predictor that sees no image and knows each question's prior then has exactly 0.5. Without
    `questions` it would score above 0.5, because it knows which questions have more positives.

    Args:
        positive: [N] bool.
        scores: [N].
        questions: index of each sample's question [N], counted from 0; None: all samples have the same.

    Returns:
        The area under the ROC curve; NaN if no question has samples of both kinds.
    """
    num_positive = int(positive.sum())
    if not num_positive or num_positive == len(positive):
        return float("nan")
    values, group = np.unique(scores, return_inverse=True)  # a group: equal scores
    question_of_group = np.zeros(len(values), dtype=int)
    if questions is not None:
        keys, group = np.unique(questions.astype(int) * len(values) + group, return_inverse=True)
        question_of_group = keys // len(values)
    positives = np.bincount(group, positive)
    negatives = np.bincount(group) - positives
    negatives_by_question = np.bincount(question_of_group, negatives)
    pairs = float(np.bincount(question_of_group, positives) @ negatives_by_question)
    if not pairs:
        return float("nan")
    before = np.cumsum(negatives_by_question) - negatives_by_question  # negatives of all earlier questions
    below = np.cumsum(negatives) - negatives - before[question_of_group]
    return float(positives @ (below + negatives / 2)) / pairs


def macro_auroc(positive: np.ndarray, scores: np.ndarray, questions: np.ndarray | None = None) -> float:
    """Mean `binary_auroc` over the columns that have one; NaN if none has. positive: [N, K] bool. scores: [N, K]."""
    aurocs = np.array([binary_auroc(*column, questions) for column in zip(positive.T, scores.T, strict=True)])
    return float(np.nanmean(aurocs)) if np.isfinite(aurocs).any() else float("nan")


# ------------------------------------------------------------------------------------------------ one answer of a set


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [C, C]: row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 over the classes that occur in labels or predictions, from a confusion table (as scikit-learn's)."""
    hits, sizes = np.diag(table), table.sum(0) + table.sum(1)
    present = sizes > 0
    return float((2 * hits[present] / sizes[present]).mean())


def classification_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    prior: np.ndarray,
    positive: int | None = None,
    questions: np.ndarray | None = None,
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1 (plain and prior-corrected), macro one-vs-rest AUROC and, with a
    `positive` class, its sensitivity and specificity. A metric is NaN if the data lacks a class that it needs.

    Args:
        prior: weight of each class in the training loss [C]. The corrected decision divides by it, so that a model
            trained on imbalanced data does not prefer its majority class. [N, C] where questions differ in it.
        questions: index of each sample's question [N]: the AUROC compares only samples of the same question. None: all
            have the same.
    """
    num_classes = probabilities.shape[1]
    table = confusion(labels, probabilities.argmax(1), num_classes)
    corrected = confusion(labels, (probabilities / prior).argmax(1), num_classes)
    sizes = table.sum(1)
    recalls = np.diag(table)[sizes > 0] / sizes[sizes > 0]
    metrics = {
        "accuracy": float(np.diag(table).sum() / table.sum()),
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": macro_f1(table),
        "macro_f1_prior_corrected": macro_f1(corrected),
        "auroc": macro_auroc(labels[:, None] == np.arange(num_classes), probabilities, questions),
    }
    if positive is not None:
        is_positive, called = labels == positive, probabilities.argmax(1) == positive
        metrics["sensitivity"] = float(called[is_positive].mean()) if is_positive.any() else float("nan")
        metrics["specificity"] = float((~called[~is_positive]).mean()) if (~is_positive).any() else float("nan")
    return metrics


def ordinal_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Quadratic weighted kappa and mean absolute error of the most probable grade.

    The classes are the grades in their order, also those that no sample has; the distance of neighbours is 1. The kappa
    is that of scikit-learn's `cohen_kappa_score(weights="quadratic")` over all grades; NaN if all samples have the same
    true and predicted grade, where it is 0/0.
    """
    predicted, num_grades = probabilities.argmax(1), probabilities.shape[1]
    table = confusion(labels, predicted, num_grades)
    weights = (np.arange(num_grades)[:, None] - np.arange(num_grades)) ** 2
    by_chance = float((weights * np.outer(table.sum(1), table.sum(0))).sum()) / max(len(labels), 1)
    return {
        "quadratic_kappa": 1 - float((weights * table).sum()) / by_chance if by_chance else float("nan"),
        "grade_mae": float(np.abs(predicted - labels).mean()) if len(labels) else float("nan"),
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


def set_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Exact match of label sets, and mean F1 of the labels that occur in a true or predicted set.

    The F1 is that of scikit-learn's `f1_score(average="macro")` over these labels.

    Args:
        truth: [N, L] bool, from `membership`.
        predicted: [N, L] bool.
    """
    hits, sizes = (truth & predicted).sum(0), truth.sum(0) + predicted.sum(0)
    present = sizes > 0
    return {
        "exact_match": float((truth == predicted).all(1).mean()) if len(truth) else float("nan"),
        "label_f1": float((2 * hits[present] / sizes[present]).mean()) if present.any() else float("nan"),
    }


def multilabel_metrics(
    probabilities: np.ndarray, members: np.ndarray, truth: np.ndarray, questions: np.ndarray | None = None
) -> dict[str, float]:
    """`set_metrics` of the most probable set, and the mean AUROC of the labels that some samples have and others lack.

    Args:
        probabilities: of the candidate sets [N, C].
        members: which candidate set holds which label [C, L], from `membership`.
        truth: which labels each sample has [N, L], from `membership`.
        questions: index of each sample's question [N]: the AUROC compares only samples of the same question.
    """
    scores = label_probabilities(probabilities, members)
    found = set_metrics(truth, members[probabilities.argmax(1)])
    return found | {"label_auroc": macro_auroc(truth, scores, questions)}


# ------------------------------------------------------------------------------------------------ numbers


def numeric_metrics(answers: np.ndarray, truths: np.ndarray, worst: float | None = None) -> dict[str, float]:
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
    answers, truths = answers[np.isfinite(truths)], truths[np.isfinite(truths)]
    numbers = np.isfinite(answers)
    parsed = float(numbers.mean()) if len(numbers) else float("nan")
    errors = answers - truths
    errors = errors[numbers] if worst is None else np.where(numbers, errors, worst)
    answers, truths = answers[numbers], truths[numbers]
    if not len(errors):
        return {"mae": float("nan"), "rmse": float("nan"), "pearson_r": float("nan"), "parsed": parsed}
    scale = float(np.abs(errors).max()) or 1.0  # against overflow and underflow of the squares
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": scale * float(np.sqrt(((errors / scale) ** 2).mean())),
        "pearson_r": pearson_r(answers, truths),
        "parsed": parsed,
    }


def pearson_r(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation, from -1 to 1; NaN if there are no values, or those [N] of either are all equal."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = ((v - v.mean()) / np.abs(v - v.mean()).max() for v in (x, y))
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))


# ------------------------------------------------------------------------------------------------ intervals


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
