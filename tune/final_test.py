"""Scores the test split with the winner's adapter and with the adapter of the guide's defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train_fn.data.samples import units_of
from train_fn.jobs import JobFailed, ScoreJob
from train_fn.scoring.scores import PartScorer, stored_predictions
from tune.plan.prepare import Study
from tune.records.end_state import EndState
from tune.records.trials import TrialRecord
from tune.results.intervals import difference, with_intervals
from tune.results.outcome import Outcome, adapter_hash

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
    adapters = {who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()}
    if "sha256" not in last:  # of an older version
        return last["adapters"] == adapters
    paths = adapter_paths(outcome, chosen)
    return last["adapters"]["winner"] == adapters["winner"] and last["sha256"] == hashes_of(paths)


def adapter_paths(outcome: Outcome, chosen: dict[str, TrialRecord]) -> dict[str, Path | None]:
    """Folders of the adapters that score the test; None for a missing one."""
    return {who: outcome.adapter if who == "winner" else outcome.find_adapter(r) for who, r in chosen.items()}


def hashes_of(paths: dict[str, Path | None]) -> dict[str, str]:
    """sha256 of each adapter; empty for a missing one."""
    return {who: adapter_hash(path) if path else "" for who, path in paths.items()}


def score_test(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None], number: int) -> str:
    """Score the test images with the winner and, if trial 0 completed, with the guide's defaults; record the scores and
    their paired difference. Scores that are in the journal already are not taken again.

    Args:
        number: the job's number; each winner needs another one.

    Returns: what is wrong with the winner's adapter; empty: nothing.
    """
    import ray

    chosen = chosen_for_test(outcome)
    if is_tested(study, outcome, chosen):
        return ""
    say("Scoring the test images with the winner" + (" and the guide's defaults" if "guide" in chosen else ""))
    paths = adapter_paths(outcome, chosen)
    hashes = hashes_of(paths)
    there = {who: path for who, path in paths.items() if path}
    job = ScoreJob(number=number, adapters=tuple(there.values()), label="scoring the test images")
    ray.get(dispatcher.submit.remote(job))
    report = ray.get(dispatcher.next_report.remote(number, 0))
    if isinstance(report, JobFailed):
        outcome.error = f"the test could not be scored: {report.error.splitlines()[0]}"
        return ""
    answers = dict(zip(there, report.predictions, strict=True))
    problems = {who: adapter_problem(answer) for who, answer in answers.items()}
    if problems["winner"]:
        return f"its adapter {problems['winner']}"
    if "guide" in chosen and (problem := problems.get("guide", "is missing")):
        outcome.note(f"there is no test score of the guide's defaults: the adapter of trial 0 {problem}")
        del chosen["guide"]
    predicted = {who: answers[who] for who in chosen}
    scorers = {who: PartScorer(answer, study.splits.test, study.splits) for who, answer in predicted.items()}
    units, clean = units_of(study.splits.test), np.array(study.data_report.test_clean, dtype=int)
    tests = {}
    for who, scorer in scorers.items():
        tests[who] = with_intervals(scorer, units)
        if 0 < len(clean) < len(units):
            tests[f"{who}, clean part"] = with_intervals(scorer, units, clean)
    if "guide" in scorers:
        tests["difference"] = difference(scorers["winner"], scorers["guide"], units)
    predictions = {
        who: stored_predictions(answer, study.splits.test, study.splits) for who, answer in predicted.items()
    }
    event = study.journal.write(
        "tested",
        tests=tests,
        predictions=predictions,
        adapters={who: outcome.relative(outcome.adapter_of(record)) for who, record in chosen.items()},
        sha256=hashes,
        num_trials=len(outcome.records),
    )
    outcome.apply(event)
    return ""


def adapter_problem(answer: dict[str, Any]) -> str:
    """What is wrong with an adapter, from its part of a `ScoreReport`; empty: nothing."""
    if "error" in answer:
        return f"cannot be loaded ({answer['error']})"
    finite = np.isfinite(answer["losses"]).all() and not np.isinf(answer["scores"]).any()
    return "" if finite else "gives scores that are not finite"
