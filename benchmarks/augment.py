"""What `--augment` costs and gains: the same trials with and without it, over several splits and seeds.

    OMP_NUM_THREADS=1 python benchmarks/augment.py [--seeds 5] [OPTION]...

Every other option is one of `tune/run.py`, such as --data MANIFEST --image-root FOLDER --allow-flips. Seed N trains on
the split of seed N, on an empty cache of vision features; seed 0 once more on the full one. Seconds are of one CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from train_fn.data.samples import Splits  # noqa: E402
from train_fn.model.base import Base, load_base  # noqa: E402
from train_fn.scoring.evaluation import predict  # noqa: E402
from train_fn.scoring.scores import metrics_of  # noqa: E402
from train_fn.settings import AUGMENT, ModelSettings, TrialSettings  # noqa: E402
from train_fn.trial.adapter_files import load_adapter  # noqa: E402
from train_fn.trial.loop import run_trial  # noqa: E402
from tune.config.cli import parse  # noqa: E402
from tune.plan.prepare import prepare  # noqa: E402


def main() -> None:
    """Train with each strength and print each trial, then the means and the differences to the trials without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    options, others = parser.parse_known_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, ...]]] = {strength: [] for strength in AUGMENT}
    full: dict[str, float] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            study = prepare(parse(["--results", folder, "--split-seed", str(seed), *others]), lambda text: None)
            for strength in AUGMENT:
                settings = dataclasses.replace(study.settings.trial, augment=strength, seed=seed)
                os.environ["XDG_CACHE_HOME"] = f"{folder}/{strength}"
                auroc, cold = trial(study.settings.model, study.splits, settings, Path(folder) / f"{strength}-cold")
                if not seed:
                    again, full[strength] = trial(study.settings.model, study.splits, settings, Path(folder) / strength)
                    assert auroc == again
                found[strength].append((*auroc, cold))
                print(seed, strength, *(f"{value:.4f}" for value in found[strength][-1]), full, flush=True)
    print(f"{'':8}{'validation':>12}{'test AUROC':>12}{'difference':>20}{'cold s':>10}{'full s':>10}")
    plain = [values[1] for values in found["none"]]
    for strength, values in found.items():
        validation, test, cold = (statistics.mean(part) for part in zip(*values, strict=True))
        gains = [one[1] - other for one, other in zip(values, plain, strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        shown = f"{statistics.mean(gains):+.4f} +- {error:.4f}"
        print(f"{strength:8}{validation:12.4f}{test:12.4f}{shown:>20}{cold:10.2f}{full[strength]:10.2f}")


def trial(
    model: ModelSettings, splits: Splits, settings: TrialSettings, output: Path
) -> tuple[tuple[float, float], float]:
    """AUROC of the best epoch's adapter on validation and test, and CPU seconds of the training."""
    base = load_base(model, torch.device("cpu"))
    output.mkdir()
    started = time.process_time()
    run_trial(base, splits, settings, lambda report: False, output=output, best_by=("auroc", "max"))
    seconds = time.process_time() - started
    with load_adapter(base, output / "final_model"):
        return (auroc(base, splits, "validation"), auroc(base, splits, "test")), seconds


def auroc(base: Base, splits: Splits, part: str) -> float:
    """AUROC of the adapted base on a part."""
    samples = getattr(splits, part)
    return metrics_of(predict(base, samples, splits, 16), samples, splits)["auroc"]


if __name__ == "__main__":
    main()
