"""The progress of a study that another process runs, from its journal: in a notebook, in a terminal, or as lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune.config.settings import StudySettings
from tune.records.end_state import DONE_STATES, EndState
from tune.results.outcome import Outcome
from tune.results.terminal import footer, live

REFRESH_S = 1.0  # in a notebook: every change is a message to the browser


class Display(Protocol):
    """IPython's handle of something on a page."""

    def update(self, obj: Any, /) -> None: ...


def progress_view(outcome: Outcome | None, study: StudySettings) -> Table:
    """A bar, the trials that run, and the best score so far. outcome: None before the study has begun."""
    view = Table.grid()
    if outcome is None or not outcome.records:
        view.add_row(Text("The study starts"))
        return view
    done = sum(record.state in DONE_STATES for record in outcome.records)
    running = [record for record in outcome.records if record.state == EndState.RUNNING]
    work = [
        {
            "label": f"trial {record.number}, {len(record.epochs)} of "
            f"{record.settings.get('num_train_epochs', '?')} epochs",
            "seconds": time.time() - record.started_at,
        }
        for record in running
    ]
    snapshot = {"lanes": outcome.lanes, "starting": 0, "running": work}
    view.add_row(ProgressBar(total=max(outcome.num_trials, done, 1), completed=done, width=60))
    view.add_row(footer(outcome.records, snapshot, outcome.goals, study, study.workers_per_trial / study.lanes_per_gpu))
    return view


@contextlib.contextmanager
def shown(render: Callable[[], Table]) -> Iterator[Callable[[], None]]:
    """Show what `render` returns: in a notebook above the printed lines, in a terminal below them, elsewhere not.

    Yields:
        A function to call again and again; it brings the display up to date.
    """
    display = notebook_display()
    if display is None:
        with live(lambda: Group(render())):
            yield lambda: None
        return
    next_s = 0.0

    def refresh() -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + REFRESH_S
            display.update(render())

    display.update(render())
    try:
        yield refresh
    finally:
        display.update(render())


def notebook_display() -> Display | None:
    """A place on the notebook's page; None where this is no notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import DisplayHandle
    except ImportError:
        return None
    shell = get_ipython()
    # A terminal's IPython has no kernel, and shows no HTML.
    if shell is None or not hasattr(shell, "kernel"):
        return None
    handle = DisplayHandle()
    handle.display(Text(""))
    return handle
