"""From predictions to the metrics of a part. Without torch: the study scores the test with the same code as a trial.

Shapes: N samples of a part, n samples of one task, C candidate answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train_fn.data.samples import Sample, Splits, Task
from train_fn.data.tasks import labels_of
from train_fn.scoring import own_metric
from train_fn.scoring.metrics import (
    classification_metrics,
    membership,
    multilabel_metrics,
    numeric_metrics,
    ordinal_metrics,
    set_metrics,
)
from train_fn.support.numbers import parse_number
from train_fn.support.text import plain_form

MAX_NAMED = 20  # tasks with metrics of their own name; the others count in the metrics of their kind
Metrics = dict[str, float]


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax [N, C] over the candidates' log-likelihoods."""
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def training_prior(splits: Splits, task: Task, class_balanced: bool) -> np.ndarray:
    """Weight of each class of a task in the training loss [C], with sum 1. Uniform for a class-balanced loss."""
    counts = np.array(splits.class_counts("train", task), dtype=float)
    weights = np.array(splits.class_weights(task)) if class_balanced else np.ones(len(counts))
    return counts * weights / (counts * weights).sum()


def stored_predictions(predicted: dict[str, Any], samples: Sequence[Sample], splits: Splits) -> dict[str, list[Any]]:
    """Predictions as files hold them.

    Returns:
        By sample: the true class's index in `answers` (-1: no candidates), the `probabilities` of the candidates of its
        task, and the generated answer in `texts` (None: none).
    """
    rows = []
    for sample, scores in zip(samples, predicted["scores"], strict=True):
        size = len(splits.task_of(sample).candidates)
        rows.append(probabilities(scores[None, :size])[0].round(6).tolist() if size else [])
    return {
        "answers": [s.label for s in samples],
        "probabilities": rows,
        "texts": list(predicted.get("texts", [None] * len(samples))),
    }


class PartScorer:
    """Computes the metrics of predictions on a part of the data, or on any of its samples.

    In data of one task, a metric has its plain name, such as `auroc`. In data of several tasks there are also the
    metrics of each kind of task (`open/token_f1`) and of each task (`modality/accuracy`); the plain name is their mean,
    weighted by the samples of each task. A metric that a task cannot give is absent, or NaN if only these samples
    cannot give it.
    """

    def __init__(
        self, predicted: dict[str, Any], samples: Sequence[Sample], splits: Splits, class_balanced: bool
    ) -> None:
        self.losses = np.asarray(predicted["losses"])
        self.several = len(splits.tasks) > 1
        self.scorers = []
        for task in splits.tasks:
            members = np.array([i for i, sample in enumerate(samples) if sample.task == task.name], dtype=int)
            if len(members):
                scorer = TaskScorer(task, [samples[i] for i in members], predicted, members, splits, class_balanced)
                self.scorers.append((task, members, scorer))
        named = sorted(self.scorers, key=lambda entry: -len(entry[1]))[:MAX_NAMED]
        self.named = {task.name for task, *_ in named}

    def __call__(self, indices: np.ndarray | None = None) -> Metrics:
        """The metrics of these samples, by index [n], which may repeat; None: of all."""
        chosen = np.arange(len(self.losses)) if indices is None else indices
        metrics = {"loss": float(self.losses[chosen].mean())}
        found: list[tuple[Task, int, Metrics]] = []
        for task, members, scorer in self.scorers:
            place = np.full(len(self.losses), -1)
            place[members] = np.arange(len(members))
            its = place[chosen]
            its = its[its >= 0]
            if len(its):
                found.append((task, len(its), {"loss": float(self.losses[members[its]].mean())} | scorer(its)))
        if not self.several:
            return (found[0][2] if found else {}) | metrics
        metrics = weighted_mean(found) | metrics
        for kind in dict.fromkeys(task.kind for task, *_ in found):
            of_kind = [entry for entry in found if entry[0].kind == kind]
            metrics |= {f"{kind}/{name}": value for name, value in weighted_mean(of_kind).items()}
        for task, _, values in found:
            if task.name in self.named and task.name != task.kind:
                metrics |= {f"{task.name}/{name}": value for name, value in values.items()}
        return metrics


def weighted_mean(found: Sequence[tuple[Task, int, Metrics]]) -> Metrics:
    """The mean of each metric over the tasks that have it, weighted by their samples; NaN where none has a number."""
    means = {}
    for name in dict.fromkeys(name for *_, metrics in found for name in metrics):
        pairs = [(n, metrics[name]) for _, n, metrics in found if np.isfinite(metrics.get(name, np.nan))]
        weights, values = [n for n, _ in pairs], [value for _, value in pairs]
        means[name] = float(np.average(values, weights=weights)) if pairs else float("nan")
    return means


