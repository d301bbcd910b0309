"""Tune callback that writes trial events to the journal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Container
from typing import Any

import ray
import ray.tune
import sqlalchemy.exc

from train_fn.jobs import EpochReport
from tune.plan.prepare import Study
from tune.records.budgets import exhausted_budget
from tune.records.control import sentence, stopped_trials
from tune.records.end_state import DONE_STATES, EndState
from tune.records.goals import sign
from tune.records.optuna_study import DatabaseExport
from tune.records.plan import save_plan
from tune.records.trials import TrialRecord, trial_records
from tune.results.summary import format_settings
from tune.search.control import take_requests
from tune.search.early_stopping import should_stop
from tune.tracking.delivery import Tracking

CONTROL_S = 1.0  # between two looks at the user's requests
STOPPED_BY_USER = "stopped by the user"


def kept_from_tune(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an error of a callback from Tune, which would take it for the trial's and run the trial again.

    The error ends the search instead: `StudyLog.failure` keeps it, and later callbacks do nothing. After a kill, or
    such an error, `--resume` goes on from the journal.
    """

    @functools.wraps(callback)
    def kept(self: StudyLog, *args: Any, **options: Any) -> Any:
        if self.failure is None:
            try:
                return callback(self, *args, **options)
            except Exception as error:
                self.failure = error
        return None

    return kept


