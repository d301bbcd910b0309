"""A study from its data to its outcome: Ray, lanes, search, confirmation, test, report."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data import fold_splits, save_splits
from train_fn.files import file_hash
from train_fn.scores import probabilities
from train_fn.worker import versions
from tune.journal import Event, read_journal
from tune.machine import allowed_cores, cluster_problem, private_folder
from tune.plan import save_plan
from tune.prepare import Study
from tune.results import (
    DONE_STATES,
    Outcome,
    TrialRecord,
    adapter_hash,
    difference,
    make_scorer,
    ranked,
    spent,
    with_intervals,
)
from tune.settings import Settings, SettingsError, SpaceError, searched_settings, stored_settings
from tune.signals import StopSignals
from tune.tracking import Tracking, target_of

CONFIRMING = 10**6  # the dispatcher's numbers for training again begin here
SCORING = 10**9  # and this is its number for the scoring job


@dataclass(frozen=True)
class Layout:
    """How the study shares out the machines."""

    lanes: int
    workers_per_trial: int
    use_gpu: bool
    num_threads: int
    """torch threads of each CPU worker, no more than OMP_NUM_THREADS says; 0 for GPUs: torch's default."""
    lanes_per_gpu: int = 1

    @property
    def devices_per_trial(self) -> float:
        """GPUs or CPU workers that a trial holds."""
        return self.workers_per_trial / (self.lanes_per_gpu if self.use_gpu else 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray sets aside for a worker."""
        return {"CPU": 1} | ({"GPU": 1 / self.lanes_per_gpu} if self.use_gpu else {})


def plan_layout(settings: Settings, resources: dict[str, float]) -> Layout:
    """Lanes and workers from what the cluster has. Raises SettingsError when it can never hold one lane.

    As few workers per trial as asked: independent trials scale better than one trial over several workers.
    """
    study = settings.study
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    use_gpu = study.device == "gpu" or (study.device == "auto" and gpus > 0)
    slots, what = cores, "CPU cores"
    if use_gpu:
        slots, what = gpus * study.lanes_per_gpu, "GPUs" if study.lanes_per_gpu == 1 else "shares of GPUs"
    most = slots // study.workers_per_trial
    # An autoscaler brings GPUs on request: there, what is missing now says nothing, but somebody must say how many.
    awaited = study.device == "gpu" and study.lanes > 0 and joins_cluster()
    if most < max(1, study.lanes) and not awaited:
        raise SettingsError(
            [
                f"`--lanes` x `--workers-per-trial` must fit the {slots} {what} of the cluster, but got "
                f"{max(1, study.lanes)} x {study.workers_per_trial}: lower one (on an autoscaling cluster say "
                f"--device gpu and --lanes)"
            ]
        )
    lanes = min(study.lanes or most, study.trials)
    threads = 0 if use_gpu else max(1, cores // (lanes * study.workers_per_trial))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal():
        threads = min(threads, max(1, int(asked)))
    return Layout(lanes, study.workers_per_trial, use_gpu, threads, study.lanes_per_gpu)


def start_ray(settings: Settings) -> dict[str, float]:
    """Join the cluster of RAY_ADDRESS or start Ray on this machine; its resources. Nobody may have imported Ray before:
    it reads some of what is set here when it is imported.

    Raises SettingsError when Ray does not start, or no cluster answers.
    """
    if os.environ.get("RAY_ADDRESS", "").strip() in ("", "local"):
        os.environ.pop("RAY_ADDRESS", None)
    quiet = not settings.study.verbose
    # Workers import the project also where it is not installed; Ray hands this to all it starts from here.
    root = str(Path(__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *(path for path in paths if path and path != root)])
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths keep their meaning in workers
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # Tune's own CSV, JSON and TensorBoard files
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial's last result has an error only
    if not joins_cluster():
        # A Ray of this machine alone stays on the loopback, as everywhere but on Linux: it would look for a way to the
        # outside, and where there is none it prints a warning that no log level silences.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process per lane; nobody drains this node
    if joins_cluster():
        check_address(os.environ["RAY_ADDRESS"].strip())
    import logging

    import psutil
    import ray
    from ray.tune.execution import class_cache

    # Tune would write the keys into a runtime environment, which Ray logs. Workers of this machine inherit them, those
    # of others have their own.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
        [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    )
    options: dict[str, Any] = {}
    try:
        if not joins_cluster():
            options = {
                "include_dashboard": False,
                "num_cpus": allowed_cores(),
                "_temp_dir": str(private_folder() / "ray"),  # Ray makes it writable by all
                # Ray's default is a third of the memory, which it refuses where /dev/shm is smaller. What a study keeps
                # there is small.
                "object_store_memory": min(2**30, psutil.virtual_memory().total // 10),
            }
        ray.init(
            log_to_driver=not quiet,
            logging_level=logging.ERROR if quiet else logging.INFO,
            configure_logging=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        fix = (
            "look at RAY_ADDRESS and the cluster" if joins_cluster() else "look at RAY_TMPDIR, /dev/shm and free memory"
        )
        raise SettingsError([f"Ray must start, but {type(error).__name__}: {str(error).strip()}: {fix}"]) from error
    # Ended by a scheduler or a spot notice is ended like by Ctrl-C: what is finished is kept, every run is closed. Ray
    # has just put a handler of its own in place, which would end the process at once.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if quiet:
        # What Ray has to say in this process goes where its other processes write.
        handler = logging.FileHandler(f"{session_logs()}/driver.log", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("ray").handlers = [handler]
        logging.getLogger("ray").setLevel(logging.INFO)
        logging.getLogger("optuna").setLevel(logging.ERROR)
        # Raylets' messages come through a thread of their own, which prints them whatever `log_to_driver` says.
        import ray._private.worker

        def tell(data: Any, ignore_prefix: bool) -> None:
            logging.getLogger("ray").warning("\n".join(data["lines"]))

        ray._private.worker.print_to_stdstream = tell
    return ray.cluster_resources()


def joins_cluster() -> bool:
    """Whether a study runs on a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_address(address: str) -> None:
    """Raise SettingsError unless a cluster answers at RAY_ADDRESS."""
    if address == "auto":
        import ray._private.services

        try:
            address = ray._private.services.canonicalize_bootstrap_address(address) or ""
        except ConnectionError as error:
            problem = "`RAY_ADDRESS` auto must find a cluster on this machine, but there is none"
            raise SettingsError([f"{problem}: unset it, or start one with ray start"]) from error
    if problem := cluster_problem(address):
        raise SettingsError([problem])


def discard(study: Study) -> None:
    """Remove the folder of a new study that could not begin, if it holds nothing but what `prepare` wrote."""
    if (study.directory / "plan.json").exists() or study.journal.events:
        return
    for name in ("journal.jsonl", "lock"):
        (study.directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something of the user's
        study.directory.rmdir()


def session_logs() -> str:
    """Where Ray's processes and the workers write what they print."""
    import ray._private.worker

    node = ray._private.worker._global_node
    return f"{node.get_session_dir_path()}/logs" if node else "the cluster's session directory"


def run(study: Study, say: Callable[[str], None], started: float) -> Outcome:
    """Search, choose, test. Returns an outcome also when interrupted; what is finished is kept.

    started: `time.perf_counter()` at which the user's waiting began.
    """
    settings = study.settings
    outcome = Outcome(
        name=study.name,
        directory=study.directory,
        goals=study.goals,
        require=settings.study.require,
        num_trials=settings.study.trials,
        records=[],
        tracking_uri=study.plan["tracking_uri"],
        storage=study.storage,
    )
    events = study.journal.events
    outcome.read(events, last_time(events))
    for note in study.journal.notes:
        say(note)
        outcome.note(note)
    layout = None
    with StopSignals() as stop:
        try:
            if not nothing_left(study, outcome):
                layout = begin(study, say)
                stop.install()  # Ray has set a handler of its own
            try:
                if layout:
                    search_and_test(study, layout, outcome, say, started, stop)
                else:
                    say("Every trial has ended and the test is scored: writing study.json and the report")
                    conclude_again(study, outcome, stop, started)
            except OSError as error:
                outcome.error = f"the study's storage failed: {error}"
        except KeyboardInterrupt:
            if not (study.directory / "plan.json").is_file():
                raise  # nothing has begun
            outcome.interrupted = True
    if study.lease.lost:
        outcome.note(f"another machine runs this study now: it has taken over {study.storage.uri}")
    study.lease.release()
    if outcome.winner is None and outcome.exit_code > 1:  # ended before the winner was named
        with contextlib.suppress(OSError):  # the outcome's error says what is wrong
            outcome.pick_winner()
    return outcome


def track(study: Study) -> Tracking:
    """The delivery of this study's events to its stores."""
    target = target_of(study.directory, study.plan)
    return Tracking(dataclasses.replace(target, may_write=study.lease.ours), study.journal.events)


def last_time(events: list[Event]) -> float:
    """When a study that does not run ended, in seconds since the epoch."""
    return events[-1]["time"] if events else 0.0


def write_plan(study: Study) -> None:
    """Fix on disk what the study rests on: splits.json, then plan.json, which makes the folder a study."""
    path = study.directory / "splits.json"
    if "splits_hash" not in study.plan:  # new
        save_splits(study.splits, path)
        study.plan["splits_hash"] = file_hash(path)
    save_plan(study.directory, study.plan)


def begin(study: Study, say: Callable[[str], None]) -> Layout:
    """Start Ray and share out the machines. Raises SettingsError when the cluster can never hold one lane."""
    settings = study.settings
    try:
        resources = start_ray(settings)
        layout = plan_layout(settings, resources)
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
    shown = ", ".join(f"{part} {len(getattr(study.splits, part))}" for part in ("train", "validation", "test"))
    say(
        f"Study {study.name}: {settings.study.trials} trials on {layout.lanes} lane(s) of "
        f"{layout.workers_per_trial} {'GPU' if layout.use_gpu else 'CPU'} worker(s); images: {shown}"
    )
    for sentence in study.data_report.sentences():
        say(f"Data: {sentence}")
    say(f"Starting the lanes (logs in {session_logs()})")
    there, wanted = int(resources.get("GPU", 0)), layout.lanes * layout.devices_per_trial
    if layout.use_gpu and there < wanted:
        awaited = f"the {math.ceil(wanted)} GPUs: the lanes wait until its autoscaler has brought the rest"
        say(f"The cluster has {there} of {awaited}")
    return layout


def search_and_test(
    study: Study, layout: Layout, outcome: Outcome, say: Callable[[str], None], started: float, stop: StopSignals
) -> None:
    """Start the lanes, run the trials through them, score the test split on one of them, and conclude."""
    import ray
    import ray.tune

    from tune.lane import Lanes, start_dispatcher
    from tune.progress import Footer, StudyLog
    from tune.search import search
    from tune.terminal import live

    settings, journal = study.settings, study.journal
    dispatcher = start_dispatcher(layout, settings.study.hang_timeout)
    lanes = Lanes(study, layout, dispatcher, say)
    tags = {"metric": study.metric, "model": settings.model.model, "data": settings.data.data, **versions()}
    waited_s = time.perf_counter() - started
    journal.write("session", params=study_params(study, layout), tags=tags, startup_s=waited_s)
    tracking = track(study)
    log = StudyLog(study, dispatcher, tracking, say)

    def collect() -> None:
        log.close()
        outcome.read(journal.events)
        outcome.ended_by = log.ended_by
        if log.space_error:
            outcome.error = f"the search space gave no further trial: {log.space_error}"
        outcome.error = outcome.error or log.study_error
        ended = [record for record in outcome.records if record.state != "INTERRUPTED"]
        outcome.interrupted |= stop.count > 0 or (not log.ended_by and len(ended) < settings.study.trials)

    try:
        with live(Footer(log, layout)):
            try:
                with stop.searching():
                    search(study, layout, dispatcher, log)
            finally:
                collect()
            if settings.study.confirm and not outcome.interrupted:
                confirm(study, dispatcher, outcome, say)
            choose_and_score(study, dispatcher, outcome, say)
    except KeyboardInterrupt:
        outcome.interrupted = True
    except (Exception, SystemExit) as error:  # SystemExit: of a space
        failed_in_ray = isinstance(error, ray.exceptions.RayActorError | ray.tune.TuneError)
        if failed_in_ray and not lives(dispatcher):
            outcome.interrupted = lanes.over = True
            outcome.note("the study lost its dispatcher")
        elif reason := explain(error):
            outcome.interrupted, outcome.error = stop.count > 0, reason
        else:
            lanes.over = True
            end_of_study(study, outcome, tracking, {"error": f"{type(error).__name__}: {error}"}, [])
            raise
    try:
        if (outcome.interrupted or outcome.error) and not lanes.over:
            lanes.leave()
        conclude(study, outcome, tracking, dataclasses.asdict(layout), stop)
        # Not in a `finally`: Ray ends the process when a lane's thread touches it after a shutdown, and the error that
        # led here would never be seen. The interpreter's exit shuts Ray down in any case.
        if not outcome.interrupted and not outcome.error:
            lanes.close()
            ray.shutdown()
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.note("a signal ended the study at once: what was running goes on from its last state")


def explain(error: BaseException) -> str:
    """What ended a search, where that is an error of the user's space or of the study's storage; else an empty text.
    Ray Tune wraps what its callbacks raise, so the errors that led to this one count, too."""
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


def conclude(study: Study, outcome: Outcome, tracking: Tracking, layout: dict[str, Any], stop: StopSignals) -> None:
    """Write what was found: the winner's adapter, study.json, the report, the journal's last event. What cannot be
    written costs itself only, with a note. The first signal leaves out the report, the second all that is left."""
    if not outcome.records:  # a signal came while they were collected
        outcome.read(study.journal.events)
    for report in (True, False):
        try:
            write_results(study, outcome, tracking, layout, report)
            return
        except KeyboardInterrupt:
            outcome.interrupted = outcome.incomplete = True
            outcome.note("a signal ended the study before all of its results were written")
            if stop.count > 1:
                return


def write_results(study: Study, outcome: Outcome, tracking: Tracking, layout: dict[str, Any], report: bool) -> None:
    """The steps of `conclude`, once."""
    artifacts: list[Path] = []
    try:
        if outcome.winner is None and not outcome.rejected:
            outcome.choose_winner()
        outcome.measure(study.journal.events)
        content = outcome.save(study.plan, layout)
        artifacts.append(study.directory / "study.json")
    except OSError as error:
        outcome.error = outcome.error or f"the study's results could not be written: {error}"
        tracking.close(timeout_s=10)
        return  # the journal is in the same folder: writing to it would wait for minutes
    if outcome.records and report:
        from tune.report import write_report

        try:
            artifacts += write_report(content, study.directory)
        except Exception as error:  # whatever a drawing library raises costs the report alone
            outcome.incomplete = True
            outcome.note(f"the report could not be written ({type(error).__name__}: {error})".splitlines()[0])
    final = {"winner": outcome.winner.number if outcome.winner else "none", "adapter": outcome.adapter or "none"}
    end_of_study(study, outcome, tracking, final, artifacts, timeout_s=60 if report else 5)


def lives(actor: Any) -> bool:
    """Whether the dispatcher still answers. What Tune raises when it does not is an error of its own."""
    import ray

    try:
        ray.get(actor.snapshot.remote(), timeout=30)
    except ray.exceptions.RayError:
        return False
    return True


def end_of_study(
    study: Study,
    outcome: Outcome,
    tracking: Tracking,
    tags: dict[str, Any],
    artifacts: list[Path],
    timeout_s: float = 60,
) -> None:
    """Write the last event of a session, and wait until the stores have received all events."""
    scores = {f"best_{name}": value for name, value in outcome.winner.metrics.items()} if outcome.winner else {}
    tests = {f"test_{name}": f"{score['value']:.4f}" for name, score in outcome.tests.get("winner", {}).items()}
    hashes = {name: study.plan[name] for name in ("data_hash", "base_hash")}
    study.journal.write(
        "study_ended",
        state=outcome.state,
        tags=tags | {"ended_by": outcome.ended_by},
        metrics=scores | {"wall_s": outcome.seconds.get("wall", 0.0)},
        num_trials=len(outcome.records),
        artifacts=[path.relative_to(study.directory) for path in artifacts],  # the folder may be moved
        adapter=outcome.relative(outcome.adapter) if outcome.adapter and outcome.exit_code == 0 else None,
        kept=outcome.kept,
        rejected=outcome.rejected,
        incomplete=outcome.incomplete or bool(outcome.error),
        register=study.settings.study.register,
        model_tags=hashes | tests | {"base_model": study.settings.model.model, "study": study.name},
    )
    tracking.notify()
    for sentence in tracking.notes(timeout_s):
        outcome.note(sentence)


def nothing_left(study: Study, outcome: Outcome) -> bool:
    """Whether a study that goes on has nothing left to train or to score. Names its winner if so."""
    settings, events = study.settings.study, study.journal.events
    states = [record.state for record in outcome.records]
    ended_by = spent(outcome.records, events, settings, last_time(events))
    if not states or "RUNNING" in states:
        return False
    if not ended_by and sum(state in DONE_STATES for state in states) < settings.trials:
        return False
    if settings.confirm and confirmations_left(study, outcome):
        return False
    outcome.pick_winner()
    outcome.ended_by = outcome.ended_by or ended_by
    return outcome.winner is None or is_tested(study, outcome, chosen_for_test(outcome))


def conclude_again(study: Study, outcome: Outcome, stop: StopSignals, started: float) -> None:
    """Write the results of a study with nothing left to train or to score: no lane is started, nor Ray."""
    write_plan(study)
    before = [event for event in study.journal.events if event["event"] == "session"][-1]
    waited_s = time.perf_counter() - started
    study.journal.write("session", params=before["params"], tags=before["tags"], startup_s=waited_s)
    tracking = track(study)
    outcome.incomplete = False
    outcome.keep_adapter()
    names = [field.name for field in dataclasses.fields(Layout)]
    conclude(study, outcome, tracking, {name: before["params"].get(name) for name in names}, stop)


def confirmations_left(study: Study, outcome: Outcome) -> list[tuple[TrialRecord, int]]:
    """The trainings over fresh seeds or folds that are not done: trial, and number of the seed or fold from 1."""
    settings = study.settings.study
    # Not `outcome.best()`: what an earlier session has confirmed would keep new trials out.
    best = ranked(outcome.records, outcome.goals, outcome.require)
    chosen = best[: settings.confirm] + [record for record in best[settings.confirm :] if record.number == 0]
    return [
        (record, run)
        for run in range(1, (settings.folds or settings.confirm_seeds) + 1)
        for record in chosen
        if run not in outcome.confirmed_runs.get(record.number, [])
    ]


def confirm(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Train the best trials and the guide's defaults again over fresh seeds, or over folds, and note their validation
    scores. What an earlier session has done is not done again.

    The best of twenty noisy scores is partly luck; seeds that no choice has looked at tell how much.
    """
    import ray

    settings = study.settings.study
    data = study.settings.data
    folds = fold_splits(study.splits, settings.folds, data.split_seed, data.copies_distance) if settings.folds else []
    left = confirmations_left(study, outcome)
    numbers = ", ".join(str(number) for number in dict.fromkeys(record.number for record, _ in left))
    if left:
        what = f"{settings.folds} folds" if folds else f"{settings.confirm_seeds} seeds"
        say(f"Confirming trials {numbers} over {what}")
    for index, (record, run) in enumerate(left):
        output = study.directory / "trials" / f"{record.number:04d}" / f"confirm-{run}"
        again = record.settings | {"seed": record.settings["seed"] + run}
        label = f"trial {record.number} again ({run})"
        assignment: dict[str, Any] = {"kind": "train", "settings": again, "output": str(output), "label": label}
        if folds:
            assignment["splits"] = folds[run - 1]
        ray.get(dispatcher.submit.remote(CONFIRMING + index, assignment))
    waiting = [dispatcher.last_report.remote(CONFIRMING + index) for index in range(len(left))]
    for done, (answer, (record, run)) in enumerate(zip(waiting, left, strict=True), 1):
        report = ray.get(answer)
        if "error" in report:
            outcome.note(f"a confirmation of trial {record.number} failed: {report['error'].splitlines()[0]}")
            continue
        value = report["metrics"].get(outcome.metric, record.value(outcome.metric))
        outcome.hear(study.journal.write("confirmed", number=record.number, run=run, value=value))
        say(f"[{done}/{len(left)}] trial {record.number} again: {outcome.metric} {value:.3f}")


def choose_and_score(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Name the winner, score the test with its adapter, and keep that. An adapter that cannot be loaded, or whose
    scores are not finite, makes the next best trial the winner."""
    outcome.pick_winner()
    attempt = 0
    while outcome.winner and not outcome.interrupted:
        problem = score_test(study, dispatcher, outcome, say, SCORING + attempt)
        if not problem:
            break
        outcome.reject(outcome.winner, problem)
        outcome.pick_winner()
        attempt += 1
    outcome.keep_adapter()


def chosen_for_test(outcome: Outcome) -> dict[str, TrialRecord]:
    """The trials whose adapters the test is scored with: the winner, and the guide's defaults where they completed."""
    assert outcome.winner
    chosen = {"winner": outcome.winner}
    guide = next((record for record in outcome.records if record.number == 0), None)
    if guide and guide is not outcome.winner and guide.state == "COMPLETE":
        chosen["guide"] = guide
    return chosen


def is_tested(study: Study, outcome: Outcome, chosen: dict[str, TrialRecord]) -> bool:
    """Whether the last test scores are those of these trials' adapters, and their files are as they were then."""
    last = next((event for event in reversed(study.journal.events) if event["event"] == "tested"), None)
    if last is None:
        return False
    adapters = {who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()}
    if "sha256" not in last:  # of an older version
        return last["adapters"] == adapters
    paths = adapter_paths(outcome, chosen)
    return last["adapters"]["winner"] == adapters["winner"] and last["sha256"] == hashes_of(paths)


def adapter_paths(outcome: Outcome, chosen: dict[str, TrialRecord]) -> dict[str, Path | None]:
    """Where the adapters to score the test with lie; None: nowhere."""
    return {who: outcome.adapter if who == "winner" else outcome.find_adapter(r) for who, r in chosen.items()}


def hashes_of(paths: dict[str, Path | None]) -> dict[str, str]:
    """The adapters' sha256, empty where there is none."""
    return {who: adapter_hash(path) if path else "" for who, path in paths.items()}


def score_test(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None], number: int) -> str:
    """Score the test images with the winner and with the guide's defaults (trial 0), if that trial completed, and their
    paired difference. What was scored already is not scored again.

    Args:
        number: the job's number, a new one for each winner.

    Returns: what is wrong with the winner's adapter; empty: nothing.
    """
    import ray

    chosen = chosen_for_test(outcome)
    if is_tested(study, outcome, chosen):
        return ""
    say("Scoring the test images with the winner" + (" and the guide's defaults" if "guide" in chosen else ""))
    paths = adapter_paths(outcome, chosen)
    hashes = hashes_of(paths)
    there = {who: path for who, path in paths.items() if path}
    job = {"kind": "score", "adapters": list(map(str, there.values())), "label": "scoring the test images"}
    ray.get(dispatcher.submit.remote(number, job))
    report = ray.get(dispatcher.next_report.remote(number, 0))
    if "error" in report:
        outcome.error = f"the test could not be scored: {report['error'].splitlines()[0]}"
        return ""
    answers = dict(zip(there, report["predictions"], strict=True))
    problems = {who: adapter_problem(answer) for who, answer in answers.items()}
    if problems["winner"]:
        return f"its adapter {problems['winner']}"
    if "guide" in chosen and (problem := problems.get("guide", "is missing")):
        outcome.note(f"there is no test score of the guide's defaults: the adapter of trial 0 {problem}")
        del chosen["guide"]
    predicted = {who: answers[who] for who in chosen}
    scorers = {
        who: make_scorer(predicted[who], study.splits, record.settings["class_balanced_loss"], study.positive)
        for who, record in chosen.items()
    }
    everything, clean = np.arange(len(study.splits.test)), np.array(study.data_report.test_clean, dtype=int)
    tests = {}
    for who, scorer in scorers.items():
        tests[who] = with_intervals(scorer, everything)
        if 0 < len(clean) < len(everything):
            tests[f"{who}, clean part"] = with_intervals(scorer, clean)
    if "guide" in scorers:
        tests["difference"] = with_intervals(difference(scorers["winner"], scorers["guide"]), everything)
    predictions = {
        who: {
            "answers": [sample.label for sample in study.splits.test],
            "probabilities": probabilities(found["scores"]).round(6).tolist(),
        }
        for who, found in predicted.items()
        if study.splits.candidates
    }
    event = study.journal.write(
        "tested",
        tests=tests,
        predictions=predictions,
        adapters={who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()},
        sha256=hashes,
        num_trials=len(outcome.records),
    )
    outcome.hear(event)
    return ""


def adapter_problem(answer: dict[str, Any]) -> str:
    """What a scoring job's answer says against an adapter; empty: nothing."""
    if "error" in answer:
        return f"cannot be loaded ({answer['error']})"
    finite = all(np.isfinite(values).all() for values in answer.values())
    return "" if finite else "gives scores that are not finite"


def show(directory: Path) -> Outcome:
    """A study's results so far, from its journal; also while it runs. Writes nothing.

    Raises SettingsError when plan.json is damaged, or the study cannot be read.
    """
    plan, values = stored_settings(directory)
    path = directory / "journal.jsonl"
    try:
        running = is_running(directory)
        journal = read_journal(path)
    except OSError as error:
        raise SettingsError([f"the study's files must be readable, but {error}: change their permissions"]) from error
    outcome = Outcome(
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        require=values.get("require", ()),
        num_trials=values["trials"],
        records=[],
        running=running,
        tracking_uri=plan["tracking_uri"],
    )
    events = journal.events
    outcome.read(events, None if running else last_time(events))
    for note in journal.notes():
        outcome.note(note)
    ended = bool(events) and events[-1]["event"] == "study_ended"
    if outcome.running:
        outcome.note("the study is running")
    elif not ended:
        outcome.note("the study was interrupted" if events else f"{path} is missing or empty: no trial is known")
        for record in outcome.records:
            record.state = "INTERRUPTED" if record.state == "RUNNING" else record.state
    outcome.incomplete |= not outcome.running and not ended
    try:
        # Not `pick_winner`: what is missing here may lie in a bucket.
        outcome.winner = next((record for record in outcome.best() if not outcome.is_rejected(record)), None)
        if outcome.winner:
            outcome.forget_old_tests()
            outcome.adapter = outcome.find_adapter(outcome.winner)
    except OSError as error:
        outcome.note(f"the winner's adapter cannot be read: {error}")
    for number, (reason, _) in outcome.rejected.items():
        outcome.note(f"trial {number} cannot be the winner: {reason}")
    return outcome


def is_running(directory: Path) -> bool:
    """Whether a process holds the study's lock. Needs no right to write there. Raises OSError."""
    try:
        handle = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


# ------------------------------------------------------------------------------------------------ what is written down


def study_params(study: Study, layout: Layout) -> dict[str, Any]:
    """The parent run's parameters: the search, the base, and what all trials share."""
    counts = {f"num_{part}": len(getattr(study.splits, part)) for part in ("train", "validation", "test")}
    settings = study.settings
    parts = (settings.trial, settings.model, settings.study, layout)
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items() if value != ""} | counts
