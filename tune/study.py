"""A study, from checked settings to an outcome: data, Ray, lanes, search, test.

`prepare` finds every problem that needs the data and writes nothing but phantoms; `run` does the rest.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data import DataReport, Splits, make_splits, read_manifest, save_splits, unreadable_images
from train_fn.metrics import MODES
from tune.results import Outcome, TrialRecord, difference, make_scorer, ranked, with_intervals
from tune.settings import Settings, SettingsError, flag, load_space, searched_settings
from tune.tracking import Tracking, tracking_uri

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "optuna", "pillow", "mlflow")
CONFIRMING = 10**6  # and from here its numbers for training again
SCORING = 10**9  # the dispatcher's number for the scoring job, beyond any trial's


@dataclass(frozen=True)
class Study:
    """A study that can start: settings without problems, and its data."""

    settings: Settings
    name: str
    directory: Path
    metric: str
    positive: str
    splits: Splits
    data_report: DataReport


# ------------------------------------------------------------------------------------------------ before Ray


def prepare(settings: Settings, say: Callable[[str], None]) -> Study:
    """Read, check and split the data. Raises SettingsError with every problem found."""
    data = settings.data
    problems: list[str] = []
    manifest = Path(data.data)
    if data.data == "phantoms":
        from train_fn.phantoms import generate

        say(f"Generating {data.num_phantoms} phantoms (no --data given)")
        folder = Path(settings.study.results) / f"phantoms-{data.num_phantoms}-{data.split_seed}"
        manifest = generate(folder, data.num_phantoms, data.split_seed)
    root = Path(data.image_root) if data.image_root else manifest.parent
    parts: dict[str, list[dict[str, Any]] | None] = {}
    for name, path in (("data", manifest), ("val_data", data.val_data), ("test_data", data.test_data)):
        parts[name] = None
        if path:
            parts[name], found = read_manifest(Path(path), root)
            problems += [f"`{flag(name)}`: {text}" for text in found]
    if problems:
        raise SettingsError(problems)
    images = [entry["image"] for entries in parts.values() for entry in entries or []]
    say(f"Checking {len(images)} images")
    problems = unreadable_images(images)
    if problems:
        raise SettingsError(problems)
    say("Looking for near-copies")
    splits, report, found = make_splits(
        parts["data"] or [],
        parts["val_data"],
        parts["test_data"],
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
        contradictions=data.contradictions,
    )
    problems += found
    problems += check_model_type(settings.model.model)
    metric = settings.study.metric or ("auroc" if splits.candidates else "loss")
    positive = data.positive_label or ("Malignant" if "Malignant" in splits.candidates else "")
    if not splits.candidates and metric != "loss":
        problems.append(
            f"`--metric` must be loss for data without a small closed set of answers, but got {metric!r}: leave it out"
        )
    elif positive and positive not in splits.candidates:
        known = ", ".join(splits.candidates) or "none, for lack of a closed set"
        problems.append(f"`--positive-label` must be an answer of the data ({known}), but got {positive!r}")
    elif metric in ("sensitivity", "specificity") and not positive:
        problems.append(f"`--metric` {metric} needs a class: give --positive-label")
    if settings.model.model != "nano":  # workers may run in another folder
        absolute = dataclasses.replace(settings.model, model=str(Path(settings.model.model).resolve()))
        settings = dataclasses.replace(settings, model=absolute)
    name = settings.study.name or time.strftime("study-%Y%m%d-%H%M%S")
    directory = Path(settings.study.results).resolve() / name
    if (directory / "splits.json").exists():
        problems.append(f"`--name` must be new, but {directory} holds a study: choose another name")
    if not problems:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"`--results` must be a folder that can be written, but {directory}: {error.strerror}")
    if problems:
        raise SettingsError(problems)
    return Study(settings, name, directory, metric, positive, splits, report)


def check_model_type(model: str) -> list[str]:
    """Whether transformers has an image-text-to-text class for the base."""
    if model == "nano":
        return []
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind in KNOWN or kind in ("hulumed_qwen2", "hulumed_qwen3"):
        return []
    return [
        f"`--model` {model!r} must be an image-text-to-text model that transformers knows, but its model_type is "
        f"{kind!r}: the known ones are hulumed_qwen2, hulumed_qwen3, {', '.join(sorted(KNOWN))}"
    ]


# ------------------------------------------------------------------------------------------------ with Ray


@dataclass(frozen=True)
class Layout:
    """How the study shares out the machines."""

    lanes: int
    workers_per_trial: int
    use_gpu: bool
    num_threads: int


def plan_layout(settings: Settings, resources: dict[str, float]) -> Layout:
    """Lanes and workers from what the cluster has. Raises SettingsError when it can never hold one lane.

    As few workers per trial as asked: independent trials scale better than one trial over several workers.
    """
    study = settings.study
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    use_gpu = study.device == "gpu" or (study.device == "auto" and gpus > 0)
    slots, what = (gpus, "GPUs") if use_gpu else (cores, "CPU cores")
    most = slots // study.workers_per_trial
    # An autoscaler brings GPUs on request: there, what is missing now says nothing, but somebody must say how many.
    awaited = study.device == "gpu" and study.lanes > 0 and bool(os.environ.get("RAY_ADDRESS"))
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
    return Layout(lanes, study.workers_per_trial, use_gpu, threads)


def start_ray(settings: Settings) -> dict[str, float]:
    """Join the cluster of RAY_ADDRESS or start Ray on this machine; its resources."""
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
    import logging

    import ray

    joined = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "num_cpus": os.cpu_count()}
    ray.init(
        log_to_driver=not quiet,
        logging_level=logging.ERROR if quiet else logging.INFO,
        configure_logging=True,
        **joined,  # type: ignore[arg-type]
    )
    if quiet:
        for name in ("ray.tune", "ray.train", "optuna"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return ray.cluster_resources()


def session_logs() -> str:
    """Where Ray's processes and the workers write what they print."""
    import ray._private.worker

    node = ray._private.worker._global_node
    return f"{node.get_session_dir_path()}/logs" if node else "the cluster's session directory"


