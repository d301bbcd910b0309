"""Whether a cheaper training ranks settings like the full one, and whether it pays as the first rung of a search.

    OMP_NUM_THREADS=1 python benchmarks/fidelity.py [--folder fidelity] [--seeds 2] [--budgets 4 6 8] [OPTION]...

A fixed grid of settings is trained in this process at full fidelity, at 1/2 and 1/4 of the image tokens, and on 1/2
and 1/4 of the training images. Scores and CPU seconds are recorded after each epoch, so that the epochs of the full
training are a cheap fidelity, too: those of an interrupted training, which is what early stopping sees. Seconds are of
training and validation; vision features are computed once for each number of tokens and timed apart; scoring the test
is in neither. Every training is written to FOLDER/table.json, and an interrupted run goes on from there: each data set
needs a folder of its own. The tables are of the settings that are complete.

Every other option is one of `tune/run.py`, such as --data MANIFEST --image-root FOLDER. The full number of image tokens
is that of --max-image-tokens, otherwise 64, the nano base's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from scipy.stats import kendalltau, spearmanr  # noqa: E402

from benchmarks.epochs import test_scores  # noqa: E402
from train_fn.data.dealing import split_indices  # noqa: E402
from train_fn.data.samples import Splits, units_of  # noqa: E402
from train_fn.data.splitting import strata_of  # noqa: E402
from train_fn.jobs import EpochReport  # noqa: E402
from train_fn.model.base import Base, load_base  # noqa: E402
from train_fn.model.batches import num_tokens  # noqa: E402
from train_fn.model.preparation import prepare_features  # noqa: E402
from train_fn.settings import TrialSettings  # noqa: E402
from train_fn.support.files import read_json, write_json  # noqa: E402
from train_fn.trial.applied import TrialFailed  # noqa: E402
from train_fn.trial.loop import run_trial  # noqa: E402
from train_fn.trial.memory import wanted_execution  # noqa: E402
from tune.config.cli import parse  # noqa: E402
from tune.plan.prepare import prepare  # noqa: E402
from tune.records.goals import Goal, sign  # noqa: E402

NANO_TOKENS = 64
EPOCHS = 3
NUM_SETTINGS = 24
# Name -> share of the image tokens, share of the training images.
FIDELITIES = {"full": (1.0, 1.0), "1/2 tokens": (0.5, 1.0), "1/4 tokens": (0.25, 1.0), "1/2 data": (1.0, 0.5),
              "1/4 data": (1.0, 0.25)}  # fmt: skip
# Name -> fidelity and epoch whose score decides who goes on.
RUNGS = {
    "epoch 1": ("full", 1), "epoch 2": ("full", 2),
    "1/2 tokens": ("1/2 tokens", EPOCHS), "1/2 tokens, epoch 1": ("1/2 tokens", 1),
    "1/4 tokens": ("1/4 tokens", EPOCHS), "1/4 tokens, epoch 1": ("1/4 tokens", 1),
    "1/2 data": ("1/2 data", EPOCHS), "1/4 data": ("1/4 data", EPOCHS),
}  # fmt: skip
SHARE = 1 / 3  # of a rung goes on
BUDGETS = (4, 6, 8, 12)  # in full trainings; half of the grid at most, or all find its best
NUM_ORDERS, NUM_DRAWS = 500, 300
NUM_GRIDS, NUM_ORDERS_A_GRID = 60, 10


def grid(usual: TrialSettings) -> list[TrialSettings]:
    """The settings, shuffled: six rates, two global batches and two ranks in full, the projector in half of them (by
    parity, so that each value of the others meets both). On the nano base the lowest rate learns little and the highest
    fails."""
    rates, accumulations, ranks = (3e-5, 1e-4, 4e-4, 1.4e-3, 5e-3, 2e-2), (2, 8), (8, 64)
    choices = itertools.product(enumerate(rates), enumerate(accumulations), enumerate(ranks))
    settings = [
        dataclasses.replace(usual, learning_rate=rate, gradient_accumulation_steps=accumulation, lora_r=rank,
                            lora_alpha=2.0 * rank, train_projector=(a + b + c) % 2 == 1, num_train_epochs=EPOCHS)
        for (a, rate), (b, accumulation), (c, rank) in choices
    ]  # fmt: skip
    return [settings[number] for number in np.random.default_rng(0).permutation(len(settings))]


# ------------------------------------------------------------------------------------------------ the trainings


def part_of(splits: Splits, share: float) -> Splits:
    """The splits with a stratified part of the training images. Near-copies and groups stay together; half of the
    images hold the quarter."""
    train, left = splits.train, 1.0
    while left > share:
        kept = split_indices(strata_of(train), {"kept": 0.5, "left": 0.5}, 0, units_of(train))["kept"]
        train, left = tuple(train[index] for index in kept), left / 2
    return dataclasses.replace(splits, train=train)


def train(base: Base, splits: Splits, settings: TrialSettings, scores_test: bool) -> dict[str, Any]:
    """Metrics and CPU seconds after each epoch, and the scores of the test; "failed" for a training that fails."""
    found: dict[str, Any] = {"epochs": [], "seconds": [], "test": {}}
    start, test_s = time.process_time(), 0.0

    def report(message: EpochReport) -> bool:
        nonlocal test_s
        found["epochs"].append(message.metrics)
        found["seconds"].append(time.process_time() - start - test_s)
        if scores_test and message.finished:
            before = time.process_time()
            found["test"] = test_scores(base, splits)
            test_s += time.process_time() - before
        return False

    try:
        run_trial(base, splits, settings, report, execution=wanted_execution(settings, base.device))
    except TrialFailed as failure:
        found["failed"] = str(failure)
        found["seconds"].append(time.process_time() - start)
    return found


def fill(path: Path, options: argparse.Namespace, others: list[str]) -> tuple[dict[str, Any], Goal]:
    """Train what is missing in the table. Returns it and the goal."""
    study = prepare(parse(["--results", str(path.parent / "results"), "--name", f"of-{os.getpid()}", *others]), print)
    table: dict[str, Any] = read_json(path, dict) if path.exists() else {"runs": {}, "features_s": {}, "tokens": {}}
    full_tokens = study.settings.model.max_image_tokens or NANO_TOKENS
    bases, parts = {}, {share: part_of(study.splits, share) for _, share in FIDELITIES.values()}
    for share, _ in FIDELITIES.values():
        if share not in bases:
            limited = dataclasses.replace(study.settings.model, max_image_tokens=round(share * full_tokens))
            bases[share] = base = load_base(limited, torch.device("cpu"))
            start = time.process_time()
            images = (*study.splits.train, *study.splits.validation)
            prepare_features(base, [image for sample in images for image in sample.images])
            table["features_s"].setdefault(str(share), time.process_time() - start)
            table["tokens"][str(share)] = sum(num_tokens(base, sample) for sample in study.splits.train)
            write_json(path, table)
    settings = grid(study.settings.trial)[: options.settings]
    for seed, (number, setting) in itertools.product(range(options.seeds), enumerate(settings)):
        for name, (tokens, share) in FIDELITIES.items():
            key = f"{seed} {number} {name}"
            if key in table["runs"] or (seed and name != "full"):
                continue
            chosen = dataclasses.replace(setting, seed=seed)
            run = train(bases[tokens], parts[share], chosen, scores_test=name == "full")
            table["runs"][key] = run | {"setting": dataclasses.asdict(chosen)}
            write_json(path, table)
            metric = study.goals[0][0]
            scores = " ".join(f"{metrics.get(metric, math.nan):.3f}" for metrics in run["epochs"])
            tested = f" test {run['test'][metric]:.3f}" if run["test"] else ""
            print(f"{key:16} {chosen.learning_rate:7.0e} x{chosen.global_batch_size:2} r{chosen.lora_r:2} "
                  f"{'p' if chosen.train_projector else '-'} {run['seconds'][-1]:5.1f} s  {scores}{tested}",
                  flush=True)  # fmt: skip
    return table, study.goals[0]


# ------------------------------------------------------------------------------------------------ the tables


class Rung(NamedTuple):
    """A first rung. Arrays by setting."""

    signal: np.ndarray
    """What the settings are ranked by, the best highest."""
    first: np.ndarray
    """Seconds of the rung."""
    rest: np.ndarray
    """Seconds from the rung to the full score: of the other epochs, or of a full training."""
    fixed: float
    """Seconds that the rung costs beside, once: vision features of another size."""
    share: float = SHARE
    """Part of the settings that goes on."""


def complete(table: dict[str, Any], seed: int = 0) -> list[int]:
    """Settings that were trained at all fidelities, or with another seed at full fidelity."""
    names = list(FIDELITIES) if seed == 0 else ["full"]
    return [n for n in range(NUM_SETTINGS) if all(f"{seed} {n} {name}" in table["runs"] for name in names)]


def scores_of(table: dict[str, Any], goal: Goal, fidelity: str, epoch: int, seed: int = 0, test: bool = False) -> Any:
    """Score of each complete setting, the best highest; a training that failed has the worst one."""
    values = []
    for number in complete(table):
        run = table["runs"][f"{seed} {number} {fidelity}"]
        metrics = run["test"] if test else run["epochs"][epoch - 1] if len(run["epochs"]) >= epoch else {}
        values.append(-sign(goal[1]) * metrics.get(goal[0], math.nan))
    scores = np.array(values)
    return np.where(np.isnan(scores), np.nanmin(scores), scores)


def seconds_of(table: dict[str, Any], fidelity: str, epoch: int) -> np.ndarray:
    """CPU seconds of each complete setting up to an epoch; of a training that failed, up to its end."""
    found = [table["runs"][f"0 {number} {fidelity}"]["seconds"] for number in complete(table)]
    return np.array([seconds[min(epoch, len(seconds)) - 1] for seconds in found])


def interval(measure: Callable[..., Any], one: np.ndarray, other: np.ndarray) -> str:
    """A rank correlation with its 95 % bootstrap interval over the settings."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(one), size=len(one)) for _ in range(NUM_DRAWS)]
    low, high = np.nanpercentile([measure(one[draw], other[draw])[0] for draw in draws], [2.5, 97.5])
    return f"{measure(one, other)[0]:.2f} ({low:.2f} to {high:.2f})"


