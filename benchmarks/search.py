"""Which search finds a good setting for less: random points, with and without early stopping, or TPE.

    python benchmarks/search.py [--folder search] [--points 100] [--seeds 10] [--budget 100] [OPTION]...

Every other option is one of `tune/run.py`, such as --space benchmarks/headroom.py --data MANIFEST --image-root FOLDER
--metric macro_f1. All runs in this process on one thread, without Ray, and goes on where it was ended. `--part pool`
and `--part live` do one part each, so that two processes can share the work.

1. A pool: the guide's point and random ones, each trained to its end, with validation and test scores after each epoch
   and at the rungs within epochs. Random search is played on the pool in many orders, without early stopping, and with
   ASHA (the product's `should_stop`) from several grace periods on.
2. TPE runs live for each seed (the product's `propose` and `should_stop`), since its points depend on its scores: in
   the same space, and in the default space.

All arms have the same budget of CPU seconds. A trial costs its training and the evaluations that its arm makes. Only
trials that ran to their end can win, so the best score is of those. Its validation score is what the search maximises.
Its test score is what the user gets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from train_fn.jobs import EpochReport, Verdict  # noqa: E402
from train_fn.model.base import Base, load_base  # noqa: E402
from train_fn.scoring.evaluation import predict  # noqa: E402
from train_fn.scoring.fitting import decide, fit_part  # noqa: E402
from train_fn.scoring.metrics import MODES  # noqa: E402
from train_fn.scoring.scores import metrics_of  # noqa: E402
from train_fn.trial import loop  # noqa: E402
from train_fn.trial.applied import TrialFailed  # noqa: E402
from tune.config.cli import parse  # noqa: E402
from tune.plan.prepare import Study, prepare  # noqa: E402
from tune.records.end_state import EndState  # noqa: E402
from tune.records.goals import sign  # noqa: E402
from tune.records.trials import TrialRecord  # noqa: E402
from tune.search.early_stopping import rungs, should_stop  # noqa: E402
from tune.search.point import Point  # noqa: E402
from tune.search.points import as_json, propose  # noqa: E402

POOL_RUNGS = (0.5, 1.5)  # those within epochs of all grace periods below
PLAYED = {
    "random, full length": ["--scheduler", "none"],
    "random, ASHA from 1": ["--grace-period", "1"],
    "random, ASHA from 0.5": ["--grace-period", "0.5"],
    "random, median from 0.5": ["--scheduler", "median", "--grace-period", "0.5"],
}
DEFAULT_SPACE = "lora"
LIVE = {
    "TPE, ASHA from 1": ["--grace-period", "1"],
    "TPE, ASHA from 0.5": ["--grace-period", "0.5"],
    "default space, TPE, ASHA": ["--space", DEFAULT_SPACE],
}
NUM_ORDERS = 200
NEAR = 0.01  # of the best score in the pool
Row = dict[str, Any]
"""A trial: `searched`, `settings`, `distributions`, `error`, and its `reports`, each with `progress`, `metrics`, `test`
(metrics, of epochs that are the best so far), `train_s` and `evaluation_s` (CPU seconds since the report before), and
`most` (the share of the validation images that get the most frequent answer, without a fitted decision)."""
Curve = list[tuple[float, float, float]]
"""After each trial: CPU seconds so far, and validation and test score of the best completed trial; NaN: none yet."""


# ------------------------------------------------------------------------------------------------ training


class Trainer:
    """Trains trials in this process, and counts their CPU seconds."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.base: Base = load_base(study.settings.model, torch.device("cpu"))
        self.evaluate = loop.evaluate
        loop.evaluate = self.evaluate_and_keep

    def evaluate_and_keep(self, *args: Any) -> Any:
        """Stands for `evaluate` in the training loop."""
        start = time.process_time()
        self.evaluation = self.evaluate(*args)
        self.evaluation_s = time.process_time() - start
        return self.evaluation

    def __call__(self, point: Point, at: Sequence[float], stop: Any = lambda report: False) -> Row:
        """Train one point.

        Args:
            at: the rungs within epochs at which it is evaluated.
            stop: returns whether a trial ends after one of its reports.
        """
        row: Row = {"searched": as_json(point.searched), "settings": asdict(point.settings), "error": "",
                    "distributions": point.distributions, "reports": []}  # fmt: skip
        started = time.process_time()

        def report(message: EpochReport) -> Verdict:
            nonlocal started
            train_s = time.process_time() - started - self.evaluation_s
            scores = self.evaluation.predicted["scores"]
            most = float(np.bincount(scores.argmax(1)).max() / len(scores))
            is_best = message.progress == message.epoch == message.best_epoch
            test = self.test_scores() if is_best else {}
            its = {"progress": message.progress, "metrics": message.metrics, "test": test, "train_s": train_s,
                   "evaluation_s": self.evaluation_s, "most": most, "finished": message.finished}  # fmt: skip
            row["reports"].append(its)
            verdict = Verdict.END if stop(its) else Verdict.GO_ON
            started = time.process_time()
            return verdict

        try:
            loop.run_trial(self.base, self.study.splits, point.settings, report, rungs=at, best_by=self.study.goals[0])
        except TrialFailed as error:
            row["error"] = str(error)
        row["lost_s"] = time.process_time() - started  # of a trial that failed: since its last report
        return row

    def test_scores(self) -> dict[str, float]:
        """Scores of the test under decisions that are fitted on validation, as in a study."""
        splits = self.study.splits
        test = predict(self.base, splits.test, splits, 16)
        decisions = fit_part(self.evaluation.predicted, splits.validation, splits)
        return metrics_of(test, splits.test, splits, decide(decisions, test, splits.test, splits))


