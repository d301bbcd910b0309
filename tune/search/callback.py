"""What the driver hears of the trials, through Tune's callbacks: into the journal, and from there to all who listen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import ray
import ray.tune

from tune.plan.prepare import Study
from tune.records.budgets import spent
from tune.records.goals import sign
from tune.records.trials import TrialRecord, fold
from tune.results.summary import format_settings
from tune.tracking.delivery import Tracking

REPORTED = ("epoch", "step", "metrics", "log", "applied", "seconds", "finished", "lane", "turn", "device", "notes",
            "num_threads", "base_gib", "base_16_bit_gib", "base_hash", "data_hash", "wall_s",
            "waited_s", "device_s", "system")  # fmt: skip


class StudyLog(ray.tune.Callback, ray.tune.Stopper):
    """Tune's callbacks, turned into events; and what ends the search, with all that runs, when a budget is used up.
    `records` is what the journal has told so far."""

    def __init__(self, study: Study, dispatcher: Any, tracking: Tracking, say: Callable[[str], None]) -> None:
        self.study = study
        self.dispatcher = dispatcher
        self.tracking = tracking
        self.say = say
        self.records = fold(study.journal.events)
        self.running: set[int] = set()  # of this session
        self.ended_by = ""
        self.space_error = ""  # why the search space gave no further trial
        self.study_error = ""  # an error that ended the search and that no trial is to blame for
        self.heard = -1  # events at the last look at the budgets

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for a restore that nobody here asks for

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.spent()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        config = trial.config
        if config["number"] not in self.running:
            self.running.add(config["number"])
            own = ("number", "settings", "chosen", "known_epochs")
            searched = {name: value for name, value in config.items() if name not in own}
            params = searched | {name: config["settings"][name] for name in config["chosen"]}
            self._tell("started", config["number"], searched=searched, settings=config["settings"], params=params)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        record = self.records[trial.config["number"]]
        # One whose Tune process was lost tells its reports again.
        if "error" not in result and result["epoch"] > len(record.epochs):
            self._tell("report", record.number, **{name: result[name] for name in REPORTED if name in result})

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number, last = trial.config["number"], trial.last_result
        if "study_error" in last:  # the trial is not to blame: a session that goes on runs it again
            self.study_error = last["study_error"]
            self.ended_by = self.ended_by or self.study_error
        elif "error" in last:
            self.end(number, "FAILED", last["error"], last["device_s"])
        else:
            self.end(number, "COMPLETE" if self.records[number].finished else "STOPPED")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if trial.config["number"] in self.records:
            self.end(trial.config["number"], "FAILED", "its Tune process was lost again and again")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.check_lanes()

    def check_lanes(self) -> None:
        """Raises RayActorError when the dispatcher, through which all lanes work, is gone."""
        ray.get(self.dispatcher.snapshot.remote())

    def spent(self) -> bool:
        """Whether a budget of the study is used up."""
        events, budgets = self.study.journal.events, self.study.settings.study
        if not self.ended_by and (len(events) > self.heard or budgets.time_budget):  # asked at each turn of Tune's loop
            self.heard = len(events)
            self.ended_by = spent(self.records.values(), events, budgets)
        return bool(self.ended_by)

    def close(self) -> list[TrialRecord]:
        """All records, in the order of their numbers; a trial without an end was interrupted."""
        for record in list(self.records.values()):
            if record.state == "RUNNING":
                # Tune kills a process that waits for its trial's next report, which then cannot stop it any more.
                self.dispatcher.stop.remote(record.number)
                self.end(record.number, "INTERRUPTED")
        return [self.records[number] for number in sorted(self.records)]

    def end(self, number: int, state: str, error: str = "", device_s: float = 0.0) -> None:
        """Write a trial's end down, and tell of it."""
        record = self.records[number]
        name, mode = self.study.goals[0]
        ended = [r for r in self.records.values() if r.state not in ("RUNNING", "INTERRUPTED")]
        ended += [record] if state != "INTERRUPTED" else []
        complete = [r.value(name) for r in ended if (r is record and state == "COMPLETE") or r.state == "COMPLETE"]
        best = min((value for value in complete if value == value), key=lambda v: sign(mode) * v, default=None)
        facts = {name: getattr(record, name) for name in ("step", "seconds", "applied", "lane", "device", "notes")}
        facts["device_s"] = max(device_s + record.spent_before, record.device_seconds)
        self._tell("ended", number, state=state, error=error, best=best, num_ended=len(ended), **facts)
        if state != "INTERRUPTED":
            # What storage that fails keeps of it does no harm; an error here, Tune would take for the trial's.
            with contextlib.suppress(OSError):
                self.study.storage.remove(self.study.directory / "trials" / f"{number:04d}" / "state")
        score = f"{name} {record.value(name):.3f}" if record.epochs else "no score"
        values = format_settings(record.searched)
        values += "; " + "; ".join(record.notes) if record.notes else ""
        told = ": " + error.splitlines()[0] if error else ""
        total = self.study.settings.study.trials
        place = f"[{len(ended)}/{total}] trial {number}".ljust(len(f"[{total}/{total}] trial {total}"))
        took = f"{record.seconds.get('wall', 0):.1f} s"
        self.say(f"{place} {f'{state.lower()}{told},':9} {score}, {took:>7} ({values})")

    def _tell(self, kind: str, number: int, **fields: Any) -> None:
        event = self.study.journal.write(kind, number=number, **fields)
        if kind == "started" and number not in self.records:
            self.records[number] = TrialRecord(number, event["searched"], event["settings"])
        self.records[number].hear(event)
        self.tracking.notify()
