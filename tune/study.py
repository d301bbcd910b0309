"""A study from its data to its outcome: Ray, lanes, search, confirmation, test, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.copies import file_hash
from train_fn.data import fold_splits, save_splits
from train_fn.scores import probabilities
from train_fn.worker import versions
from tune.machine import allowed_cores, cluster_problem, private_folder
from tune.plan import save_plan
from tune.prepare import Study
from tune.results import Outcome, TrialRecord, difference, fold, make_scorer, ranked, with_intervals
from tune.settings import Settings, SettingsError
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
    write_plan(study)
    outcome = Outcome(
        name=study.name,
        directory=study.directory,
        goals=study.goals,
        require=settings.study.require,
        records=[],
        lanes=layout.lanes,
        tracking_uri=study.plan["tracking_uri"],
        storage=study.storage,
    )
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
    search_and_test(study, layout, outcome, say, started)
    # Not in a `finally`: Ray ends the process when a lane's thread touches it after a shutdown, and the error that
    # led here would never be seen. The interpreter's exit shuts Ray down in any case.
    if not outcome.interrupted:
        ray.shutdown()
    return outcome


def write_plan(study: Study) -> None:
    """Fix on disk what the study rests on: splits.json, then plan.json, which makes the folder a study."""
    path = study.directory / "splits.json"
    if "splits_hash" not in study.plan:  # new
        save_splits(study.splits, path)
        study.plan["splits_hash"] = file_hash(path)
    save_plan(study.directory, study.plan)


def search_and_test(study: Study, layout: Layout, outcome: Outcome, say: Callable[[str], None], started: float) -> None:
    """Start the lanes, run the trials through them, and score the test split on one of them."""
    import optuna
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
    journal.write("session", params=study_params(study, layout), tags=tags)
    tracking = Tracking(target_of(study.directory, study.plan), journal.events)
    log = StudyLog(study, dispatcher, tracking, say)

    def collect() -> None:
        outcome.records, outcome.ended_by, outcome.space_error = log.close(), log.ended_by, log.space_error
        # A Ctrl-C in Tune's own hands ends the search without an exception.
        ended = [record for record in outcome.records if record.state != "INTERRUPTED"]
        outcome.interrupted |= not log.ended_by and len(ended) < settings.study.trials
        for event in journal.events:
            outcome.hear(event)

    try:
        with live(Footer(log, layout)):
            try:
                search(study, layout, dispatcher, log)
            finally:
                collect()
            if settings.study.confirm and not outcome.interrupted:
                confirm(study, dispatcher, outcome, say)
            outcome.choose_winner()
            if outcome.winner and not outcome.interrupted:
                score_test(study, dispatcher, outcome, say)
    except KeyboardInterrupt:
        outcome.interrupted = True
    except (OSError, optuna.exceptions.StorageInternalError) as error:
        outcome.interrupted = True
        outcome.notes.append(f"the study's storage failed: {error}")
    except (ray.exceptions.RayActorError, ray.tune.TuneError):
        if lives(dispatcher):
            lanes.over = True
            end_of_study(study, outcome, tracking, {"error": "an error inside Ray Tune"}, [])
            raise
        outcome.interrupted = lanes.over = True
        outcome.notes.append("the study lost its dispatcher")
    except BaseException as error:
        lanes.over = True
        end_of_study(study, outcome, tracking, {"error": f"{type(error).__name__}: {error}"}, [])
        raise
    if outcome.winner is None:
        outcome.choose_winner()
    if outcome.interrupted and not lanes.over:
        lanes.leave()
    outcome.seconds["wall"] = time.perf_counter() - started
    content = outcome.save(study.plan, dataclasses.asdict(layout))
    artifacts = [study.directory / "study.json"]
    if outcome.records:
        from tune.report import write_report

        artifacts += write_report(content, study.directory)
    final = {"winner": outcome.winner.number if outcome.winner else "none", "adapter": outcome.adapter or "none"}
    end_of_study(study, outcome, tracking, final, artifacts)
    if not outcome.interrupted:
        lanes.close()


def lives(actor: Any) -> bool:
    """Whether the dispatcher still answers. What Tune raises when it does not is an error of its own."""
    import ray

    try:
        ray.get(actor.snapshot.remote(), timeout=30)
    except ray.exceptions.RayError:
        return False
    return True


def end_of_study(
    study: Study, outcome: Outcome, tracking: Tracking, tags: dict[str, Any], artifacts: list[Path]
) -> None:
    """The last event of a session, and the wait until the stores have been told."""
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
        adapter=outcome.adapter.relative_to(study.directory) if outcome.adapter and not outcome.interrupted else None,
        register=study.settings.study.register,
        model_tags=hashes | tests | {"base_model": study.settings.model.model, "study": study.name},
    )
    tracking.notify()
    outcome.notes += tracking.notes()


def confirm(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Train the best trials and the guide's defaults again over fresh seeds, or over folds, and note their validation
    scores. What an earlier session has done is not done again.

    The best of twenty noisy scores is partly luck; seeds that no choice has looked at tell how much.
    """
    import ray

    settings = study.settings.study
    # Not `outcome.best()`: what an earlier session has confirmed would keep new trials out.
    best = ranked(outcome.records, outcome.goals, outcome.require)
    chosen = best[: settings.confirm] + [record for record in best[settings.confirm :] if record.number == 0]
    data = study.settings.data
    folds = fold_splits(study.splits, settings.folds, data.split_seed, data.copies_distance) if settings.folds else []
    count = settings.folds or settings.confirm_seeds
    what = "folds" if folds else "seeds"
    say(f"Confirming trials {', '.join(str(record.number) for record in chosen)} over {count} {what}")
    runs: dict[int, tuple[TrialRecord, int]] = {}
    for run in range(1, count + 1):
        for record in chosen:
            if run in outcome.confirmed_runs.get(record.number, []):
                continue
            output = study.directory / "trials" / f"{record.number:04d}" / f"confirm-{run}"
            again = record.settings | {"seed": record.settings["seed"] + run}
            label = f"trial {record.number} again ({run})"
            assignment: dict[str, Any] = {"kind": "train", "settings": again, "output": str(output), "label": label}
            if folds:
                assignment["splits"] = folds[run - 1]
            number = CONFIRMING + len(runs)
            runs[number] = (record, run)
            ray.get(dispatcher.submit.remote(number, assignment))
    waiting = [dispatcher.last_report.remote(number) for number in runs]
    for done, (answer, (record, run)) in enumerate(zip(waiting, runs.values(), strict=True), 1):
        report = ray.get(answer)
        if "error" in report:
            outcome.notes.append(f"a confirmation of trial {record.number} failed: {report['error'].splitlines()[0]}")
            continue
        value = report["metrics"].get(outcome.metric, record.value(outcome.metric))
        outcome.hear(study.journal.write("confirmed", number=record.number, run=run, value=value))
        say(f"[{done}/{len(runs)}] trial {record.number} again: {outcome.metric} {value:.3f}")


