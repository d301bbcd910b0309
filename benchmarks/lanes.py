"""What a trial costs beside its training: lanes against the documented pattern, in one run on one machine.

    python benchmarks/lanes.py [--trials 20] [--baseline-trials 3] [--output table.json]

(a) `tune/run.py` as two lanes of one worker, (b) as one lane of two ZeRO-2 workers, (c) Ray's documented way to combine
Train and Tune (docs.ray.io, "Hyperparameter Tuning with Ray Tune", Train V2): every Tune trial is a function that
starts a TorchTrainer of its own. All three train the guide's own settings on the same phantoms with the same base; the
final metrics of (c)'s trial must equal those of trial 0 of (a), so that neither wins by doing less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SPACE = """GUIDE = {}
def space(trial):
    return {}
"""


def run_study(folder: Path, name: str, trials: int, *options: str) -> dict[str, Any]:
    """study.json of one `tune/run.py`, and its wall time from process start to end."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "tune" / "run.py"), "--trials", str(trials), "--name", name, *options]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    study = json.loads((folder / "results" / name / "study.json").read_text())
    return study | {"process_s": time.perf_counter() - started}


def documented_worker(config: dict[str, Any]) -> None:
    """One trial as a worker of its own TorchTrainer."""
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(1)
    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings, TrialSettings
    from train_fn.trial.loop import run_trial

    base = load_base(ModelSettings(), ray.train.torch.get_device())

    def report(message: Any) -> bool:
        ray.train.report(message.metrics | {f"{k}_s": v for k, v in message.seconds.items()})
        return False

    run_trial(base, config["splits"], TrialSettings(), report, output=Path(config["output"]))


def documented_trial(config: dict[str, Any]) -> None:
    """Tune's side: start a TorchTrainer, pass its reports on."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        documented_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False, resources_per_worker={"CPU": 0.9}),
        run_config=RunConfig(storage_path=config["output"], callbacks=[TuneReportCallback()]),
    ).fit()


def run_documented(folder: Path, splits_file: Path, trials: int, at_once: int = 1) -> list[dict[str, Any]]:
    """Metrics of each trial of the documented pattern; one after the other, each is timed alone."""
    os.environ["PYTHONPATH"] = str(ROOT)
    import ray
    import ray.tune

    from train_fn.data.splits_file import load_splits

    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=os.cpu_count())
    results = ray.tune.Tuner(
        ray.tune.with_resources(documented_trial, {"CPU": 0.01}),
        param_space={"splits": load_splits(splits_file), "output": str(folder / "documented")},
        tune_config=ray.tune.TuneConfig(num_samples=trials, max_concurrent_trials=at_once),
        run_config=ray.tune.RunConfig(storage_path=str(folder / "documented"), verbose=0),
    ).fit()
    found = [result.metrics for result in results]
    ray.shutdown()
    return found


def main() -> None:
    """Measure all three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--baseline-trials", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lanes-") as name:
        folder = Path(name)
        (folder / "same.py").write_text(SPACE)
        same = ("--space", "same.py", "--scheduler", "none")  # every trial its whole length
        two = run_study(folder, "two-lanes", options.trials, "--lanes", "2", "--workers-per-trial", "1", *same)
        one = run_study(folder, "one-lane", options.trials, "--lanes", "1", "--workers-per-trial", "2", *same)
        started = time.perf_counter()
        documented = run_documented(folder, folder / "results" / "two-lanes" / "splits.json", options.baseline_trials)
        documented_s = time.perf_counter() - started
    rows = {}
    for label, study in (("2 lanes x 1 worker", two), ("1 lane x 2 workers", one)):
        later = [trial for trial in study["trials"] if trial["turn"]]
        rows[label] = {
            "trials": len(study["trials"]),
            "wall_s": study["process_s"],
            "wall_per_trial_s": study["process_s"] / len(study["trials"]),
            "trial_s": statistics.median(t["seconds"]["wall"] for t in later),
            "overhead_s": statistics.median(t["overhead_s"] for t in later),
            "overhead_max_s": max(t["overhead_s"] for t in later),
            "busy_share": study["share_training_and_evaluation"],
        }
    work = [trial["train_s"] + trial["evaluation_s"] for trial in documented]
    rows["one TorchTrainer per trial"] = {
        "trials": len(documented),
        "wall_s": documented_s,
        "wall_per_trial_s": documented_s / len(documented),
        "trial_s": statistics.median(t["time_total_s"] for t in documented),
        "overhead_s": statistics.median(t["time_total_s"] - w for t, w in zip(documented, work, strict=True)),
        "overhead_max_s": max(t["time_total_s"] - w for t, w in zip(documented, work, strict=True)),
        "busy_share": sum(work) / documented_s,
    }
    ours = two["trials"][0]["epochs"][-1]
    assert all(trial[name] == value for trial in documented for name, value in ours.items()), "not the same training"
    print(f"{'':28}" + "".join(f"{column:>18}" for column in next(iter(rows.values()))))
    for label, row in rows.items():
        print(f"{label:28}" + "".join(f"{value:18.2f}" for value in row.values()))
    ratio = rows["one TorchTrainer per trial"]["overhead_s"] / rows["2 lanes x 1 worker"]["overhead_s"]
    print(f"overhead of the documented pattern / of a lane: {ratio:.0f}x")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