def run(study: Study, say: Callable[[str], None], started: float) -> Outcome:
    """Search, choose, test. Returns an outcome also when interrupted; what is finished is kept.

    started: `time.perf_counter()` at which the user's waiting began.
    """
    import ray

    settings = study.settings
    resources = start_ray(settings)
    try:
        layout = plan_layout(settings, resources)
    except SettingsError:
        ray.shutdown()
        raise
    save_splits(study.splits, study.directory / "splits.json")
    outcome = Outcome(
        name=study.name,
        directory=study.directory,
        metric=study.metric,
        records=[],
        lanes=layout.lanes,
        tracking_uri=tracking_uri(),
    )
    shown = ", ".join(f"{part} {len(getattr(study.splits, part))}" for part in ("train", "validation", "test"))
    say(
        f"Study {study.name}: {settings.study.trials} trials on {layout.lanes} lane(s) of "
        f"{layout.workers_per_trial} {'GPU' if layout.use_gpu else 'CPU'} worker(s); images: {shown}"
    )
    for sentence in study.data_report.sentences():
        say(f"Data: {sentence}")
    say(f"Starting the lanes (logs in {session_logs()})")
    search_and_test(study, layout, outcome, say, started)
    # Not in a `finally`: Ray ends the process when a lane's thread touches it after a shutdown, and the error that
    # led here would never be seen. The interpreter's exit shuts Ray down in any case.
    if not outcome.interrupted:
        ray.shutdown()
    return outcome