def halve(order: np.ndarray, rung: Rung, budget: float) -> np.ndarray:
    """The settings that a search over the first ones of an order trains to the end, for at most a budget of seconds.

    As many settings as the budget allows enter the rung, and its best share goes on (synchronous successive halving).
    """
    finished = order[:0]
    for count in range(1, len(order) + 1):
        its = order[:count]
        kept = its[np.argsort(-rung.signal[its], kind="stable")][: math.ceil(count * rung.share)]
        if rung.fixed + rung.first[its].sum() + rung.rest[kept].sum() > budget:
            break
        finished = kept
    return finished


def rungs_of(table: dict[str, Any], goal: Goal, measured: bool) -> dict[str, Rung]:
    """All first rungs, and random search ("full length").

    Args:
        measured: whether costs are the CPU seconds. Otherwise a share of the tokens, images or epochs costs that share
            of a full training, and vision features cost nothing: what a cheap fidelity costs at best.
    """
    full = seconds_of(table, "full", EPOCHS) if measured else np.ones(len(seconds_of(table, "full", 1)))
    rungs = {"full length": Rung(full, 0 * full, full, 0.0, share=1.0)}
    for name, (fidelity, epoch) in RUNGS.items():
        tokens, images = FIDELITIES[fidelity]
        first = seconds_of(table, fidelity, epoch) if measured else full * tokens * images * epoch / EPOCHS
        fixed = table["features_s"][str(tokens)] if measured and tokens < 1 else 0.0
        rest = full - first if fidelity == "full" else full
        rungs[name] = Rung(scores_of(table, goal, fidelity, epoch), first, rest, fixed)
    return rungs