class TaskScorer:
    """Computes the metrics of one task on any of its samples."""

    def __init__(
        self,
        task: Task,
        samples: Sequence[Sample],
        predicted: dict[str, Any],
        members: np.ndarray,
        splits: Splits,
        class_balanced: bool,
    ) -> None:
        self.task = task
        self.labels = np.array([sample.label for sample in samples], dtype=int)  # [n]
        # Only samples with the same question are compared by the AUROC: otherwise a model that has learned which
        # question has which answers would score above chance without an image.
        forms = {form: number for number, form in enumerate(dict.fromkeys(plain_form(s.question) for s in samples))}
        questions = np.array([forms[plain_form(sample.question)] for sample in samples], dtype=int)
        self.questions = questions if len(forms) > 1 else None  # [n]
        texts = [predicted["texts"][i] if "texts" in predicted else None for i in members]
        if task.candidates:
            scores = np.asarray(predicted["scores"])[members, : len(task.candidates)]
            self.probabilities = probabilities(scores)  # [n, C]
            texts = [task.candidates[index] for index in scores.argmax(1)]
        self.there = np.array([text is not None for text in texts], dtype=bool)  # [n]
        self.by_text: dict[str, np.ndarray] = {}  # metrics of one text each [n], NaN where there is none
        if splits.own_metric:
            self.use(splits.own_metric.name, own_metric.scorer(splits.own_metric), samples, texts)
        if task.kind in ("closed", "binary", "ordinal"):
            self.prior = training_prior(splits, task, class_balanced)
            self.positive = task.indices.get(task.positive)
        elif task.kind == "multilabel":
            self.use_labels(samples, texts)
        elif task.kind == "numeric":
            self.numbers = np.array([np.nan if text is None else parse_number(text) for text in texts])
            self.truths = np.array([parse_number(sample.answer) for sample in samples])
            trained = [parse_number(sample.answer) for sample in splits.train if sample.task == task.name]
            self.worst = float(np.ptp(trained)) if trained else 0.0
        else:
            self.use_texts(samples, texts)

    def use(
        self, name: str, score: Callable[[str, str], float], samples: Sequence[Sample], texts: Sequence[str | None]
    ) -> None:
        """Score each text against its true answer."""
        values = [np.nan if t is None else score(t, s.answer) for t, s in zip(texts, samples, strict=True)]
        self.by_text[name] = np.array(values, dtype=float)

    def use_labels(self, samples: Sequence[Sample], texts: Sequence[str | None]) -> None:
        """Prepare the sets of labels: of the candidates, the true ones, and the generated ones."""
        separator = self.task.separator
        truths = [labels_of(sample.answer, separator) for sample in samples]
        written = [labels_of(text or "", separator) for text in texts]
        sets = [labels_of(candidate, separator) for candidate in self.task.candidates]
        names = sorted({label for labels in (*truths, *written, *sets) for label in labels})
        self.truths, self.written = membership(truths, names), membership(written, names)  # [n, labels]
        self.sets = membership(sets, names)  # [C, labels]

    def use_texts(self, samples: Sequence[Sample], texts: Sequence[str | None]) -> None:
        """Score each generated text against its true answer; NaN where there is none."""
        from train_fn.scoring import text_metrics

        for name in ("exact_match", "token_f1", "rouge_l"):
            self.use(name, getattr(text_metrics, name), samples, texts)
        pairs = [(text, sample.answer) for text, sample in zip(texts, samples, strict=True) if text is not None]
        statistics = [text_metrics.bleu_statistics(text, truth) for text, truth in pairs]
        self.bleu = np.zeros((len(samples), len(statistics[0]) if statistics else 1), dtype=int)
        if statistics:
            self.bleu[self.there] = statistics

    def __call__(self, chosen: np.ndarray) -> Metrics:
        """The metrics of these samples of the task, by index."""
        metrics = self.of_kind(chosen)
        if len(there := chosen[self.there[chosen]]):
            metrics |= {name: float(values[there].mean()) for name, values in self.by_text.items()}
        return metrics

    def of_kind(self, chosen: np.ndarray) -> Metrics:
        """The metrics that the task's kind gives beside the means of `by_text`."""
        kind = self.task.kind
        questions = None if self.questions is None else self.questions[chosen]
        if kind in ("closed", "binary", "ordinal"):
            p, labels = self.probabilities[chosen], self.labels[chosen]
            metrics = classification_metrics(p, labels, self.prior, self.positive, questions)
            return metrics | (ordinal_metrics(p, labels) if kind == "ordinal" else {})
        if kind == "multilabel" and self.task.candidates:
            return multilabel_metrics(self.probabilities[chosen], self.sets, self.truths[chosen], questions)
        chosen = chosen[self.there[chosen]]
        if not len(chosen):
            return {}
        if kind == "multilabel":
            return set_metrics(self.truths[chosen], self.written[chosen])
        if kind == "numeric":
            return numeric_metrics(self.numbers[chosen], self.truths[chosen], self.worst)
        from train_fn.scoring.text_metrics import corpus_bleu

        return {"bleu": corpus_bleu(self.bleu[chosen])}


def metrics_of(predicted: dict[str, Any], samples: Sequence[Sample], splits: Splits, class_balanced: bool) -> Metrics:
    """All metrics of a part, see `PartScorer`."""
    return PartScorer(predicted, samples, splits, class_balanced)()
