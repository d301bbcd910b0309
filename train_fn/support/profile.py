"""Where a trial's time goes: seconds by phase, `--profile` in more detail, `--trace` for a few steps of torch.

Without `--profile` a phase costs a function call. With it, every phase begins and ends by waiting for the GPU: the
shares are true, and the trial takes longer.
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
from train_fn.support.cleanup import at_end

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object",
               "reduce_scatter_tensor", "barrier")  # fmt: skip
TRACED = {"skip_first": 2, "wait": 0, "warmup": 1, "active": 3, "repeat": 1}  # optimizer steps


class Clock:
    """Seconds of a trial by phase. Phases follow each other and do not overlap."""

    def __init__(self) -> None:
        self.by_phase: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.perf_counter()
        self.by_phase[phase] = self.by_phase.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""
        return dict(self.by_phase)


class Profile:
    """Seconds by phase, where phases nest: time in an inner phase counts for that one only."""

    def __init__(self, by_phase: dict[str, float], device: torch.device) -> None:
        """by_phase: seconds by phase so far; this profile adds to them."""
        self.by_phase, self.device = by_phase, device
        self.open: list[str] = []
        self.last = 0.0

    def add_elapsed(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            key = PROFILE_PREFIX + self.open[-1]
            self.by_phase[key] = self.by_phase.get(key, 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time in this context for a phase."""
        self.add_elapsed()
        self.open.append(name)
        with at_end(self.close), torch.profiler.record_function(name):
            yield

    def close(self) -> None:
        """Close the innermost open phase."""
        try:
            self.add_elapsed()
        finally:
            self.open.pop()


active: Profile | None = None  # of this process: one trial at a time
work_count = 0  # units of work that this process has begun; a heartbeat sends it, so that a hang shows


def count_work() -> None:
    """Count one more unit of work."""
    global work_count
    work_count += 1


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Count a unit of work and, if this trial is profiled, its time for the phase."""
    count_work()
    return active.phase(name) if active else contextlib.nullcontext()


@contextlib.contextmanager
def profiled(by_phase: dict[str, float], device: torch.device) -> Iterator[None]:
    """Profile the phases in this context.

    A collective counts as communication while its caller waits; if it overlaps with other work on a GPU, that time
    counts as that work.
    """
    global active
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def timed(call: Any) -> Any:
        def collective(*args: Any, **options: Any) -> Any:
            with phase("communication"):
                return call(*args, **options)

        return collective

    active = Profile(by_phase, device)
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
    """Run torch's profiler over optimizer steps 4 to 6 and write a trace for chrome://tracing or ui.perfetto.dev.

    Yields the function to call after each step. A trial with fewer steps leaves no trace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(**TRACED),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
