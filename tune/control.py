"""`python -m tune.control STUDY stop 7`: act on a study, while it runs or before it goes on."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.settings import SHOWN
from train_fn.support.text import plain
from tune.config.paths import SettingsError, program, study_directory, user_paths
from tune.records.control import ACTIONS, Request

if TYPE_CHECKING:
    from tune.records.journal import Event

WAIT_S = 60.0  # for the answer of a study that runs
HELP = """\
actions:
  stop NUMBER   end a trial for good, as early stopping does: after the step that
                it trains, or at once if it waits for a lane
  add POINT     try a point next, such as '{"lora_r": 16}': names as the search
                space asks for them; the sampler chooses what is left out. The
                study has one trial more
  trials N      the study ends after N trials, more or fewer than before
  pause         the trials that run write their state, and the study ends; go on
                with --resume (the same as Ctrl-C)

A study that does not run takes stop, add and trials at its next --resume. Give
the command on a machine that has the study's folder; for a study on object
storage, on the machine that runs it. Each action is in journal.jsonl and in
MLflow (tags control_... of the study's run)."""


def main(argv: list[str]) -> int:
    """Ask a study for an action. Returns 0 if the study has taken it or will, 2 if it cannot be taken."""
    parser = argparse.ArgumentParser(
        prog="python -m tune.control",
        description="Act on a study: stop a trial, add a point, change the number of trials, pause.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="the study's name (see --results) or folder")
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("value", nargs="?", help="NUMBER, POINT or N")
    parser.add_argument("--results", default="results", help="folder of the studies [results]")
    options = parser.parse_args(argv)
    try:
        with user_paths():
            return control(options.study, options.results, options.action, options.value)
    except SettingsError as error:
        print("Nothing was done:", file=sys.stderr)
        for problem in error.problems:
            print("  - " + plain(problem), file=sys.stderr)
        return 2


def control(study: str, results: str, action: str, text: str | None) -> int:
    """Check an action, hand it to the study, and print the answer. Returns the exit code.

    Args:
        study: the name in `results`, or the folder.
        text: the action's value as typed; None: none was.

    Raises:
        SettingsError: the action cannot be taken, or the study cannot be read.
    """
    from tune.config.base_shape import BaseShape
    from tune.config.settings import Settings
    from tune.config.stored import stored_settings
    from tune.records.control import write_request
    from tune.records.journal import is_running, read_events
    from tune.records.trials import trial_records
    from tune.search.control import problems_of

    request = Request(action, value_of(action, text))
    directory = find_study(study, results)
    plan, stored = stored_settings(directory)
    running = is_running(directory)
    problems = elsewhere(directory, stored) if not running else []
    base = BaseShape.from_dict(plan["base"]) if "base" in plan else BaseShape()
    settings = Settings.of(stored, plan["settings"]["pinned"], plan.get("first_points", ()), base)
    if action == "add":
        from tune.config.trust import check_trust

        problems += check_trust(plan, settings.study.space, "")
    records = trial_records(read_events(directory / "journal.jsonl"))
    if problems := problems or problems_of(request, records, settings, running):
        raise SettingsError(problems)
    name = write_request(directory, request)
    event = answer(directory, name) if running else None
    if event is None:
        command = shlex.join([*program(), "--results", str(directory.parent), "--resume", directory.name])
        state = f"has not answered in {WAIT_S:g} s" if is_running(directory) else "does not run"
        print(f"{directory.name} {state}: it takes this when its search goes on, at the latest with {command}")
        return 0
    if event["refused"]:
        raise SettingsError([event["refused"]])
    print(plain(event["done"]))
    return 0


def value_of(action: str, text: str | None) -> Any:
    """An action's value from the command line. Raises SettingsError."""
    if action == "pause":
        if text is not None:
            raise SettingsError([f"`pause` must stand alone, but got {SHOWN.repr(text)}: leave it out"])
        return None
    if text is None:
        raise SettingsError([f"`{action}` must be followed by a value, but got none: see --help"])
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # refused with the action's own rule


def find_study(study: str, results: str) -> Path:
    """The study's folder. Raises SettingsError."""
    directory = None if "://" in study else study_directory(study, results)
    if directory is None:
        raise SettingsError(
            [
                f"STUDY must be a study on this machine, but got {SHOWN.repr(study)}: give its name (and --results) "
                f"or its folder, in which plan.json lies"
            ]
        )
    return directory.resolve()


def elsewhere(directory: Path, stored: dict[str, Any]) -> list[str]:
    """Problems with a study on object storage that another machine runs: the folder there is the one that counts."""
    if not stored.get("storage"):
        return []
    from train_fn.support.storage import Storage
    from tune.records.bucket import Lease, abandoned

    try:
        held = Lease(Storage.under(stored["storage"], directory)).read()
    except (OSError, ValueError):
        return []  # the study is asked for its next --resume, which needs the storage
    if held and not abandoned(held):
        return [f"the command must be given on the machine that runs the study, {held['host']}: go there"]
    return []


def answer(directory: Path, name: str) -> Event | None:
    """The study's answer to a request; None if the study ends or does not answer."""
    from tune.records.journal import is_running, read_events

    journal, size = directory / "journal.jsonl", -1
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        if (now := journal.stat().st_size) != size:
            size = now
            for event in reversed(read_events(journal)):
                if event["event"] == "control" and event["file"] == name:
                    return event
        if not is_running(directory):
            return None
        time.sleep(0.2)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
