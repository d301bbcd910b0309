"""How often the sets of `predict --coverage` hold the true answer: over 200 random splits.

    python benchmarks/conformal.py [--study results/STUDY] [--splits 200]

Simulated: three classes with the shares of BUSI's; a half calibrates, the other is covered. In groups of four, images
have their label and most of their noise in common. `images` takes images of one group for independent ones, `units`
counts a group once, as the product does. With `--study`: the validation and test predictions of a study's winner,
pooled and divided anew, its units together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(Path(__file__).resolve().parent))]

from train_fn.data.dealing import split_indices  # noqa: E402
from train_fn.data.samples import units_of  # noqa: E402
from train_fn.data.splits_file import load_splits  # noqa: E402
from train_fn.scoring.conformal import answer_sets, calibration_scores, coverage_of  # noqa: E402

COVERAGES = (0.8, 0.9, 0.95)
SHARES = (0.17, 0.56, 0.27)  # of BUSI's classes
SIGNAL = 2.0  # of the true class's score, in standard deviations of the noise
IN_COMMON = 0.8  # share of the noise's variance that images of a group have in common
Data = tuple[np.ndarray, np.ndarray, np.ndarray]  # probabilities [N, C], labels [N], units [N]
ROW = (
    "| data | calibration | coverage | covered | smallest class | in 19 of 20 splits at least | answers | one answer |"
)


def simulated(rng: np.random.Generator, num_images: int, size: int) -> Data:
    """Images in groups of `size`, half for calibration and half to be covered; the probabilities are calibrated."""
    units = np.arange(num_images) // size
    num_units = int(units[-1]) + 1
    labels = rng.choice(len(SHARES), num_units, p=SHARES)[units]
    share = IN_COMMON if size > 1 else 0.0
    noise = np.sqrt(share) * rng.normal(size=(num_units, len(SHARES)))[units]
    noise += np.sqrt(1 - share) * rng.normal(size=(num_images, len(SHARES)))
    likelihood = np.exp(SIGNAL * (SIGNAL * np.eye(len(SHARES))[labels] + noise)) * SHARES
    return likelihood / likelihood.sum(1, keepdims=True), labels, units


def pooled(study: Path) -> Data:
    """Validation and test predictions of a study's winner. Raises ValueError for a study of several tasks."""
    splits = load_splits(study / "splits.json")
    if not splits.candidates:
        raise ValueError(f"{study} must have one task with candidate answers: choose another study")
    stored = json.loads((study / "study.json").read_text())
    lines = (study / "trials" / f"{stored['winner']:04d}" / "validation_predictions.jsonl").read_text().splitlines()
    rows = [list(json.loads(line)["probabilities"].values()) for line in lines]
    rows += stored["predictions"]["winner"]["probabilities"]
    samples = [*splits.validation, *splits.test]
    return np.array(rows), np.array([int(sample.label) for sample in samples]), np.array(units_of(samples))


def measure(name: str, draw: Callable[[np.random.Generator, int], Data], repeats: int, count_units: bool) -> None:
    """Rows of the table, one for each coverage."""
    found: dict[float, list[list[float]]] = {coverage: [] for coverage in COVERAGES}
    for repeat in range(repeats):
        rng = np.random.default_rng([9, repeat])
        probabilities, labels, units = draw(rng, repeat)
        halves = split_indices(labels.tolist(), {"calibrate": 0.5, "cover": 0.5}, repeat, units.tolist())
        known, new = halves["calibrate"], halves["cover"]
        its = units[known] if count_units else np.arange(len(known))
        conformal = calibration_scores(probabilities[known], labels[known], its.tolist())
        for coverage, rows in found.items():
            got = coverage_of(answer_sets(probabilities[new], conformal, coverage), labels[new], units[new].tolist())
            classes = got["covered_by_class"][0]
            rows.append([*(float(got[key][0]) for key in ("covered", "set_size", "one_answer")), *classes])
    for coverage, rows in found.items():
        means = np.nanmean(rows, 0)  # a small class may be missing
        low = np.quantile(np.array(rows)[:, 0], 0.05)
        print(
            f"| {name} | {'units' if count_units else 'images'} | {coverage} | {means[0]:.3f} | {means[3:].min():.3f} "
            f"| {low:.3f} | {means[1]:.2f} | {means[2]:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=Path, help="folder of a study with one closed task [simulated scores]")
    parser.add_argument("--splits", type=int, default=200, help="random splits [200]")
    options = parser.parse_args()
    print(f"{ROW}\n|" + " --- |" * (ROW.count("|") - 1))
    if options.study:
        data = pooled(options.study)
        name = f"{options.study.name}, {len(data[1])} images"
        for count_units in (True, False) if len(set(data[2].tolist())) < len(data[2]) else (True,):
            measure(name, lambda rng, repeat: data, options.splits, count_units)
        return
    for num_images in (96, 252, 2000):
        measure(f"{num_images} single", lambda rng, repeat, n=num_images: simulated(rng, n, 1), options.splits, True)
        for count_units in (True, False):
            name = f"{num_images} in groups of 4"
            measure(name, lambda rng, repeat, n=num_images: simulated(rng, n, 4), options.splits, count_units)


if __name__ == "__main__":
    main()
