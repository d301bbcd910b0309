"""One trial, from its settings to its adapter: the training loop. Knows nothing of Ray.

Runs in one process or in each of several that torch.distributed has joined.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train_fn.data import Splits, class_weights, epoch_order, micro_batches
from train_fn.engine import TrialFailed, build_engine, check_applied, read_applied
from train_fn.evaluation import predict
from train_fn.lora import adapted, load_adapter, save_adapter
from train_fn.model import Base, collate
from train_fn.scores import metrics_of
from train_fn.settings import TrialSettings

Report = Callable[[dict[str, Any]], bool]


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator that training draws from; dropout differs by rank, as its images do."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100_003 * rank)


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of one number per rank. Every rank gets the same answer, so all decide alike on it."""
    _, world_size = world()
    if world_size == 1:
        return value
    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / world_size


# ------------------------------------------------------------------------------------------------ one trial


def run_trial(
    base: Base,
    splits: Splits,
    settings: TrialSettings,
    report: Report,
    *,
    eval_batch_size: int = 16,
    positive: str = "",
    output: Path | None = None,
) -> None:
    """Train one adapter and report after each epoch.

    report: called on every rank with {"epoch", "metrics", "seconds", "done", ...}; its answer True ends the trial
        early. The report of the last epoch has `done` and comes after the adapter is written.
    output: folder in which `final_model/` is written at the trial's end (not when it is stopped early).

    Raises TrialFailed, on all ranks alike, for what the trial itself has done wrong: no module to adapt, a setting
    that did not reach the engine, a loss that is not finite.
    """
    rank, world_size = world()
    clock = Clock()
    seed_everything(settings.seed, 0)  # the adapter starts alike on every rank
    try:
        trial = adapted(base, settings)
        model = trial.__enter__()
    except ValueError as error:
        raise TrialFailed(str(error)) from error
    engine = None
    try:
        steps_per_epoch = -(-len(splits.train) // settings.global_batch_size)
        weights = class_weights(splits.class_counts("train")) if settings.class_balanced_loss else []
        engine = build_engine(
            base,
            model,
            settings,
            torch.tensor(weights, device=base.device),
            steps_per_epoch * settings.num_train_epochs,
            world_size,
        )
        applied = read_applied(engine)
        check_applied(applied, settings)
        seed_everything(settings.seed, rank)
        clock.lap("setup")

        for epoch in range(1, settings.num_train_epochs + 1):
            train_loss = train_epoch(base, splits, settings, engine, epoch)
            clock.lap("train")
            if not np.isfinite(train_loss):
                raise TrialFailed(f"the training loss became {train_loss} in epoch {epoch}: lower the learning rate")
            metrics = evaluate(base, splits, "validation", eval_batch_size, settings.class_balanced_loss, positive)
            clock.lap("evaluation")
            last = epoch == settings.num_train_epochs
            if last and output is not None and rank == 0:
                save_adapter(base, model, settings, output / "final_model")
                clock.lap("checkpoint")
            stop = report(
                {
                    "epoch": epoch,
                    "step": epoch * steps_per_epoch,
                    "metrics": metrics | {"train_loss": train_loss},
                    "applied": applied,
                    "seconds": clock.seconds(),
                    "done": last,
                }
            )
            clock.lap("report")
            if stop:
                break
    finally:
        if engine is not None:
            engine.destroy()
        trial.__exit__(None, None, None)


def train_epoch(base: Base, splits: Splits, settings: TrialSettings, engine: Any, epoch: int) -> float:
    """One pass over the training images; the mean training loss over all workers."""
    rank, world_size = world()
    engine.train()
    total, count = torch.zeros((), device=base.device), 0
    order = epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch)
    for step in order:
        for indices in micro_batches(step, settings.per_device_train_batch_size, rank, world_size):
            samples = [splits.train[index] for index in indices]
            batch = collate(base, samples, with_answers=True)
            labels = torch.tensor([sample.label for sample in samples], device=base.device)
            loss = engine(batch, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
            count += 1
    return mean_over_ranks(total.item() / count, base.device)


def evaluate(
    base: Base, splits: Splits, part: str, batch_size: int, class_balanced: bool, positive: str
) -> dict[str, float]:
    """Metrics of the adapted base on one part of the data."""
    samples = getattr(splits, part)
    predicted = predict(base, samples, splits.candidates, batch_size, *world())
    return metrics_of(predicted, samples, splits, class_balanced, positive)


def score_adapter(base: Base, splits: Splits, part: str, batch_size: int, adapter: Path) -> dict[str, np.ndarray]:
    """Losses [N] and scores [N, C] of a saved adapter on one part of the data."""
    with load_adapter(base, adapter):
        return predict(base, getattr(splits, part), splits.candidates, batch_size, *world())


class Clock:
    """Where a trial's seconds went, by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on a phase."""
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""
        return dict(self.spent)
