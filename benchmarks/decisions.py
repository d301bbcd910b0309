"""What a fitted decision is worth: the adapters of a study on its test images, before and after the fit.

    python tune/run.py --trials 20 --scheduler none --data DATA --test-data MANY --name STUDY
    python benchmarks/decisions.py results/STUDY

Every decision is fitted on the study's validation images only. Rows: the plain argmax of the model's scores; the argmax
of the probabilities after vector scaling; rules for macro-F1, accuracy, balanced accuracy and a sensitivity of 0.9. For
the winner and the guide's defaults with 95 % intervals; for all completed trials the mean, its distance to the plain
argmax, and the number of trials that are better.

With the adapters of `--confirm` also the standard deviation over the seeds of one configuration: a score that moves
with the seed says little of the settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]

from train_fn.data.samples import Splits, units_of  # noqa: E402
from train_fn.data.splits_file import load_splits  # noqa: E402
from train_fn.scoring.fitting import decide, decide_out_of_fold, fit_part  # noqa: E402
from train_fn.scoring.scores import PartScorer, metrics_of  # noqa: E402
from train_fn.settings import ModelSettings  # noqa: E402
from tune.results.intervals import with_intervals  # noqa: E402
from tune.results.summary import format_score  # noqa: E402

WAYS = {
    "argmax": "plain argmax",
    "scaled": "argmax after scaling",
    "macro_f1": "rule for macro-F1",
    "accuracy": "rule for accuracy",
    "balanced_accuracy": "rule for balanced accuracy",
    "sensitivity>=0.9": "rule for sensitivity 0.9",
}
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "sensitivity", "specificity", "log_loss", "brier", "ece")
LOWER_IS_BETTER = ("log_loss", "brier", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    directory = parser.parse_args().study
    study = json.loads((directory / "study.json").read_text(encoding="utf-8"))
    splits = load_splits(directory / "splits.json")
    done = [trial["number"] for trial in study["trials"] if trial["state"] == "COMPLETE"]
    folders = {str(number): directory / "trials" / f"{number:04d}" / "final_model" for number in done}
    for path in sorted(directory.glob("trials/*/confirm-*/final_model")):
        folders[f"{int(path.parts[-3])} {path.parts[-2]}"] = path
    predicted = predictions(directory, study, splits, folders)
    found = {name: {way: scorer_of(its, splits, way) for way in WAYS} for name, its in predicted.items()}
    for who, number in (("winner", study["winner"]), ("guide", 0)):
        print(f"\n{who} (trial {number}), {len(splits.validation)} validation and {len(splits.test)} test images\n")
        print_header()
        for way, title in WAYS.items():
            scores = with_intervals(found[str(number)][way], units_of(splits.test))
            print_row(title, {name: format_score(scores[name]) for name in SHOWN if name in scores})
    values = {way: {name: np.array([found[str(number)][way]()[name][0] for number in done]) for name in SHOWN if
                    name in found[str(done[0])][way]()} for way in WAYS}  # fmt: skip
    print(f"\nmean of {len(done)} trials (distance to the plain argmax; trials that are better)\n")
    print_header()
    for way, title in WAYS.items():
        cells = {}
        for name, its in values[way].items():
            gap = its - values["argmax"][name]
            better = (gap < 0) if name in LOWER_IS_BETTER else (gap > 0)
            cells[name] = f"{its.mean():.3f}" + (f" ({gap.mean():+.3f}; {better.sum()})" if way != "argmax" else "")
        print_row(title, cells)
    print_seeds(predicted, splits)


def predictions(
    directory: Path, study: dict[str, Any], splits: Splits, folders: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Scores of the candidates by adapter and part; kept in the study's folder."""
    path = directory / "decisions.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    if left := {name: folder for name, folder in folders.items() if f"{name} test" not in kept}:
        import torch

        from train_fn.model.base import load_base
        from train_fn.trial.scoring import score_adapter

        model = ModelSettings(**study["settings"]["model"])
        base = load_base(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for name, folder in left.items():
            print(f"scoring adapter {name}", file=sys.stderr)
            for part in ("validation", "test"):
                answered = score_adapter(base, splits, part, model.per_device_eval_batch_size, folder)
                kept[f"{name} {part}"] = answered["scores"]
        np.savez(path, **kept)
    return {name: {part: {"scores": kept[f"{name} {part}"], "losses": np.zeros(len(getattr(splits, part)))}
                   for part in ("validation", "test")} for name in folders}  # fmt: skip


def scorer_of(predicted: Mapping[str, Any], splits: Splits, way: str) -> PartScorer:
    """The scorer of the test under a decision that is fitted on validation."""
    aim = replace(splits, decide="macro_f1" if way == "scaled" else way)
    decisions = fit_part(predicted["validation"], splits.validation, aim)
    if way == "scaled":
        decisions = {name: replace(decision, rule=()) for name, decision in decisions.items()}
    return PartScorer(predicted["test"], splits.test, aim, decide(decisions, predicted["test"], splits.test, aim))


def print_header() -> None:
    print(f"| decision | {' | '.join(SHOWN)} |\n| --- |{' --- |' * len(SHOWN)}")


def print_row(title: str, cells: Mapping[str, str]) -> None:
    print(f"| {title} | {' | '.join(cells.get(name, '-') for name in SHOWN)} |")


def print_seeds(predicted: Mapping[str, dict[str, Any]], splits: Splits) -> None:
    """Standard deviations over the seeds of each confirmed trial: of validation (out of fold) and test scores."""
    seeds: dict[str, list[str]] = {}
    for name in predicted:
        if " " in name:
            seeds.setdefault(name.split(" ")[0], [name.split(" ")[0]]).append(name)
    for number, names in seeds.items():
        print(f"\ntrial {number}, standard deviation over {len(names)} seeds; rules for macro-F1\n")
        print("| score | validation, argmax | validation, rule | test, argmax | test, rule |\n" + "| --- " * 5 + "|")
        table = []
        for name in names:
            its, aim = predicted[name], replace(splits, decide="macro_f1")
            held_out = decide_out_of_fold(its["validation"], splits.validation, aim)
            row = [metrics_of(its["validation"], splits.validation, replace(splits, decide="argmax"))]
            row.append(metrics_of(its["validation"], splits.validation, aim, held_out))
            for way in ("argmax", "macro_f1"):
                row.append({key: float(value[0]) for key, value in scorer_of(its, splits, way)().items()})
            table.append(row)
        for score in ("auroc", "accuracy", "balanced_accuracy", "macro_f1", "sensitivity", "specificity"):
            if all(score in row[0] for row in table):
                cells = (f"{np.std([row[column][score] for row in table], ddof=1):.3f}" for column in range(4))
                print(f"| {score} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
