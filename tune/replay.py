"""One trial of a study again, on a lane of its own, its metrics beside those of the first time."""

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
    """Train a trial again and print both times' metrics. 0: all are identical; 1: they are not, or it failed."""
    records = fold(study.journal.events)
    if number not in records or not records[number].epochs:
        told = ", ".join(str(n) for n, record in records.items() if record.epochs)
        raise SettingsError([f"`--trial` must be a trial with a result ({told}), but got {number}: choose one of them"])
    record = records[number]
    start_ray(study.settings)
    import ray  # after what `start_ray` sets for it

    from tune.lanes.dispatcher import start_dispatcher
    from tune.lanes.trainers import Lanes

    workers = study.settings.study.workers_per_trial
    layout = Layout(1, workers, record.device != "cpu", record.num_threads)
    # Within the study's own folder or bucket: a temporary folder of this machine is no place for other nodes.
    folder = study.directory / "replay"
    study.storage.remove(folder)
    found: list[dict[str, Any]] = []
    try:
        dispatcher = start_dispatcher(layout, study.settings.study.hang_timeout)
        lanes = Lanes(study, layout, dispatcher, say)
        say(f"Training trial {number} of {study.name} again")
        job = {"kind": "train", "settings": record.settings, "output": str(folder)}
        ray.get(dispatcher.submit.remote(number, job))
        while len(found) < len(record.epochs):
            report = ray.get(dispatcher.next_report.remote(number, len(found)))
            if "error" in report:
                say(f"It failed: {report['error'].splitlines()[0]}")
                break
            found.append(report["metrics"])
        ray.get(dispatcher.stop.remote(number))
        lanes.close()
        ray.shutdown()
    finally:
        study.storage.remove(folder)
    return compare(record, found)


def compare(record: TrialRecord, found: list[dict[str, Any]]) -> int:
    """Print the metrics of both times, epoch by epoch. 0 when they are identical."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 110
    table = Table("epoch", "metric", "then", "now", "difference")
    same = len(found) == len(record.epochs)
    for epoch, (then, now) in enumerate(zip(record.epochs, found, strict=False), 1):
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
