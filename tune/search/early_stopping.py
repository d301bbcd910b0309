"""Early stopping by epoch, as a function of the trial records alone.

A decision depends on the reports that came before it, in the order of the journal. So a study that goes on after a kill
decides as it would have without it, and there is no state to store.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tune.config.settings import StudySettings
from tune.records.goals import Goal, sign
from tune.records.trials import TrialRecord

REDUCTION_FACTOR = 3  # of ASHA: a third goes on at epochs 1, 3, 9, ... times the grace period
MIN_SAMPLES = 3  # of the median rule: other trials that have come as far


def should_stop(
    records: Mapping[int, TrialRecord], number: int, epoch: int, study: StudySettings, goals: tuple[Goal, ...]
) -> bool:
    """Whether a trial must end after one of its epochs.

    The guide's trial (number 0) always runs to its end, because the winner is compared with its test score. With
    several goals no trial is stopped, because one bad goal does not make a trial hopeless.
    """
    if number == 0 or len(goals) > 1 or study.scheduler == "none" or epoch < study.grace_period:
        return False
    (metric, mode) = goals[0]
    seen = records[number].report_seqs[epoch - 1]

    def scores(record: TrialRecord) -> np.ndarray:
        """Scores of the epochs up to `epoch`, less is better."""
        each = [metrics.get(metric, np.nan) for metrics in record.epochs]
        # The median rule itself takes the best of one side and the mean of the other.
        values = record.values(goals[0]) if study.scheduler == "asha" else np.array(each)
        return sign(mode) * values[:epoch]

    own = scores(records[number])
    others = [
        scores(other)
        for other in records.values()
        if len(other.epochs) >= epoch and other.report_seqs[epoch - 1] < seen
    ]
    rule = asha if study.scheduler == "asha" else median_rule
    return rule(own, others, study.grace_period)


def asha(own: np.ndarray, others: list[np.ndarray], grace_period: int) -> bool:
    """ASHA without pauses (arXiv:1810.05934): at each rung, stop what is worse than the best third so far.

    Args:
        own: scores by which a trial counted after each of its epochs so far [E], less is better.
        others: scores of the other trials that reached this epoch before, [E] each.
    """
    rung = grace_period
    while rung < len(own):
        rung *= REDUCTION_FACTOR
    at_rung = [scores[-1] for scores in others if np.isfinite(scores[-1])]
    if rung != len(own) or not at_rung:
        return False
    return bool(own[-1] > np.percentile(at_rung, 100 / REDUCTION_FACTOR))


def median_rule(own: np.ndarray, others: list[np.ndarray], grace_period: int) -> bool:
    """The median stopping rule (Google Vizier): stop a trial whose best score is worse than the median of the others'
    mean scores. Arguments as for `asha`, but the scores are those of each epoch alone."""
    means = [scores[grace_period - 1 :].mean() for scores in others]
    means = [mean for mean in means if np.isfinite(mean)]
    return len(means) >= MIN_SAMPLES and bool(np.nanmin(own) > np.median(means))
