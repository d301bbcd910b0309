"""95 % intervals of test scores, and of the paired differences of two models.

Standard errors come from leaving out one unit at a time (the jackknife), so that nothing depends on a seed, and samples
of one unit (a patient, near-copies) count as one observation. A score with bounds gets Wilson's interval for the number
of samples that has this standard error: for a share of independent samples that is Wilson's own, and no perfect score
has an interval of width 0. `benchmarks/coverage.py` measures how often intervals hold the true value.

Shapes: N samples, U units, R rows of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from train_fn.scoring.metrics import METRICS
from tune.records.goals import metric_of

Scorer = Callable[[np.ndarray | None], dict[str, np.ndarray]]  # metrics [R] under weights [R, N]
Interval = dict[str, Any]  # "value", and "interval" [low, high] or None
Error = tuple[float, float]  # standard error, and its degrees of freedom

MIN_UNITS = 10  # with fewer, no standard error can be trusted
MAX_LEFT_OUT = 1000  # more units are left out in this many random blocks
RESAMPLES = 2000  # for metrics whose value jumps, where the jackknife does not hold
JUMPING = ("sensitivity_at_specificity_90", "specificity_at_sensitivity_90")
SHARES = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "exact_match", "parsed")  # of samples
AREAS = ("auroc", "label_auroc")
BIASED = ("ece",)  # of few samples far above its value of many: no interval around it holds that
BLOCK = 1 << 22  # weights that are made at a time


class Part:
    """The samples that are scored, and their units."""

    def __init__(self, units: Sequence[int], chosen: np.ndarray | None = None) -> None:
        """
        Args:
            units: number of each sample's unit [N].
            chosen: indices of the samples that count; None: all.
        """
        self.counted = np.ones(len(units)) if chosen is None else np.bincount(chosen, minlength=len(units)) > 0
        there, numbers = np.unique(np.asarray(units)[self.counted > 0], return_inverse=True)
        self.num_units = len(there)
        self.unit = np.full(len(units), -1)
        self.unit[self.counted > 0] = numbers

    def weights(self, of_units: np.ndarray) -> np.ndarray:
        """Weights of the samples [R, N] from those of the units [R, U]."""
        return np.where(self.unit >= 0, of_units[:, self.unit], 0)

    def score(self, scorer: Scorer, of_units: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
        """The metrics under weights of the units, which come in blocks [R, U]."""
        blocks = [scorer(self.weights(block)) for block in of_units]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def value(self, scorer: Scorer) -> dict[str, np.ndarray]:
        """The metrics of the part [1]."""
        return scorer(self.weights(np.ones((1, self.num_units))))

    def rows(self) -> int:
        """Rows of weights that are made at a time."""
        return max(1, BLOCK // len(self.unit))

    def left_out(self) -> Iterator[np.ndarray]:
        """Rows that leave out a unit each, or, of many units, one of MAX_LEFT_OUT random blocks."""
        block = np.arange(self.num_units)
        if self.num_units > MAX_LEFT_OUT:
            block = np.random.default_rng(0).permutation(self.num_units) % MAX_LEFT_OUT
        for start in range(0, min(self.num_units, MAX_LEFT_OUT), self.rows()):
            stop = min(start + self.rows(), self.num_units, MAX_LEFT_OUT)
            yield (block != np.arange(start, stop)[:, None]).astype(np.uint8)

    def alone(self) -> Iterator[np.ndarray]:
        """Rows with a unit each."""
        for start in range(0, self.num_units, self.rows()):
            stop = min(start + self.rows(), self.num_units)
            yield (np.arange(self.num_units) == np.arange(start, stop)[:, None]).astype(np.uint8)

    def drawn(self) -> Iterator[np.ndarray]:
        """Rows that draw as many units as there are, with replacement."""
        rng = np.random.default_rng(0)
        for start in range(0, RESAMPLES, self.rows()):
            size = min(self.rows(), RESAMPLES - start)
            drawn = rng.integers(0, self.num_units, (size, self.num_units)) + np.arange(size)[:, None] * self.num_units
            yield np.bincount(drawn.ravel(), minlength=size * self.num_units).reshape(size, self.num_units)

    def standard_errors(self, scorer: Scorer) -> dict[str, Error]:
        """The standard error of each metric by samples; NaN where the metric hangs on a single unit."""
        errors = {}
        for name, values in self.score(scorer, self.left_out()).items():
            size = len(values)
            moments = np.mean((values - values.mean()) ** 2), np.mean((values - values.mean()) ** 4)
            freedom = size - 1.0
            if plain(name) not in SHARES and moments[0] > 0:
                # Var(s^2) / s^4 = excess kurtosis / n + 2 / (n - 1): with a long tail a variance is less certain.
                excess = max(0.0, float(moments[1] / moments[0] ** 2) - 3)
                freedom = 2 / (excess / size + 2 / freedom)
            errors[name] = math.sqrt((size - 1) * float(moments[0])), freedom
        if any(plain(name) in JUMPING for name in errors):
            for name, values in self.score(scorer, self.drawn()).items():
                if plain(name) in JUMPING:
                    finite = values[np.isfinite(values)]
                    error = float(np.std(finite)) if len(finite) > RESAMPLES / 2 else math.nan
                    errors[name] = error, self.num_units - 1.0
        return errors


def plain(name: str) -> str:
    """The metric of a name such as modality/accuracy_raw, without task and suffix."""
    return metric_of(name).removesuffix("_raw")


def with_intervals(scorer: Scorer, units: Sequence[int], chosen: np.ndarray | None = None) -> dict[str, Interval]:
    """Each metric of a part as {"value", "interval"}.

    Args:
        units: number of each sample's unit [N], see `train_fn.data.samples.units_of`.
        chosen: indices of the samples that count, such as those without near-copies in training; None: all.

    Returns:
        By metric; "interval" is None where the samples cannot give one.
    """
    part = Part(units, chosen)
    values = {name: float(value[0]) for name, value in part.value(scorer).items()}
    found = {name: Interval(value=value, interval=None) for name, value in values.items()}
    if part.num_units < MIN_UNITS:
        return found
    sizes = dict.fromkeys(values, float(part.num_units))
    if any(plain(name) in SHARES and value in (0, 1) for name, value in values.items()):
        alone = part.score(scorer, part.alone())  # a share has a value for each unit that is counted in it
        shares = {name: its for name, its in alone.items() if plain(name) in SHARES}
        sizes |= {name: float(np.isfinite(its).sum()) or sizes[name] for name, its in shares.items()}
    for name, error in part.standard_errors(scorer).items():
        if plain(name) not in BIASED and math.isfinite(values[name]) and math.isfinite(error[0]):
            found[name]["interval"] = interval(name, values[name], error, sizes[name])
    return found


def interval(name: str, value: float, error: Error, size: float) -> list[float]:
    """The interval of a metric; see the head of the file.

    Args:
        size: units behind it. For a perfect score, or an area under the curve near 1, no more samples are assumed,
            however small the error.
    """
    metric = METRICS.get(metric_of(name))
    low, high = (metric.low, metric.high) if metric else (-math.inf, math.inf)
    quantile, deviation = t_quantile(error[1]), error[0]
    if deviation < 1e-12 and low < value < high:
        return [value, value]  # of a model that always answers the same, whatever the samples are
    if math.isfinite(low) and math.isfinite(high):
        share, deviation = (value - low) / (high - low), deviation / (high - low)
        number = share * (1 - share) / deviation**2 if deviation > 0 else math.inf
        if plain(name) in AREAS or not 0 < share < 1:
            number = min(number or math.inf, size)
        return [float(low + (high - low) * bound) for bound in wilson(share, number, quantile)]
    if low == 0 and value > 0:  # on the scale of the logarithm: errors have a long tail
        factor = math.exp(min(quantile * deviation / value, 700.0))
        return [value / factor, value * factor]
    return [value - quantile * deviation, value + quantile * deviation]


def wilson(share: Any, number: Any, quantile: float) -> tuple[Any, Any]:
    """Wilson's interval (1927) of a share among a number of samples, which need not be whole; numbers or arrays."""
    spread = quantile**2 / number
    middle = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return np.maximum(0.0, middle - half), np.minimum(1.0, middle + half)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


