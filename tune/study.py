"""A study from its data to its outcome: set up, search, confirm, test, conclude."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.samples import MAX_GENERATED, PARTS
from train_fn.data.splits_file import save_splits
from train_fn.support.files import file_hash
from train_fn.worker import versions
from tune.conclude import conclude, end_of_study
from tune.config.paths import SettingsError
from tune.config.space import SpaceError, searched_settings
from tune.confirm import confirm, confirmations_left
from tune.final_test import choose_and_score, chosen_for_test, is_tested
from tune.lanes.layout import Layout, joins_cluster, plan_layout
from tune.lanes.ray_start import session_folder, start_ray, watch_control_service
from tune.plan.prepare import Study
from tune.records.bucket import FILES
from tune.records.budgets import exhausted_budget, last_time
from tune.records.end_state import DONE_STATES
from tune.records.plan import save_plan
from tune.records.process import this_process
from tune.results.outcome import Outcome
from tune.search.control import act_before_session
from tune.signals import StopSignals
from tune.tracking.delivery import Tracking
from tune.tracking.target import target_of

if TYPE_CHECKING:
    from tune.search.callback import StudyLog


def run(study: Study, say: Callable[[str], None], started: float) -> Outcome:
    """Run a study to its end, or until a signal or an error stops it; what is finished by then is kept.

    Args:
        started: `time.perf_counter()` when the user's wait began.

    Raises:
        SettingsError: Ray does not start, or the cluster can never hold one lane.
        KeyboardInterrupt: a signal came before the study had begun.
    """
    outcome = earlier_outcome(study, say)
    with StopSignals() as stop:
        try:
            study = act_before_session(study, say)
            outcome.num_trials = study.settings.study.trials
            if nothing_left(study, outcome):
                say("Every trial has ended and the test is scored: writing study.json and the report")
                conclude_again(study, outcome, stop, started)
            else:
                layout = set_up(study, say)
                stop.install()  # Ray has set handlers of its own
                run_session(study, layout, outcome, say, started, stop)
        except OSError as error:
            outcome.error = f"the study's storage failed: {error}"
        except KeyboardInterrupt:
            if not (study.directory / "plan.json").is_file():
                raise
            outcome.interrupted = True
    if study.lease.lost:
        outcome.note(f"another machine runs this study now: it has taken over {study.storage.uri}")
    study.lease.release()
    if outcome.winner is None and outcome.exit_code > 1:  # it stopped before the winner was named
        with contextlib.suppress(OSError):  # outcome.error has the reason
            outcome.pick_winner()
    return outcome


def earlier_outcome(study: Study, say: Callable[[str], None]) -> Outcome:
    """The outcome of a study's earlier sessions."""
    outcome = Outcome(
        name=study.name,
        directory=study.directory,
        goals=study.goals,
        require=study.settings.study.require,
        num_trials=study.settings.study.trials,
        records=[],
        tracking_uri=study.plan["tracking_uri"],
        storage=study.storage,
    )
    outcome.read(study.journal.events, last_time(study.journal.events))
    for note in study.journal.notes:
        say(note)
        outcome.note(note)
    return outcome


def nothing_left(study: Study, outcome: Outcome) -> bool:
    """Whether a study has nothing left to train or to score. If so, names its winner."""
    settings, events = study.settings.study, study.journal.events
    states = [record.state for record in outcome.records]
    ended_by = exhausted_budget(outcome.records, events, settings, last_time(events))
    if not states or "RUNNING" in states:
        return False
    if not ended_by and sum(state in DONE_STATES for state in states) < settings.trials:
        return False
    if settings.confirm and confirmations_left(study, outcome):
        return False
    outcome.pick_winner()
    outcome.ended_by = outcome.ended_by or ended_by
    return outcome.winner is None or is_tested(study, outcome, chosen_for_test(outcome))


# ------------------------------------------------------------------------------------------------ set up


