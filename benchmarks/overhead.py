"""CPU time and wall time of the study's own machinery per trial, and which of them grow with the number of trials.

    python benchmarks/overhead.py [--trials 20 200 500 1000] [--output table.json]

Runs whole studies (`prepare`, `run`: Ray Tune, Optuna, dispatcher, journal, MLflow on sqlite, report) on lanes that
train nothing: threads of the driver that take jobs and report three epochs of a noisy score, each after 0.2 s. Every
number of trials is measured in a process of its own. Times of the parts are CPU seconds of their threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "benchmarks"))]

from train_fn.jobs import EpochReport, ScoreReport, TrainJob  # noqa: E402
from train_fn.settings import TrialSettings  # noqa: E402

EPOCHS = 3
PARTS = {
    "next point": "tune.search.searcher.JournalSearcher.suggest",
    "report, early stopping": "tune.search.callback.StudyLog.__call__",  # holds its line of the journal
    "optuna.db": "tune.records.optuna_study.DatabaseExport.write",
    "budgets": "tune.search.callback.StudyLog.spent",
    "journal": "tune.records.journal.Journal.write",
    "trial's end": "tune.search.callback.StudyLog.end",  # holds its line of the journal
    "Tune's controller": "ray.tune.execution.tune_controller.TuneController.step",  # holds all of the above
    "footer": "tune.search.footer.Footer.__call__",
    "tracking": "tune.tracking.delivery.Tracking._run",
    "report": "tune.results.report.write_report",
}


def score(settings: TrialSettings, epoch: int) -> float:
    """An AUROC that depends on rate and rank, rises with the epochs, and is noisy."""
    draw = random.Random(f"{settings.learning_rate} {settings.lora_r} {epoch}")
    distance = abs(math.log10(settings.learning_rate) + 3) + 0.1 * abs(math.log2(settings.lora_r) - 4)
    return min(0.99, max(0.3, 0.9 - 0.15 * distance - 0.1 / epoch + draw.gauss(0, 0.02)))


class StubLanes:
    """Stands for `tune.lanes.trainers.Lanes`: a thread per lane does what `lane_loop` does, without a model."""

    def __init__(self, study: Any, layout: Any, dispatcher: Any, say: Any = None) -> None:
        self.study, self.dispatcher, self.over, self.cpu_s = study, dispatcher, False, 0.0
        self.threads = [threading.Thread(target=self.lane, args=(n,), daemon=True) for n in range(layout.lanes)]
        for thread in self.threads:
            thread.start()

    def lane(self, lane: int) -> None:
        import ray

        group = f"group-{lane}"
        for index in range(10**9):
            job = ray.get(self.dispatcher.next_assignment.remote(lane, group, index))
            if job is None:
                self.cpu_s += time.thread_time()
                return
            reports = self.train(job, lane, index) if isinstance(job, TrainJob) else self.predict()
            for epoch, report in enumerate(reports, 1):
                if ray.get(self.dispatcher.report.remote(job.number, group, epoch, report)):
                    break

    def train(self, job: TrainJob, lane: int, index: int) -> Iterator[EpochReport]:
        settings, directory = job.settings, job.output / "final_model"
        for epoch in range(1, EPOCHS + 1):
            value = score(settings, epoch)
            # Trials that end at once would have Tune start processes that it no longer needs when they are there.
            time.sleep(random.uniform(0.1, 0.3))
            if epoch == EPOCHS:
                directory.mkdir(parents=True)
                (directory / "adapter_model.safetensors").write_bytes(b"none")
                (directory / "task.json").write_text(
                    json.dumps({"model": {}, "question": "?", "candidates": self.study.splits.candidates})
                )
            log = [{"step": 9 * epoch - 8 + i, "loss": 1 - value, "learning_rate": 1e-4} for i in range(9)]
            yield EpochReport(
                epoch=epoch,
                step=9 * epoch,
                metrics={"loss": 1 - value, "auroc": value, "macro_f1": value - 0.1, "train_loss": 1 - value},
                log=log,
                applied={**dataclasses.asdict(settings), "trainable_params": 77824 * settings.lora_r},
                seconds={"setup": 0.01, "train": 0.2 * epoch, "evaluation": 0.05 * epoch},
                finished=epoch == EPOCHS,
                lane=lane,
                turn=index,
                device="cpu",
                num_threads=1,
                base_gib=0.1,
                base_16_bit_gib=0.1,
                waited_s=0.01,
                wall_s=0.3 * epoch,
            )

    def predict(self) -> Iterator[ScoreReport]:
        import numpy as np

        shape = (len(self.study.splits.test), len(self.study.splits.candidates))
        scores = np.random.default_rng(0).normal(size=shape)
        yield ScoreReport(predictions=[{"losses": -scores[:, 0], "scores": scores}] * 2)

    def close(self) -> None:
        import ray

        ray.get(self.dispatcher.close.remote())
        for thread in self.threads:
            thread.join(30)


def clocked(path: str, cpu_s: dict[str, float], part: str) -> None:
    """Book the CPU time of a function under `part`."""
    owner: Any = __import__(path.split(".")[0])
    *parents, name = path.split(".")[1:]
    for parent in parents:
        if not hasattr(owner, parent):
            __import__(f"{owner.__name__}.{parent}")
        owner = getattr(owner, parent)
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        before = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            cpu_s[part] += time.thread_time() - before

    setattr(owner, name, call)


def measure(trials: int, keep: Path | None, options: list[str]) -> dict[str, Any]:
    """One study of so many trials."""
    import os

    folder = keep or Path(tempfile.mkdtemp(prefix="overhead-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    import tune.config.cli
    import tune.plan.prepare
    import tune.study

    parts: dict[str, float] = defaultdict(float)
    for part, path in PARTS.items():
        clocked(path, parts, part)
    lanes: list[StubLanes] = []

    def stub(*given: Any) -> StubLanes:
        lanes.append(StubLanes(*given))
        return lanes[-1]

    import tune.lanes.trainers

    tune.lanes.trainers.Lanes = stub  # type: ignore[assignment, misc]
    ends: list[float] = []

    def say(text: str) -> None:
        if "] trial" in text:
            ends.append(time.perf_counter())
        if len(ends) % 100 == 0:
            print(text, file=sys.stderr, flush=True)

    words = ["--trials", str(trials), "--name", f"sweep-{trials}", "--num-phantoms", "60", "--lanes", "2", *options]
    study = tune.plan.prepare.prepare(tune.config.cli.parse(words), lambda text: None)
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = tune.study.run(study, say, wall)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(ends) == len(outcome.records) == trials and not outcome.notes, outcome.notes
    tenth = max(1, trials // 10)
    return {
        "trials": trials,
        "wall_s": wall,
        "search_s": ends[-1] - ends[0],
        "first_tenth_s": (ends[tenth] - ends[0]) / tenth,
        "last_tenth_s": (ends[-1] - ends[-1 - tenth]) / tenth,
        "cpu_s": cpu - sum(lane.cpu_s for lane in lanes),
        "journal_bytes": study.journal.path.stat().st_size,
        "parts": dict(parts),
    }


def main() -> None:
    """Measure each number of trials and print the table: per trial, and the last column over the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 200, 500, 1000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the studies and their mlflow.db")
    options, others = parser.parse_known_args()  # the rest goes to the study, such as --scheduler none
    keep, found = options.keep and options.keep.resolve(), []
    context = multiprocessing.get_context("spawn")
    for trials in options.trials:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found.append(pool.submit(measure, trials, keep, others).result())
    rows: dict[str, list[float]] = {
        "wall of the search, ms": [1000 * study["search_s"] / (study["trials"] - 1) for study in found],
        "the same, first tenth, ms": [1000 * study["first_tenth_s"] for study in found],
        "the same, last tenth, ms": [1000 * study["last_tenth_s"] for study in found],
        "CPU of the driver, ms": [1000 * study["cpu_s"] / study["trials"] for study in found],
        "journal, bytes": [study["journal_bytes"] / study["trials"] for study in found],
    }
    for part in PARTS:
        rows[f"CPU: {part}, ms"] = [1000 * study["parts"].get(part, 0.0) / study["trials"] for study in found]
    print(f"{'per trial':32}" + "".join(f"{trials:>10}" for trials in options.trials) + f"{'ratio':>8}")
    for name, values in rows.items():
        ratio = f"{values[-1] / values[0]:8.2f}" if values[0] else f"{'-':>8}"
        print(f"{name:32}" + "".join(f"{value:10.1f}" for value in values) + ratio)
    print(f"{'report in all, CPU s':32}" + "".join(f"{study['parts']['report']:10.1f}" for study in found))
    shares = [study["parts"]["tracking"] / study["cpu_s"] for study in found]
    print(f"{'share of tracking in the CPU':32}" + "".join(f"{share:10.0%}" for share in shares))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
