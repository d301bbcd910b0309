"""One trial, from its settings to its adapter: the training loop. Knows nothing of Ray.

Runs in one process or in each of several that torch.distributed has joined. What it needs to go on after a kill lies in
`state/`: the trial then ends with the same numbers, to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_fn.data.order import class_weights, epoch_order, micro_batches
from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport
from train_fn.model.base import Base
from train_fn.model.batches import collate, prompt_size, to_device
from train_fn.model.memory import is_out_of_memory
from train_fn.settings import TrialSettings
from train_fn.support.profile import beat, phase, profiled, traced
from train_fn.support.storage import Storage, patiently
from train_fn.trial.applied import (
    TrialFailed,
    check_applied,
    check_schedule,
    check_trained,
    read_applied,
    read_schedule,
)
from train_fn.trial.engine import MicroBatchTooLarge, build_engine, load_engine_state
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import History, checkpoints, save_checkpoint, save_final
from train_fn.trial.ranks import mean_over_ranks, seed_everything, world
from train_fn.trial.resume_state import ResumeState
from train_fn.trial.scoring import evaluate

Report = Callable[[EpochReport], bool]
Progress = Callable[[dict[str, Any]], object]


class Leaving(Exception):
    """This trial's process must leave; the trial can be continued elsewhere."""


