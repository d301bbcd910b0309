"""How a trial would be computed in the memory of a node, if it fits at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from train_fn.execution import Execution
from train_fn.settings import TrialSettings
from train_fn.trial.memory import Sizes, fitting_execution, memory_needed, roomy_execution


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What decides how much memory one worker of a trial takes."""

    sizes: Sizes
    trial: TrialSettings
    workers: int
    """Of the trial."""
    on_gpu: bool
    longest: int
    """Tokens of the longest sample."""
    candidates: int
    """Number of candidate answers."""


@dataclass(frozen=True)
class Fit:
    """A way to compute the trial's steps, and what it takes."""

    execution: Execution
    parts: dict[str, float]
    """GiB by use."""
    fits: bool


def fit(worker: Worker, present_gib: float, compiles: bool, images: int = 0) -> Fit:
    """The fastest way that should fit; the smallest one if none does.

    Args:
        present_gib: GiB of memory that one worker may take.
        compiles: whether layers are compiled if the user does not choose.
        images: a micro-batch of so many images instead of the settings' own.
    """
    sizes, trial, on_gpu = worker.sizes, worker.trial, worker.on_gpu
    if images:
        trial = replace(trial, per_device_train_batch_size=images)

    def parts(execution: Execution) -> dict[str, float]:
        return memory_needed(sizes, trial, execution, worker.workers, on_gpu, worker.longest, worker.candidates)

    execution = roomy_execution(trial, on_gpu, compiles)
    fixed = parts(execution)
    free = present_gib - fixed["worker"] - fixed["base"]
    execution, fits = fitting_execution(sizes, trial, execution, free, worker.workers, on_gpu, worker.longest)
    needed = parts(execution)
    return Fit(execution, needed, fits and sum(needed.values()) <= present_gib)


def words(execution: Execution) -> str:
    """An execution for the table."""
    limit = f"{execution.images} images" if execution.images else f"{execution.tokens:,} tokens"
    text = f"forward passes of {limit}, {'compiled' if execution.compiled else 'not compiled'}"
    if execution.activation_budget < 1:
        text += f", {execution.activation_budget:.0%} of activations kept"
    return text + (", gradient checkpointing" if execution.gradient_checkpointing else "")
