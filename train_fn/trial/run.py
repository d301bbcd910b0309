"""How far a trial has come, and how that is saved: `Run`."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from train_fn.settings import SAVE_STATE_EVERY_S
from train_fn.support.background import BackgroundWriter
from train_fn.support.profile import Clock, count_work, phase
from train_fn.support.ranks import gather
from train_fn.support.storage import retry_on_os_error
from train_fn.trial.engine import load_engine_state
from train_fn.trial.outputs import History
from train_fn.trial.resume_state import ResumeState

Progress = Callable[[dict[str, Any]], object]


@dataclass
class Run:
    """How far a trial has come, and how that is saved."""

    engine: Any
    state: ResumeState
    clock: Clock
    progress: Progress | None
    totals: dict[str, int]
    """`num_epochs` and `num_steps` of the whole trial."""
    best_by: tuple[str, str] | None = None
    """As for `run_trial`."""
    save_state_every: float = SAVE_STATE_EVERY_S
    """As for `run_trial`."""
    saved_at: float = field(default_factory=time.monotonic)
    """Time of the last point, or of the trial's start."""
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    best_epoch: int = 0
    """The best epoch so far; 0: none is."""
    best_score: float | None = None
    """Its score."""
    saved_best: int = 0
    """The best epoch of the last saved point."""
    log: History = field(default_factory=History)
    epoch: int = 1
    losses: list[float] = field(default_factory=list)
    """Losses of this epoch's steps so far."""
    shown: Counter[str] = field(default_factory=Counter)
    """Images that this rank has trained on in this epoch so far, by variant."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Storage errors that were retried, and damaged states; part of every report."""

    def resume(self) -> bool:
        """Continue from the newest sound state. Returns whether there was one."""
        saved = self.state.load()
        self.notes = list(self.state.notes)
        if saved is None:
            return False
        # States of earlier versions have no best epoch. The adapter of the last one is where the trial delivers it.
        best, finished = saved.get("best_epoch", 0), saved["reports"] and saved["reports"][-1].get("finished")
        missing = self.state.rank == 0 and bool(best) and not finished and not self.state.has_epoch(best)
        if any(gather(missing)):
            self.notes.append(f"the adapter of epoch {best}, the best so far, was missing or damaged: trained again")
            return False
        self.best_epoch, self.best_score, self.saved_best = best, saved.get("best_score"), best
        load_engine_state(self.engine, saved["engine"], self.state.rank)
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"])
        self.log = History(saved["step"], saved["entries"], saved["told"], saved.get("recent", []))
        self.losses, self.epoch, self.reports = saved["losses"], saved["epoch"], saved["reports"]
        self.shown = Counter(saved["shown"])
        self.clock.by_phase = saved["seconds"]
        return True

    @property
    def progress_reported(self) -> float:
        """Epochs trained at the last report."""
        return self.reports[-1].get("progress", self.reports[-1]["epoch"]) if self.reports else 0.0

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether the present epoch is the best so far by `best_by`; then note it. An equal one is not, nor is a score
        that is not finite."""
        if self.best_by is None:
            return False
        name, mode = self.best_by
        score = metrics.get(name, math.nan)
        if not math.isfinite(score):
            return False
        if self.best_score is not None and (score >= self.best_score if mode == "min" else score <= self.best_score):
            return False
        self.best_epoch, self.best_score = self.epoch, score
        return True

    def is_due(self) -> bool:
        """Whether this epoch's end should be saved. Every rank gets the same answer: that of the slowest clock."""
        if self.state.directory is None:
            return False
        is_late = self.writer.is_idle() and time.monotonic() - self.saved_at >= self.save_state_every
        return all(gather(is_late)) if self.save_state_every else True

    def save(self) -> None:
        """Begin to write the trial's state, and let training go on. A write that still runs is waited for."""
        if self.state.directory is None:
            return
        self.finish_writes()
        self.saved_at = time.monotonic()
        log = self.log
        # States of earlier versions have the number of reported entries under "told".
        position = {"step": log.step, "entries": log.entries, "told": log.num_reported, "recent": log.recent}
        position |= {"losses": self.losses, "shown": self.shown, "epoch": self.epoch, "reports": self.reports}
        position |= {"seconds": self.clock.seconds(), "best_epoch": self.best_epoch, "best_score": self.best_score}
        with phase("checkpoint"):
            point, content = self.state.serialise(position, self.engine)
        best_epochs = self.saved_best, self.best_epoch

        def write() -> None:
            self.state.write(point, content)
            if self.best_by and self.state.rank == 0:  # only now: a kill before goes on from the points before
                self.state.keep_epochs(*best_epochs)

        self.writer.start(functools.partial(retry_on_os_error, write, self.note))
        self.saved_best = self.best_epoch
        self.clock.lap("checkpoint")

    def finish_writes(self) -> None:
        """Wait until all ranks have written their last points. Raises what the write of this rank's raised."""
        if self.state.directory is not None:
            with phase("checkpoint"):
                self.writer.wait()
                gather(None)
            self.clock.lap("checkpoint")

    def write(self, action: Callable[[], None]) -> None:
        """Write to storage, and retry while it fails."""
        with phase("checkpoint"):
            retry_on_os_error(action, self.note)

    def note(self, text: str) -> None:
        """Add a note to the reports, once."""
        count_work()  # waiting for a full disk is no hang
        if text not in self.notes:
            self.notes.append(text)

    def announce(self, phase: str, loss: float | None) -> None:
        """Call `progress` on rank 0."""
        if self.progress is not None and self.state.rank == 0:
            position = {"epoch": self.epoch, "step": self.log.step, **self.totals}
            self.progress({"phase": phase, "loss": loss} | position)
