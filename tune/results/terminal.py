"""What a terminal shows below the lines that stay while a study runs: what each lane does, and how far the study is."""

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

from train_fn.support.text import plain
from tune.config.settings import StudySettings
from tune.records.end_state import DONE_STATES
from tune.records.goals import Goal
from tune.records.ranking import ranked
from tune.records.trials import TrialRecord
from tune.results.summary import score_text

MOST_LANES = 8  # shown, so that the lines above keep their place
SHOW_CURSOR = b"\x1b[?25h"


def print_line(text: str) -> None:
    """Print one line, with nothing in it that commands the terminal. Output that nobody reads any more, such as that of
    a closed terminal, is dropped: it must not end a study."""
    try:
        print(plain(text), flush=True)
    except OSError:
        drop_output(1)


def give_back_terminal(descriptors: Sequence[int]) -> None:
    """Show the cursor again; a terminal that is gone is replaced by /dev/null, so that later lines raise no error."""
    for descriptor in descriptors:
        try:
            os.write(descriptor, SHOW_CURSOR if os.isatty(descriptor) else b"")
        except OSError:
            drop_output(descriptor)


def drop_output(descriptor: int) -> None:
    """Send what is written to a descriptor nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def live(render: Callable[[], RenderableType]) -> Iterator[None]:
    """Keep what `render` returns below all that is printed meanwhile, and take it away at the end. Where standard
    output is no terminal that can do so, nothing is shown and `render` is never called.

    render: called twice a second by a thread of its own, under a lock that printing needs too: it must not wait.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if not (sys.stdout.isatty() and console.is_interactive):
        yield
        return
    # What prints to standard error keeps its way where that leads to a file.
    together = sys.stderr.isatty()
    with Live(get_renderable=render, console=console, refresh_per_second=2, transient=True, redirect_stderr=together):
        yield


def footer(
    records: Sequence[TrialRecord],
    snapshot: dict[str, Any],
    goals: Sequence[Goal],
    study: StudySettings,
    devices_per_trial: float,
) -> Group:
    """A line for each lane at work, then one for the study.

    snapshot: what `tune.lanes.dispatcher.Dispatcher.snapshot` answers. devices_per_trial: as `tune.lanes.layout.Layout` has it.
    """
    running, starting = snapshot["running"], snapshot["starting"]
    lanes = Table.grid(padding=(0, 2))
    for _ in range(6):
        lanes.add_column(no_wrap=True)
    for work in running[:MOST_LANES]:
        lanes.add_row(*work_cells(work))
    told = [f"and {len(running) - MOST_LANES} more lanes"] if len(running) > MOST_LANES else []
    if starting:
        told.append(f"starting {starting} lane{'s' if starting > 1 else ''}: loading the base")
    if best := ranked(records, goals, study.require)[:1]:
        name = goals[0][0]
        told.append(f"best {name} {score_text(best[0].value(name))} (trial {best[0].number})")
    done = sum(record.state in DONE_STATES for record in records)
    told.append(f"{done} of {study.trials} done, {len(running)} running")
    left = seconds_left(records, snapshot, study.trials - done, devices_per_trial)
    if left is not None:
        told.append(f"about {duration(left)} left")
    return Group(lanes, Text(plain(" · ".join(told)), no_wrap=True, overflow="ellipsis"))


def work_cells(work: dict[str, Any]) -> list[RenderableType]:
    """What a lane works on, and how far it is if that has steps and the first has been told of."""
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
    """Seconds to the end of the search if a trial goes on taking as long as one has so far; None before the first has
    ended, and after the last."""
    took = [record.device_seconds / devices for record in records if record.state in ("COMPLETE", "STOPPED")]
    if not took or num_left <= 0:
        return None
    mean = statistics.fmean(took)
    gone = sum(min(work["seconds"], mean) for work in snapshot["running"])
    return (num_left * mean - gone) / max(1, min(snapshot["lanes"], num_left))


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
