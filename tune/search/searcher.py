"""Tune's side of the search: what is tried next."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from ray.tune.search import Searcher

from tune.config.samplers import grid_points
from tune.config.space import SpaceError
from tune.config.space_check import TIMEOUT_S
from tune.plan.prepare import Study
from tune.records.control import added_points
from tune.records.end_state import DONE_STATES
from tune.records.trials import TrialRecord
from tune.search.callback import StudyLog
from tune.search.early_stopping import rungs
from tune.search.points import as_json, propose, time_limit
from tune.search.prior import prior_trials, with_prior_points


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
        """Whether the space has no point left to try."""
        self._rungs = rungs(study.settings.study, study.goals)
        self._prior = prior_trials(study, log.say)
        self.study = study = with_prior_points(study)
        with time_limit(TIMEOUT_S):
            self._grid = grid_points(study.settings) if study.settings.study.sampler == "grid" else []
        self._handed_out: dict[int, TrialRecord] = {}
        """The records of the trials of this session, also of those that Tune has not started yet."""
        self._live: set[str] = set()
        """Tune's names of the trials of this session that have not ended."""
        self._added: set[str] = set()
        """The requests whose points this session has handed out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object for a restore that is never used

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "w").close()  # Tune moves the file that it asks for

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        records = self.log.records
        self.log.end_stopped(self._handed_out)
        if len(self._handed_out.keys() | {n for n in records if self._has_ended(n)}) >= self.log.num_trials:
            # Not the end while a trial runs: the user may still ask for more.
            return None if self._live else Searcher.FINISHED
        number = next(n for n in itertools.count() if n not in self._handed_out and not self._has_ended(n))
        if number in records:
            config: dict[str, Any] = {"settings": records[number].typed_settings()}
            self._handed_out[number] = records[number]
        else:
            try:
                waiting = added_points(self.study.journal.events).items()
                added = next((item for item in waiting if item[0] not in self._added), None)
                point = propose(self.study, self._handed_out | records, number, self._prior, self._grid, added)
            except SpaceError as error:  # the trials that run may end; a resumed study asks for this one again
                self.log.space_error = self.log.space_error or str(error)
                return Searcher.FINISHED
            if point is None:
                self.exhausted = True
                return Searcher.FINISHED
            self._added.add(point.added)
            config = {"settings": point.settings, "point": point}
            settings = as_json(dataclasses.asdict(point.settings))
            self._handed_out[number] = TrialRecord(number, as_json(point.searched), settings, point.distributions)
        self._live.add(trial_id)
        known_epochs = records[number].progress if number in records else 0
        return {"number": number, "known_epochs": known_epochs, "rungs": self._rungs, **config}

    def _has_ended(self, number: int) -> bool:
        return number in self.log.records and self.log.records[number].state in DONE_STATES

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._live.discard(trial_id)  # the journal has the result
