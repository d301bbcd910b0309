"""A study in an MLflow store: its experiment and runs, calls that may fail, and which records the store lacks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.config.uris import local_path
from tune.records.end_state import IN_MLFLOW
from tune.records.journal import Event
from tune.tracking.calls import (
    CALL_S,
    UPLOAD_BYTES_PER_S,
    StoreLost,
    StoreUnavailable,
    bounded,
    prepare_mlflow,
    reason_of,
    refuses,
    trial_params,
)
from tune.tracking.target import Target

if TYPE_CHECKING:
    from mlflow import MlflowClient


class MLflowStore:
    """A parent run for the study and a child run per trial, each identified by its tag `vlm_tune.key`."""

    def __init__(self, target: Target) -> None:
        prepare_mlflow()
        from mlflow import MlflowClient

        self.target = target
        self.path = local_path(target.uri)
        self.run_ids: dict[str, str] = {}  # by key
        self.client: MlflowClient = self.query(lambda: MlflowClient(target.uri))
        self.experiment_id: str = self.query(self._experiment)
        self.inode = self._inode()

    # -------------------------------------------------------------------------------- calls

    def _bounded(self, call: Callable[[], Any], num_bytes: int = 0) -> Any:
        """Run a call with a time limit. A local file needs none: it has no server that could hang."""
        if self.path is not None:
            return call()
        limit = max(CALL_S, 1.5 * float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
        return bounded(call, limit + num_bytes / UPLOAD_BYTES_PER_S)

    def query(self, call: Callable[[], Any]) -> Any:
        """Run a call while the store is opened. Raises StoreUnavailable unless the store refuses the call."""
        try:
            return self._bounded(call)
        except Exception as error:
            if refuses(error):
                raise
            raise StoreUnavailable(reason_of(error)) from error

    def call(self, call: Callable[[], Any], num_bytes: int = 0) -> Any:
        """Run a call of an event.

        An error that may not be the request's fault counts as a refusal only if it comes twice and the store answers
        another query in between: otherwise one event could block all later ones for ever.

        Raises:
            StoreUnavailable: the store does not answer.
            Exception: the error with which the store refuses the call.
        """
        try:
            return self._bounded(call, num_bytes)
        except Exception as error:
            if refuses(error):
                raise
            self._probe(error)
        return self._bounded(call, num_bytes)

    def _probe(self, error: Exception) -> None:
        """Raises StoreUnavailable for `error` if the store does not answer now."""
        try:
            self._bounded(lambda: self.client.get_experiment(self.experiment_id))
        except Exception as other:
            if not refuses(other):
                raise StoreUnavailable(reason_of(error)) from error

    def _inode(self) -> int:
        return self.path.stat().st_ino if self.path and self.path.is_file() else 0

    def check_file(self) -> None:
        """Raises StoreLost if the store's file was removed or replaced: SQLite would go on writing to the old one."""
        if self.inode and self._inode() != self.inode:
            raise StoreLost(f"{self.path} was removed or replaced while it was in use")

    # -------------------------------------------------------------------------------- experiment and runs

    def _experiment(self) -> str:
        """Id of the experiment of that name, or of a renamed one that holds the study's run. Creates a missing one."""
        from mlflow.exceptions import MlflowException

        name = self.target.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment and experiment.lifecycle_stage != "active":
            raise ValueError(deleted_experiment(name, experiment.experiment_id))
        if experiment and self._find("study", [experiment.experiment_id]):
            return experiment.experiment_id
        if (self.target.directory / "tracking.json").exists():  # not new: its experiment may have been renamed
            others = [other.experiment_id for other in self.client.search_experiments(max_results=1000)]
            if runs := self._find("study", others):
                return runs[0].info.experiment_id
        if experiment:
            return experiment.experiment_id
        try:
            return self.client.create_experiment(name, artifact_location() if self.path else None)
        except MlflowException as error:
            exists = error.error_code == "RESOURCE_ALREADY_EXISTS"  # another study was faster
            experiment = self.client.get_experiment_by_name(name) if exists else None
            if not experiment:
                raise
            return experiment.experiment_id

    def _find(self, key: str, experiments: list[str]) -> Any:
        """The run of a key in a list; an empty one if there is none."""
        condition = f"tags.`vlm_tune.key` = '{self.target.study_id}/{key}'"
        return self.client.search_runs(experiments, condition, max_results=1) if experiments else []

    def run(self, key: str, name: str, tags: Mapping[str, str], start_time: int) -> str:
        """Id of the run of a key. Creates a missing one.

        Args:
            start_time: ms since the epoch.
        """

        def find_or_create() -> str:
            if runs := self._find(key, [self.experiment_id]):
                parent = tags.get("mlflow.parentRunId")
                if parent and runs[0].data.tags.get("mlflow.parentRunId") != parent:  # its parent was deleted
                    self.client.set_tag(runs[0].info.run_id, "mlflow.parentRunId", parent)
                return runs[0].info.run_id
            own = {"vlm_tune.key": f"{self.target.study_id}/{key}", "study": self.target.study, **tags}
            return self.client.create_run(self.experiment_id, start_time, own, name).info.run_id

        if key not in self.run_ids:
            self.run_ids[key] = self.call(find_or_create)
        return self.run_ids[key]

    # -------------------------------------------------------------------------------- reconciliation

    def missing(self, events: Sequence[Event], again: set[int]) -> set[int]:
        """Compare the store with the delivered events.

        Args:
            events: the delivered events.
            again: indices of events that are to be delivered again in any case.

        Returns:
            Indices of the events to deliver again. If the store lacks anything of a run (the run itself, its state, an
            epoch, the name of a parameter), or an event of the run is in `again`, that is all events of the run: states
            must come in their order.
        """
        runs = self.query(self._runs)
        by_run: dict[str, list[int]] = {}
        for index, event in enumerate(events):
            if isinstance(event, dict):
                by_run.setdefault(str(event.get("number", "study")), []).append(index)
        if events and "study" not in runs:
            return set(range(len(events)))
        missing = set(again)
        for key, indices in by_run.items():
            own = [events[index] for index in indices]
            if again & set(indices) or not self.query(partial(self._holds, runs.get(key), own)):
                missing |= set(indices)
        return missing

    def _runs(self) -> dict[str, Any]:
        """The study's runs by their keys."""
        condition = f"tags.`vlm_tune.key` LIKE '{self.target.study_id}/%'"
        runs: dict[str, Any] = {}
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, max_results=1000, page_token=token)
            runs |= {run.data.tags["vlm_tune.key"].rpartition("/")[2]: run for run in page}
            token = page.token
            if not token:
                return runs

    def _holds(self, run: Any, events: Sequence[Event]) -> bool:
        """Whether a run holds what its events have delivered."""
        if run is None:
            return False
        params = {name for event in events if isinstance(event.get("params"), dict) for name in trial_params(event)}
        reported = [event.get("progress", event.get("epoch")) for event in events if event.get("event") == "report"]
        epochs = {epoch for epoch in reported if isinstance(epoch, int | float)}
        states = [
            IN_MLFLOW.get(str(event.get("state"))) if str(event["event"]).endswith("ended") else "RUNNING"
            for event in events
            if event.get("event") in ("session", "started", "ended", "study_ended")
        ]
        if not params <= set(run.data.params) or (states and run.info.status != states[-1]):
            return False
        return not epochs or epochs <= {m.value for m in self.client.get_metric_history(run.info.run_id, "epoch")}


def artifact_location() -> str | None:
    """Where a new experiment of a local store keeps its artifacts; None: MLflow's default.

    MLflow unquotes its default, so that a working folder with a `%` in its name would get a second folder beside it.
    """
    folder = Path.cwd() / "mlruns"
    return (folder / f"{time.time_ns()}").as_uri() if "%" in str(folder) else None


def deleted_experiment(name: str, experiment_id: str) -> str:
    """The message for an experiment in MLflow's trash, which accepts no records."""
    return (
        f"the MLflow experiment must be active, but {name!r} was deleted: restore it with "
        f"`mlflow experiments restore --experiment-id {experiment_id}`, or give another --experiment"
    )
