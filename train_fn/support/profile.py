"""Where a trial's time goes: `--profile` measures its phases, `--trace` writes down what torch does in a few steps.

Off, a phase costs a function call. On, a GPU is waited for at every edge of a phase: the shares are true, and the whole
takes longer than without.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train_fn.settings import PROFILE_PREFIX

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object",
               "reduce_scatter_tensor", "barrier")  # fmt: skip
TRACED = {"skip_first": 2, "wait": 0, "warmup": 1, "active": 3, "repeat": 1}  # optimizer steps


class Profile:
    """Books seconds by phase; within another phase, they count for the inner one only."""

    def __init__(self, spent: dict[str, float], device: torch.device) -> None:
        """spent: seconds by phase so far, to which this one's are added."""
        self.spent, self.device = spent, device
        self.open: list[str] = []
        self.last = 0.0

    def book(self) -> None:
        """The time since the last edge, for the phase that is open."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            key = PROFILE_PREFIX + self.open[-1]
            self.spent[key] = self.spent.get(key, 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs in this context belongs to a phase."""
        self.book()
        self.open.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self.book()
            self.open.pop()


active: Profile | None = None  # of this process: one trial at a time
beats = 0


def beat() -> None:
    """Work goes on; `beats` is how often that was said. Whoever watches this process hears of it."""
    global beats
    beats += 1


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """See `Profile.phase`; a beat only unless a trial is profiled."""
    beat()
    return active.phase(name) if active else contextlib.nullcontext()


@contextlib.contextmanager
def profiled(spent: dict[str, float], device: torch.device) -> Iterator[None]:
    """Measure the phases of what runs in this context. Collectives count where they are waited for; one that overlaps
    with other work on a GPU counts as that work."""
    global active
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def timed(call: Any) -> Any:
        def collective(*args: Any, **options: Any) -> Any:
            with phase("communication"):
                return call(*args, **options)

        return collective

    active = Profile(spent, device)
    try:
        for name, call in plain.items():
            setattr(dist, name, timed(call))
        yield
    finally:
        active = None
        for name, call in plain.items():
            setattr(dist, name, call)


@contextlib.contextmanager
def traced(path: Path) -> Iterator[Callable[[], None]]:
    """torch's profiler over optimizer steps 4 to 6, whose trace (for chrome://tracing or ui.perfetto.dev) it writes;
    gives the function to call after each step. Fewer steps leave no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(**TRACED),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
