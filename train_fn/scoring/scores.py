"""From predictions to the metrics of a part. Without torch: the study scores the test with the same code as a trial.

Shapes: N samples of a part, n samples of one task, R rows of weights, C candidate answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from train_fn.data.decision import ARGMAX, softmax
from train_fn.data.samples import Sample, Splits, Task
from train_fn.data.tasks import labels_of
from train_fn.scoring import own_metric
from train_fn.scoring.fitting import Decided
from train_fn.scoring.metrics import (
    CHOICE,
    decision_metrics,
    macro_auroc,
    mean,
    membership,
    multilabel_metrics,
    numeric_metrics,
    operating_points,
    ordinal_metrics,
    probability_metrics,
    set_metrics,
)
from train_fn.support.numbers import parse_number
from train_fn.support.text import plain_form

MACRO = "macro"  # prefix of the means in which every task counts the same
MAX_NAMED = 20  # tasks with metrics of their own name; the others count in the metrics of their kind
MAX_VALUES = 1 << 20  # weights that are used at a time: memory stays bounded, and they stay in the processor's cache


def stored_predictions(
    predicted: Mapping[str, Any],
    samples: Sequence[Sample],
    splits: Splits,
    decided: Mapping[str, Decided] | None = None,
) -> dict[str, list[Any]]:
    """Predictions as files hold them.

    Args:
        decided: as for `PartScorer`.

    Returns:
        By sample: the true class's index in `answers` (-1: no candidates); the `probabilities` of the candidates of its
        task, and the index of the one that is `decided` for (None: no candidates); the softmax of the scores, in
        `raw_probabilities`; and the generated answer in `texts` (None: none).
    """
    raw: list[list[float]] = []
    for sample, scores in zip(samples, predicted["scores"], strict=True):
        size = len(splits.task_of(sample).candidates)
        raw.append(softmax(scores[None, :size])[0].round(6).tolist() if size else [])
    fitted, chosen = list(raw), [int(np.argmax(row)) if row else None for row in raw]
    for name, its in (decided or {}).items():
        members = [index for index, sample in enumerate(samples) if sample.task == name]
        for index, row, answer in zip(members, its.probabilities, its.answers, strict=True):
            fitted[index], chosen[index] = row.round(6).tolist(), int(answer)
    return {
        "answers": [s.label for s in samples],
        "probabilities": fitted,
        "decided": chosen,
        "raw_probabilities": raw,
        "texts": list(predicted.get("texts", [None] * len(samples))),
    }


class PartScorer:
    """Computes the metrics of predictions on a part of the data, as functions of the samples' weights.

    In data of one task, a metric has its plain name, such as `auroc`. In data of several tasks there are also the
    metrics of each kind of task (`open/token_f1`) and of each task (`modality/accuracy`); the plain name is their mean,
    weighted by the samples of each task, and `macro/accuracy` the mean in which every task counts the same. A metric
    that a task cannot give is absent, or NaN where only these weights cannot give it.
    """

    def __init__(
        self,
        predicted: dict[str, Any],
        samples: Sequence[Sample],
        splits: Splits,
        decided: Mapping[str, Decided] | None = None,
    ) -> None:
        """
        Args:
            decided: probabilities and answers of each task's samples under a fitted decision, by the task's name. None:
                the softmax of the scores, and the most probable answer.
        """
        self.losses = np.asarray(predicted["losses"])
        self.several = len(splits.tasks) > 1
        self.scorers = []
        for task in splits.tasks:
            members = np.array([i for i, sample in enumerate(samples) if sample.task == task.name], dtype=int)
            if len(members):
                its = (decided or {}).get(task.name)
                scorer = TaskScorer(task, [samples[i] for i in members], predicted, members, splits, its)
                self.scorers.append((task, members, scorer))
        named = sorted(self.scorers, key=lambda entry: -len(entry[1]))[:MAX_NAMED]
        self.named = {task.name for task, *_ in named}

    def __call__(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The metrics under each row of weights [R, N], as arrays [R]. None: one row of ones.

        An integer weight counts its sample that often; 0 leaves it out.
        """
        if weights is None:
            weights = np.ones((1, len(self.losses)))
        size = max(1, MAX_VALUES // max(1, weights.shape[1]))
        blocks = [self.of_rows(weights[start : start + size].astype(float)) for start in range(0, len(weights), size)]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def of_rows(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics under rows of weights that fit the memory."""
        found: list[tuple[Task, np.ndarray, dict[str, np.ndarray]]] = []
        for task, members, scorer in self.scorers:
            its = weights[:, members]
            found.append((task, its.sum(1), {"loss": mean(self.losses[members], its)} | scorer(its)))
        loss = {"loss": mean(self.losses, weights)}
        if not self.several:
            return (found[0][2] if found else {}) | loss
        metrics = mean_of_tasks(found) | loss
        alike = [(task, np.ones(len(weights)), values) for task, _, values in found]
        metrics |= {f"{MACRO}/{name}": value for name, value in mean_of_tasks(alike).items()}
        for kind in dict.fromkeys(task.kind for task, *_ in found):
            of_kind = [entry for entry in found if entry[0].kind == kind]
            metrics |= {f"{kind}/{name}": value for name, value in mean_of_tasks(of_kind).items()}
        for task, _, values in found:
            if task.name in self.named and task.name != task.kind:
                metrics |= {f"{task.name}/{name}": value for name, value in values.items()}
        return metrics


def mean_of_tasks(found: Sequence[tuple[Task, np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """The mean of each metric over the tasks that have it, weighted by their samples; NaN where none has a number.

    Args:
        found: each task with the weight of its samples [R] and its metrics [R].
    """
    means = {}
    for name in dict.fromkeys(name for *_, metrics in found for name in metrics):
        pairs = [(mass, metrics[name]) for _, mass, metrics in found if name in metrics]
        values = np.stack([value for _, value in pairs], 1)  # [R, tasks]
        finite = np.isfinite(values)
        masses = np.where(finite, np.stack([mass for mass, _ in pairs], 1), 0.0)
        means[name] = mean(np.where(finite, values, 0.0), masses)
    return means


class TaskScorer:
    """Computes the metrics of one task."""

    def __init__(
        self,
        task: Task,
        samples: Sequence[Sample],
        predicted: dict[str, Any],
        members: np.ndarray,
        splits: Splits,
        decided: Decided | None,
    ) -> None:
        self.task, self.prevalence = task, splits.prevalence
        self.labels = np.array([sample.label for sample in samples], dtype=int)  # [n]
        # Only samples with the same question are compared by the AUROC: otherwise a model that has learned which
        # question has which answers would score above chance without an image.
        forms = {form: number for number, form in enumerate(dict.fromkeys(plain_form(s.question) for s in samples))}
        questions = np.array([forms[plain_form(sample.question)] for sample in samples], dtype=int)
        self.questions = questions if len(forms) > 1 else None  # [n]
        texts = [predicted["texts"][i] if "texts" in predicted else None for i in members]
        if task.candidates:
            scores = np.asarray(predicted["scores"])[members, : len(task.candidates)]
            self.probabilities = softmax(scores)  # [n, C]
            # By the suffix of their metrics, decisions: probabilities [n, C] and answers [n].
            self.decisions = {"": (self.probabilities, scores.argmax(1))}
            if decided is not None:
                raw = {"_raw": self.decisions[""]} if splits.decide not in ("", ARGMAX) else {}
                self.decisions = {"": (decided.probabilities, decided.answers)} | raw
            texts = [task.candidates[index] for index in self.decisions[""][1]]
        self.there = np.array([text is not None for text in texts], dtype=bool)  # [n]
        self.by_text: dict[str, np.ndarray] = {}  # metrics of one text each [n], NaN where there is none
        if splits.own_metric:
            self.use(splits.own_metric.name, own_metric.scorer(splits.own_metric), samples, texts)
        if task.kind in CHOICE:
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

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics [R] under weights of the task's samples [R, n]."""
        metrics = self.of_choice(weights) if self.task.kind in CHOICE else self.of_kind(weights)
        if self.there.any():
            its = weights[:, self.there]
            metrics |= {name: mean(values[self.there], its) for name, values in self.by_text.items()}
        return metrics

    def of_choice(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics of a task with one answer of a set: of the scores, of the decision, and without the decision."""
        size = len(self.task.candidates)
        one_of_each = self.labels[:, None] == np.arange(size)
        metrics: dict[str, np.ndarray] = {}
        for suffix, (probabilities, answers) in self.decisions.items():
            found = decision_metrics(answers, self.labels, weights, size, self.positive, self.prevalence)
            found |= probability_metrics(probabilities, self.labels, weights)
            if self.task.kind == "ordinal":
                found |= ordinal_metrics(answers, self.labels, weights, size)
            metrics |= {f"{name}{suffix}": value for name, value in found.items()}
        metrics["auroc"] = macro_auroc(one_of_each, self.probabilities, weights, self.questions)
        if self.positive is not None:
            column = self.positive
            metrics |= operating_points(one_of_each[:, column], self.probabilities[:, column], weights)
        return metrics

    def of_kind(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics that other kinds of task give beside the means of `by_text`."""
        kind = self.task.kind
        if kind == "multilabel" and self.task.candidates:
            return multilabel_metrics(self.probabilities, self.sets, self.truths, weights, self.questions)
        there = self.there
        if not there.any():
            return {}
        if kind == "multilabel":
            return set_metrics(self.truths[there], self.written[there], weights[:, there])
        if kind == "numeric":
            return numeric_metrics(self.numbers[there], self.truths[there], weights[:, there], self.worst)
        from train_fn.scoring.text_metrics import corpus_bleu

        return {"bleu": corpus_bleu(self.bleu[there], weights[:, there])}


def metrics_of(
    predicted: dict[str, Any],
    samples: Sequence[Sample],
    splits: Splits,
    decided: Mapping[str, Decided] | None = None,
) -> dict[str, float]:
    """All metrics of a part, see `PartScorer`."""
    return {name: float(value[0]) for name, value in PartScorer(predicted, samples, splits, decided)().items()}
