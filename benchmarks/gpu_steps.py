"""Optimizer steps of one trial, as the checks of benchmarks/gpu.py measure them."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu import GIB, Lab

from train_fn.execution import Execution
from train_fn.settings import TrialSettings

Result = tuple[bool | None, str]


@dataclass
class Steps:
    """Optimizer steps of one trial."""

    seconds: list[float]
    losses: list[float]
    graphs: int
    """How many were compiled."""
    peak_gib: float
    reserved_gib: float
    weights: torch.Tensor
    """The trained weights at the end, on the CPU."""

    @property
    def step_s(self) -> float:
        return median(self.seconds[2:] or self.seconds[1:] or self.seconds)


def settings(lab: Lab, compiled: bool = False, **options: Any) -> TrialSettings:
    """The default trial, which a GPU compiles and a CPU does not.

    Args:
        compiled: whether a CPU compiles, too.
    """
    return TrialSettings(**({"torch_compile": True} if compiled and not lab.on_gpu else {}), **options)


def chosen(lab: Lab, base: Any, splits: Any, trial: TrialSettings, share: float = 1.0) -> Execution:
    """What the product chooses here."""
    from train_fn.trial.memory import choose_execution, free_memory

    return choose_execution(base, splits.train, trial, free_memory(base.device, share * lab.share))[0]


def train(
    lab: Lab,
    base: Any,
    splits: Any,
    trial: TrialSettings,
    execution: Execution,
    num_steps: int,
    seed: int = 0,
    around_last: contextlib.AbstractContextManager | None = None,
) -> Steps:
    """The product's optimizer steps, on the same samples each time.

    Args:
        seed: of the dropout; the adapter's is the trial's.
        around_last: encloses a further step that is not timed.
    """
    from torch._dynamo.utils import counters

    from train_fn.support.cleanup import at_end
    from train_fn.support.ranks import seed_everything
    from train_fn.trial.engine import build_engine
    from train_fn.trial.lora import adapted
    from train_fn.trial.steps import micro_batches, train_step
    from train_fn.worker import release_memory

    release_memory()
    if lab.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    num_steps = num_steps if lab.on_gpu else min(num_steps, 2)
    rng, before = np.random.default_rng(0), counters["stats"]["unique_graphs"]
    steps = num_steps + (around_last is not None)
    order = np.stack([rng.permutation(len(splits.train))[: trial.global_batch_size] for _ in range(steps)])
    seconds, losses = [], []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(adapted(base, trial, execution))
        engine = build_engine(base, model, trial, torch.tensor([], device=lab.device), 100, 1, execution)
        stack.enter_context(at_end(engine.destroy))
        seed_everything(seed, 0)
        batches = stack.enter_context(contextlib.closing(micro_batches(base, splits.train, execution, order)))
        for step in range(1, num_steps + 1):
            begun = time.perf_counter()
            losses.append(train_step(engine, batches, step, False)[0])
            wait(lab)
            seconds.append(time.perf_counter() - begun)
        if around_last is not None:
            with around_last:
                train_step(engine, batches, steps, False)
                wait(lab)
        weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])
    peak = torch.cuda.max_memory_allocated() / GIB if lab.on_gpu else 0.0
    reserved = torch.cuda.max_memory_reserved() / GIB if lab.on_gpu else 0.0
    return Steps(seconds, losses, counters["stats"]["unique_graphs"] - before, peak, reserved, weights)


def wait(lab: Lab) -> None:
    """Wait for the device."""
    if lab.on_gpu:
        torch.cuda.synchronize()


def apart(one: Steps, other: Steps) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def brief(execution: Execution) -> str:
    """An execution in a few words."""
    cut = f"{execution.images} images" if execution.images else f"{execution.tokens} tokens"
    way = "checkpointing" if execution.gradient_checkpointing else "compiled" if execution.compiled else "eager"
    return f"{way} {execution.activation_budget:g}, {cut}"