def truth_of(table: dict[str, Any], goal: Goal, num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The full training's validation score of each setting (seed 0) and its test score (mean over the seeds)."""
    tests = [scores_of(table, goal, "full", EPOCHS, seed, test=True) for seed in range(num_seeds)]
    return scores_of(table, goal, "full", EPOCHS), np.mean(tests, axis=0)


def print_correlations(table: dict[str, Any], goal: Goal, num_seeds: int) -> None:
    """How each cheap fidelity ranks the settings, against the full training's validation and test."""
    validation, test = truth_of(table, goal, num_seeds)
    parts = [f"{measure}, {part}" for part in ("validation", "test") for measure in ("Spearman", "Kendall")]
    print(f"\n| {goal[0]} | CPU seconds | token-epochs | {' | '.join(parts)} |\n{'| --- ' * 7}|")
    full_s, full_tokens = seconds_of(table, "full", EPOCHS).mean(), table["tokens"]["1.0"]
    rows: dict[str, tuple[str, int, int]] = {name: (*rung, 0) for name, rung in RUNGS.items()}
    rows |= {"another seed": ("full", EPOCHS, 1)} if num_seeds > 1 else {}
    for name, (fidelity, epoch, seed) in rows.items():
        tokens, images = FIDELITIES[fidelity]
        cost = seconds_of(table, fidelity, epoch).mean() / full_s
        work = table["tokens"][str(tokens)] / full_tokens * images * epoch / EPOCHS
        signal = scores_of(table, goal, fidelity, epoch, seed)
        found = [interval(measure, signal, part) for part in (validation, test) for measure in (spearmanr, kendalltau)]
        print(f"| {name} | {cost:.2f} | {work:.2f} | {' | '.join(found)} |", flush=True)
    print(f"| full | 1 | 1 | | | {interval(spearmanr, validation, test)} | {interval(kendalltau, validation, test)} |")
    features = ", ".join(f"{share} of the tokens {seconds:.1f}" for share, seconds in table["features_s"].items())
    print(f"\nA full training: {full_s:.1f} CPU seconds; vision features, once: {features}.")
    for part, scores in (("validation", validation), ("test", test)):
        low, *quartiles, high = np.percentile(scores, [0, 25, 50, 75, 100])
        print(f"{part}: {low:.3f} to {high:.3f}, quartiles {', '.join(f'{score:.3f}' for score in quartiles)}")
    if num_seeds > 1:
        gaps = validation - scores_of(table, goal, "full", EPOCHS, 1)
        print(f"standard deviation of a setting's validation over seeds: {np.sqrt((gaps**2).mean() / 2):.3f}")


def print_tables(table: dict[str, Any], goal: Goal, budgets: Sequence[float]) -> None:
    """All tables of the settings that are complete."""
    num_seeds = 1 + (set(complete(table)) <= set(complete(table, 1)))
    print_correlations(table, goal, num_seeds)
    for measured in (True, False):
        print_regrets(table, goal, num_seeds, budgets, measured)


def regrets_of(rung: Rung, orders: list[np.ndarray], budget: float, truth: tuple[np.ndarray, ...]) -> np.ndarray:
    """Regret in validation and test [2, orders] of the setting with the best validation among those that a search
    trains to the end, against the best of all settings in the orders."""
    validation, test = truth
    picked = [max(halve(order, rung, budget), key=lambda number: validation[number]) for order in orders]
    return np.array([scores[orders[0]].max() - scores[picked] for scores in (validation, test)])


def print_regrets(table: dict[str, Any], goal: Goal, num_seeds: int, budgets: Sequence[float], measured: bool) -> None:
    """Regret of searches over random orders of the settings at equal cost, and the mean regret against epoch 1's."""
    truth, rungs, rng = truth_of(table, goal, num_seeds), rungs_of(table, goal, measured), np.random.default_rng(0)
    size, full_s = len(truth[0]), rungs["full length"].rest.mean()
    orders = [rng.permutation(size) for _ in range(NUM_ORDERS)]
    print(f"\n{'CPU seconds' if measured else 'Costs as low as they could be'}: regret in validation {goal[0]}, median "
          f"(quartiles) over {NUM_ORDERS:,} orders, by budget in full trainings")  # fmt: skip
    print(f"\n| first rung | {' | '.join(map(str, budgets))} | mean | test: mean |\n{'| --- ' * (3 + len(budgets))}|")
    for name, rung in rungs.items():
        found = np.array(
            [regrets_of(rung, orders, budget * full_s, truth) for budget in budgets]
        )  # [budgets, 2, orders]
        cells = [
            f"{mid:.3f} ({low:.3f} to {high:.3f})" for low, mid, high in np.percentile(found[:, 0], [25, 50, 75], 1).T
        ]
        mean, on_test = found.mean((0, 2))
        print(f"| {name} | {' | '.join(cells)} | {mean:.4f} | {on_test:.4f} |", flush=True)
    # A draw of the settings with replacement stands for another grid.
    grids = [rng.integers(size, size=size) for _ in range(NUM_GRIDS)]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in rungs}
    for its in grids:
        orders = [rng.permutation(its) for _ in range(NUM_ORDERS_A_GRID)]
        for name, rung in rungs.items():
            found = [regrets_of(rung, orders, budget * full_s, truth).mean(1) for budget in budgets]
            drawn[name].append(np.mean(found, axis=0))
    print("\nMean regret less that of epoch 1, 95 % interval over resampled grids\n")
    print("| first rung | validation | test |\n| --- | --- | --- |")
    for name, values in drawn.items():
        if name == "epoch 1":
            continue
        gaps = np.array(values) - np.array(drawn["epoch 1"])  # [grids, 2]
        cells = [
            f"{gap.mean():+.4f} ({low:+.4f} to {high:+.4f})"
            for gap in gaps.T
            for low, high in [np.percentile(gap, [2.5, 97.5])]
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("fidelity"))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each setting at full fidelity")
    parser.add_argument("--settings", type=int, default=NUM_SETTINGS, help="how many of the grid's settings")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="in full trainings")
    options, others = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ["XDG_CACHE_HOME"] = str(options.folder.resolve() / "cache")  # empty, so that features are timed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    table, goal = fill(options.folder / "table.json", options, others)
    print_tables(table, goal, options.budgets)


if __name__ == "__main__":
    main()
