"""What a positive answer is worth: the operating point on the test, and the rates at every threshold.

Shapes: n test samples of a task, K thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train_fn.data.decision import ARGMAX, operating_point
from train_fn.data.samples import units_of
from train_fn.scoring.fitting import DECIDED
from train_fn.support.text import plain
from tune.results.comparison import CLEAN
from tune.results.intervals import wilson
from tune.results.summary import Score, format_score, is_number
from tune.results.view import ADAPTERS, TestedTask, View

Z = 1.96  # the 97.5 % quantile of the normal distribution


def rates(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of positive and of negative samples that are called positive, at every threshold.

    Args:
        positive: whether each sample is positive [n]; both kinds must occur.
        scores: of the positive answer [n].

    Returns:
        Sensitivity [K] and 1 - specificity [K]; a sample is called positive from the threshold on, and the thresholds
        are the K different scores, the highest first.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of equal scores
    hits, alarms = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
    return hits / positive.sum(), alarms / (~positive).sum()


def precision(sensitivity: np.ndarray, alarms: np.ndarray, prevalence: float) -> np.ndarray:
    """Positive predictive value [K] by Bayes' rule. alarms: 1 - specificity [K]."""
    hits = prevalence * sensitivity
    return hits / (hits + (1 - prevalence) * alarms)


def net_benefit(
    positive: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray, prevalence: float
) -> np.ndarray:
    """Net benefit [K] of calling a sample positive from a probability on (Vickers and Elkin 2006,
    doi:10.1177/0272989X06295361): true positives a person, minus false positives weighted by the threshold's odds.

    Args:
        positive: whether each sample is positive [n]; both kinds must occur.
        probabilities: of the positive answer [n].
        thresholds: above 0, below 1 [K].
        prevalence: share of positive persons, by which the samples are weighted.
    """
    called = probabilities >= thresholds[:, None]  # [K, n]
    hits, alarms = called[:, positive].mean(1), called[:, ~positive].mean(1)
    return prevalence * hits - (1 - prevalence) * alarms * thresholds / (1 - thresholds)


def proportion(hits: np.ndarray, units: np.ndarray) -> Score:
    """The share of hits with Wilson's interval. Samples of one unit count as one case, which never makes the interval
    too narrow.

    Args:
        hits: [n] bool.
        units: number of each sample's unit [n].
    """
    if not len(hits):
        return {"value": None, "interval": None}
    share = float(hits.mean())
    low, high = wilson(share, len(np.unique(units)), Z)
    return {"value": share, "interval": [float(low), float(high)]}


@dataclass(frozen=True)
class PositiveTask:
    """The test of one task with a positive answer."""

    tested: TestedTask
    name: str
    """The positive answer."""
    prefix: str
    """Before the names of its metrics."""
    positive: np.ndarray
    """Whether each sample is positive [n]."""
    units: np.ndarray
    """Number of each sample's unit [n]."""
    clean: np.ndarray
    """Whether each sample has no near-copy in training [n]."""
    given: float
    """The prevalence that the user gave; 0: none."""
    stored: dict[str, dict[str, Score]]
    """The test scores of the study, by "winner" and so on."""

    @property
    def index(self) -> int:
        """Of the positive answer among the candidates."""
        return self.tested.task.indices[self.tested.task.positive]

    @property
    def prevalence(self) -> float:
        """The one given, else the share of positive samples in the test."""
        return self.given or float(self.positive.mean())

    def probability(self, who: str) -> np.ndarray:
        """Of the positive answer, calibrated if a decision was fitted [n]."""
        return self.tested.probabilities[who][:, self.index]

    def raw(self, who: str) -> np.ndarray:
        """The model's own probability of the positive answer [n], from which the AUROC is computed, too."""
        return self.tested.raw.get(who, self.tested.probabilities[who])[:, self.index]

    def score(self, who: str, name: str) -> Score | None:
        """A test score of the task; None: the study does not hold it."""
        return self.stored.get(who, {}).get(self.prefix + name)

    def share(self, who: str, name: str) -> Score:
        """The study's own score, else what the answers give: sensitivity, specificity, and the predictive values at the
        prevalence of the test. who: of ADAPTERS, also with CLEAN."""
        at_test = not (self.given and name in ("ppv", "npv"))
        if at_test and (found := self.score(who, name)):
            return found
        called = self.tested.answers[who.removesuffix(CLEAN)] == self.index
        hits, among = {
            "sensitivity": (called, self.positive),
            "specificity": (~called, ~self.positive),
            "ppv": (self.positive, called),
            "npv": (~self.positive, ~called),
        }[name]
        among = among & self.clean if who.endswith(CLEAN) else among
        return proportion(hits[among], self.units[among])


