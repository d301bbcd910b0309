"""Does a smaller sibling rank settings like the base itself?

    python benchmarks/nano.py --width 64 --layers 2 --output nano-small
    python benchmarks/sibling.py --small nano-small [--settings 24] [--output sibling.jsonl]

The guide's settings and random points of the wide space, drawn once, are trained on both bases in this process: on the
default phantoms and, where BUSI_ROOT names the images, on BUSI. For each data set and score: Spearman's correlation of
the two rankings with a bootstrap interval over the settings, and the regret: how much worse than the best of all
settings on the base is the best of those that the sibling ranks first, against as many at random. The base with another
seed in the sibling's place is the ceiling: no ranking can agree better than the scores do with themselves.

A training that is in the output file is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tune.records.goals import mode_of, sign  # noqa: E402

SCORES = ("auroc", "loss")
TOP = (1, 3, 5)
NUM_RESAMPLES = 10_000
SIBLING, SAME, AGAIN = "the sibling", "the base", "the base with another seed"


def train_all(options: argparse.Namespace, data: dict[str, list[str]]) -> None:
    """Train every setting on each base and data set, and append a line for each training to the output file.

    Args:
        data: the options of `tune/run.py` for each data set.
    """
    import torch
    import torch.distributed as dist

    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings
    from tune.config.cli import parse
    from tune.plan.prepare import prepare
    from tune.search.points import propose

    done = {(line["data"], line["base"], line["setting"]) for line in read(options.output)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        search = ["--results", folder, "--space", options.space, "--sampler", "random", "--metric", "auroc"]
        studies = {
            name: prepare(parse([*search, "--name", name, *arguments]), lambda text: None)
            for name, arguments in data.items()
        }
        for name, model, seed in ((SAME, "nano", 0), (SIBLING, str(options.small), 0), (AGAIN, "nano", 1)):
            base = load_base(ModelSettings(model=model), torch.device("cpu"))
            for (data_name, study), number in product(studies.items(), range(options.settings)):
                if (data_name, name, number) in done:
                    continue
                point = propose(study, {}, number)  # the same for each base and data set
                assert point is not None
                began = time.process_time()
                metrics = train(base, study, dataclasses.replace(point.settings, seed=seed))
                line = {"data": data_name, "base": name, "setting": number, "searched": point.searched}
                line |= {score: metrics.get(score) for score in SCORES} | {"cpu_s": time.process_time() - began}
                with options.output.open("a") as file:
                    print(json.dumps(line), file=file)
                print(line, flush=True)


def train(base: Any, study: Any, settings: Any) -> dict[str, float]:
    """The validation metrics of one training's best epoch; empty if it failed."""
    from train_fn.jobs import EpochReport
    from train_fn.support.storage import Storage
    from train_fn.trial.applied import TrialFailed
    from train_fn.trial.loop import run_trial

    epochs: list[EpochReport] = []

    def report(message: EpochReport) -> bool:
        epochs.append(message)
        return False

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        try:
            run_trial(
                base, study.splits, settings, report, output=output, storage=Storage(output), best_by=study.goals[0]
            )
        except TrialFailed:
            return {}
    return epochs[epochs[-1].best_epoch - 1].metrics


def read(path: Path) -> list[dict[str, Any]]:
    """The trainings that have been done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def costs(lines: list[dict[str, Any]], score: str) -> np.ndarray:
    """A score of each setting [N], less is better; of a training that failed the worst."""
    cost = sign(mode_of(score)) * np.array([line[score] for line in lines], dtype=float)
    return np.where(np.isfinite(cost), cost, np.nanmax(cost))


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation of two [N]; NaN where one of them does not vary."""
    from scipy.stats import rankdata

    ranks = rankdata(one), rankdata(other)
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(each) for each in ranks) else np.nan


def interval(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % of Spearman's correlation over settings drawn with replacement."""
    rows = rng.integers(len(one), size=(NUM_RESAMPLES, len(one)))
    low, high = np.nanpercentile([spearman(one[row], other[row]) for row in rows], [2.5, 97.5])
    return float(low), float(high)


def regrets(cost: np.ndarray, order: np.ndarray) -> list[float]:
    """For each of TOP: how much the best of the first settings in an order costs beyond the best of all.

    Args:
        cost: of each setting on the base [N], less is better.
        order: settings [N] or, for a mean over orders, [R, N].
    """
    orders = np.atleast_2d(order)
    return [float(np.mean(cost[orders[:, :k]].min(1)) - cost.min()) for k in TOP]


def print_tables(lines: list[dict[str, Any]]) -> None:
    """Print the tables of what has been trained: of a data set, the settings that were trained on the base and on the
    base that is compared with it."""
    print("| data, score | ranked by | settings | Spearman | " + " | ".join(f"best {k}: regret" for k in TOP) + " |")
    print("| --- " * (4 + len(TOP)) + "|")
    trained = {(line["data"], line["base"], line["setting"]): line for line in lines}
    for data, score in product(dict.fromkeys(line["data"] for line in lines), SCORES):
        for base in (SIBLING, AGAIN):
            both = [n for name, which, n in trained if (name, which) == (data, SAME) and (data, base, n) in trained]
            if len(both) < max(TOP):
                continue
            rng = np.random.default_rng(0)
            one, other = (costs([trained[data, which, n] for n in both], score) for which in (base, SAME))
            low, high = interval(one, other, rng)
            cells = [f"{spearman(one, other):.2f} ({low:.2f} to {high:.2f})"]
            cells += [f"{regret:.4f}" for regret in regrets(other, np.argsort(one, kind="stable"))]
            print(f"| {data}, {score} | {base} | {len(both)} | " + " | ".join(cells) + " |")
            chance = regrets(other, np.array([rng.permutation(len(both)) for _ in range(NUM_RESAMPLES)]))
            print(f"| | chance | | | {' | '.join(f'{regret:.4f}' for regret in chance)} |")
            print(f"| | (on the base: {np.abs(other).min():.3f} to {np.abs(other).max():.3f}) | | |{' |' * len(TOP)}")
    for data, base in dict.fromkeys((line["data"], line["base"]) for line in lines):
        seconds = np.median([line["cpu_s"] for line in lines if (line["data"], line["base"]) == (data, base)])
        print(f"{data}, {base}: {seconds:.1f} CPU seconds a training (median)")


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", type=Path, help="the sibling's folder; not given: print the tables so far")
    parser.add_argument("--settings", type=int, default=24)
    parser.add_argument("--space", default="wide")
    parser.add_argument("--output", type=Path, default=Path("sibling.jsonl"))
    options = parser.parse_args()
    data: dict[str, list[str]] = {"phantoms": []}
    if root := os.environ.get("BUSI_ROOT"):
        data["BUSI"] = ["--data", f"{root}/train_busi_breast_cancer.json", "--image-root", root]
    if options.small:
        train_all(options, data)
    print_tables(read(options.output))


if __name__ == "__main__":
    main()