def set_up(study: Study, say: Callable[[str], None]) -> Layout:
    """Start Ray, share out the machines, write the plan. Raises SettingsError when that cannot be done."""
    try:
        resources = start_ray(study.settings)
        layout = plan_layout(study.settings, resources)
    except SettingsError:
        import ray

        ray.shutdown()
        discard(study)
        raise
    import ray

    if not joins_cluster():
        with contextlib.suppress(PermissionError):  # another user's folder
            study.directory.chmod(0o700)  # on a cluster, nodes may work under other accounts
    try:
        write_plan(study)
    except OSError as error:
        ray.shutdown()
        raise SettingsError([f"`--results` must be a folder that can be written, but {error}: make room"]) from error
    splits = study.splits
    what = "images" if len(splits.images) == len(splits.samples) else "questions"
    sizes = ", ".join(f"{part} {len(getattr(splits, part)):,}" for part in PARTS)
    say(
        f"Study {study.name}: {study.settings.study.trials} trials on {layout.lanes} lane(s) of "
        f"{layout.workers_per_trial} {'GPU' if layout.use_gpu else 'CPU'} worker(s); {what}: {sizes}"
    )
    for sentence in task_sentences(study):
        say(sentence)
    for sentence in study.data_report.sentences():
        say(f"Data: {sentence}")
    say(f"Starting the lanes (logs in {session_folder() / 'logs'})")
    present, needed = int(resources.get("GPU", 0)), math.ceil(layout.lanes * layout.devices_per_trial)
    if layout.use_gpu and present < needed:
        say(f"The cluster has {present} of {needed} GPUs: the lanes wait until its autoscaler has brought the rest")
    return layout


def discard(study: Study) -> None:
    """Remove the folder of a new study that could not begin, if it holds nothing but what `prepare` wrote; also that of
    the study that would have come after it."""
    if study.then:
        discard(study.then)
    if (study.directory / "plan.json").exists() or study.journal.events:
        return
    for name in ("journal.jsonl", "lock"):
        (study.directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the user has files in it
        study.directory.rmdir()


def write_plan(study: Study) -> None:
    """Write splits.json, then plan.json, which makes the folder a study; first those of the study that comes after it,
    by whose name the user resumes both."""
    if study.then:
        write_plan(study.then)
        for name in FILES:
            study.then.storage.push(study.then.directory / name)
    path = study.directory / "splits.json"
    if "splits_hash" not in study.plan:  # a new study
        save_splits(study.splits, path)
        study.plan["splits_hash"] = file_hash(path)
    save_plan(study.directory, study.plan)


# ------------------------------------------------------------------------------------------------ a session with lanes


def run_session(
    study: Study, layout: Layout, outcome: Outcome, say: Callable[[str], None], started: float, stop: StopSignals
) -> None:
    """Start the lanes, search, confirm, score the test images, conclude."""
    import ray

    from tune.lanes.trainers import Lanes, start_dispatcher
    from tune.results.terminal import live
    from tune.search.callback import StudyLog
    from tune.search.footer import Footer
    from tune.search.points import recover_distributions
    from tune.search.tuner import search

    settings = study.settings
    needs_ray = watch_control_service(study.directory, say)
    dispatcher = start_dispatcher(study, layout)
    lanes = Lanes(study, layout, dispatcher, say)
    tags = {"metric": study.metric, "model": settings.model.model, "data": settings.data.data, **versions()}
    if settings.study.warm_start:
        tags["warm_start"] = Path(settings.study.warm_start).name
    tracking = open_session(study, study_params(study, layout), tags, started)
    recover_distributions(study, outcome.records)
    log = StudyLog(study, dispatcher, tracking, say)
    try:
        with live(Footer(log, layout)):
            try:
                with stop.searching():
                    search(study, layout, dispatcher, log)
            finally:
                collect(study, log, outcome, stop)
            if settings.study.confirm and not outcome.interrupted:
                confirm(study, dispatcher, outcome, say)
            choose_and_score(study, dispatcher, outcome, say)
    except KeyboardInterrupt:
        outcome.interrupted = True
    except (Exception, SystemExit) as error:  # SystemExit: from a space
        if lost_dispatcher(error, dispatcher):
            outcome.interrupted = lanes.over = True
            outcome.note("the study lost its dispatcher")
        elif reason := error_of_space_or_storage(error):
            outcome.interrupted, outcome.error = stop.count > 0, reason
        elif error is log.failure:
            logging.getLogger(__name__).error("An error of this program ended the search", exc_info=error)
            outcome.interrupted = stop.count > 0
            outcome.error = f"an error of this program ended the search: {type(error).__name__}: {error}"
        else:
            lanes.over = True
            end_of_study(study, outcome, tracking, {"error": f"{type(error).__name__}: {error}"}, [])
            raise
    try:
        if (outcome.interrupted or outcome.error) and not lanes.over:
            lanes.drain()
        needs_ray.clear()
        conclude(study, outcome, tracking, dataclasses.asdict(layout), stop)
        # Not in a `finally`: Ray ends the process when a lane's thread uses it after a shutdown, and then hides the
        # error that led here. The interpreter's exit shuts Ray down in any case.
        if not outcome.interrupted and not outcome.error:
            lanes.close()
            ray.shutdown()
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.note("a signal ended the study at once: what was running goes on from its last state")


def open_session(study: Study, params: dict[str, Any], tags: dict[str, Any], started: float) -> Tracking:
    """Write a session's first event, and start the delivery of the study's events to its stores."""
    startup_s = time.perf_counter() - started
    study.journal.write("session", params=params, tags=tags, startup_s=startup_s, process=this_process())
    target = target_of(study.directory, study.plan)
    return Tracking(dataclasses.replace(target, may_write=study.lease.ours), study.journal.events)


def task_sentences(study: Study) -> list[str]:
    """What is asked and what is tuned on; nothing for one question with a closed set of answers."""
    splits = study.splits
    if len(splits.tasks) == 1 and splits.tasks[0].kind in ("closed", "binary"):
        return []
    sizes = Counter(sample.task for sample in splits.samples)
    named = ", ".join(f"{task.name or 'all'} ({task.kind}, {sizes[task.name]:,} questions)" for task in splits.tasks)
    lines = [f"Tasks: {named}; tuned on {study.metric} (--metric chooses another)"]
    written = sum(not splits.task_of(sample).candidates for sample in splits.validation)
    if written > MAX_GENERATED:
        lines.append(
            f"After each epoch the model writes its answers to a fixed sample of {MAX_GENERATED} of the {written:,} "
            f"validation questions without candidates; on the test to all"
        )
    return lines


def study_params(study: Study, layout: Layout) -> dict[str, Any]:
    """The parent run's parameters: the search, the base, and what all trials share."""
    counts = {f"num_{part}": len(getattr(study.splits, part)) for part in ("train", "validation", "test")}
    settings = study.settings
    parts = (settings.trial, settings.model, settings.study, layout)
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items() if value != ""} | counts