def make_pool(trainer: Trainer, path: Path, points: int) -> list[Row]:
    """The rows of the pool: those of the file, and those that it lacks."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    settings = trainer.study.settings
    random_study = replace(settings.study, sampler="random", study_seed=1000)
    study = replace(trainer.study, settings=replace(settings, study=random_study))
    with path.open("a") as file:
        for number in range(len(rows), points + 1):
            point = propose(study, {}, number)
            assert point is not None
            rows.append(trainer(point, POOL_RUNGS))
            print(json.dumps(rows[-1]), file=file, flush=True)
            print(number, summary(rows[-1], study.metric), file=sys.stderr, flush=True)
    return rows


def summary(row: Row, metric: str) -> str:
    """A trial in one line."""
    scores = " ".join(f"{its['progress']:g}:{its['metrics'][metric]:.3f}" for its in row["reports"])
    return f"{scores} {cost(row['reports'], row):.1f} s {row['searched']} {row['error'][:60]}"


# ------------------------------------------------------------------------------------------------ one search


class Search:
    """A search with one lane: its records, what it has spent, and the best trial so far.

    Args:
        argv: the options of the arm.
        studied: the study whose other settings it has.
    """

    def __init__(self, studied: Study, argv: Sequence[str], metric: str = "") -> None:
        given = parse(["--metric", metric or studied.metric, *argv]).study
        names = ("scheduler", "grace_period", "sampler", "study_seed")
        changed = replace(studied.settings.study, **{name: getattr(given, name) for name in names})
        self.study = replace(studied, settings=replace(studied.settings, study=changed))
        self.goal = (metric, "max") if metric else studied.goals[0]
        self.records: dict[int, TrialRecord] = {}
        self.tests: dict[int, list[float]] = {}  # test score after each epoch, by trial
        self.seq, self.spent_s = 0, 0.0
        self.curve: Curve = []

    @property
    def rungs(self) -> list[float]:
        """The rungs within epochs."""
        return [rung for rung in rungs(self.study.settings.study, (self.goal,)) if not rung.is_integer()]

    def start(self, row: Row) -> int:
        """Begin a trial. Returns its number."""
        number = len(self.records)
        fields = {name: row[name] for name in ("searched", "settings", "distributions")}
        self.records[number] = TrialRecord.of({"number": number, **fields})
        self.tests[number] = []
        return number

    def stops(self, number: int, report: Row) -> bool:
        """Take in a report. Returns whether early stopping ends the trial."""
        name, mode = self.goal
        record = self.records[number]
        epoch = len(record.epochs) + 1
        scores = [*(sign(mode) * metrics[name] for metrics in record.epochs), sign(mode) * report["metrics"][name]]
        best = int(np.argmin(scores)) + 1 if report["progress"] == epoch else record.best_epoch
        event = {"event": "report", "epoch": epoch, "best_epoch": best, "seq": self.seq, "seconds": {}, "wall_s": 0.0,
                 "waited_s": 0.0, "device_s": 0.0, **report}  # fmt: skip
        self.seq += 1
        record.apply(event)
        if report["progress"] == epoch:
            self.tests[number].append(report["test"].get(name, np.nan))
        return bool(should_stop(self.records, number, record.progress, self.study.settings.study, (self.goal,)))

    def end(self, number: int, spent_s: float, failed: bool) -> None:
        """End a trial."""
        record = self.records[number]
        record.state = EndState.FAILED if failed else EndState.COMPLETE if record.finished else EndState.STOPPED
        self.spent_s += spent_s
        complete = [record for record in self.records.values() if record.state == EndState.COMPLETE]
        best = min(complete, key=lambda each: sign(self.goal[1]) * each.value(self.goal[0]), default=None)
        scores = (best.value(self.goal[0]), self.tests[best.number][best.best_epoch - 1]) if best else (np.nan,) * 2
        self.curve.append((self.spent_s, *scores))


def cost(reports: Iterable[Row], row: Row) -> float:
    """CPU seconds of a trial with these of its reports."""
    return sum(its["train_s"] + its["evaluation_s"] for its in reports) + (row["lost_s"] if row["error"] else 0.0)


def after_epochs(row: Row) -> list[Row]:
    """The reports of a trial after its epochs."""
    return [report for report in row["reports"] if report["progress"] % 1 == 0]


def play(search: Search, rows: Iterator[Row], budget_s: float) -> Search:
    """Play a search on rows of the pool."""
    while search.spent_s < budget_s and (row := next(rows, None)):
        number, made, train_s, error = search.start(row), [], 0.0, row["error"]
        for report in row["reports"]:
            train_s += report["train_s"]
            if report["progress"] % 1 == 0 or report["progress"] in search.rungs:
                made.append(report | {"train_s": train_s})  # with that since the last report that this arm makes
                train_s = 0.0
                if search.stops(number, report):
                    error = ""  # of a failure that it does not come to
                    break
        search.end(number, cost(made, row | {"error": error}), bool(error))
    return search


def run_live(trainer: Trainer, search: Search, path: Path, budget_s: float) -> Search:
    """Run a search, or take its trials from the file where it has run before."""
    rows = iter(json.loads(path.read_text()) if path.exists() else [])
    made: list[Row] = []
    while search.spent_s < budget_s:
        row = next(rows, None)
        if row is None:
            if path.exists():
                break
            point = propose(search.study, search.records, len(search.records))
            assert point is not None
            shell = {"searched": as_json(point.searched), "settings": {}, "distributions": point.distributions}
            number = search.start(shell)
            row = trainer(point, search.rungs, lambda report, number=number: search.stops(number, report))
        else:
            number = search.start(row)
            for report in row["reports"]:
                search.stops(number, report)
        made.append(row)
        search.end(number, cost(row["reports"], row), bool(row["error"]))
    if not path.exists():
        path.write_text(json.dumps(made))
        print(path.name, search.curve[-1], len(made), file=sys.stderr, flush=True)
    return search


# ------------------------------------------------------------------------------------------------ tables


def at(curve: Curve, budget_s: float) -> tuple[float, float]:
    """Validation and test score of the best trial within a budget; NaN: none was completed."""
    return next((scores for spent, *scores in reversed(curve) if spent <= budget_s), (np.nan, np.nan))  # type: ignore[return-value]


def show_arms(arms: dict[str, list[Search]], best: float, mode: str, budget_s: float) -> None:
    """Print what each arm has found at shares of the budget."""
    for share in (0.25, 0.5, 1.0):
        print(f"\nafter {share * budget_s:.0f} CPU seconds ({share:.0%} of the budget): median (quartiles)")
        print(f"{'arm':26}{'validation':>24}{'test':>24}{'near the best':>15}{'trials':>8}{'complete':>10}")
        for arm, searches in arms.items():
            scores = np.array([at(search.curve, share * budget_s) for search in searches])
            cells = [
                "{1:.3f} ({0:.3f} to {2:.3f})".format(*np.nanpercentile(column, [25, 50, 75])) for column in scores.T
            ]
            near = np.mean(sign(mode) * scores[:, 0] <= sign(mode) * best + NEAR)
            counts = [[spent <= share * budget_s for spent, *_ in search.curve] for search in searches]
            states = [[r.state == EndState.COMPLETE for r in search.records.values()] for search in searches]
            complete = np.mean([np.sum(np.array(c) & np.array(s)) for c, s in zip(counts, states, strict=True)])
            trials = np.mean([sum(count) for count in counts])
            print(f"{arm:26}{cells[0]:>24}{cells[1]:>24}{near:15.2f}{trials:8.1f}{complete:10.1f}")


def show_ranks(rows: list[Row], metrics: Sequence[str]) -> None:
    """Print how well a score within the training tells which trials end well: its rank correlation with the best of
    the epochs, and that one's with the test."""
    from scipy.stats import spearmanr

    marks = sorted({report["progress"] for row in rows for report in row["reports"]})[:-1]
    print(f"\nrank correlation (Spearman) over {len(rows)} points of a score with the best of its trial's epochs")
    print(f"{'score':20}" + "".join(f"{f'after {mark:g}':>12}" for mark in marks) + f"{'with the test':>16}")
    for metric in metrics:
        mode = MODES[metric]
        best = [min(after_epochs(row), key=lambda its: sign(mode) * its["metrics"][metric]) for row in rows]
        finals = [its["metrics"][metric] for its in best]
        scored = [(its["metrics"][metric], its["test"][metric]) for its in best if its["test"]]
        cells = [
            spearmanr(
                [next(r["metrics"][metric] for r in row["reports"] if r["progress"] == mark) for row in rows], finals
            )
            for mark in marks
        ]
        test = spearmanr(*zip(*scored, strict=True)).statistic
        print(f"{metric:20}" + "".join(f"{cell.statistic:12.2f}" for cell in cells) + f"{test:11.2f} ({len(scored)})")


