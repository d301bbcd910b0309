"""The test's scores: of the winner and the guide's defaults, of baselines that cost nothing, and paired differences.

Shapes: N test samples, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train_fn.data.decision import Decision
from train_fn.data.samples import Splits, units_of
from train_fn.jobs import ScoreReport
from train_fn.scoring.fitting import DECIDED, Decided, decide, fit_part
from train_fn.scoring.probe import LEAST, probe_predictions, probe_samples, probe_tasks
from train_fn.scoring.scores import PartScorer, stored_predictions
from tune.results.comparison import CLEAN, GAIN, MAJORITY, OVER_PROBE, PROBE, UNTUNED
from tune.results.intervals import Scorer, difference_over_seeds, with_intervals

Scores = dict[str, dict[str, Any]]  # by metric: "value" and "interval"


@dataclass(frozen=True)
class Model:
    """What a model answers to the test."""

    predicted: Mapping[str, Any]
    """As a `ScoreReport` has it."""
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    """How its answers are chosen, by task; empty: the most probable ones."""
    answered: Sequence[int] | None = None
    """Indices of the test samples that it answers; None: all."""
    left_out: tuple[str, ...] = ()
    """Metrics that it cannot have."""


# ------------------------------------------------------------------------------------------------ baselines


def baselines(
    splits: Splits, report: ScoreReport, class_balanced: bool, note: Callable[[str], None]
) -> dict[str, Model]:
    """The baselines by name. One that cannot be had is left out; if it is the linear probe, with a note.

    Args:
        report: with `untuned` and `features`.
        class_balanced: whether the winner's loss was.
    """
    found = {}
    if report.untuned and np.isfinite(report.untuned["test"]["losses"]).all():
        fitted = {}
        if validation := report.untuned.get("validation"):
            fitted = fit_part(validation, splits.validation, splits)
        found[UNTUNED] = Model(report.untuned["test"], fitted)
    found[MAJORITY] = majority(splits)
    try:
        if not probe_tasks(splits):
            raise ValueError("no question has one answer of a set")
        if report.features is None:
            raise ValueError("this base keeps no vision features by image")
        probe = probe_predictions(report.features, splits, class_balanced)
    except ValueError as error:
        note(f"the winner is not compared with a linear probe: {error}")
        return found
    chosen = probe_samples(splits)
    fitted = {}
    if validation := probe.get("validation"):
        part = [splits.validation[index] for index in chosen["validation"]]
        fitted = fit_part(taken(validation, chosen["validation"]), part, splits)
    return found | {PROBE: Model(probe["test"], fitted, chosen["test"], left_out=("loss",))}


def majority(splits: Splits) -> Model:
    """The most frequent training answer of each task to all of its questions. The probabilities are the shares of the
    answers in the training part."""
    samples = splits.test
    scores = np.full((len(samples), max((len(task.candidates) for task in splits.tasks), default=0)), np.nan)
    texts = np.full(len(samples), None, dtype=object)
    for task in splits.tasks:
        members = [index for index, sample in enumerate(samples) if sample.task == task.name]
        if task.candidates:
            counts = np.array(splits.class_counts("train", task), dtype=float)
            scores[members, : len(counts)] = np.log(np.maximum(counts / counts.sum(), LEAST))
        else:
            answers = Counter(sample.answer for sample in splits.train if sample.task == task.name)
            texts[members] = answers.most_common(1)[0][0] if answers else ""
    decisions = {task.name: Decision() for task in splits.tasks if task.kind in DECIDED}
    predicted = {"losses": np.full(len(samples), np.nan), "scores": scores, "texts": texts}
    return Model(predicted, decisions, left_out=("loss",))


# ------------------------------------------------------------------------------------------------ scores


def test_scores(
    models: Mapping[str, Sequence[Model]],
    others: Mapping[str, Model],
    splits: Splits,
    clean: Sequence[int],
    folds: bool = False,
) -> dict[str, Scores]:
    """All scores of the test with their 95 % intervals, by who has them.

    Args:
        models: of "winner" and, if it was scored, "guide": a model for each seed or fold, the delivered one first.
        others: baselines by name.
        clean: test samples without a copy in training. If they are some but not all, they are scored apart as well.
        folds: whether several models of one trial are of folds, not of seeds.
    """
    parts = {"": list(range(len(splits.test)))}
    if 0 < len(clean) < len(splits.test):
        parts[CLEAN] = list(clean)
    tests = {}
    for who, its in models.items():
        for suffix, part in parts.items():
            tests[who + suffix] = scores_of(its[0], part, splits)
    runs = "num_folds" if folds else "num_seeds"
    if "guide" in models:
        for suffix, part in parts.items():
            facts = {runs: [len(models["winner"]), len(models["guide"])], "num_samples": len(part)}
            tests[GAIN + suffix] = paired(models["winner"], models["guide"], part, splits, facts)
    for who, model in others.items():
        tests[who] = scores_of(model, parts[""], splits)
    if PROBE in others:
        for suffix, part in parts.items():
            asked = sorted(set(part) & set(others[PROBE].answered or ()))
            if asked:
                facts = {runs: [len(models["winner"]), 1], "num_samples": len(asked)}
                tests[OVER_PROBE + suffix] = paired(models["winner"], [others[PROBE]], asked, splits, facts)
    return {who: scores for who, scores in tests.items() if scores}


def scores_of(model: Model, part: Sequence[int], splits: Splits) -> Scores:
    """A model's scores on those of these test samples that it answers."""
    its = part if model.answered is None else sorted(set(part) & set(model.answered))
    found = with_intervals(model_scorer(model, its, splits), units_in(splits, its)) if its else {}
    return {name: score for name, score in found.items() if name.rsplit("/")[-1] not in model.left_out}


def paired(
    ours: Sequence[Model], theirs: Sequence[Model], part: Sequence[int], splits: Splits, facts: dict[str, Any]
) -> Scores:
    """Mean of our models minus mean of theirs on the same test samples.

    Args:
        facts: what each score holds beside value and interval.
    """
    left_out = {name for model in (*ours, *theirs) for name in model.left_out}
    first, second = ([model_scorer(model, part, splits) for model in its] for its in (ours, theirs))
    found = difference_over_seeds(first, second, units_in(splits, part))
    return {name: score | facts for name, score in found.items() if name.rsplit("/")[-1] not in left_out}


def model_scorer(model: Model, part: Sequence[int], splits: Splits) -> Scorer:
    """The scorer of a model on these test samples."""
    samples, predicted = [splits.test[index] for index in part], taken(model.predicted, part)
    return PartScorer(predicted, samples, splits, decide(model.decisions, predicted, samples, splits) or None)


def units_in(splits: Splits, part: Sequence[int]) -> list[int]:
    """The units of these test samples."""
    return units_of([splits.test[index] for index in part])


def taken(predicted: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The predictions of some samples of a part."""
    return {name: np.asarray(values)[list(chosen)] for name, values in predicted.items()}


def stored(model: Model, splits: Splits) -> dict[str, list[Any]]:
    """A model's predictions of the test as study.json holds them."""
    return stored_predictions(model.predicted, splits.test, splits, decided_by(model, splits))


def decided_by(model: Model, splits: Splits) -> dict[str, Decided]:
    """Probabilities and answers of the test by task."""
    return decide(model.decisions, model.predicted, splits.test, splits)