def positive_tasks(view: View) -> list[PositiveTask]:
    """The tasks whose test holds positive and negative samples, those with most samples first."""
    if not view.splits:
        return []
    units = np.array(units_of(view.splits.test), dtype=int)
    clean = np.isin(np.arange(len(units)), view.summary.study["data_report"].get("test_clean", []))
    settings = view.summary.study["settings"]["study"]
    found = []
    for tested in view.tested:
        task, indices = tested.task, tested.indices
        positive = tested.truth == task.indices.get(task.positive, -1)
        if task.kind in DECIDED and positive.any() and not positive.all():
            prefix = f"{task.name}/" if len(view.splits.tasks) > 1 else ""
            given = settings.get("prevalence") or view.splits.prevalence
            facts = (positive, units[indices], clean[indices], given, view.summary.study["test"])
            found.append(PositiveTask(tested, plain(task.positive), prefix, *facts))
    return found


# ------------------------------------------------------------------------------------------------ for the page


@dataclass(frozen=True)
class OperatingPoint:
    """The operating point of one task, in words and as a table."""

    title: str
    sentences: list[str]
    columns: list[str]
    """Whose scores: "winner" and so on."""
    rows: list[tuple[str, list[Score | None]]]
    """What a score is, and the score by column."""


def aim_of(view: View) -> str:
    """What the answers were chosen for, as `Decision.aim`."""
    aim = (view.splits.decide if view.splits else "") or view.summary.study["settings"]["study"].get("decide")
    fitted = any("decided" in part for part in view.predictions.values())
    return aim or ("macro_f1" if fitted else ARGMAX)


def operating_points(view: View) -> list[OperatingPoint]:
    """The operating point of each task with a positive answer."""
    return [
        OperatingPoint(task.tested.task.name, sentences(view, task), whose(task), table(task))
        for task in positive_tasks(view)
    ]


def whose(task: PositiveTask) -> list[str]:
    """The columns of the table: each adapter that was scored, and its clean part if that differs."""
    columns = [who + part for who in ADAPTERS for part in ("", CLEAN)]
    return [who for who in columns if who in task.stored and who.removesuffix(CLEAN) in task.tested.answers]


def table(task: PositiveTask) -> list[tuple[str, list[Score | None]]]:
    """The rows of the table; a row without any score is left out."""
    columns = whose(task)

    def row(title: str, name: str) -> tuple[str, list[Score | None]]:
        return title, [task.score(who, name) for who in columns]

    as_in_test = {
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "ppv": "positive predictive value at the prevalence of the test",
        "npv": "negative predictive value at the prevalence of the test",
    }
    rows: list[tuple[str, list[Score | None]]]
    rows = [(title, [task.share(who, name) for who in columns]) for name, title in as_in_test.items()]
    given = f"predictive value at a prevalence of {percent(task.given)}"
    rows += [row(f"positive {given}", "ppv"), row(f"negative {given}", "npv")] if task.given else []
    rows.append(row("sensitivity at a specificity of 0.90", "sensitivity_at_specificity_90"))
    rows.append(row("specificity at a sensitivity of 0.90", "specificity_at_sensitivity_90"))
    return [(title, scores) for title, scores in rows if any(scores)]


def percent(share: float) -> str:
    """A share such as 0.125 as 12.5 %."""
    return f"{100 * share:.3g} %"


def sentences(view: View, task: PositiveTask) -> list[str]:
    """What the answers are chosen for, and whether the test keeps what was asked for."""
    count, number = int(task.positive.sum()), len(task.positive)
    found = [f"{count} of {number} test samples have the positive answer, {task.name} ({percent(count / number)})."]
    aim = aim_of(view)
    point = operating_point(aim)
    if aim == ARGMAX:
        return [*found, "The most probable answer is given: no rule was fitted."]
    if not point:
        return [*found, f"The rule that chooses the answers was fitted on the validation images for {aim}."]
    return [*found, asked_and_kept(view, task, *point)]


def asked_and_kept(view: View, task: PositiveTask, name: str, value: float) -> str:
    """An operating point that was asked for, beside its validation and its test value."""
    text = f"The rule that chooses the answers was fitted on the validation images for a {name} of at least {value:g}"
    record = view.summary.winner
    if record and is_number(validation := record.value(task.prefix + name)):
        text += f", where trial {record.number} has {validation:.3f} (out-of-fold)"
    who = "winner" + CLEAN if "winner" + CLEAN in task.stored else "winner"
    score = task.share(who, name)
    if not (is_number(score["value"]) and score["interval"]):
        return f"{text}. On the test it is undefined."
    low, high = score["interval"]
    images = "test images without a near-copy" if who.endswith(CLEAN) else "test images"
    if low <= value <= high:
        judged = f"the interval contains {value:g}"
    elif high < value:
        judged = f"the whole interval lies below {value:g}, so what was asked for is not reached"
    else:
        judged = f"the whole interval lies above {value:g}"
    return f"{text}. On the {images} it is {format_score(score)}: {judged}."