def score_test(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """The test scores of the winner and of the guide's defaults (trial 0), if that one completed, and their paired
    difference. What was scored already is not scored again."""
    import ray

    assert outcome.winner
    chosen = {"winner": outcome.winner}
    guide = next((record for record in outcome.records if record.number == 0), None)
    if guide and guide is not outcome.winner and guide.state == "COMPLETE":
        chosen["guide"] = guide
    adapters = {who: str(outcome.adapter_of(record).relative_to(study.directory)) for who, record in chosen.items()}
    tested = [event["adapters"] for event in study.journal.events if event["event"] == "tested"]
    if tested[-1:] == [adapters]:
        return
    say("Scoring the test images, once, with the winner and the guide's defaults")
    paths = [str(study.directory / path) for path in adapters.values()]
    job = {"kind": "score", "adapters": paths, "label": "scoring the test images"}
    ray.get(dispatcher.submit.remote(SCORING, job))
    report = ray.get(dispatcher.next_report.remote(SCORING, 0))
    if "error" in report:
        outcome.notes.append(f"the test could not be scored: {report['error'].splitlines()[0]}")
        return
    scorers = {
        who: make_scorer(predicted, study.splits, record.settings["class_balanced_loss"], study.positive)
        for (who, record), predicted in zip(chosen.items(), report["predictions"], strict=True)
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
        for who, found in zip(chosen, report["predictions"], strict=True)
        if study.splits.candidates
    }
    event = study.journal.write(
        "tested", tests=tests, predictions=predictions, adapters=adapters, num_trials=len(outcome.records)
    )
    outcome.hear(event)


def show(directory: Path) -> Outcome:
    """The outcome of a study so far, from its journal; also while it runs."""
    from tune.journal import StudyLock, read_events

    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    events = read_events(directory / "journal.jsonl")
    records = fold(events)
    ended = [event for event in events if event["event"] == "study_ended"]
    outcome = Outcome(
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        require=tuple(plan["settings"]["study"]["require"]),
        records=[records[number] for number in sorted(records)],
        tracking_uri=plan["tracking_uri"],
        ended_by=ended[-1]["tags"]["ended_by"] if ended else "",
    )
    for event in events:
        outcome.hear(event)
    best = outcome.best()
    if best and (directory / "best_adapter").exists():
        outcome.winner, outcome.adapter = best[0], directory / "best_adapter"
        outcome.forget_old_tests()
    if not StudyLock(directory).acquire():
        outcome.notes.append("the study is running")
    elif not ended or events[-1]["event"] != "study_ended":
        outcome.notes.append("the study was interrupted")
    return outcome


# ------------------------------------------------------------------------------------------------ what is written down


def study_params(study: Study, layout: Layout) -> dict[str, Any]:
    """The parent run's parameters: the search, the base, and what all trials share."""
    counts = {f"num_{part}": len(getattr(study.splits, part)) for part in ("train", "validation", "test")}
    settings = study.settings
    parts = (settings.trial, settings.model, settings.study, layout)
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items() if value != ""} | counts
