"""Trial records as an Optuna study: what samplers and pictures read, and the export optuna.db.

The journal is the truth. An Optuna study is made from its records whenever somebody needs one, and never read back.
"""

from __future__ import annotations

import functools
import math
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from train_fn.support.files import write_file
from tune.records.end_state import IN_OPTUNA
from tune.records.goals import Goal
from tune.records.trials import TrialRecord, point_key

# Optuna logs each new study on the terminal, between the lines of the display. Set here, where every study of the
# search is made, and not in one of the functions: which one runs first depends on the threads.
optuna.logging.set_verbosity(optuna.logging.ERROR)

ONLY_RANKING = "only_ranking"
"""User attribute of another study's trials whose values are not on this study's scale."""


def as_optuna(
    records: Mapping[int, TrialRecord], goals: Sequence[Goal], prior: Sequence[FrozenTrial] = ()
) -> optuna.Study:
    """The records as an Optuna study in memory. Without `prior`, a trial has the same number there.

    Args:
        prior: trials of another study (`--warm-start`), which come first.
    """
    study = optuna.create_study(directions=directions_of(goals))
    numbers, steps = range(max(records, default=-1) + 1), optuna_steps(records)
    own = [frozen_trial(records.get(number), goals, steps) for number in numbers]
    if any(ONLY_RANKING in trial.user_attrs for trial in prior):
        prior = on_own_scale(prior, own)
    study.add_trials([*prior, *own])
    return study


