"""`python tune/run.py --trials 20`: parse, prepare, run, report."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

STARTED = time.perf_counter()
# As a script, Python puts tune/ first on the path, where its modules would shadow libraries: the project's root it is.
ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [ROOT, *(path for path in sys.path if path not in (ROOT, str(Path(__file__).resolve().parent)))]

from train_fn.support.text import plain  # noqa: E402
from tune.config.cli import parse  # noqa: E402
from tune.config.paths import SettingsError, study_directory, user_paths  # noqa: E402

if TYPE_CHECKING:
    from tune.plan.prepare import Study


def say(text: str) -> None:
    """One line of progress."""
    from tune.results.terminal import print_line

    print_line(f"[{time.perf_counter() - STARTED:6.1f} s] {text}")


def begin(argv: list[str]) -> Study | int:
    """The study that a command line asks for, or the exit code of a command that has done its work.

    Raises:
        SettingsError: the command line, or a file or folder that it names, cannot be used.
    """
    settings = parse(argv)
    if settings.command.doctor:
        from tune.doctor.examine import examine

        return examine(settings, say)
    if settings.command.show:
        from tune.results.console import print_summary
        from tune.show import show

        print_summary(show(study_directory(settings.command.show, settings.study.results).resolve()))  # type: ignore[union-attr]
        return 0
    from tune.plan.prepare import prepare, resume

    if settings.command.replay:
        from tune.replay import replay

        return replay(resume(settings, say), settings.command.trial, say)
    return resume(settings, say) if settings.command.resume else prepare(settings, say)


def main(argv: list[str]) -> int:
    """Run a study. Returns the exit code: 0 a winner, 1 none, 2 bad input, 3 ended by an error, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may take ASCII only
    try:
        with user_paths():
            study = begin(argv)
        if isinstance(study, int):
            return study
        from tune.study import run

        outcome = run(study, say, STARTED)
    except SettingsError as error:
        print("The study cannot start:", file=sys.stderr)
        for problem in error.problems:
            print("  - " + plain(problem, keep="\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: nothing has been changed.", file=sys.stderr)
        return 130
    from tune.results.console import print_summary

    try:
        print_summary(outcome)
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt):
        from tune.results.terminal import drop_output

        drop_output(1)  # nobody reads it any more; the same stands in study.json
    if outcome.interrupted or outcome.error:
        # Lanes still run in threads; one that touches Ray while the interpreter shuts it down ends the process with
        # another code. Ray's processes end with this one.
        os._exit(outcome.exit_code)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
