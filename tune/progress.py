"""What the driver hears of the trials: keeps their records, tells MLflow and the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.tune

from tune.results import TrialRecord, number_text
from tune.study import Study, record_of
from tune.tracking import Tracking


class StudyLog(ray.tune.Callback):
    """Tune's callbacks, turned into records."""

    def __init__(self, study: Study, dispatcher: Any, tracking: Tracking, say: Callable[[str], None]) -> None:
        self.study = study
        self.dispatcher = dispatcher
        self.tracking = tracking
        self.say = say
        self.records: dict[int, TrialRecord] = {}
        self.started = time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that nobody here asks for

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = record_of(trial.config)
        if record.number not in self.records:
            self.records[record.number] = record
            self.tracking.trial_started(record.number, record.searched | record.settings)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        record = self.records[trial.config["number"]]
        record.finished = result["finished"]
        record.epochs.append(result["metrics"])
        record.applied = result["applied"]
        record.seconds = result["seconds"] | {"wall": result["wall_s"], "waited": result["waited_s"]}
        record.lane, record.turn, record.device = result["lane"], result["turn"], result["device"]
        record.notes = result["notes"]
        record.base_gib, record.base_16_bit_gib = result["base_gib"], result["base_16_bit_gib"]
        record.step = result["step"]
        self.tracking.trial_report(record.number, result["metrics"], record.step, result["log"])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self.records[trial.config["number"]]
        self._end(record, "COMPLETE" if record.finished else "STOPPED")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self.records[trial.config["number"]]
        record.error = ray.get(self.dispatcher.error_of.remote(record.number)) or "the trial's Tune process died"
        self._end(record, "FAILED")

    def close(self) -> list[TrialRecord]:
        """All records, in the order of their numbers; a trial without an end was interrupted."""
        for record in self.records.values():
            if record.state == "RUNNING":
                self._end(record, "INTERRUPTED")
        return [self.records[number] for number in sorted(self.records)]

    def _end(self, record: TrialRecord, state: str) -> None:
        record.state = state
        tags = {"lane": record.lane, "device": record.device, "applied": record.applied}
        if record.error:
            tags["error"] = record.error
        if record.notes:
            tags["notes"] = "; ".join(record.notes)
        metrics = {f"{phase}_s": value for phase, value in record.seconds.items()}
        if record.seconds:
            metrics |= {"overhead_s": record.overhead_s, "trainable_params": record.applied["trainable_params"]}
        self.tracking.trial_ended(record.number, state, tags, metrics, record.step)
        metric = self.study.metric
        score = f"{metric} {record.metrics[metric]:.3f}" if metric in record.metrics else "no score"
        values = ", ".join(f"{name} {number_text(value)}" for name, value in record.searched.items())
        done = sum(r.state != "RUNNING" for r in self.records.values())
        values += "; " + "; ".join(record.notes) if record.notes else ""
        error = ": " + record.error.splitlines()[0] if record.error else ""
        self.say(
            f"[{done}/{self.study.settings.study.trials}] trial {record.number} {state.lower()}{error}, {score}, "
            f"{record.seconds.get('wall', 0):.1f} s ({values})"
        )
