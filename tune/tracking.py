"""MLflow: a parent run for the study, a child run per trial. Written by a thread of the driver, in order.

Workers never talk to MLflow, and the search never waits for it: every call below only queues a record.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATES = {"COMPLETE": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED", "INTERRUPTED": "KILLED"}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the sqlite file that a bare `mlflow ui` in the working folder shows."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


class Tracking:
    """The study's records in MLflow. `errors` holds what MLflow refused; the study goes on without."""

    def __init__(self, experiment: str, study: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.errors: list[str] = []
        self._children: dict[int, str] = {}
        self._records: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        self._records.put(lambda: self._open(experiment, study, params, tags))

    # -------------------------------------------------------------------------------- called by the study

    def trial_started(self, number: int, params: dict[str, Any]) -> None:
        """Open the trial's child run with its parameters."""
        self._records.put(lambda: self._start_child(number, params))

    def trial_report(self, number: int, metrics: dict[str, float], epoch: int) -> None:
        """Log an epoch's metrics."""
        now = time.time()
        self._records.put(lambda: self._log_metrics(self._children[number], metrics, epoch, now))

    def trial_ended(self, number: int, state: str, tags: dict[str, Any], metrics: dict[str, float]) -> None:
        """Close the trial's child run: state is COMPLETE, STOPPED, FAILED or INTERRUPTED."""
        now = time.time()

        def close() -> None:
            self._log_metrics(self._children[number], metrics, 0, now)
            self._end(self._children.pop(number), state, tags)

        self._records.put(close)

    def study_ended(
        self, state: str, tags: dict[str, Any], metrics: dict[str, float], artifacts: list[Path], timeout_s: float = 60
    ) -> None:
        """Close every open run, log the study's files, and wait until all is written."""
        now = time.time()

        def close() -> None:
            for run in self._children.values():
                self._end(run, "INTERRUPTED", {})
            self._log_metrics(self.run_id, metrics, 0, now)
            for path in artifacts:
                self._client.log_artifact(self.run_id, str(path))
            self._end(self.run_id, state, tags)

        self._records.put(close)
        self._records.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.errors.append(f"MLflow did not take all records within {timeout_s:g} s")

    # -------------------------------------------------------------------------------- within the thread

    def _write(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                record()
            except Exception as error:  # a tracking store must not end a study; what it lost is told at the end
                self.errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    def _open(self, experiment: str, study: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri())
        found = self._client.get_experiment_by_name(experiment)
        self.experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(self.experiment_id, run_name=study, tags={"study": study, **tags})
        self.run_id = run.info.run_id
        self._study = study
        self._log_params(self.run_id, params)

    def _start_child(self, number: int, params: dict[str, Any]) -> None:
        tags = {"mlflow.parentRunId": self.run_id, "study": self._study, "trial": str(number)}
        run = self._client.create_run(self.experiment_id, run_name=f"trial {number}", tags=tags)
        self._children[number] = run.info.run_id
        self._log_params(run.info.run_id, params)

    def _log_params(self, run: str, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:500]) for key, value in params.items()]
        self._client.log_batch(run, params=entities)

    def _log_metrics(self, run: str, metrics: dict[str, float], step: int, when: float) -> None:
        from mlflow.entities import Metric

        entities = [Metric(key, float(value), int(when * 1000), step) for key, value in metrics.items()]
        self._client.log_batch(run, metrics=entities)

    def _end(self, run: str, state: str, tags: dict[str, Any]) -> None:
        for key, value in {"end_state": state, **tags}.items():
            self._client.set_tag(run, key, str(value)[:5000])
        self._client.set_terminated(run, STATES[state])
