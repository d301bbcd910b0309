"""How often 95 % intervals of test scores hold the true value, on samples from a known population.

    python benchmarks/coverage.py [--repeats 1000] [--sizes 48 126 150]

The population has three classes in the shares of BUSI, and Gaussian scores. Groups are patients: all their images are
of one class and share half of the scores' variance. The true value is that of 400,000 images. The first number of a
cell is of the percentile bootstrap of 1,000 resamples of images, as it was (on a fifth of the samples), the second of
`tune.results.intervals`. A star: some samples give no interval, and the share is of the others.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing

import numpy as np

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.scoring.scores import PartScorer
from tune.results import intervals

SHARES = (0.17, 0.56, 0.27)
SAMPLES = [Sample(("",), "", name, label) for label, name in enumerate("abc")]
STRENGTHS = {0.83: 1.05, 0.97: 2.1}  # by their AUROC, how far a true class's score is above the others'
METRICS = ("accuracy", "macro_f1", "sensitivity", "specificity", "ppv", "auroc", "log_loss", "brier",
           "sensitivity_at_specificity_90", "difference in accuracy", "difference in auroc")  # fmt: skip
SEED_SD = 0.1  # of the shifts that a seed adds to the scores of each class


def draw(size: int, group: int, strength: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Labels [N], scores [N, 3] and units [N]."""
    units = np.arange(size) // group
    labels = rng.choice(3, units[-1] + 1, p=SHARES)[units]
    shared = 0.5 if group > 1 else 0.0
    scores = math.sqrt(shared) * rng.normal(0, 1, (units[-1] + 1, 3))[units]
    scores += math.sqrt(1 - shared) * rng.normal(0, 1, (size, 3))
    scores[np.arange(size), labels] += strength
    return labels, scores * strength, units


def scorer(labels: np.ndarray, scores: np.ndarray, positive: str = "c") -> PartScorer:
    """The product's own."""
    samples = tuple(SAMPLES[label] for label in labels)
    predicted = {"losses": np.zeros(len(labels)), "scores": scores}
    return PartScorer(predicted, samples, Splits((), (), samples, closed_set(("a", "b", "c"), positive)))


def percentiles(ours: PartScorer, theirs: PartScorer, rng: np.random.Generator, size: int) -> dict[str, list[float]]:
    """The intervals as they were."""
    weights = rng.multinomial(size, np.full(size, 1 / size), 1000)
    drawn, others = ours(weights), theirs(weights)
    drawn |= {f"difference in {name}": drawn[name] - others[name] for name in ("accuracy", "auroc")}
    return {name: np.nanpercentile(drawn[name], [2.5, 97.5]).tolist() for name in METRICS}


def coverages(size: int, group: int, strength: float, repeats: int, truth: dict[str, float]) -> dict[str, list[float]]:
    """By metric, the share of old and of new intervals that hold the true value, and of samples that give a new one."""
    intervals.RESAMPLES = 500  # instead of 2,000: as good on average
    rng, hits = np.random.default_rng(1), {name: np.full((repeats, 2), np.nan) for name in METRICS}
    for repeat in range(repeats):
        labels, scores, units = draw(size, group, strength, rng)
        weaker = scores + rng.normal(0, 0.5 * strength, scores.shape)
        both = [scorer(labels, scores, positive="")], [scorer(labels, weaker, positive="")]
        new = intervals.with_intervals(scorer(labels, scores), units.tolist())
        paired = intervals.difference_over_seeds(*both, units.tolist())
        new |= {f"difference in {name}": entry for name, entry in paired.items()}
        old = {} if repeat % 5 else percentiles(scorer(labels, scores), both[1][0], rng, size)
        for name in METRICS:
            for column, bounds in enumerate([old.get(name), new[name]["interval"]]):
                if bounds:
                    hits[name][repeat, column] = bounds[0] <= truth[name] <= bounds[1]
    return {name: [*np.nanmean(its, 0), np.isfinite(its[:, 1]).mean()] for name, its in hits.items()}


def true_values(strength: float) -> dict[str, float]:
    """The metrics of the population, and those less a weaker model's."""
    rng = np.random.default_rng(0)
    labels, scores, _ = draw(400_000, 1, strength, rng)
    ours = {name: float(value[0]) for name, value in scorer(labels, scores)().items()}
    noise = rng.normal(0, 0.5 * strength, scores.shape)
    theirs = {name: float(value[0]) for name, value in scorer(labels, scores + noise)().items()}
    return ours | {f"difference in {name}": ours[name] - theirs[name] for name in ("accuracy", "auroc")}


def over_seeds(size: int, num_seeds: int, repeats: int) -> float:
    """Share of intervals that hold 0, the difference in accuracy of two equal ways to train over seeds."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(repeats):
        labels, scores, units = draw(size, 1, STRENGTHS[0.83], rng)
        models = [
            scorer(labels, scores + rng.normal(0, 4 * SEED_SD, 3) + rng.normal(0, 0.3, scores.shape))
            for _ in range(2 * num_seeds)
        ]
        found = intervals.difference_over_seeds(models[:num_seeds], models[num_seeds:], units.tolist())["accuracy"][
            "interval"
        ]
        held += found[0] <= 0 <= found[1]
    return held / repeats


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[48, 126, 150])
    parser.add_argument("--seeds", action="store_true", help="differences over seeds only")
    args = parser.parse_args()
    if args.seeds:
        print("| test images | seeds | holds 0 |\n| --- | --- | --- |")
        for size, num_seeds in ((48, 1), (48, 2), (48, 3), (48, 5), (150, 3), (150, 5)):
            print(f"| {size} | {num_seeds} | {over_seeds(size, num_seeds, args.repeats):.3f} |", flush=True)
        return
    columns = [(size, group) for size in args.sizes for group in (1, 2, 4)]
    for auroc, strength in STRENGTHS.items():
        truth = true_values(strength)
        with multiprocessing.Pool(2) as pool:
            cases = [(size, group, strength, args.repeats, truth) for size, group in columns]
            tables = pool.starmap(coverages, cases, chunksize=1)
        print(f"\n| AUROC {auroc} | true | {' | '.join(f'{n} / {group}' for n, group in columns)} |")
        print("| --- " * (2 + len(columns)) + "|")
        for name in METRICS:
            cells = [f"{old:.2f} {new:.3f}" + "*" * int(given < 0.99) for old, new, given in (t[name] for t in tables)]
            print(f"| {name} | {truth[name]:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