def show_shapes(rows: list[Row], metric: str, mode: str) -> None:
    """Print how trials end whose loss or answers looked hopeless after the first epoch."""
    whole = [row for row in rows if row["reports"] and row["reports"][-1]["finished"]]
    finals = np.array([min(sign(mode) * r["metrics"][metric] for r in after_epochs(row)) for row in whole])
    ranks = finals.argsort().argsort()
    firsts = [next(report for report in row["reports"] if report["progress"] == 1) for row in whole]
    shapes = {"one answer for all images": [first["most"] == 1.0 for first in firsts]}
    shapes |= {"one answer for 95 %": [first["most"] >= 0.95 for first in firsts]}
    lowest = min(first["metrics"]["train_loss"] for first in firsts)
    for factor in (2, 3, 5):
        shapes[f"training loss over {factor} x the lowest"] = [
            first["metrics"]["train_loss"] > factor * lowest for first in firsts
        ]
    print(
        f"\nafter the first epoch of the {len(whole)} trials of the pool that ended ({len(rows) - len(whole)} failed)"
    )
    print(f"{'shape':36}{'trials':>8}{'in the best tenth':>20}{'third':>8}{'best rank':>11}")
    for shape, those in shapes.items():
        its = ranks[np.array(those)]
        best = its.min() + 1 if len(its) else "-"
        print(f"{shape:36}{len(its):8}{sum(its < len(whole) / 10):20}{sum(its < len(whole) / 3):8}{best:>11}")


