"""Sets of answers that hold the true one with a probability that the user names (split conformal prediction).

The calibrated probabilities of samples that the model was not trained on say, for each class, how small the probability
of the true answer can be. An answer is in a set if its probability is at least the quantile of its class: so the sets
hold the true answer in the named share of the samples of every class (label-conditional coverage; Vovk 2012,
arXiv:1209.2673), however rare the class is. Samples of one unit (near-copies, images of one patient) count as one
observation: they share its mass (hierarchical conformal prediction; Lee, Barber and Willett 2023, arXiv:2306.06342).

The promise is a mean over draws of calibration samples, and holds for new samples like these. Trial and epoch were
chosen by the same samples, which makes the sets a little too small: the test part says by how much.

Shapes: N samples, C candidates, R rows of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train_fn.data.samples import Sample
from train_fn.model.adapters import MAX_POINTS, AdapterTask, ClassScores
from train_fn.scoring.answering import Answer
from train_fn.settings import SHOWN

ROUNDING = 1e-9  # sums of masses are not exact


def calibration_scores(probabilities: np.ndarray, labels: np.ndarray, units: Sequence[int]) -> tuple[ClassScores, ...]:
    """What sets need to know of the calibration samples, for each class.

    Args:
        probabilities: calibrated, out of fold [N, C].
        labels: index of each true candidate [N].
        units: each sample's unit [N], of `train_fn.data.samples.units_of`.

    Returns:
        For each class pairs of probability and mass, the least probable first. With G units in a class each has the
        mass 1 / (G + 1), which its samples share; the rest stands for the unit that has not been seen. Of more than
        MAX_POINTS pairs neighbours are joined, at the smaller probability: sets can only become larger.
    """
    found = []
    for index in range(probabilities.shape[1]):
        its = np.flatnonzero(np.asarray(labels) == index)
        its = its[np.argsort(probabilities[its, index], kind="stable")]
        _, unit, sizes = np.unique(np.asarray(units)[its], return_inverse=True, return_counts=True)
        masses = 1 / ((len(sizes) + 1) * sizes[unit])
        starts = np.unique(np.linspace(0, len(its), MAX_POINTS, endpoint=False).astype(int)) if len(its) else its
        joined = np.add.reduceat(masses, starts) if len(its) else masses
        found.append(tuple(zip(probabilities[its[starts], index].tolist(), joined.tolist(), strict=True)))
    return tuple(found)


def thresholds(conformal: Sequence[ClassScores], coverage: float) -> np.ndarray:
    """The probability [C] from which on a candidate is in a set; -inf: in every set, for its class has too few units.

    Args:
        conformal: of `calibration_scores`.
        coverage: share of the samples whose set is to hold the true answer, above 0 and below 1.
    """
    found = np.full(len(conformal), -np.inf)
    for index, scores in enumerate(conformal):
        probabilities, masses = np.array(sorted(scores)).reshape(-1, 2).T
        at_least = np.cumsum(masses[::-1])[::-1]  # mass of the samples with this probability or a larger one
        enough = np.flatnonzero(at_least >= coverage - ROUNDING)
        if len(enough):
            found[index] = probabilities[enough[-1]]
    return found


def answer_sets(probabilities: np.ndarray, conformal: Sequence[ClassScores], coverage: float) -> np.ndarray:
    """Whether each candidate is in the set of each sample [N, C], from calibrated probabilities [N, C]."""
    return probabilities >= thresholds(conformal, coverage)


def answer_set(probabilities: Sequence[float], conformal: Sequence[ClassScores], coverage: float) -> list[int]:
    """The candidates in the set of one sample, as indices, the most probable first."""
    return members(probabilities, thresholds(conformal, coverage))


def members(probabilities: Sequence[float], limits: np.ndarray) -> list[int]:
    """The candidates [C] that reach their thresholds, as indices, the most probable first."""
    values = np.asarray(probabilities)
    return [index for index in np.argsort(-values, kind="stable").tolist() if values[index] >= limits[index]]


def coverage_of(
    sets: np.ndarray, labels: np.ndarray, units: Sequence[int], weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What sets are worth on samples with known answers. Each unit counts once, as in the promise.

    Args:
        sets: of `answer_sets` [N, C].
        labels: index of each true candidate [N].
        weights: of the samples, such as those of a bootstrap [R, N]. Not given: 1 each, R = 1.

    Returns:
        `covered`: share of sets that hold the true answer [R]; `covered_by_class` [R, C], NaN for a class that does not
        occur; `set_size`: mean number of answers [R]; `one_answer`: share of sets with exactly one [R].
    """
    labels = np.asarray(labels)
    weights = np.ones((1, len(labels))) if weights is None else weights
    hit = sets[np.arange(len(labels)), labels]

    def mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        _, unit, sizes = np.unique(np.asarray(units)[chosen], return_inverse=True, return_counts=True)
        shared = weights[:, chosen] / sizes[unit]
        with np.errstate(invalid="ignore"):
            return shared @ values[chosen] / shared.sum(1)

    everyone = np.arange(len(labels))
    classes = [mean(hit, np.flatnonzero(labels == index)) for index in range(sets.shape[1])]
    return {
        "covered": mean(hit, everyone),
        "covered_by_class": np.stack(classes, 1),
        "set_size": mean(sets.sum(1), everyone),
        "one_answer": mean(sets.sum(1) == 1, everyone),
    }


