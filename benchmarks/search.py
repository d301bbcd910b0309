"""Which search finds a good setting for less: TPE with early stopping, or random points trained to their end.

    python benchmarks/search.py [--seeds 10] [--folder search] [--plot search.png]

For each seed (of the search and of the phantoms) two studies run on one lane: the default one, and `--sampler random
--scheduler none` with 20 trials. The default one gets more trials, and both are compared at equal device-seconds (and
epochs) of training. Only trials that ran to their end count, as they alone can win. A finished study in the folder is
not run again.

From the same learning curves it also tells whether ASHA should pause and promote trials instead of stopping them: the
random arm's curves are complete, so both rules are played on them, at every budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
METRIC = "auroc"
ARMS = {
    "TPE + ASHA": ["--trials", "32"],
    "random, full length": ["--trials", "20", "--sampler", "random", "--scheduler", "none"],
}


def run_study(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """study.json of one study, run if it is not there yet."""
    path = folder / "results" / name / "study.json"
    if not path.exists():
        command = [sys.executable, str(ROOT / "tune" / "run.py"), "--name", name, "--lanes", "1", *options]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return json.loads(path.read_text())


def trajectory(study: dict[str, Any]) -> list[tuple[float, int, float]]:
    """After each trial: device-seconds and epochs so far, and the best score of a completed trial."""
    spent, epochs, best, found = 0.0, 0, 0.0, []
    for trial in study["trials"]:
        spent += trial["seconds"]["wall"] - trial["seconds"]["waited"]
        epochs += len(trial["epochs"])
        if trial["state"] == "COMPLETE":
            best = max(best, trial["epochs"][trial.get("best_epoch", 0) - 1][METRIC])
        found.append((spent, epochs, best))
    return found


def at(curve: list[tuple[float, int, float]], budget: float, axis: int) -> float:
    """The best score that was known when so much (axis 0: seconds, 1: epochs) was spent."""
    return max((best for *spent, best in curve if spent[axis] <= budget), default=0.0)


# ------------------------------------------------------------------------------------------------ stop or promote


def play(curves: list[list[float]], budget: int, promote: bool, factor: int = 3) -> float:
    """Best final score that ASHA with rungs at epochs 1 and 3 finds within a budget of epochs.

    curves: each trial's score after each of its three epochs, in the order of the trials. The first (the guide's)
    always runs to its end. promote: a trial waits at its rung and goes on when it is in the rung's best third
    (arXiv:1810.05934, algorithm 2); otherwise it is stopped or goes on at once, as Ray's does.
    """
    best, spent, rung, promoted = 0.0, 0, {}, set()  # type: ignore[var-annotated]
    fresh = iter(range(len(curves)))
    while spent < budget:
        # As many as a third of what has been seen, the best first; the first trial is always one of them.
        allowed = sorted(rung, key=lambda n: -rung[n])[: len(rung) // factor] if promote else []
        waiting = [number for number in ([0] if 0 in rung else []) + allowed if number not in promoted]
        if waiting:
            number = waiting[0]
        else:
            if (number := next(fresh, None)) is None:
                return best
            spent += 1
            rung[number] = curves[number][0]
            if promote:
                continue
            cutoff = np.nanpercentile(list(rung.values()), (1 - 1 / factor) * 100)
            if number and curves[number][0] < cutoff:
                continue
        promoted.add(number)
        spent += len(curves[number]) - 1
        if spent <= budget:
            best = max(best, curves[number][-1])
    return best


def main() -> None:
    """Run what is missing, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("search"))
    parser.add_argument("--plot", type=Path, default=Path("search.png"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    studies: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for number, (arm, flags) in enumerate(ARMS.items()):  # in turn, so that a busy machine slows both
            seeds = ["--study-seed", str(seed), "--split-seed", str(seed)]
            studies[arm].append(run_study(options.folder, f"seed{seed}-arm{number}", flags + seeds))
    curves = {arm: [trajectory(study) for study in found] for arm, found in studies.items()}
    for axis, unit in enumerate(("device-seconds", "epochs")):
        end = min(curve[-1][axis] for found in curves.values() for curve in found)
        print(f"\nbest validation {METRIC}, median (and quartiles) over {options.seeds} seeds, by {unit}")
        print(f"{unit:>16}" + "".join(f"{arm:>32}" for arm in ARMS) + f"{'median difference':>20}")
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            values = {arm: [at(curve, share * end, axis) for curve in found] for arm, found in curves.items()}
            shown = [np.percentile(found, [50, 25, 75]) for found in values.values()]
            gaps = [one - other for one, other in zip(*values.values(), strict=True)]
            cells = "".join(f"{f'{m:.3f} ({low:.3f} to {high:.3f})':>32}" for m, low, high in shown)
            print(f"{share * end:16.0f}{cells}{statistics.median(gaps):+20.3f}")
    for arm, found in studies.items():
        seconds = statistics.median(
            curve[-1][0] / len(s["trials"]) for s, curve in zip(found, curves[arm], strict=True)
        )
        scores = [study["test"]["winner"][METRIC]["value"] for study in found]
        print(f"{arm}: {seconds:.2f} device-seconds a trial; winner's test: median {statistics.median(scores):.3f}")
    full = [[[e[METRIC] for e in t["epochs"]] for t in s["trials"]] for s in studies["random, full length"]]
    print(f"\nASHA on the random arm's complete curves: best final {METRIC}, mean over the seeds, by epochs")
    print(f"{'epochs':>16}{'stop-only':>14}{'promotion':>14}{'full length':>14}")
    for budget in (12, 18, 24, 30, 36):
        played = [statistics.fmean(play(c, budget, promote) for c in full) for promote in (False, True)]
        whole = statistics.fmean(max(c[-1] for c in seed[: budget // 3]) for seed in full)
        print(f"{budget:16}{played[0]:14.4f}{played[1]:14.4f}{whole:14.4f}")
    draw(curves, options.plot)


def draw(curves: dict[str, list[list[tuple[float, int, float]]]], path: Path) -> None:
    """Median and quartiles of the best score so far over device-seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    end = min(curve[-1][0] for found in curves.values() for curve in found)
    grid = np.linspace(0, end, 200)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm, found in curves.items():
        values = np.array([[at(curve, budget, 0) for budget in grid] for curve in found])
        values[values == 0] = np.nan
        low, median, high = np.nanpercentile(values, [25, 50, 75], axis=0)
        axes.plot(grid, median, label=arm)
        axes.fill_between(grid, low, high, alpha=0.2)
    axes.set(xlabel="device-seconds", ylabel=f"best validation {METRIC} so far (median, quartiles)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