def search_and_test(study: Study, layout: Layout, outcome: Outcome, say: Callable[[str], None], started: float) -> None:
    """Start the lanes, run the trials through them, and score the test split on one of them."""
    from train_fn.worker import LaneJob
    from tune.lane import Lanes, start_dispatcher
    from tune.progress import StudyLog
    from tune.search import search

    settings = study.settings
    dispatcher = start_dispatcher(layout.lanes)
    jobs = [
        LaneJob(
            lane=lane,
            dispatcher=dispatcher,
            model=settings.model,
            splits=study.splits,
            positive=study.positive,
            num_threads=layout.num_threads,
        )
        for lane in range(layout.lanes)
    ]
    threads = {"OMP_NUM_THREADS": str(layout.num_threads)} if layout.num_threads else {}
    lanes = Lanes(
        jobs,
        workers_per_trial=layout.workers_per_trial,
        use_gpu=layout.use_gpu,
        cpus_per_worker=1,
        storage=study.directory / "ray",
        runtime_env={"env_vars": threads},
    )
    tags = {"metric": study.metric, "model": settings.model.model, "data": settings.data.data, **versions()}
    tracking = Tracking(
        settings.study.report_to,
        settings.study.experiment,
        study.name,
        study.directory,
        study_params(study, layout),
        tags,
    )
    log = StudyLog(study, dispatcher, tracking, say)
    try:
        search(study, layout, dispatcher, log)
    except KeyboardInterrupt:
        pass  # told by the trials that did not end
    except BaseException:
        lanes.over = True
        raise
    outcome.records = log.close()
    outcome.interrupted = len(outcome.records) < settings.study.trials or any(
        record.state == "INTERRUPTED" for record in outcome.records
    )
    if settings.study.confirm and not outcome.interrupted:
        confirm(study, dispatcher, outcome, say)
    outcome.choose_winner()
    if outcome.winner and not outcome.interrupted:
        say("Scoring the test images, once, with the winner and the guide's defaults")
        score_test(study, dispatcher, outcome)
    outcome.seconds["wall"] = time.perf_counter() - started
    outcome.notes += [f"tracking: {error}" for error in dict.fromkeys(tracking.errors)]
    path = outcome.save(study_facts(study, layout))
    metrics = {f"test_{who}_{m}": s["value"] for who, found in outcome.tests.items() for m, s in found.items()}
    if outcome.winner:
        metrics |= {f"best_{name}": value for name, value in outcome.winner.metrics.items()}
    final = {"winner": outcome.winner.number if outcome.winner else "none", "adapter": outcome.adapter or "none"}
    told = len(tracking.errors)
    tracking.study_ended(outcome.state, final, metrics | {"wall_s": outcome.seconds["wall"]}, [path])
    outcome.notes += [f"tracking: {error}" for error in dict.fromkeys(tracking.errors[told:])]
    if not outcome.interrupted:
        lanes.close()