class StudyLog(ray.tune.Callback, ray.tune.Stopper):
    """Writes trial events to the journal, and ends the search when a budget is used up.

    `records` holds the trials' records so far.

    Args:
        dispatcher: handle of the study's `Dispatcher`.
        tracking: is notified of each event.
        say: prints a line of the study's output.
    """

    def __init__(self, study: Study, dispatcher: Any, tracking: Tracking, say: Callable[[str], None]) -> None:
        self.study = study
        self.dispatcher = dispatcher
        self.tracking = tracking
        self.say = say
        self.records = trial_records(study.journal.events)
        self.running: set[int] = set()  # of this session
        self.ended_by = ""  # why the search ended before all trials had
        self.space_error = ""  # why the search space gave no further trial
        self.study_error = ""  # an error that ended the search and that no trial is to blame for
        self.failure: Exception | None = None  # an error of a callback, which ends the search
        self.num_trials = study.settings.study.trials  # the user may change it (`tune.control`)
        self.stopped = stopped_trials(study.journal.events)  # trials that the user has stopped
        self.next_control = 0.0  # `time.monotonic()` of the next look at the user's requests
        self.num_checked = -1  # events when the budgets were last checked
        self.export = DatabaseExport(study.directory / "optuna.db", study.name, study.goals)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object for a restore that is never used

    @kept_from_tune
    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Write a report to the journal. Returns True if its trial is stopped early.

        Tune calls it with each result, before anything else.
        """
        if "report" not in result:
            return False
        number = result["number"]
        # A trial whose Tune process was lost sends its reports again.
        if result["report"].progress > self.records[number].progress:
            self._write("report", number, **vars(result["report"]))
            self._keep_memory(result["report"])
        if not self.stop_reason(number) and number not in self.stopped:
            return False
        # Before the trial's Tune process does it, which does not know that no session goes on with the trial.
        self.dispatcher.stop.remote(number, for_good=True)
        return True

    def stop_all(self) -> bool:
        return self.failure is not None or self.spent()

    @kept_from_tune
    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Take the actions that the user asks for (`tune.control`)."""
        if time.monotonic() < self.next_control:
            return
        self.next_control = time.monotonic() + CONTROL_S
        for event in take_requests(self.study, self.records, self.num_trials):
            self.num_trials = event["trials"]
            if event["action"] == "stop" and not event["refused"]:
                self.stopped.add(event["value"])
                self.dispatcher.stop_soon.remote(event["value"])
            elif event["action"] == "pause" and not event["refused"]:
                os.kill(os.getpid(), signal.SIGINT)  # as the first Ctrl-C
            self.say(f"Control: {sentence(event)}")
            self.tracking.notify()

    @kept_from_tune
    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        config = trial.config
        if config["number"] not in self.running:
            self.running.add(config["number"])
            self._write("started", config["number"], **self._start_fields(config))
            if config["number"] in self.stopped:  # while Tune's process started
                self.dispatcher.stop_soon.remote(config["number"])

    @kept_from_tune
    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number, last = trial.config["number"], trial.last_result
        if "study_error" in last:  # the trial is not to blame: a resumed study runs it again
            self.study_error = last["study_error"]
            self.ended_by = self.ended_by or self.study_error
        elif "error" in last:
            self.end(number, EndState.FAILED, last["error"], last["device_s"])
        elif "stopped" in last:
            self.end(number, EndState.STOPPED, device_s=last["device_s"])
        else:
            finished = self.records[number].finished
            note = "" if finished else self.stop_reason(number)
            self.end(number, EndState.COMPLETE if finished else EndState.STOPPED, note=note)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.check_lanes()  # raises when the dispatcher is gone: then it is not the trial that failed
        self._on_lost_trial(trial.config["number"])

    @kept_from_tune
    def _on_lost_trial(self, number: int) -> None:
        if number in self.records:
            self.end(number, EndState.FAILED, "its Tune process was lost again and again")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.check_lanes()

    def check_lanes(self) -> None:
        """Raises RayActorError when the dispatcher is gone: without it no lane can work."""
        ray.get(self.dispatcher.snapshot.remote())

    def spent(self) -> bool:
        """Whether a budget of the study is used up."""
        events, budgets = self.study.journal.events, self.study.settings.study
        # Tune asks in each step of its loop.
        if not self.ended_by and (len(events) > self.num_checked or budgets.time_budget):
            self.num_checked = len(events)
            self.ended_by = exhausted_budget(self.records.values(), events, budgets)
        return bool(self.ended_by)

    def close(self) -> None:
        """End the trials that still run as interrupted."""
        for record in list(self.records.values()):
            if record.state == EndState.RUNNING:
                # Tune kills the trial's process while that waits for a report, so the process cannot do this itself.
                self.dispatcher.stop.remote(record.number)
                with contextlib.suppress(Exception) if self.failure else contextlib.nullcontext():
                    self.end(record.number, EndState.INTERRUPTED)

    def end_stopped(self, handed_out: Container[int] = ()) -> None:
        """End the trials that the user has stopped and that no process of Tune's has: before they go on.

        Args:
            handed_out: the numbers of the trials that Tune has.
        """
        for number in self.stopped:
            record = self.records.get(number)
            if record and record.state not in DONE_STATES and number not in handed_out:
                self.end(number, EndState.STOPPED)

    def stop_reason(self, number: int) -> str:
        """Why early stopping ends a trial after its last report; "" if it does not."""
        progress = self.records[number].progress
        return should_stop(self.records, number, progress, self.study.settings.study, self.study.goals)

    def end(self, number: int, state: str, error: str = "", device_s: float = 0.0, note: str = "") -> None:
        """Write a trial's end to the journal and print it.

        Args:
            note: added to the trial's notes, such as why it was stopped.
        """
        record = self.records[number]
        name, mode = self.study.goals[0]
        ended = [r for r in self.records.values() if r.state in DONE_STATES]
        complete = [r for r in ended if r.state == EndState.COMPLETE]
        ended += [record] if state in DONE_STATES else []
        complete += [record] if state == EndState.COMPLETE else []
        scores = [r.value(name) for r in complete]
        best = min((value for value in scores if value == value), key=lambda v: sign(mode) * v, default=None)
        names = ("step", "seconds", "applied", "lane", "device", "notes", "best_epoch")
        facts = {fact: getattr(record, fact) for fact in names} | {"score": record.value(name)}
        if state == EndState.STOPPED and number in self.stopped:
            note = STOPPED_BY_USER
        facts["notes"] = [*record.notes, *filter(None, [note])]
        facts["device_s"] = max(device_s + record.spent_before, record.device_seconds)
        self._write("ended", number, state=state, error=error, best=best, num_ended=len(ended), **facts)
        if state in DONE_STATES:
            # A folder that stays does no harm. Tune would count an error here as the trial's.
            with contextlib.suppress(OSError):
                self.study.storage.remove(self.study.directory / "trials" / f"{number:04d}" / "state")
            self._export()
        score = f"{name} {record.value(name):.3f}" if record.metrics else "no score"
        values = format_settings(record.searched)
        again = [f"trial {record.repeats} with seed {record.settings['seed']}"] if record.repeats is not None else []
        values = "; ".join([values, *again, *record.notes])
        reason = ": " + error.splitlines()[0] if error else ""
        total = self.num_trials
        count = f"[{len(ended)}/{total}] trial {number}".ljust(len(f"[{total}/{total}] trial {total}"))
        took = f"{record.seconds.get('wall', 0):.1f} s"
        self.say(f"{count} {f'{state.lower()}{reason},':9} {score}, {took:>7} ({values})")

    def _start_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of a trial's "started" event: of its point, or of its earlier event when the trial goes on."""
        if point := config.get("point"):
            settings = dataclasses.asdict(point.settings)
            params = point.searched | {name: settings[name] for name in point.decided}
            fields = {"searched": point.searched, "distributions": point.distributions, "settings": settings}
            fields |= {"params": params} | ({"added": point.added} if point.added else {})
            return fields | ({} if point.repeats is None else {"repeats": point.repeats})
        events = self.study.journal.events
        earlier = next(e for e in events if e["event"] == "started" and e["number"] == config["number"])
        names = ("searched", "distributions", "settings", "params", "repeats")
        return {name: earlier[name] for name in names if name in earlier}

    def _keep_memory(self, report: EpochReport) -> None:
        """Write into the plan how much memory this kind of device has beside the base: a study that goes on computes
        its trials as before."""
        known = self.study.plan.setdefault("free_gib", {})
        if report.free_gib and report.device not in known:
            known[report.device] = report.free_gib
            save_plan(self.study.directory, self.study.plan)

    def _export(self) -> None:
        try:
            self.export.write(self.records)
        except (OSError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError) as error:
            self.say(f"optuna.db could not be written ({error}); the search does not need it")

    def _write(self, kind: str, number: int, **fields: Any) -> None:
        event = self.study.journal.write(kind, number=number, **fields)
        if kind == "started" and number not in self.records:
            self.records[number] = TrialRecord.of(event)
        self.records[number].apply(event)
        self.tracking.notify()
