"""Tune's side of the search: what is tried next."""

from __future__ import annotations

import itertools
from typing import Any

from ray.tune.search import Searcher

from tune.config.samplers import grid_points
from tune.config.space import SpaceError
from tune.config.space_check import TIMEOUT_S
from tune.plan.prepare import Study
from tune.records.end_state import DONE_STATES
from tune.records.trials import TrialRecord
from tune.search.callback import StudyLog
from tune.search.early_stopping import rungs
from tune.search.points import as_json, prior_trials, propose, time_limit


class JournalSearcher(Searcher):
    """Hands out the trials that have not ended, each with its old settings, and then new points.

    It stores no results: `propose` reads the log's records.

    Raises:
        SpaceError: `--sampler grid` cannot list the points of the space.
    """

    def __init__(self, study: Study, log: StudyLog) -> None:
        super().__init__()
        self.study = study
        self.log = log
        self.exhausted = False
        """Whether every point of a grid has been tried."""
        self._rungs = rungs(study.settings.study, study.goals)
        self._prior = prior_trials(study, log.say)
        with time_limit(TIMEOUT_S):
            self._grid = grid_points(study.settings) if study.settings.study.sampler == "grid" else []
        self._handed_out: dict[int, TrialRecord] = {}
        """The records of the trials of this session, also of those that Tune has not started yet."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object for a restore that is never used

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "w").close()  # Tune moves the file that it asks for

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        records = self.log.records
        number = next(n for n in itertools.count() if n not in self._handed_out and not self._has_ended(n))
        if number in records:
            config: dict[str, Any] = {"settings": records[number].typed_settings()}
            self._handed_out[number] = records[number]
        else:
            try:
                point = propose(self.study, self._handed_out | records, number, self._prior, self._grid)
            except SpaceError as error:  # the trials that run may end; a resumed study asks for this one again
                self.log.space_error = self.log.space_error or str(error)
                return Searcher.FINISHED
            if point is None:
                self.exhausted = True
                return Searcher.FINISHED
            config = {"settings": point.settings, "point": point}
            self._handed_out[number] = TrialRecord(number, as_json(point.searched), {}, point.distributions)
        known_epochs = records[number].progress if number in records else 0
        return {"number": number, "known_epochs": known_epochs, "rungs": self._rungs, **config}

    def _has_ended(self, number: int) -> bool:
        return number in self.log.records and self.log.records[number].state in DONE_STATES

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass  # the journal has the result