# ------------------------------------------------------------------------------------------------ differences


def mean_of(scorers: Sequence[Scorer]) -> Scorer:
    """The mean of each metric over several models."""

    def score(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        found = [scorer(weights) for scorer in scorers]
        shared = [name for name in found[0] if all(name in its for its in found)]
        return {name: np.mean([its[name] for its in found], 0) for name in shared}

    return score


def minus(one: Scorer, other: Scorer) -> Scorer:
    """One model's metrics minus another's under the same weights, which pairs them."""

    def score(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        first, second = one(weights), other(weights)
        return {name: first[name] - second[name] for name in first if name in second}

    return score


def difference(
    one: Scorer, other: Scorer, units: Sequence[int], chosen: np.ndarray | None = None
) -> dict[str, Interval]:
    """The paired difference of two models on the same samples: one minus the other; see `with_intervals`."""
    return difference_over_seeds([one], [other], units, chosen)


def difference_over_seeds(
    ours: Sequence[Scorer], theirs: Sequence[Scorer], units: Sequence[int], chosen: np.ndarray | None = None
) -> dict[str, Interval]:
    """The mean over our seeds minus the mean over theirs, on the same samples.

    The variance is that by samples plus that of each mean over its seeds. Of a single seed the latter is not known, and
    left out: the interval then compares two trained models, not two ways to train.

    Args:
        ours: a model for each seed.
        theirs: in the same way; their number may differ.
    """
    part = Part(units, chosen)
    paired = minus(mean_of(ours), mean_of(theirs))
    by_seed = [[part.value(scorer) for scorer in side] for side in (ours, theirs) if len(side) > 1]
    found = {name: Interval(value=float(value[0]), interval=None) for name, value in part.value(paired).items()}
    if part.num_units < MIN_UNITS:
        return found
    for name, (error, freedom) in part.standard_errors(paired).items():
        parts = [(error**2, freedom)]  # variances and their degrees of freedom
        parts += [(float(np.var([its[name] for its in side], ddof=1)) / len(side), len(side) - 1) for side in by_seed]
        value, variance = found[name]["value"], sum(variance for variance, _ in parts)
        if plain(name) not in BIASED and math.isfinite(value + variance):
            if variance:  # Satterthwaite (1946)
                freedom = variance**2 / sum(its**2 / degrees for its, degrees in parts)
            half = t_quantile(freedom) * math.sqrt(variance)
            metric = METRICS.get(metric_of(name))
            if not variance and metric and math.isfinite(metric.high):  # no unit tells the models apart
                half = (metric.high - metric.low) * (1 - wilson(1.0, part.num_units, t_quantile(freedom))[0])
            found[name]["interval"] = [value - half, value + half]
    return found
