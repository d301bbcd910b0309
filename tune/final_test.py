"""Scores the test split with the winner's adapters, with those of the guide's defaults, and with baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.data.decision import Decision
from train_fn.jobs import JobFailed, ScoreJob
from tune.plan.prepare import Study
from tune.records.end_state import EndState
from tune.records.trials import TrialRecord
from tune.results.baselines import Model, baselines, decided_by, stored, test_scores
from tune.results.outcome import Outcome, adapter_hash

if TYPE_CHECKING:
    from train_fn.model.adapters import ClassScores

SCORING = 10**9  # job numbers of scoring begin here


def choose_and_score(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Name the winner, score the test images with its adapter, and copy the adapter to `best_adapter/`. When an adapter
    cannot be loaded, or its scores are not finite, the next best trial is the winner."""
    outcome.pick_winner()
    attempt = 0
    while outcome.winner and not outcome.interrupted:
        problem = score_test(study, dispatcher, outcome, say, SCORING + attempt)
        if not problem:
            break
        outcome.reject(outcome.winner, problem)
        outcome.pick_winner()
        attempt += 1
    outcome.keep_adapter()


def chosen_for_test(outcome: Outcome) -> dict[str, TrialRecord]:
    """The trials whose adapters score the test: the winner, and trial 0 (the guide's defaults) if it completed."""
    assert outcome.winner
    chosen = {"winner": outcome.winner}
    guide = next((record for record in outcome.records if record.number == 0), None)
    if guide and guide is not outcome.winner and guide.state == EndState.COMPLETE:
        chosen["guide"] = guide
    return chosen


def is_tested(study: Study, outcome: Outcome, chosen: dict[str, TrialRecord]) -> bool:
    """Whether the last test scores are of these trials' adapters, and the adapters' files have not changed since."""
    last = next((event for event in reversed(study.journal.events) if event["event"] == "tested"), None)
    if last is None:
        return False
    delivered = {who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()}
    if "sha256" not in last:  # of an older version
        return last["adapters"] == delivered
    paths = adapter_paths(outcome, chosen)
    if "num_adapters" not in last:  # of an older version, which scored the delivered adapters only
        paths = {who: its[:1] for who, its in paths.items()}
    return last["adapters"]["winner"] == delivered["winner"] and last["sha256"] == hashes_of(paths)


def adapter_paths(outcome: Outcome, chosen: dict[str, TrialRecord]) -> dict[str, list[Path | None]]:
    """Folders of the adapters that score the test, the delivered one first; None for a missing one."""
    paths: dict[str, list[Path | None]] = {}
    for who, record in chosen.items():
        paths[who] = [outcome.adapter if who == "winner" else outcome.find_adapter(record)]
        for folder in outcome.adapters_of(record)[1:]:
            if outcome.storage:
                outcome.storage.pull(folder)
            paths[who].append(folder if folder.is_dir() else None)
    return paths


def hashes_of(paths: dict[str, list[Path | None]]) -> dict[str, str]:
    """sha256 of each adapter by "winner", "winner 2" and so on; empty for a missing one."""
    return {
        who + (f" {number}" if number > 1 else ""): adapter_hash(path) if path else ""
        for who, its in paths.items()
        for number, path in enumerate(its, 1)
    }


def score_test(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None], number: int) -> str:
    """Score the test images with the winner, with the guide's defaults if trial 0 completed, and with baselines; record
    the scores and paired differences. Scores that are in the journal already are not taken again.

    Args:
        number: the job's number; each winner needs another one.

    Returns: what is wrong with the winner's adapter; empty: nothing.
    """
    import ray

    from tune.results.coverage import coverage_rows  # here: it imports torch's libraries

    chosen = chosen_for_test(outcome)
    if is_tested(study, outcome, chosen):
        return ""
    say("Scoring the test images with the winner" + (" and the guide's defaults" if "guide" in chosen else ""))
    paths = adapter_paths(outcome, chosen)
    hashes = hashes_of(paths)
    there = [path for its in paths.values() for path in its if path]
    job = ScoreJob(number=number, adapters=tuple(there), baselines=True, label="scoring the test images")
    ray.get(dispatcher.submit.remote(job))
    report = ray.get(dispatcher.next_report.remote(number, 0))
    if isinstance(report, JobFailed):
        outcome.error = f"the test could not be scored: {report.error.splitlines()[0]}"
        return ""
    answers = dict(zip(there, report.predictions, strict=True))
    problems = {path: adapter_problem(answer) for path, answer in answers.items()}
    (winner, *_), (guide, *_) = paths["winner"], paths.get("guide", [None])
    assert winner
    if problems[winner]:
        return f"its adapter {problems[winner]}"
    if "guide" in chosen and (problem := problems[guide] if guide else "is missing"):
        outcome.note(f"there is no test score of the guide's defaults: the adapter of trial 0 {problem}")
        del chosen["guide"]
    for who, record in chosen.items():
        if lost := sum(path is None or bool(problems[path]) for path in paths[who]):
            outcome.note(
                f"{lost} of the {len(paths[who])} confirmed adapters of trial {record.number} cannot be used, and are "
                f"not in the test's comparison"
            )
    models = {
        who: [Model(answers[path], fitted_with(path)[0]) for path in paths[who] if path and not problems[path]]
        for who in chosen
    }
    balanced = bool(outcome.winner and outcome.winner.settings["class_balanced_loss"])
    others = baselines(study.splits, report, balanced, outcome.note)
    splits, clean = study.splits, study.data_report.test_clean
    folds = bool(study.settings.study.folds)
    event = study.journal.write(
        "tested",
        tests=test_scores(models, others, splits, clean, folds),
        predictions={who: stored(its[0], splits) for who, its in models.items()},
        coverage=coverage_rows(decided_by(models["winner"][0], splits), fitted_with(winner)[1], splits),
        adapters={who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()},
        sha256=hashes,
        num_adapters=sum("error" not in answer for answer in report.predictions),
        num_trials=len(outcome.records),
    )
    outcome.apply(event)
    return ""


def fitted_with(adapter: Path) -> tuple[Mapping[str, Decision], Mapping[str, Sequence[ClassScores]]]:
    """What was fitted for an adapter on the validation part, from its task.json: decisions, and calibration scores of
    its sets of answers, by task. Empty in those of earlier versions."""
    from train_fn.model.adapters import BadAdapter, read_task  # here: it imports torch's libraries

    try:
        task = read_task(adapter)
    except BadAdapter:  # without a task.json that can be read: of an earlier version
        return {}, {}
    return task.decisions, task.conformal


def adapter_problem(answer: dict[str, Any]) -> str:
    """What is wrong with an adapter, from its part of a `ScoreReport`; empty: nothing."""
    if "error" in answer:
        return f"cannot be loaded ({answer['error']})"
    finite = np.isfinite(answer["losses"]).all() and not np.isinf(answer["scores"]).any()
    return "" if finite else "gives scores that are not finite"
