"""A study in a process of its own, for `tune.api`: the command of `tune.run`, with its problems as a JSON list."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from train_fn.support.text import plain
from tune.run import main as run_command

if TYPE_CHECKING:
    from tune.results.outcome import Outcome


def main(argv: list[str]) -> int:
    """Run a study.

    Args:
        argv: the descriptor that the problems are written to, then the words of a command line.

    Returns:
        The exit code of `tune.run`.
    """
    descriptor = int(argv[0])

    def write_problems(problems: list[str]) -> None:
        os.write(descriptor, json.dumps(problems).encode())

    # The caller stops this process by SIGINT, which a process that a script began in the background ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop_with_caller, daemon=True).start()
    return run_command(argv[1:], write_problems, print_end)


def stop_with_caller() -> None:
    """Wait until the process that has begun the study is gone, then stop the study as the first Ctrl-C does: nobody
    would end it otherwise, and it can be resumed."""
    while os.read(0, 1):  # the caller writes nothing, and the system closes its end of the pipe
        pass
    os.kill(os.getpid(), signal.SIGINT)


def print_end(outcome: Outcome) -> None:
    """Print why a study has ended, and its notes. The caller has the rest as a `StudyResult`."""
    lines = [f"Ended by an error: {outcome.error}."] if outcome.error else []
    lines += [f"Ended because {outcome.ended_by}."] if outcome.ended_by else []
    for line in [*lines, *(f"Note: {note}" for note in outcome.notes)]:
        print(plain(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
