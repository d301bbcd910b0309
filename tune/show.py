"""Printing a study's results: at its end, or so far (`--show`)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_fn.support.storage import Storage
from tune.config.paths import SettingsError
from tune.config.stored import stored_settings
from tune.records.bucket import Lease, abandoned
from tune.records.budgets import last_time
from tune.records.control import asked_trials
from tune.records.end_state import DONE_STATES, EndState
from tune.records.journal import Event, holder, read_journal
from tune.records.process import as_process, clock, named, runs_study, was_here
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
        process = holder(directory)  # before the journal: a study that ends in between has ended
        journal = read_journal(path)
    except OSError as error:
        raise SettingsError([f"the study's files must be readable, but {error}: change their permissions"]) from error
    running = runs_study(process)
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
    session = next((event for event in reversed(events) if event["event"] == "session"), {})
    begun_by = as_process(session.get("process"))  # None: an earlier version's
    elsewhere = not (running or ended) and begun_by is not None and not was_here(begun_by)
    if not (running or ended):
        outcome.incomplete = True
        if not events:
            outcome.note(f"{path} is missing or empty: there are no trials")
    if not (running or elsewhere):
        outcome.interrupted = not ended or events[-1]["state"] == "INTERRUPTED"
        for record in outcome.records:
            record.state = EndState.INTERRUPTED if record.state == EndState.RUNNING else record.state
    if process and not running:
        outcome.note(f"another command holds the study, {named(process)}: {process['work']}")
    if not events and settings.get("model_small"):
        outcome.note(f"it begins when the search on its small base ends: --show {shlex.quote(settings['warm_start'])}")
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
    how_far = progress(outcome, events, session)
    last = clock(last_time(events)) if events else "none"
    if running:
        since = f"since {clock(session['time'])}" if session else "now"
        outcome.status = f"running {named(process) if process else since}; {how_far}"
    elif ended:
        outcome.status = f"{'interrupted' if outcome.interrupted else 'finished'} at {last}"
    elif not elsewhere:
        machine = f" on {begun_by['host']}" if begun_by else ""
        outcome.status = f"interrupted{machine}: no process runs it (last event: {last}); {how_far}"
    else:
        assert begun_by
        owner = lease_holder(directory, settings)
        seen = (
            f"running on {owner}, as its storage says"
            if owner
            else (
                f"begun {named(begun_by)}, and this machine cannot see whether it still runs there; go on with it here "
                f"only if it does not"
            )
        )
        outcome.status = f"{seen} (last event in this folder: {last}); {how_far}"
    return outcome


def progress(outcome: Outcome, events: Sequence[Event], session: Event) -> str:
    """How far a study has come that has not ended. session: the first event of its last session; {}: there is none."""
    states = [record.state for record in outcome.records]
    done = f"{sum(state in DONE_STATES for state in states)} of {outcome.num_trials} trials have ended"
    unfinished = sum(state in ("RUNNING", "INTERRUPTED") for state in states)
    if not session:
        return "before its first trial"
    if not outcome.ended_by and (unfinished or outcome.num_trials > len(states)):
        return f"in the search: {done}, {unfinished} {'is' if unfinished == 1 else 'are'} unfinished"
    after = {event["event"] for event in events if event["seq"] > session["seq"]}
    if outcome.tests and "tested" in after:
        return f"after the test: {done}, its results are not written yet"
    confirmed = sum(len(values) for values in outcome.confirmations.values())
    confirming = f", {confirmed} trained again to confirm" if confirmed else ""
    return f"after the search: {done}{confirming}, the test images are not scored yet"


def lease_holder(directory: Path, settings: dict[str, Any]) -> str:
    """The machine that runs a study on object storage; "": none, or the storage does not answer."""
    if not settings.get("storage"):
        return ""
    try:
        held = Lease(Storage.under(settings["storage"], directory)).read()
    except (OSError, ValueError):
        return ""
    return f"{held['host']} (process {held['pid']})" if held and not abandoned(held) else ""
