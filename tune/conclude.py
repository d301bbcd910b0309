"""The end of a study: the winner's adapter and its card, study.json, the report, the journal's last event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_fn.scoring.answers import answer_lines
from train_fn.support.files import write_json_lines
from tune.plan.prepare import Study
from tune.results.outcome import Outcome
from tune.signals import StopSignals
from tune.tracking.delivery import Tracking


def conclude(study: Study, outcome: Outcome, tracking: Tracking, layout: dict[str, Any], stop: StopSignals) -> None:
    """Write the winner's adapter, study.json, the report, and the journal's last event.

    A step that fails leaves a note and does not stop the others. The first signal skips the report, the second all
    remaining steps.
    """
    if not outcome.records:  # a signal arrived while they were collected
        outcome.read(study.journal.events)
    for report in (True, False):
        try:
            write_results(study, outcome, tracking, layout, report)
            return
        except KeyboardInterrupt:
            outcome.interrupted = outcome.incomplete = True
            outcome.note("a signal ended the study before all of its results were written")
            if stop.count > 1:
                return


def write_results(study: Study, outcome: Outcome, tracking: Tracking, layout: dict[str, Any], report: bool) -> None:
    """Take the steps of `conclude` once."""
    artifacts: list[Path] = []
    try:
        if outcome.winner is None and not outcome.rejected:
            outcome.choose_winner()
        outcome.measure(study.journal.events)
        outcome.runs_address = tracking.runs_address
        content = outcome.save(study.plan, layout)
        artifacts.append(study.directory / "study.json")
    except OSError as error:
        outcome.error = outcome.error or f"the study's results could not be written: {error}"
        tracking.close(timeout_s=10)
        return  # the journal is in the same folder: writing to it would wait for minutes
    export_card(study, outcome, content)
    export_search(study, outcome)
    artifacts += export_predictions(study, outcome)
    if outcome.records and report:
        from tune.results.report import write_report

        try:
            artifacts += write_report(content, study.directory)
        except Exception as error:  # whatever a drawing library raises costs only the report
            outcome.incomplete = True
            outcome.note(f"the report could not be written ({type(error).__name__}: {error})".splitlines()[0])
    final = {"winner": outcome.winner.number if outcome.winner else "none", "adapter": outcome.adapter or "none"}
    if outcome.winner:
        final["seed"] = outcome.delivered_seed(outcome.winner)
    end_of_study(study, outcome, tracking, final, artifacts, timeout_s=60 if report else 5)


def end_of_study(
    study: Study,
    outcome: Outcome,
    tracking: Tracking,
    tags: dict[str, Any],
    artifacts: list[Path],
    timeout_s: float = 60,
) -> None:
    """Write the last event of a session, and wait until the stores have received all events.

    Args:
        artifacts: files to log in the tracking stores.
    """
    metrics = outcome.delivered_metrics(outcome.winner) if outcome.winner else {}
    scores = {f"best_{name}": value for name, value in metrics.items()}
    tests = {f"test_{name}": f"{score['value']:.4f}" for name, score in outcome.tests.get("winner", {}).items()}
    hashes = {name: study.plan[name] for name in ("data_hash", "base_hash")}
    study.journal.write(
        "study_ended",
        state=outcome.state,
        tags=tags | {"ended_by": outcome.ended_by},
        metrics=scores | {"wall_s": outcome.seconds.get("wall", 0.0)},
        num_trials=len(outcome.records),
        artifacts=[path.relative_to(study.directory) for path in artifacts],  # the folder may be moved
        adapter=outcome.relative(outcome.adapter) if outcome.adapter and outcome.exit_code == 0 else None,
        kept=outcome.kept,
        rejected=outcome.rejected,
        incomplete=outcome.incomplete or bool(outcome.error),
        register=study.settings.study.register,
        model_tags=hashes | tests | {"base_model": study.settings.model.model, "study": study.name},
    )
    tracking.notify()
    for sentence in tracking.notes(timeout_s):
        outcome.note(sentence)


def export_predictions(study: Study, outcome: Outcome) -> list[Path]:
    """Write predictions.jsonl: question, truth and answers of each test sample. A failure costs a note.

    Returns: its path; nothing before the test.
    """
    if not outcome.predictions:
        return []
    path = study.directory / "predictions.jsonl"
    lines = answer_lines(study.splits.test, study.splits, outcome.predictions)
    try:
        write_json_lines(path, lines)
    except OSError as error:
        outcome.note(f"predictions.jsonl could not be written: {error}")
        return []
    return [path]


def export_card(study: Study, outcome: Outcome, content: dict[str, Any]) -> None:
    """Write best_adapter/README.md, if there is a winner. A failure costs a note.

    Args:
        content: of study.json.
    """
    from tune.results.card import FOLDER, write_card

    if outcome.winner is None or outcome.adapter != study.directory / FOLDER:
        return
    try:
        write_card(content, study.directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # The disk, a damaged file of the adapter, or a study of an earlier version, which lacks a fact.
        outcome.note(f"the model card could not be written ({type(error).__name__}: {error})")


def export_search(study: Study, outcome: Outcome) -> None:
    """Write optuna.db. The study does not need it, so a failure costs a note."""
    from tune.records.optuna_study import DatabaseExport

    records = {record.number: record for record in outcome.records}
    try:
        DatabaseExport(study.directory / "optuna.db", study.name, study.goals).write(records, ended_only=False)
    except OSError as error:
        outcome.note(f"optuna.db could not be written: {error}")
