"""The live footer of a running study in a terminal: the work of each lane, and the study's progress."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train_fn.support.text import duration, plain
from tune.config.settings import StudySettings
from tune.records.goals import Goal
from tune.records.ranking import ranked
from tune.records.trials import TrialRecord
from tune.results.summary import format_metric

MOST_LANES = 8  # shown, so that the footer does not push the lines above away
SHOW_CURSOR = b"\x1b[?25h"


def print_line(text: str) -> None:
    """Print one line, without characters that control the terminal. Output that nobody can read any more, such as to a
    closed terminal, is dropped: it must not end a study."""
    try:
        print(plain(text), flush=True)
    except OSError:
        drop_output(1)


def give_back_terminal(descriptors: Sequence[int]) -> None:
    """Show the cursor again. A closed terminal is replaced by /dev/null, so that later lines raise no error."""
    for descriptor in descriptors:
        try:
            os.write(descriptor, SHOW_CURSOR if os.isatty(descriptor) else b"")
        except OSError:
            drop_output(descriptor)


def drop_output(descriptor: int) -> None:
    """Redirect a descriptor to /dev/null."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)


@contextlib.contextmanager
def live(render: Callable[[], RenderableType]) -> Iterator[None]:
    """Show what `render` returns below all printed lines, and remove it at the end. If standard output is not a capable
    terminal, nothing is shown and `render` is never called.

    Args:
        render: called twice a second by another thread, under a lock that printing needs as well: it must not wait.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if not (sys.stdout.isatty() and console.is_interactive):
        yield
        return
    # Standard error that goes to a file is not redirected.
    terminal = sys.stderr.isatty()
    with Live(get_renderable=render, console=console, refresh_per_second=2, transient=True, redirect_stderr=terminal):
        yield


def footer(
    records: Sequence[TrialRecord],
    snapshot: dict[str, Any],
    goals: Sequence[Goal],
    study: StudySettings,
    devices_per_trial: float,
) -> Group:
    """A line for each lane at work, then one for the study.

    Args:
        snapshot: what `tune.lanes.dispatcher.Dispatcher.snapshot` returns.
        devices_per_trial: as in `tune.lanes.layout.Layout`.
    """
    running, starting = snapshot["running"], snapshot["starting"]
    lanes = Table.grid(padding=(0, 2))
    for _ in range(6):
        lanes.add_column(no_wrap=True)
    for work in running[:MOST_LANES]:
        lanes.add_row(*work_cells(work))
    parts = [f"and {len(running) - MOST_LANES} more lanes"] if len(running) > MOST_LANES else []
    if starting:
        parts.append(f"starting {starting} lane{'s' if starting > 1 else ''}: loading the base")
    if best := ranked(records, goals, study.require)[:1]:
        name = goals[0][0]
        parts.append(f"best {name} {format_metric(best[0].value(name))} (trial {best[0].number})")
    done = sum(record.state in ("COMPLETE", "STOPPED", "FAILED") for record in records)
    parts.append(f"{done} of {study.trials} done, {len(running)} running")
    left = seconds_left(records, snapshot, study.trials - done, devices_per_trial)
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return Group(lanes, Text(plain(" · ".join(parts)), no_wrap=True, overflow="ellipsis"))


def work_cells(work: dict[str, Any]) -> list[RenderableType]:
    """The cells of a lane's line: its work and, once a step is reported, its progress."""
    if "step" not in work:
        return [Text(plain(work["label"]))]
    return [
        Text(plain(work["label"])),
        f"epoch {work['epoch']}/{work['num_epochs']}",
        f"step {work['step']}/{work['num_steps']}",
        "" if work["loss"] is None else f"loss {work['loss']:.3f}",
        ProgressBar(total=work["num_steps"], completed=work["step"], width=20),
        "evaluating" if work["phase"] == "evaluation" else "",
    ]


def seconds_left(
    records: Sequence[TrialRecord], snapshot: dict[str, Any], num_left: int, devices: float
) -> float | None:
    """Estimated seconds to the end of the search, from the mean time of the trials that have ended; None before the
    first has ended and after the last."""
    ended = [record.device_seconds / devices for record in records if record.state in ("COMPLETE", "STOPPED")]
    if not ended or num_left <= 0:
        return None
    mean = statistics.fmean(ended)
    done = sum(min(work["seconds"], mean) for work in snapshot["running"])
    return (num_left * mean - done) / max(1, min(snapshot["lanes"], num_left))
