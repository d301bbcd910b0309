"""Training the best trials again over fresh seeds or folds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from train_fn.data.samples import Splits
from train_fn.data.settings import split_rules
from train_fn.data.splitting import fold_splits
from train_fn.jobs import JobFailed, TrainJob
from tune.plan.prepare import Study
from tune.records.ranking import ranked
from tune.records.trials import TrialRecord
from tune.results.outcome import Outcome

CONFIRMING = 10**6  # job numbers of confirmations begin here


def confirmations_left(study: Study, outcome: Outcome) -> list[tuple[TrialRecord, int]]:
    """Confirmations that are still to be done: each a trial, and the number of its fresh seed or fold, from 1."""
    settings = study.settings.study
    # Not `outcome.best()`, which puts confirmed trials first and so would keep new trials out.
    best = ranked(outcome.records, outcome.goals, outcome.require)
    chosen = best[: settings.confirm] + [record for record in best[settings.confirm :] if record.number == 0]
    return [
        (record, run)
        for run in range(1, (settings.folds or settings.confirm_seeds) + 1)
        for record in chosen
        if run not in outcome.confirmed_runs.get(record.number, [])
    ]


def folds_of(study: Study, num_folds: int) -> list[Splits]:
    """The splits of each fold; empty for 0 folds."""
    rules = split_rules(study.settings.data, study.settings.model.image_options)
    return fold_splits(study.splits, num_folds, rules) if num_folds else []


def confirm(study: Study, dispatcher: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Train the best trials and the guide's defaults again over fresh seeds or folds, and record their validation
    scores. Confirmations of an earlier session are not repeated.

    The best of twenty noisy scores is partly luck. Scores of seeds that no choice was made by show how much.
    """
    import ray

    settings = study.settings.study
    folds = folds_of(study, settings.folds)
    left = confirmations_left(study, outcome)
    numbers = ", ".join(str(number) for number in dict.fromkeys(record.number for record, _ in left))
    if left:
        what = f"{settings.folds} folds" if folds else f"{settings.confirm_seeds} seeds"
        say(f"Confirming trials {numbers} over {what}")
    for index, (record, run) in enumerate(left):
        job = TrainJob(
            number=CONFIRMING + index,
            settings=record.typed_settings(seed=record.settings["seed"] + run),
            output=study.directory / "trials" / f"{record.number:04d}" / f"confirm-{run}",
            label=f"trial {record.number} again ({run})",
            splits=folds[run - 1] if folds else None,
        )
        ray.get(dispatcher.submit.remote(job))
    waiting = [dispatcher.last_report.remote(CONFIRMING + index) for index in range(len(left))]
    for done, (answer, (record, run)) in enumerate(zip(waiting, left, strict=True), 1):
        report = ray.get(answer)
        if isinstance(report, JobFailed):
            outcome.note(f"a confirmation of trial {record.number} failed: {report.error.splitlines()[0]}")
            continue
        reports = ray.get([dispatcher.next_report.remote(CONFIRMING + done - 1, n) for n in range(report.epoch)])
        metrics = reports[report.best_epoch - 1].metrics
        value = metrics.get(outcome.metric, record.value(outcome.metric))
        event = study.journal.write(
            "confirmed",
            number=record.number,
            run=run,
            value=value,
            metrics=metrics,
            best_epoch=report.best_epoch,
            seed=record.settings["seed"] + run,
            folds=settings.folds,
            epochs=[earlier.metrics for earlier in reports],
        )
        outcome.apply(event)
        say(f"[{done}/{len(left)}] trial {record.number} again: {outcome.metric} {value:.3f}")
