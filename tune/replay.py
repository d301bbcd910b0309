"""`--replay`: trains one trial of a study again, on a lane of its own, and compares the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from train_fn.support.text import plain
from tune.config.paths import SettingsError
from tune.lanes.layout import Layout
from tune.lanes.ray_start import start_ray
from tune.plan.prepare import Study
from tune.records.trials import TrialRecord, fold


def replay(study: Study, number: int, say: Callable[[str], None]) -> int:
    """Train a trial again and print its metrics beside the old ones. Returns the exit code: 0 if all are identical."""
    records = fold(study.journal.events)
    if number not in records or not records[number].epochs:
        choices = ", ".join(str(n) for n, record in records.items() if record.epochs)
        raise SettingsError([f"`--trial` must be a trial with a result ({choices}), but got {number}: choose one"])
    record = records[number]
    start_ray(study.settings)
    import ray  # after what `start_ray` sets for it

    from tune.lanes.dispatcher import start_dispatcher
    from tune.lanes.trainers import Lanes

    workers = study.settings.study.workers_per_trial
    layout = Layout(1, workers, record.device != "cpu", record.num_threads)
    # In the study's folder or bucket: other nodes do not see a temporary folder of this machine.
    folder = study.directory / "replay"
    study.storage.remove(folder)
    metrics: list[dict[str, Any]] = []  # of each epoch
    try:
        dispatcher = start_dispatcher(layout, study.settings.study.hang_timeout)
        lanes = Lanes(study, layout, dispatcher, say)
        say(f"Training trial {number} of {study.name} again")
        job = {"kind": "train", "settings": record.settings, "output": str(folder)}
        ray.get(dispatcher.submit.remote(number, job))
        while len(metrics) < len(record.epochs):
            report = ray.get(dispatcher.next_report.remote(number, len(metrics)))
            if "error" in report:
                say(f"It failed: {report['error'].splitlines()[0]}")
                break
            metrics.append(report["metrics"])
        ray.get(dispatcher.stop.remote(number))
        lanes.close()
        ray.shutdown()
    finally:
        study.storage.remove(folder)
    return compare(record, metrics)


def compare(record: TrialRecord, metrics: list[dict[str, Any]]) -> int:
    """Print the old and the new metrics of each epoch. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 110
    table = Table("epoch", "metric", "then", "now", "difference")
    same = len(metrics) == len(record.epochs)
    for epoch, (then, now) in enumerate(zip(record.epochs, metrics, strict=False), 1):
        for name, value in then.items():
            again = now.get(name, math.nan)  # another version may lack it
            equal = again == value or (again != again and value != value)
            same &= equal
            gap = "none" if equal else f"{again - value:+.3g}"
            table.add_row(str(epoch), plain(name), repr(value), repr(again), gap)
    console.print(table)
    threads = "" if record.num_threads <= 1 else f" (with {record.num_threads} threads last bits may differ)"
    print("Identical." if same else f"Not identical{threads}.")
    return 0 if same else 1
