"""Printing a study's results: at its end, or so far (`--show`)."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from tune.config.paths import SettingsError
from tune.config.stored import stored_settings
from tune.records.budgets import last_time
from tune.records.control import asked_trials
from tune.records.end_state import EndState
from tune.records.journal import read_journal
from tune.results.outcome import Outcome
from tune.tracking.delivery import stored_runs_address


def print_outcome(outcome: Outcome) -> None:
    """Print a study's results at its end. A terminal that is gone, or a signal, leaves the rest out."""
    from tune.results.console import print_summary
    from tune.results.terminal import drop_output

    try:
        print_summary(outcome)
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt):
        drop_output(1)  # study.json holds the same


def show(directory: Path) -> Outcome:
    """A study's results so far, from its journal; also while it runs. Writes nothing.

    Raises:
        SettingsError: plan.json is damaged, or the study's files cannot be read.
    """
    plan, settings = stored_settings(directory)
    path = directory / "journal.jsonl"
    try:
        running = is_running(directory)
        journal = read_journal(path)
    except OSError as error:
        raise SettingsError([f"the study's files must be readable, but {error}: change their permissions"]) from error
    outcome = Outcome(
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        require=settings.get("require", ()),
        num_trials=asked_trials(journal.events, settings["trials"]),
        records=[],
        running=running,
        tracking_uri=plan["tracking_uri"],
        runs_address=stored_runs_address(directory, plan),
    )
    events = journal.events
    outcome.read(events, None if running else last_time(events))
    for note in journal.notes():
        outcome.note(note)
    ended = bool(events) and events[-1]["event"] == "study_ended"
    if running:
        outcome.note("the study is running")
    elif not ended:
        outcome.note("the study was interrupted" if events else f"{path} is missing or empty: there are no trials")
        outcome.incomplete = True
        for record in outcome.records:
            record.state = EndState.INTERRUPTED if record.state == EndState.RUNNING else record.state
    if not events and settings.get("model_small"):
        outcome.note(f"it begins when the search on its small base ends: --show {settings['warm_start']}")
    try:
        # Not `pick_winner`: a file that is missing here may lie on object storage.
        outcome.winner = next((record for record in outcome.best() if not outcome.is_rejected(record)), None)
        if outcome.winner:
            outcome.forget_old_tests()
            outcome.adapter = outcome.find_adapter(outcome.winner)
    except OSError as error:
        outcome.note(f"the winner's adapter cannot be read: {error}")
    for number, (reason, _) in outcome.rejected.items():
        outcome.note(f"trial {number} cannot be the winner: {reason}")
    return outcome


def is_running(directory: Path) -> bool:
    """Whether a process holds the study's lock. Needs no right to write in the folder. Raises OSError."""
    try:
        handle = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