def confirm(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Train the best trials and the guide's defaults again over fresh seeds, and note their validation scores.

    The best of twenty noisy scores is partly luck; seeds that no choice has looked at tell how much.
    """
    import ray

    settings = study.settings.study
    best = ranked(outcome.records, outcome.metric)
    chosen = best[: settings.confirm] + [record for record in best[settings.confirm :] if record.number == 0]
    say(f"Confirming trials {', '.join(str(record.number) for record in chosen)} over {settings.confirm_seeds} seeds")
    runs = {}
    for run, (record, seed) in enumerate(
        (record, seed) for seed in range(1, settings.confirm_seeds + 1) for record in chosen
    ):
        output = study.directory / "trials" / f"{record.number:04d}" / f"confirm-{seed}"
        again = record.settings | {"seed": record.settings["seed"] + seed}
        assignment = {"kind": "train", "settings": again, "output": str(output)}
        runs[CONFIRMING + run] = record
        ray.get(dispatcher.submit.remote(CONFIRMING + run, assignment))
    for done, (number, record) in enumerate(runs.items(), 1):
        report: dict[str, Any] = {"done": False}
        while not report.get("done") and "error" not in report:
            report = ray.get(dispatcher.next_report.remote(number))
        if "error" in report:
            outcome.notes.append(f"a confirmation of trial {record.number} failed: {report['error'].splitlines()[0]}")
            continue
        value = report["metrics"][outcome.metric]
        outcome.confirmations.setdefault(record.number, []).append(value)
        say(f"[{done}/{len(runs)}] trial {record.number} again: {outcome.metric} {value:.3f}")


def score_test(study: Study, dispatcher: Any, outcome: Outcome) -> None:
    """The test scores of the winner and of the guide's defaults (trial 0), if that one completed, and their paired
    difference."""
    import ray

    assert outcome.winner
    chosen = {"winner": outcome.winner}
    guide = next((record for record in outcome.records if record.number == 0), None)
    if guide and guide is not outcome.winner and guide.state == "COMPLETE":
        chosen["guide"] = guide
    adapters = [str(outcome.adapter_of(record)) for record in chosen.values()]
    ray.get(dispatcher.submit.remote(SCORING, {"kind": "score", "adapters": adapters}))
    report = ray.get(dispatcher.next_report.remote(SCORING))
    if "error" in report:
        outcome.notes.append(f"the test could not be scored: {report['error'].splitlines()[0]}")
        return
    scorers = {
        who: make_scorer(predicted, study.splits, record.settings["class_balanced_loss"], study.positive)
        for (who, record), predicted in zip(chosen.items(), report["predictions"], strict=True)
    }
    everything, clean = np.arange(len(study.splits.test)), np.array(study.data_report.test_clean, dtype=int)
    for who, scorer in scorers.items():
        outcome.tests[who] = with_intervals(scorer, everything)
        if 0 < len(clean) < len(everything):
            outcome.tests[f"{who}, clean part"] = with_intervals(scorer, clean)
    if "guide" in scorers:
        outcome.tests["difference"] = with_intervals(difference(scorers["winner"], scorers["guide"]), everything)


# ------------------------------------------------------------------------------------------------ what is written down


def versions() -> dict[str, str]:
    """Versions of what every node must agree on."""
    return {f"version_{name}": importlib.metadata.version(name) for name in PACKAGES}


def study_params(study: Study, layout: Layout) -> dict[str, Any]:
    """The parent run's parameters."""
    counts = {f"num_{part}": len(getattr(study.splits, part)) for part in ("train", "validation", "test")}
    return dataclasses.asdict(study.settings.study) | dataclasses.asdict(layout) | counts


def study_facts(study: Study, layout: Layout) -> dict[str, Any]:
    """What study.json holds beside the outcome."""
    settings = study.settings
    return {
        "settings": {
            "study": dataclasses.asdict(settings.study),
            "model": dataclasses.asdict(settings.model),
            "data": dataclasses.asdict(settings.data),
            "trial": dataclasses.asdict(settings.trial),
            "pinned": settings.pinned,
        },
        "layout": dataclasses.asdict(layout),
        "mode": MODES[study.metric],
        "data_report": dataclasses.asdict(study.data_report),
        "candidates": study.splits.candidates,
        "positive_label": study.positive,
        "class_counts": {part: study.splits.class_counts(part) for part in ("train", "validation", "test")},
        "versions": versions(),
    }


def make_space(study: Study) -> Callable[[Any], dict[str, Any]]:
    """The space in the form that OptunaSearch asks: the trial's number and its complete settings."""
    space, _ = load_space(study.settings.study.space)
    settings = study.settings
    return lambda trial: {"number": trial.number, "settings": searched_settings(settings, space, trial)}


def searched_values(config: dict[str, Any]) -> dict[str, Any]:
    """What the search asked for, from a Tune trial's configuration."""
    return {name: value for name, value in config.items() if name not in ("number", "settings")}


def record_of(config: dict[str, Any]) -> TrialRecord:
    """A fresh record for a Tune trial's configuration."""
    return TrialRecord(config["number"], searched_values(config), config["settings"])
