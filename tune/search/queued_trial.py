"""Ray Tune's side of a trial."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ray
import ray.tune


class QueuedTrial(ray.tune.Trainable):
    """Tune's side of a trial: hands its settings to the dispatcher, returns the reports that come back."""

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
        if "error" in report:
            # A result and no exception: Tune begins a trial again whose process raised, as if the process were lost.
            return {**report, "done": True}
        # Tune overwrites `done` when it stops a trial itself.
        costs = {"trainable_params": report["applied"]["trainable_params"], "train_s": report["seconds"]["train"]}
        return {**report["metrics"], **costs, **report, "finished": report["done"], "number": self.number}

    def cleanup(self) -> None:
        self._stop()

    def _submit(self, config: dict[str, Any]) -> None:
        self.number, self.seen = config["number"], 0
        assignment = {
            "kind": "train",
            "settings": dataclasses.asdict(config["settings"]),
            "output": str(self.trials / f"{self.number:04d}"),
            "known_epochs": config["known_epochs"],
        }
        ray.get(self.dispatcher.submit.remote(self.number, assignment))

    def _stop(self) -> None:
        if self.number is not None:
            ray.get(self.dispatcher.stop.remote(self.number))
            self.number = None