# ------------------------------------------------------------------------------------------------ predict --coverage


def coverage_problems(task: AdapterTask, coverage: float | None) -> list[str]:
    """Why an adapter cannot answer in sets, as sentences. coverage: None: it need not."""
    problems = []
    if coverage is not None and not 0 < coverage < 1:
        problems.append(f"`--coverage` must be above 0 and below 1, but got {coverage:g}: 0.9 is usual")
    if coverage is not None and not task.conformal:
        problems.append(
            "`--coverage` needs calibration scores of the answers to choose from, but the adapter's task.json has none "
            "for these answers: leave it out, train the adapter again, or leave out what replaces its answers"
        )
    return problems


class SetRule:
    """Makes the sets of `predict --coverage`; without a coverage none."""

    def __init__(self, task: AdapterTask, coverage: float | None) -> None:
        self.task, self.coverage = task, coverage or 0.0
        scores = task.conformal.items() if coverage else ()
        self.limits = {name: thresholds(its, self.coverage) for name, its in scores}  # [C] of each task

    def set_of(self, sample: Sample, answer: Answer) -> list[int] | None:
        """The candidates in the set of a sample, as indices, the most probable first; None: it has no set."""
        has_set = sample.task in self.limits and not answer.error
        return members(answer.probabilities, self.limits[sample.task]) if has_set else None

    def line(self, sample: Sample, answer: Answer) -> dict[str, Any]:
        """The part of a line about the set: its `answers`, and whether it is `for_reader`."""
        its = self.set_of(sample, answer)
        if its is None:
            return {}
        candidates = self.task.by_name[sample.task].candidates
        return {"answers": [candidates[index] for index in its], "for_reader": len(its) != 1}

    def notes(self, answered: Sequence[tuple[Sample, Answer]]) -> list[str]:
        """Sentences on all sets: how many hold one answer and the true one, and which answers are in every set."""
        found = [(sample, its) for sample, answer in answered if (its := self.set_of(sample, answer)) is not None]
        if not found:
            return []
        num_sure = sum(len(its) == 1 for _, its in found)
        lines = [
            f"coverage {self.coverage:g}: {num_sure} of {len(found)} sets hold one answer, the others need a reader"
        ]
        if known := [sample.label in its for sample, its in found if sample.answer]:
            lines[0] += f"; {sum(known)} of {len(known)} hold the true answer"
        needed = math.ceil(self.coverage / (1 - self.coverage) - ROUNDING)
        for name, limits in self.limits.items():
            rare = [self.task.by_name[name].candidates[index] for index in np.flatnonzero(np.isinf(limits))]
            if rare:
                lines.append(
                    f"{', '.join(map(SHOWN.repr, rare[:5]))}{' ...' if len(rare) > 5 else ''} in every set: a coverage "
                    f"of {self.coverage:g} needs {needed} validation images of an answer, and there are fewer "
                    f"(near-copies, and images of one group, count as one)"
                )
        return lines
