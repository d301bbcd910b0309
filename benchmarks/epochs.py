"""What a choice of the epoch gains, and how optimistic it is: `--select best` against `--select last`, on one training.

    python benchmarks/epochs.py [--trials 8] [OPTION]...

Every other option is one of `tune/run.py`, such as --data MANIFEST --image-root FOLDER. Random points of the space are
trained in this process, and validation and test are scored after each epoch, the test under decisions that are fitted
on validation. So both ways see the same trainings. The optimism of a way is its validation score less its test score.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from train_fn.data.samples import Splits  # noqa: E402
from train_fn.jobs import EpochReport  # noqa: E402
from train_fn.model.base import Base, load_base  # noqa: E402
from train_fn.scoring.evaluation import predict  # noqa: E402
from train_fn.scoring.fitting import decide, fit_part  # noqa: E402
from train_fn.scoring.scores import metrics_of  # noqa: E402
from train_fn.support.storage import Storage  # noqa: E402
from train_fn.trial.loop import run_trial  # noqa: E402
from tune.config.cli import parse  # noqa: E402
from tune.plan.prepare import prepare  # noqa: E402
from tune.records.goals import epoch_goal, sign  # noqa: E402
from tune.search.points import propose  # noqa: E402

Way = tuple[float, float]
"""A trial's validation and test score by one way."""


def main() -> None:
    """Train the points and print, for both ways, mean scores and those of the trial that would have won."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=8)
    options, others = parser.parse_known_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        study = prepare(parse(["--results", folder, "--sampler", "random", *others]), lambda text: None)
        metric, mode = goal = epoch_goal(study.goals, "best") or study.goals[0]
        base = load_base(study.settings.model, torch.device("cpu"))
        ways: dict[str, list[Way]] = {"best": [], "last": []}
        for number in range(options.trials):
            point = propose(study, {}, number)
            assert point is not None
            epochs: list[Way] = []
            chosen = [0]

            def report(message: EpochReport, epochs: list[Way] = epochs, chosen: list[int] = chosen) -> bool:
                test = test_scores(base, study.splits)
                epochs.append((message.metrics[metric], test[metric]))
                chosen[0] = message.best_epoch
                return False

            output = Path(folder) / str(number)
            output.mkdir()
            run_trial(base, study.splits, point.settings, report, output=output, storage=Storage(output), best_by=goal)
            ways["best"].append(epochs[chosen[0] - 1])
            ways["last"].append(epochs[-1])
            print(number, chosen[0], *(f"{validation:.3f}/{test:.3f}" for validation, test in epochs), flush=True)
    print(f"{metric:10}{'validation':>12}{'test':>8}{'optimism':>10}   winner: validation, test")
    for way, scores in ways.items():
        validation, test = (statistics.mean(part) for part in zip(*scores, strict=True))
        won = min(scores, key=lambda score: sign(mode) * score[0])
        print(f"{way:10}{validation:12.3f}{test:8.3f}{validation - test:+10.3f}   {won[0]:.3f}, {won[1]:.3f}")


def test_scores(base: Base, splits: Splits) -> dict[str, float]:
    """Scores of the test under decisions that are fitted on validation, as in a study."""
    validation, test = (predict(base, part, splits, 16) for part in (splits.validation, splits.test))
    decided = decide(fit_part(validation, splits.validation, splits), test, splits.test, splits)
    return metrics_of(test, splits.test, splits, decided)


if __name__ == "__main__":
    main()
