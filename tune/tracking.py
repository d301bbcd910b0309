"""MLflow, TensorBoard and W&B: a thread of the driver writes what the study tells it, in order.

Workers never talk to a tracking store, and the search never waits for one: every call on `Tracking` only queues a
record.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

STATES = {"COMPLETE": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED", "INTERRUPTED": "KILLED"}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the sqlite file that a bare `mlflow ui` in the working folder shows."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


class Sink(Protocol):
    """A place where records go. All calls come from one thread."""

    def start_trial(self, number: int, params: Mapping[str, Any]) -> None:
        """Open the trial's run."""

    def log(self, number: int, metrics: Mapping[str, float], step: int, when: float) -> None:
        """Metrics at an optimizer step; `when` in seconds since the epoch."""

    def end_trial(self, number: int, state: str, tags: Mapping[str, Any]) -> None:
        """Close the trial's run: state is COMPLETE, STOPPED, FAILED or INTERRUPTED."""

    def end_study(
        self, state: str, tags: Mapping[str, Any], metrics: Mapping[str, float], artifacts: list[Path]
    ) -> None:
        """Close everything."""


class Tracking:
    """The study's records. `errors` holds what a store refused; the study goes on without."""

    def __init__(
        self,
        report_to: tuple[str, ...],
        experiment: str,
        study: str,
        directory: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        self.errors: list[str] = []
        self._sinks: list[Sink] = []
        self._records: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        makers: dict[str, Callable[[], Sink]] = {
            "mlflow": lambda: MLflowSink(experiment, study, params, tags),
            "tensorboard": lambda: TensorBoardSink(directory),
            "wandb": lambda: WandbSink(experiment, study, directory, tags),
        }
        for name in report_to:
            # Made in the thread: importing MLflow and creating its tables takes seconds that the lanes start in.
            self._records.put(lambda make=makers[name]: self._sinks.append(make()))  # type: ignore[misc]

    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        """Open the trial's runs with its parameters."""
        self._tell(lambda sink: sink.start_trial(number, params))

    def trial_report(self, number: int, metrics: Mapping[str, float], step: int, log: list[dict[str, float]]) -> None:
        """An epoch's metrics at an optimizer step, and the training loss and learning rate on the way to it."""
        now = time.time()
        for entry in log:
            if "loss" in entry:
                values = {f"train/{name}": entry[name] for name in ("loss", "learning_rate")}
                self._tell(lambda sink, v=values, s=int(entry["step"]): sink.log(number, v, s, now))  # type: ignore[misc]
        self._tell(lambda sink: sink.log(number, metrics, step, now))

    def trial_ended(
        self, number: int, state: str, tags: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Close the trial's runs with their last metrics."""
        now = time.time()
        self._tell(lambda sink: sink.log(number, metrics, step, now))
        self._tell(lambda sink: sink.end_trial(number, state, tags))

    def study_ended(
        self,
        state: str,
        tags: Mapping[str, Any],
        metrics: Mapping[str, float],
        artifacts: list[Path],
        timeout_s: float = 60,
    ) -> None:
        """Close every open run, log the study's files, and wait until all is written."""
        self._tell(lambda sink: sink.end_study(state, tags, metrics, artifacts))
        self._records.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.errors.append(f"tracking did not take all records within {timeout_s:g} s")

    def _tell(self, call: Callable[[Sink], None]) -> None:
        def record() -> None:
            for sink in self._sinks:
                call(sink)

        self._records.put(record)

    def _write(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                record()
            except Exception as error:  # a store must not end a study; what it lost is told at the end
                self.errors.append(f"{type(error).__name__}: {error}".splitlines()[0])


class MLflowSink:
    """A parent run for the study, a child run per trial."""

    def __init__(self, experiment: str, study: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.client = MlflowClient(tracking_uri())
        found = self.client.get_experiment_by_name(experiment)
        self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
        run = self.client.create_run(self.experiment_id, run_name=study, tags={"study": study, **tags})
        self.run_id = run.info.run_id
        self.tags = {"study": study, **tags}
        self.children: dict[int, str] = {}
        self._params(self.run_id, params)

    def start_trial(self, number: int, params: Mapping[str, Any]) -> None:
        tags = {"mlflow.parentRunId": self.run_id, "trial": str(number), **self.tags}
        run = self.client.create_run(self.experiment_id, run_name=f"trial {number}", tags=tags)
        self.children[number] = run.info.run_id
        self._params(run.info.run_id, params)

    def log(self, number: int, metrics: Mapping[str, float], step: int, when: float) -> None:
        self._metrics(self.children[number], metrics, step, when)

    def end_trial(self, number: int, state: str, tags: Mapping[str, Any]) -> None:
        self._end(self.children.pop(number), state, tags)

    def end_study(
        self, state: str, tags: Mapping[str, Any], metrics: Mapping[str, float], artifacts: list[Path]
    ) -> None:
        for number in list(self.children):
            self.end_trial(number, "INTERRUPTED", {})
        self._metrics(self.run_id, metrics, 0, time.time())
        for path in artifacts:
            self.client.log_artifact(self.run_id, str(path))
        self._end(self.run_id, state, tags)

    def _params(self, run: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in params.items()])

    def _metrics(self, run: str, metrics: Mapping[str, float], step: int, when: float) -> None:
        from mlflow.entities import Metric

        entities = [Metric(key, float(value), int(when * 1000), step) for key, value in metrics.items()]
        self.client.log_batch(run, metrics=entities)

    def _end(self, run: str, state: str, tags: Mapping[str, Any]) -> None:
        for key, value in {"end_state": state, **tags}.items():
            self.client.set_tag(run, key, str(value)[:5000])
        self.client.set_terminated(run, STATES[state])


class TensorBoardSink:
    """Event files under `trials/0007/runs/`, as the guide's monitoring reads them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writers: dict[int, Any] = {}

    def start_trial(self, number: int, params: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.writers[number] = SummaryWriter(str(self.directory / "trials" / f"{number:04d}" / "runs"))
        lines = "\n".join(f"{name}: {value}  " for name, value in params.items())
        self.writers[number].add_text("settings", lines)

    def log(self, number: int, metrics: Mapping[str, float], step: int, when: float) -> None:
        for name, value in metrics.items():
            self.writers[number].add_scalar(name, value, step, walltime=when)

    def end_trial(self, number: int, state: str, tags: Mapping[str, Any]) -> None:
        self.writers.pop(number).close()

    def end_study(
        self, state: str, tags: Mapping[str, Any], metrics: Mapping[str, float], artifacts: list[Path]
    ) -> None:
        for writer in self.writers.values():
            writer.close()


class WandbSink:
    """A run per trial, grouped by study. WANDB_MODE=offline keeps them on disk."""

    def __init__(self, experiment: str, study: str, directory: Path, tags: Mapping[str, str]) -> None:
        self.options: dict[str, Any] = {
            "project": experiment,
            "group": study,
            "dir": str(directory),
            "notes": str(dict(tags)),
        }
        self.runs: dict[int, Any] = {}

    def start_trial(self, number: int, params: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(silent=True)
        name = f"trial {number}"
        self.runs[number] = wandb.init(
            **self.options, name=name, config=dict(params), reinit="create_new", settings=settings
        )

    def log(self, number: int, metrics: Mapping[str, float], step: int, when: float) -> None:
        self.runs[number].log(dict(metrics), step=step)

    def end_trial(self, number: int, state: str, tags: Mapping[str, Any]) -> None:
        run = self.runs.pop(number)
        run.summary.update({"end_state": state, **{name: str(value) for name, value in tags.items()}})
        run.finish(exit_code=0 if STATES[state] == "FINISHED" else 1)

    def end_study(
        self, state: str, tags: Mapping[str, Any], metrics: Mapping[str, float], artifacts: list[Path]
    ) -> None:
        for number in list(self.runs):
            self.end_trial(number, "INTERRUPTED", {})
