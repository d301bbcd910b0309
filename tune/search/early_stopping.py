"""Early stopping by epoch, or by parts of epochs, as a function of the trial records alone.

A decision depends on the reports that came before it, in the order of the journal. So a study that goes on after a kill
decides as it would have without it, and there is no state to store.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from tune.config.settings import StudySettings
from tune.records.goals import Goal, sign
from tune.records.trials import TrialRecord

REDUCTION_FACTOR = 3  # of ASHA: a third goes on at 1, 3, 9, ... times the grace period
MIN_SAMPLES = 3  # of the median rule: other trials that have come as far
DIVERGED = 3  # times the training loss of the first report; such trials ended badly (benchmarks/README.md)
MAX_EPOCHS = 10_000  # of a trial, by its settings


def rungs(study: StudySettings, goals: tuple[Goal, ...]) -> tuple[float, ...]:
    """The epochs, whole or not, after which early stopping compares trials; empty if it stops none. The median rule
    also compares them after each epoch."""
    if len(goals) > 1 or study.scheduler == "none":
        return ()
    if study.scheduler == "median":
        return (float(study.grace_period),)
    every = (study.grace_period * float(REDUCTION_FACTOR) ** number for number in itertools.count())
    return tuple(itertools.takewhile(lambda rung: rung <= MAX_EPOCHS, every))


def should_stop(
    records: Mapping[int, TrialRecord], number: int, progress: float, study: StudySettings, goals: tuple[Goal, ...]
) -> str:
    """Why a trial must end after one of its reports; "" if it goes on.

    The guide's trial (number 0) always runs to its end, because the winner is compared with its test score. A trial
    that has diverged ends in any case. With several goals no other trial is stopped, because one bad goal does not make
    a trial hopeless.

    Args:
        progress: epochs trained at that report; 0: there is none yet.
    """
    if number == 0 or not progress:
        return ""
    if reason := diverged(records[number], progress):
        return reason
    rule = asha if study.scheduler == "asha" else median_rule
    reached = [rung for rung in rungs(study, goals) if rung <= progress]
    return rule(records, number, progress, reached, goals[0]) if reached else ""


def diverged(record: TrialRecord, progress: float) -> str:
    """Why a trial has diverged by one of its reports: its training loss has risen far above that of its first one."""
    losses = [report["metrics"].get("train_loss", np.nan) for report in record.reports]
    first, loss = losses[0], losses[reports_until(record, progress) - 1]
    if loss > DIVERGED * first:
        return f"diverged: the training loss rose from {first:.3g} to {loss:.3g}"
    return ""


def asha(records: Mapping[int, TrialRecord], number: int, progress: float, reached: list[float], goal: Goal) -> str:
    """ASHA without pauses (arXiv:1810.05934): at each rung, stop what is worse than the best third so far.

    A trial counts at a rung by its first report at or after it: where the rung lies within an epoch and the trial has
    too few steps for it, that is the epoch's.

    Args:
        progress: as for `should_stop`.
        reached: the rungs up to there, rising.
    """
    own = records[number]
    count = reports_until(own, progress)
    before = own.reports[count - 2]["progress"] if count > 1 else 0.0
    score = sign(goal[1]) * own.values(goal)[count - 1]
    for rung in (rung for rung in reached if rung > before):
        others = earlier(records, rung, own.reports[count - 1]["seq"])
        values = [sign(goal[1]) * other.values(goal)[its - 1] for other, its in others]
        values = [value for value in values if np.isfinite(value)]
        if values and score > np.percentile(values, 100 / REDUCTION_FACTOR):
            return f"worse than the best third after {epochs(rung)}"
    return ""


def median_rule(
    records: Mapping[int, TrialRecord], number: int, progress: float, reached: list[float], goal: Goal
) -> str:
    """The median stopping rule (Google Vizier): stop a trial whose best score is worse than the median of the others'
    mean scores since the grace period. Arguments as for `asha`; the scores are those of each report alone."""
    name, mode = goal

    def scores(record: TrialRecord, count: int, since: float) -> np.ndarray:
        """Scores of the first `count` reports that come at or after `since` epochs, less is better."""
        its = [report for report in record.reports[:count] if report["progress"] >= since]
        return sign(mode) * np.array([report["metrics"].get(name, np.nan) for report in its])

    own = records[number]
    count = reports_until(own, progress)
    others = earlier(records, progress, own.reports[count - 1]["seq"])
    means = [scores(other, its, reached[0]).mean() for other, its in others]
    means = [mean for mean in means if np.isfinite(mean)]
    if len(means) >= MIN_SAMPLES and np.nanmin(scores(own, count, 0.0)) > np.median(means):
        return f"worse than the median after {epochs(progress)}"
    return ""


def epochs(number: float) -> str:
    """So many epochs in words."""
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def reports_until(record: TrialRecord, progress: float) -> int:
    """The number of a trial's reports up to the first at or after so many epochs; 0 if it has not come so far."""
    return next((count for count, its in enumerate(record.reports, 1) if its["progress"] >= progress), 0)


def earlier(records: Mapping[int, TrialRecord], progress: float, seq: int) -> list[tuple[TrialRecord, int]]:
    """The trials that had come so far before event `seq`, each with its `reports_until`."""
    found = [(record, reports_until(record, progress)) for record in records.values()]
    return [(record, count) for record, count in found if count and record.reports[count - 1]["seq"] < seq]