def make_study(argv: Sequence[str], images: int) -> Study:
    """A study with these options of `tune/run.py` and at most so many training images; 0: all of them."""
    with tempfile.TemporaryDirectory() as folder:
        study = prepare(parse(["--results", folder, *argv]), lambda text: None)
    if not images:
        return study
    train = random.Random(0).sample(study.splits.train, images)
    return replace(study, splits=replace(study.splits, train=tuple(train)))


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("search"))
    parser.add_argument("--points", type=int, default=100, help="random points of the pool")
    parser.add_argument("--seeds", type=int, default=10, help="of the live arms; 0: none")
    parser.add_argument("--budget", type=float, default=100, help="CPU seconds of a search")
    parser.add_argument("--part", choices=("all", "pool", "live"), default="all")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    options, others = parser.parse_known_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options.folder.mkdir(parents=True, exist_ok=True)
    study = make_study(others, options.images)
    default_study = make_study([*others, "--space", DEFAULT_SPACE], options.images)
    trainer = Trainer(study)
    budget_s: float = options.budget
    arms: dict[str, list[Search]] = {}
    pool = make_pool(trainer, options.folder / "pool.jsonl", options.points) if options.part != "live" else []
    for seed in range(options.seeds if options.part != "pool" else 0):  # in turn: an unfinished run has as many of each
        for name, argv in LIVE.items():
            path = options.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
            studied = default_study if "--space" in argv else study
            live = Search(studied, ["--sampler", "tpe", "--study-seed", str(seed), *argv])
            arms.setdefault(name, []).append(run_live(trainer, live, path, budget_s))
    if options.part != "all":
        return
    whole = [row for row in pool if row["reports"] and row["reports"][-1]["finished"]]
    scores = dict.fromkeys([study.metric, f"{study.metric}_raw", "auroc", "loss"])
    show_ranks(whole, [name for name in scores if name in whole[0]["reports"][0]["metrics"]])
    for metric in dict.fromkeys([study.metric, "auroc"]):
        mode = study.goals[0][1] if metric == study.metric else "max"
        finals = [[sign(mode) * r["metrics"][metric] for r in after_epochs(row)] for row in whole]
        best = sign(mode) * min(map(min, finals))
        orders = [[pool[0], *random.Random(order).sample(pool[1:], len(pool) - 1)] for order in range(NUM_ORDERS)]
        played = {
            name: [play(Search(study, argv, metric), iter(order), budget_s) for order in orders]
            for name, argv in PLAYED.items()
        }
        guide = sign(mode) * min(finals[0])
        print(f"\n{metric}: the best of {len(pool) - 1} random points has {best:.3f}, the guide's {guide:.3f}")
        show_arms(played | (arms if metric == study.metric else {}), best, mode, budget_s)
        show_shapes(pool, metric, mode)


if __name__ == "__main__":
    main()