def collect(study: Study, log: StudyLog, outcome: Outcome, stop: StopSignals) -> None:
    """Read the trials of a search that has ended, and why it ended, into the outcome."""
    log.close()
    outcome.read(study.journal.events)
    outcome.ended_by = log.ended_by
    if log.space_error:
        outcome.error = f"the search space gave no further trial: {log.space_error}"
    outcome.error = outcome.error or log.study_error
    outcome.num_trials = study.plan["settings"]["study"]["trials"] = log.num_trials
    num_ended = sum(record.state != "INTERRUPTED" for record in outcome.records)
    outcome.interrupted |= stop.count > 0 or (not log.ended_by and num_ended < log.num_trials)


def lost_dispatcher(error: BaseException, dispatcher: Any) -> bool:
    """Whether a search ended because the dispatcher has died. Tune raises an error of its own then."""
    import ray
    import ray.tune

    if not isinstance(error, ray.exceptions.RayActorError | ray.tune.TuneError):
        return False
    try:
        ray.get(dispatcher.snapshot.remote(), timeout=30)
    except ray.exceptions.RayError:
        return True
    return False


def error_of_space_or_storage(error: BaseException) -> str:
    """Why a search ended, if an error of the user's space or of the study's storage ended it; else "".

    Ray Tune wraps what its callbacks raise, so the errors that led to this one count, too.
    """
    import sqlite3

    import optuna
    import ray
    import sqlalchemy.exc

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in chain:
        if isinstance(cause, SpaceError):
            return f"the search space {cause}".splitlines()[0]
        frames = [frame.f_code for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if searched_settings.__code__ in frames or isinstance(cause, SystemExit):
            return f"the search space raised {type(cause).__name__}: {cause}".splitlines()[0]
    storage = (OSError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
    for cause in chain:
        if isinstance(cause, storage) and not isinstance(cause, ray.exceptions.RayError):
            root = cause.__cause__ if isinstance(cause, optuna.exceptions.StorageInternalError) else None
            return f"the study's storage failed: {root or cause}".splitlines()[0]
    return ""


# ------------------------------------------------------------------------------------------------ a session without


def conclude_again(study: Study, outcome: Outcome, stop: StopSignals, started: float) -> None:
    """Write the results of a study with nothing left to train or to score. Starts neither Ray nor a lane."""
    from tune.search.points import recover_distributions

    write_plan(study)
    before = [event for event in study.journal.events if event["event"] == "session"][-1]
    tracking = open_session(study, before["params"], before["tags"], started)
    recover_distributions(study, outcome.records)
    outcome.incomplete = False
    outcome.keep_adapter()
    layout = {field.name: before["params"].get(field.name) for field in dataclasses.fields(Layout)}
    conclude(study, outcome, tracking, layout, stop)
