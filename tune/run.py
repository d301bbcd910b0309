"""`python tune/run.py --trials 20`: parse, prepare, run, report."""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

STARTED = time.perf_counter()
# Python puts a script's folder first on the path, and the modules of tune/ would shadow libraries. Installed packages
# stay where they are on the path: ahead of the standard library they would shadow it.
HERE = str(Path(__file__).resolve().parent)
if HERE in sys.path:
    sys.path[:] = [str(Path(HERE).parent), *(path for path in sys.path if path != HERE)]

from train_fn.support.text import plain  # noqa: E402
from tune.config.cli import parse_all  # noqa: E402
from tune.config.paths import SettingsError, study_directory, user_paths  # noqa: E402

if TYPE_CHECKING:
    from tune.config.settings import Settings
    from tune.plan.prepare import Study
    from tune.results.outcome import Outcome


def command() -> int:
    """The console script `vlm-tune`."""
    return main(sys.argv[1:])


def main(
    argv: list[str],
    show_problems: Callable[[list[str]], None] | None = None,
    show_outcome: Callable[[Outcome], None] | None = None,
) -> int:
    """Run a command.

    Args:
        show_problems: called with the problems of settings and data; None: prints them.
        show_outcome: called with the outcome of each study that has ended; None: prints it.

    Returns:
        The exit code: 0 a winner, 1 none, 2 bad input, 3 ended by an error, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may take ASCII only
    try:
        with user_paths():
            study = begin(argv)
        if isinstance(study, int):
            return study
        from tune.show import print_outcome
        from tune.study import run

        show_outcome = show_outcome or print_outcome
        outcome = run(study, say, STARTED)
        while study.then and outcome.exit_code == 0:
            show_outcome(outcome)
            study = study.then
            say(f"Now its best settings on {study.settings.model.model}, as the study {study.name}")
            outcome = run(study, say, time.perf_counter())
    except SettingsError as error:
        (show_problems or print_problems)(error.problems)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: nothing has been changed.", file=sys.stderr)
        return 130
    show_outcome(outcome)
    if study.then:
        name = plain(study.then.name)
        print(f"The study {name} needs this search: --resume {shlex.quote(name)} goes on with both.")
    if outcome.interrupted or outcome.error:
        # Lanes still run in threads; one that uses Ray while the interpreter shuts it down ends the process with
        # another code. Ray's processes end with this one.
        os._exit(outcome.exit_code)
    return outcome.exit_code


def begin(argv: list[str]) -> Study | int:
    """The study that a command line asks for, or the exit code of another command, which has run.

    Raises:
        SettingsError: the command line, or a file or folder that it names, cannot be used.
    """
    settings = read_settings(argv)
    command = settings.command
    small = settings.study.model_small
    if command.doctor:
        from tune.doctor.examine import examine
        from tune.transfer import examine_both

        return examine_both(settings, say) if small else examine(settings, say)
    if command.show:
        from tune.show import print_outcome, show

        print_outcome(show(study_directory(command.show, settings.study.results).resolve()))  # type: ignore[union-attr]
        return 0
    from tune.plan.prepare import prepare, resume

    if command.replay:
        from tune.replay import replay

        return replay(resume(settings, say), command.trial, command.run, say)
    if not (command.resume or small):
        return prepare(settings, say)
    from tune.transfer import prepare_both, resume_both

    return resume_both(settings, say) if command.resume else prepare_both(settings, say)


def read_settings(argv: list[str]) -> Settings:
    """The settings of a command line. Raises SettingsError with all of its problems, and with those of the data."""
    settings, problems = parse_all(argv)
    if problems:
        from tune.plan.prepare import more_problems

        raise SettingsError([*problems, *more_problems(settings, problems)])
    return settings


def print_problems(problems: list[str]) -> None:
    """Print why a study cannot start."""
    print("The study cannot start:", file=sys.stderr)
    for problem in problems:
        print("  - " + plain(problem, keep="\n"), file=sys.stderr)


def say(text: str) -> None:
    """Print one line of progress."""
    from tune.results.terminal import print_line

    print_line(f"[{time.perf_counter() - STARTED:6.1f} s] {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
