"""Trains a trial of a study again, on a lane of its own, and compares the metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from train_fn.execution import Execution
from train_fn.jobs import JobFailed, TrainJob
from train_fn.support.tables import print_table
from tune.config.paths import SettingsError
from tune.confirm import folds_of
from tune.lanes.layout import Layout
from tune.lanes.ray_start import start_ray
from tune.plan.prepare import Study
from tune.records.trials import TrialRecord, trial_records


def replay(study: Study, number: int, run: int, say: Callable[[str], None]) -> int:
    """Train a trial again and print the metrics of both times.

    Args:
        number: the trial's.
        run: which training of it: 0 is the search's own, 1 the first fresh seed or fold of `--confirm`.

    Returns: the exit code. 0: all are identical; 1: they are not, or the trial failed.

    Raises SettingsError when the study has no result of that training.
    """
    record, job, epochs = recorded(study, number, run)
    start_ray(study.settings)
    import ray  # after what `start_ray` sets for it

    from tune.lanes.trainers import Lanes, start_dispatcher

    workers = study.settings.study.workers_per_trial
    layout = Layout(1, workers, record.device != "cpu", record.num_threads)
    # In the study's own folder or bucket, because other nodes may not see a temporary folder of this machine.
    study.storage.remove(job.output)
    metrics: list[dict[str, float]] = []
    try:
        dispatcher = start_dispatcher(study, layout)
        lanes = Lanes(study, layout, dispatcher, say)
        say(f"Training {training_name(number, run)} of {study.name} again, with seed {job.settings.seed}")
        ray.get(dispatcher.submit.remote(job))
        while len(metrics) < len(epochs):
            report = ray.get(dispatcher.next_report.remote(number, len(metrics)))
            if isinstance(report, JobFailed):
                say(f"It failed: {report.error.splitlines()[0]}")
                break
            metrics.append(report.metrics)
        ray.get(dispatcher.stop.remote(number, for_good=True))
        lanes.close()
        ray.shutdown()
    finally:
        study.storage.remove(job.output)
    return compare(epochs, metrics, record.num_threads)


def training_name(number: int, run: int) -> str:
    """The name of one training of a trial for people."""
    return f"trial {number}, confirmation {run}" if run else f"trial {number}"


def recorded(study: Study, number: int, run: int) -> tuple[TrialRecord, TrainJob, list[dict[str, float]]]:
    """A trial's record, the job that repeats one of its trainings, and the metrics that the journal has of each epoch
    of that training. Raises SettingsError as `replay`."""
    records = trial_records(study.journal.events)
    if number not in records or not records[number].epochs:
        choices = ", ".join(str(n) for n, record in records.items() if record.epochs)
        raise SettingsError(
            [f"`--trial` must be a trial with a result ({choices}), but got {number}: choose one of them"]
        )
    record = records[number]
    try:
        settings = record.typed_settings()
    except ValueError as error:
        raise SettingsError([f"`--trial` {number} must have settings of this version, but {error}"]) from error
    output, execution = study.directory / "replay", execution_of(record.applied)
    if not run:
        return record, TrainJob(number=number, settings=settings, output=output, execution=execution), record.epochs
    events = [e for e in study.journal.events if e["event"] == "confirmed" and e["number"] == number]
    event = next((event for event in events if event["run"] == run), None)
    if event is None:
        choices = ", ".join(map(str, sorted({0, *(event["run"] for event in events)})))
        raise SettingsError(
            [f"`--run` must be a training of trial {number} with a result ({choices}), but got {run}: choose one"]
        )
    # Of earlier versions, events have the first goal's value after the last epoch, and no more.
    only_value: list[dict[str, float]] = [*[{}] * (len(record.epochs) - 1), {study.goals[0][0]: event["value"]}]
    epochs = event.get("epochs", only_value)
    folds = folds_of(study, event.get("folds", study.settings.study.folds))
    job = TrainJob(
        number=number,
        settings=dataclasses.replace(settings, seed=event.get("seed", settings.seed + run)),
        output=output,
        splits=folds[run - 1] if folds else None,
        execution=execution_of(event.get("applied", record.applied)),
    )
    return record, job, epochs


def execution_of(applied: dict[str, Any]) -> Execution:
    """How a trial's steps were computed, from what its engine applied."""
    if "execution" in applied:
        return Execution(**applied["execution"])
    # An earlier version's: micro-batches of images, as the settings say.
    names = {"images": "per_device_train_batch_size", "compiled": "torch_compile"}
    found = {ours: applied[name] for ours, name in names.items() if name in applied}
    return Execution(**found, gradient_checkpointing=applied.get("gradient_checkpointing", False))


def compare(epochs: list[dict[str, float]], metrics: list[dict[str, float]], num_threads: int) -> int:
    """Print the metrics of both times, epoch by epoch. Returns 0 if they are identical, else 1.

    Args:
        epochs: what the journal has of each epoch.
        metrics: what the epochs gave now.
        num_threads: torch threads of each worker then.
    """
    rows: list[tuple[str, ...]] = []
    same = len(metrics) == len(epochs)
    for epoch, (then, now) in enumerate(zip(epochs, metrics, strict=False), 1):
        for name, value in then.items():
            again = now.get(name, math.nan)  # another version may not have it
            equal = again == value or (again != again and value != value)
            same &= equal
            gap = "none" if equal else f"{again - value:+.3g}"
            rows.append((name, str(epoch), repr(value), repr(again), gap))
    print_table("", ["metric", "epoch", "then", "now", "difference"], rows, width=110)
    threads = "" if num_threads <= 1 else f" (with {num_threads} threads last bits may differ)"
    print("Identical." if same else f"Not identical{threads}.")
    return 0 if same else 1
