"""Ray Tune's side of a trial."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import ray
import ray.tune

from train_fn.jobs import JobFailed, TrainJob


class QueuedTrial(ray.tune.Trainable):
    """Submits a trial's settings to the dispatcher and returns the reports of the lane that trains it.

    A result holds the trial's `number`, `epoch`, `finished`, and the `EpochReport` as `report`; or the fields of
    `JobFailed`.
    """

    def setup(self, config: dict[str, Any], dispatcher: Any = None, trials: str = "") -> None:  # type: ignore[override]
        self.dispatcher = dispatcher
        self.trials = Path(trials)
        self.number: int | None = None
        self._submit(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._stop()
        self._submit(new_config)
        return True

    def step(self) -> dict[str, Any]:
        report = ray.get(self.dispatcher.next_report.remote(self.number, self.seen))
        self.seen += 1
        if isinstance(report, JobFailed):
            # Not an exception: Tune would start the trial again, as after the loss of its process.
            facts = {name: value for name, value in vars(report).items() if value != "" and value is not False}
            return {**facts, "done": True}
        return {
            "number": self.number,
            "epoch": report.epoch,
            "done": report.finished,  # Tune overwrites it when it stops a trial itself
            "finished": report.finished,
            "report": report,
        }

    def cleanup(self) -> None:
        self._stop()

    def _submit(self, config: dict[str, Any]) -> None:
        self.number, self.seen = config["number"], 0
        job = TrainJob(
            number=config["number"],
            settings=config["settings"],
            output=self.trials / f"{self.number:04d}",
            known_epochs=config["known_epochs"],
            rungs=config["rungs"],
        )
        self.submission = uuid.uuid4().hex
        ray.get(self.dispatcher.submit.remote(job, self.submission))

    def _stop(self) -> None:
        if self.number is not None:
            ray.get(self.dispatcher.stop.remote(self.number, submission=self.submission))
            self.number = None
