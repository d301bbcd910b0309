"""Trains a trial of a study again, on a lane of its own, and compares the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable

from train_fn.jobs import JobFailed, TrainJob
from train_fn.support.text import plain
from tune.config.paths import SettingsError
from tune.lanes.layout import Layout
from tune.lanes.ray_start import start_ray
from tune.plan.prepare import Study
from tune.records.trials import TrialRecord, trial_records


def replay(study: Study, number: int, say: Callable[[str], None]) -> int:
    """Train a trial again and print the metrics of both times.

    Returns: the exit code. 0: all are identical; 1: they are not, or the trial failed.

    Raises SettingsError when the study has no result of the trial.
    """
    records = trial_records(study.journal.events)
    if number not in records or not records[number].epochs:
        choices = ", ".join(str(n) for n, record in records.items() if record.epochs)
        raise SettingsError(
            [f"`--trial` must be a trial with a result ({choices}), but got {number}: choose one of them"]
        )
    record = records[number]
    try:
        job = TrainJob(number=number, settings=record.typed_settings(), output=study.directory / "replay")
    except ValueError as error:
        raise SettingsError([f"`--trial` {number} must have settings of this version, but {error}"]) from error
    start_ray(study.settings)
    import ray  # after what `start_ray` sets for it

    from tune.lanes.trainers import Lanes, start_dispatcher

    workers = study.settings.study.workers_per_trial
    layout = Layout(1, workers, record.device != "cpu", record.num_threads)
    # In the study's own folder or bucket, because other nodes may not see a temporary folder of this machine.
    study.storage.remove(job.output)
    metrics: list[dict[str, float]] = []
    try:
        dispatcher = start_dispatcher(layout, study.settings.study.hang_timeout)
        lanes = Lanes(study, layout, dispatcher, say)
        say(f"Training trial {number} of {study.name} again")
        ray.get(dispatcher.submit.remote(job))
        while len(metrics) < len(record.epochs):
            report = ray.get(dispatcher.next_report.remote(number, len(metrics)))
            if isinstance(report, JobFailed):
                say(f"It failed: {report.error.splitlines()[0]}")
                break
            metrics.append(report.metrics)
        ray.get(dispatcher.stop.remote(number))
        lanes.close()
        ray.shutdown()
    finally:
        study.storage.remove(job.output)
    return compare(record, metrics)


def compare(record: TrialRecord, metrics: list[dict[str, float]]) -> int:
    """Print the metrics of both times, epoch by epoch. Returns 0 if they are identical, else 1."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 110
    table = Table("epoch", "metric", "then", "now", "difference")
    same = len(metrics) == len(record.epochs)
    for epoch, (then, now) in enumerate(zip(record.epochs, metrics, strict=False), 1):
        for name, value in then.items():
            again = now.get(name, math.nan)  # another version may not have it
            equal = again == value or (again != again and value != value)
            same &= equal
            gap = "none" if equal else f"{again - value:+.3g}"
            table.add_row(str(epoch), plain(name), repr(value), repr(again), gap)
    console.print(table)
    threads = "" if record.num_threads <= 1 else f" (with {record.num_threads} threads last bits may differ)"
    print("Identical." if same else f"Not identical{threads}.")
    return 0 if same else 1