def on_own_scale(prior: Sequence[FrozenTrial], own: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of another study, with values on the scale of this one's.

    TPE sorts all trials in one order, so both studies need one scale, and only the order within the other study is
    evidence. The points that both studies completed give the scale: their values there and here, each sorted. A value
    between two of them there becomes a value between the same two here, and one beyond the ends becomes that of the
    end. So the other study's order stays, and a point that was not tried here never ranks above the best that was. The
    quantiles of this study's trials would rank too high what the other study found mediocre: this study's first points
    are the other one's best.

    A point that has ended here counts by its own result, so the other study's is left out. While no point is shared,
    the values stay as they are.
    """
    here = {point_key(trial.params): trial for trial in own if trial.state.is_finished()}
    shared = [(other, here[point_key(other.params)]) for other in prior if point_key(other.params) in here]
    shared = [(other, trial) for other, trial in shared if trial.state == TrialState.COMPLETE]
    left = [trial for trial in prior if point_key(trial.params) not in here]
    if not shared:
        return left
    there_and_here = [np.sort([trial.values for trial in trials], axis=0).T for trials in zip(*shared, strict=True)]
    scales = list(zip(*there_and_here, strict=True))  # of each goal: sorted values [points] there, and here
    return [
        optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            values=[float(np.interp(v, *scale)) for v, scale in zip(trial.values, scales, strict=True)],
            user_attrs=trial.user_attrs,
        )
        for trial in left
    ]


def directions_of(goals: Sequence[Goal]) -> list[StudyDirection]:
    """Optuna's direction of each goal."""
    return [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for _, mode in goals]


def optuna_steps(records: Mapping[int, TrialRecord]) -> int:
    """Steps of Optuna's intermediate values in an epoch: 1, or 1000 where early stopping has rungs within epochs.
    Optuna takes whole steps only."""
    return 1000 if any(record.rungs for record in records.values()) else 1


def frozen_trial(record: TrialRecord | None, goals: Sequence[Goal], steps_per_epoch: int = 1) -> FrozenTrial:
    """A record as an Optuna trial: RUNNING if it has no end, FAIL if the journal has lost it (None) or a value of a
    goal is not finite. Parameters without a stored distribution are left out.

    Args:
        steps_per_epoch: Optuna's steps of the intermediate values, from `optuna_steps`.
    """
    if record is None:
        return optuna.trial.create_trial(state=TrialState.FAIL)
    state = TrialState[IN_OPTUNA[record.state]]
    values = [record.value(name) for name, _ in goals]
    has_values = all(map(math.isfinite, values))
    if state == TrialState.COMPLETE and not has_values:
        state = TrialState.FAIL
    distributions = read_distributions(record.distributions)
    metric = goals[0][0]
    # Optuna knows no epochs of several goals. Its samplers take a pruned trial's last value as its score, so the values
    # are those by which the trial counted.
    reports = zip(record.reports, record.values(goals[0]), strict=True) if len(goals) == 1 else ()
    trial = optuna.trial.create_trial(
        state=state,
        params={name: value for name, value in record.searched.items() if name in distributions},
        distributions=distributions,
        # A pruned trial has its last value, as Optuna itself records it.
        values=values if has_values and state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        intermediate_values={
            round(steps_per_epoch * report["progress"]): float(value)
            for report, value in reports
            if metric in report["metrics"]
        },
    )
    trial.datetime_start = datetime.fromtimestamp(record.started_at)
    trial.datetime_complete = datetime.fromtimestamp(record.ended_at) if state.is_finished() else None
    return trial


def user_attributes(record: TrialRecord | None) -> dict[str, Any]:
    """What optuna-dashboard shows of a trial beside values and parameters; nothing for a trial without a record."""
    if record is None:
        return {}
    epochs = math.floor(record.reports[-1]["progress"]) if record.reports else 0
    attributes = {
        "end_state": str(record.state), "epochs": epochs, "best_epoch": record.best_epoch, "error": record.error,
        "notes": "; ".join(record.notes), "lane": record.lane, "device": record.device,
        "train_s": record.seconds.get("train"),
    }  # fmt: skip
    return {name: value for name, value in attributes.items() if value not in (None, "")}


def distributions_json(distributions: Mapping[str, optuna.distributions.BaseDistribution]) -> dict[str, str]:
    """Distributions as the journal keeps them."""
    return {name: optuna.distributions.distribution_to_json(range_) for name, range_ in distributions.items()}


def read_distributions(texts: Mapping[str, str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Distributions from `distributions_json`."""
    return {name: optuna.distributions.json_to_distribution(text) for name, text in texts.items()}


class DatabaseExport:
    """optuna.db: the trials for optuna-dashboard and for people. Nothing here reads it.

    The database is built in memory, where a trial costs milliseconds, and then replaces the file as a whole.
    """

    def __init__(self, path: Path, name: str, goals: Sequence[Goal]) -> None:
        self.path, self.name, self.goals = path, name, goals
        self._num_trials = 0
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)

    @functools.cached_property
    def _study(self) -> optuna.Study:  # made at the first write: SQLAlchemy takes most of a second of a study's start
        storage = optuna.storages.RDBStorage(
            "sqlite://", engine_kwargs={"creator": lambda: self._connection, "poolclass": sqlalchemy.StaticPool}
        )
        study = optuna.create_study(study_name=self.name, storage=storage, directions=directions_of(self.goals))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([name for name, _ in self.goals])
        return study

    def write(self, records: Mapping[int, TrialRecord], ended_only: bool = True) -> None:
        """Write the trials that are not in the file yet, in the order of their numbers. Raises OSError.

        Args:
            ended_only: stop before the first trial that has not ended, since Optuna's trials cannot be changed later.
        """
        before = self._num_trials
        study = self._study  # made here, and not with the first trial: without its tables there is nothing to write
        for number in range(self._num_trials, max(records, default=-1) + 1):
            trial = frozen_trial(records.get(number), self.goals, optuna_steps(records))
            if ended_only and not trial.state.is_finished():
                break
            for key, value in user_attributes(records.get(number)).items():
                trial.set_user_attr(key, value)
            study.add_trial(trial)
            self._num_trials += 1
        if self._num_trials > before or not self.path.exists():
            write_file(self.path, self._connection.serialize())