def run_trial(
    base: Base,
    splits: Splits,
    settings: TrialSettings,
    report: Report,
    *,
    eval_batch_size: int = 16,
    positive: str = "",
    output: Path | None = None,
    storage: Storage | None = None,
    progress: Progress | None = None,
    leaving: Callable[[], bool] = lambda: False,
    profile: bool = False,
    trace: bool = False,
) -> None:
    """Train one adapter and report after each epoch.

    report: called on every rank after each epoch; returns True to end the trial early. The report of the last epoch
        has `finished`, and comes after the adapter is written. A trial that continues after a kill first repeats its
        earlier reports, because whoever had them may be gone.
    output: folder in which `final_model/` and trainer_state.json are written at the trial's end (not when it is stopped
        early), `checkpoint-N/` on the way, and `state/` as long as the trial is unfinished.
    progress: called on rank 0 with {"phase", "epoch", "num_epochs", "step", "num_steps", "loss"} when training begins,
        every `logging_steps` optimizer steps, and when an evaluation begins; it must not wait.

    leaving: whether this process must leave soon; asked in each optimizer step.
    profile: measure phases (see `train_fn.profile`) and report their seconds with the others.
    trace: write `trace.json.gz` into `output`, of a few optimizer steps.

    Raises Leaving, on all ranks alike and with `state/` just written, when one of them must leave.
    Raises TrialFailed, on all ranks alike, for what the trial itself has done wrong: no module to adapt, a setting
    that did not reach the engine, a loss that is not finite.
    """
    rank, world_size = world()
    clock = Clock()
    if problems := settings.problems(world_size):
        raise TrialFailed("; ".join(problems))
    seed_everything(settings.seed, 0)  # the adapter starts alike on every rank
    with contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(adapted(base, settings))
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        steps_per_epoch = -(-len(splits.train) // settings.global_batch_size)
        num_steps = settings.max_steps or steps_per_epoch * settings.num_train_epochs
        num_epochs = -(-num_steps // steps_per_epoch)
        weights = class_weights(splits.class_counts("train")) if settings.class_balanced_loss else []
        weights_tensor = torch.tensor(weights, device=base.device)
        engine = build_engine(base, model, settings, weights_tensor, num_steps, world_size)
        stack.callback(engine.destroy)
        rates = read_schedule(engine, settings, num_steps)
        applied = read_applied(engine) | {"learning_rate_at_step": rates}
        check_applied(applied, settings)
        check_schedule(rates, settings, num_steps)
        seed_everything(settings.seed, rank)

        log, epoch, stop = History(), 1, False
        losses: list[float] = []
        reports: list[dict[str, Any]] = []
        storage = storage or Storage(output or Path())
        tracer = traced(output / "trace.json.gz") if trace and output and rank == 0 else None
        traced_step = stack.enter_context(tracer or contextlib.nullcontext(lambda: None))
        state = ResumeState(output, storage, settings)
        if found := state.load():
            load_engine_state(engine, found["engine"], rank)
            torch.set_rng_state(found["random"]["cpu"])
            if "cuda" in found["random"]:
                torch.cuda.set_rng_state(found["random"]["cuda"])
            log.step, log.entries, log.told = (found[key] for key in ("step", "entries", "told"))
            log.recent = found.get("recent", [])
            losses, epoch, reports, clock.spent = (found[key] for key in ("losses", "epoch", "reports", "seconds"))
        elif output is not None and rank == 0:
            for old in checkpoints(output, storage):
                storage.remove(old)  # of an attempt that cannot be continued
        clock.lap("setup")
        if profile:
            stack.enter_context(profiled(clock.spent, base.device))

        troubles = list(state.notes)

        def trouble(text: str) -> None:
            beat()
            if text not in troubles:
                troubles.append(text)

        def write(action: Callable[[], None]) -> None:
            with phase("checkpoint"):
                patiently(action, trouble)

        def save_state() -> None:
            place = {"step": log.step, "entries": log.entries, "told": log.told, "recent": log.recent}
            place |= {"losses": losses, "epoch": epoch, "reports": reports, "seconds": clock.seconds()}
            write(lambda: state.save(place, engine))
            clock.lap("checkpoint")

        def tell(phase: str, loss: float | None) -> None:
            if progress is not None and rank == 0:
                place = {"epoch": epoch, "num_epochs": num_epochs, "step": log.step, "num_steps": num_steps}
                progress({"phase": phase, "loss": loss} | place)

        for known in reports:
            stop = stop or report(EpochReport.from_dict(known))
        tell("train", None)
        while not stop and epoch <= num_epochs:
            done = (epoch - 1) * steps_per_epoch
            order = epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch)
            for indices in order[log.step - done : num_steps - done]:
                loss, leave = train_step(base, splits, settings, engine, indices, log.step + 1, leaving())
                losses.append(loss)
                log.recent.append(loss)
                log.step += 1
                traced_step()
                if log.step % settings.logging_steps == 0:
                    loss = sum(log.recent) / len(log.recent)
                    log.add(epoch=log.step / steps_per_epoch, loss=loss, learning_rate=engine.get_lr()[0])
                    log.recent = []
                    tell("train", loss)
                if settings.save_steps and log.step % settings.save_steps == 0 and output is not None:
                    clock.lap("train")
                    if rank == 0:
                        write(lambda: save_checkpoint(base, model, settings, log, output, storage))
                    save_state()
                if leave:
                    clock.lap("train")
                    save_state()
                    raise Leaving(f"left at step {log.step}")
            train_loss = sum(losses) / len(losses)
            tell("evaluation", train_loss)
            clock.lap("train")
            with phase("evaluation"):
                metrics = evaluate(base, splits, "validation", eval_batch_size, settings.class_balanced_loss, positive)
            log.add(epoch=epoch, **{f"eval_{name}": value for name, value in metrics.items()})
            clock.lap("evaluation")
            last = log.step == num_steps
            if last:
                check_trained(engine, settings, len(splits.train), epoch)
            if last and output is not None and rank == 0:
                write(lambda: save_final(base, model, settings, splits, log, output, storage))
                clock.lap("checkpoint")
            message = EpochReport(
                epoch=epoch,
                step=log.step,
                metrics=metrics | {"train_loss": train_loss},
                log=log.take_new(),
                applied=applied,
                seconds=clock.seconds(),
                notes=troubles,
                finished=last,
            )
            reports.append(dataclasses.asdict(message))
            epoch, losses = epoch + 1, []
            save_state()
            with phase("idle"):
                stop = report(message)
            clock.lap("report")
        if not stop:
            write(state.remove)  # one that was told to stop may be asked to go on, by a study that goes on


NOT_FINITE = "a gradient was not finite in step {}: lower the learning rate (or not --fp16)"


def finite_gradient(engine: Any) -> bool:
    """Whether the step may be taken. ZeRO looks by itself; without it, all ranks have the same mean gradient by now."""
    if engine.zero_optimization_stage():
        return True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


@contextlib.contextmanager
def out_of_memory_told_apart() -> Iterator[None]:
    """Of what runs in here, for a step that does not fit is told otherwise than an evaluation that does not."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MicroBatchTooLarge(str(error)) from error
        raise


@out_of_memory_told_apart()
def train_step(
    base: Base, splits: Splits, settings: TrialSettings, engine: Any, indices: np.ndarray, step: int, leaving: bool
) -> tuple[float, bool]:
    """Optimizer step number `step` on the images `indices` [global_batch_size]; their mean loss over all workers, and
    whether any worker is `leaving`.

    Raises TrialFailed, on all ranks and before the weights are touched, when loss or gradient is not finite on one;
    MicroBatchTooLarge, on those that have run out of memory.
    """
    rank, world_size = world()
    engine.train()
    total = torch.zeros((), device=base.device)
    micro_batch_size = settings.per_device_train_batch_size
    num_micro_batches = len(indices) // (micro_batch_size * world_size)
    # Images of like size go into one micro-batch: less padding, and workers wait less for each other. The step's sum
    # stays the same. Images of one size keep their order.
    indices = np.array(sorted(indices, key=lambda index: prompt_size(base, splits.train[index])))
    for number, images in enumerate(micro_batches(indices, micro_batch_size, rank, world_size), 1):
        with phase("data"):
            samples = [splits.train[index] for index in images]
            labels = to_device(torch.tensor([sample.label for sample in samples]), base.device)
            batch = collate(base, samples, with_answers=True)
        with phase("forward"):
            loss = engine(batch, labels)
        with phase("backward"):
            engine.backward(loss)
        total += loss.detach()
        if number == num_micro_batches:
            # Here the step waits for the device: all ranks agree on the loss before the weights move.
            with phase("communication"):
                told = [total.item() / num_micro_batches, float(leaving)]
                mean_loss, leave = mean_over_ranks(told, base.device)
            if not np.isfinite(mean_loss):
                raise TrialFailed(f"the training loss became {mean_loss} in step {step}: lower the learning rate")
            if not finite_gradient(engine):
                raise TrialFailed(NOT_FINITE.format(step))
        with phase("optimizer"):
            engine.step()
    if engine.skipped_steps:  # ZeRO's answer to a gradient that is not finite, on all ranks alike
        raise TrialFailed(NOT_FINITE.format(step))
    return mean_loss, leave > 0


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
