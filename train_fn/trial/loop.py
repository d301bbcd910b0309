"""One trial, from its settings to its adapter: the training loop. It does not know Ray.

It runs in one process, or in each process of a torch.distributed group. A trial that is killed continues from `state/`
and ends with the same numbers, to the last bit.

Shapes: G images of the global batch, C candidate answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_fn.data.order import epoch_order, micro_batches
from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport
from train_fn.model.base import Base
from train_fn.model.batches import collate, prompt_size, to_device
from train_fn.model.memory import is_out_of_memory
from train_fn.settings import TrialSettings
from train_fn.support.profile import Clock, count_work, phase, profiled, traced
from train_fn.support.ranks import gather, mean_over_ranks, seed_everything, world
from train_fn.support.storage import Storage, retry_on_os_error
from train_fn.trial.applied import (
    TrialFailed,
    check_applied,
    check_schedule,
    check_trained,
    read_applied,
    read_schedule,
)
from train_fn.trial.compiled import compiler_note
from train_fn.trial.engine import MicroBatchTooLarge, build_engine, load_engine_state
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import (
    History,
    checkpoints,
    copy_final,
    save_checkpoint,
    save_final,
    save_log,
    save_predictions,
)
from train_fn.trial.resume_state import ResumeState
from train_fn.trial.scoring import evaluate

Report = Callable[[EpochReport], bool]
Progress = Callable[[dict[str, Any]], object]
NOT_FINITE = "a gradient was not finite in step {}: lower the learning rate (or not --fp16)"


class Preempted(Exception):
    """This trial's process must shut down; the trial can continue elsewhere."""


def run_trial(
    base: Base,
    splits: Splits,
    settings: TrialSettings,
    report: Report,
    *,
    eval_batch_size: int = 16,
    output: Path | None = None,
    storage: Storage | None = None,
    best_by: tuple[str, str] | None = None,
    progress: Progress | None = None,
    preempted: Callable[[], bool] = lambda: False,
    profile: bool = False,
    trace: bool = False,
) -> None:
    """Train one adapter and report after each epoch.

    Args:
        report: called on every rank after each epoch; if it returns True, the trial stops early. The last epoch's
            report has `finished` and comes after the adapter is written. A trial that continues after a kill first
            repeats its reports: the process that received them may be gone.
        output: folder for `state/` while the trial is unfinished, for `checkpoint-N/`, and at the end of a trial that
            is not stopped early for `final_model/` and trainer_state.json.
        storage: where `output` is also kept. Not given: on this disk only.
        best_by: a validation metric, and "max" or "min": the adapter and the validation predictions that are kept are
            those of the epoch that is best by it. Not given, or the metric is finite in no epoch: of the last epoch.
        progress: called on rank 0 with {"phase", "epoch", "num_epochs", "step", "num_steps", "loss"} when training
            begins, every `logging_steps` optimizer steps, and when an evaluation begins; it must not block.
        preempted: whether this process must shut down soon; called in each optimizer step.
        profile: measure phases (see `train_fn.support.profile`) and report their seconds with the others.
        trace: write `trace.json.gz` of a few optimizer steps into `output`.

    Raises:
        Preempted: on all ranks, with `state/` just written, when one of them must shut down.
        TrialFailed: on all ranks, when the trial itself is at fault: no module to adapt, a setting that did not reach
            the engine, a loss that is not finite.
    """
    clock = Clock()
    rank, world_size = world()
    if problems := settings.problems(world_size):
        raise TrialFailed("; ".join(problems))
    with contextlib.ExitStack() as stack:
        # ---------------------------------------------------------------------------------------- adapter and engine
        seed_everything(settings.seed, 0)  # the adapter starts alike on every rank
        try:
            model = stack.enter_context(adapted(base, settings))
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        steps_per_epoch = -(-len(splits.train) // settings.global_batch_size)
        num_steps = settings.max_steps or steps_per_epoch * settings.num_train_epochs
        num_epochs = -(-num_steps // steps_per_epoch)
        weights = splits.sample_weights() if settings.class_balanced_loss and splits.has_candidates else []
        engine = build_engine(base, model, settings, torch.tensor(weights, device=base.device), num_steps, world_size)
        stack.callback(engine.destroy)

        # ------------------------------------------------------------------------------- what the live engine applies
        rates = read_schedule(engine, settings, num_steps)
        applied = read_applied(engine) | {"learning_rate_at_step": rates}
        check_applied(applied, settings, closed_set=splits.has_candidates)
        check_schedule(rates, settings, num_steps)

        # ---------------------------------------------------------------------------- where an earlier attempt stopped
        seed_everything(settings.seed, rank)  # dropout differs by rank
        storage = storage or Storage(output or Path())
        tracer = traced(output / "trace.json.gz") if trace and output and rank == 0 else None
        end_traced_step = stack.enter_context(tracer or contextlib.nullcontext(lambda: None))
        totals = {"num_epochs": num_epochs, "num_steps": num_steps}
        run = Run(engine, ResumeState(output, storage, settings), clock, progress, totals, best_by)
        if not run.resume():
            run.state.discard()
            for old in checkpoints(output, storage) if output is not None and rank == 0 else []:
                storage.remove(old)
        clock.lap("setup")
        if profile:
            stack.enter_context(profiled(clock.by_phase, base.device))
        log, troubles, stop = run.log, run.notes, False
        for earlier in run.reports:
            stop = stop or report(EpochReport.from_dict(earlier))

        # ------------------------------------------------------------------------------------------- epoch after epoch
        run.announce("train", None)
        while not stop and run.epoch <= num_epochs:
            epoch = run.epoch
            first = (epoch - 1) * steps_per_epoch
            order = epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch)
            for indices in order[log.step - first : num_steps - first]:  # indices [G]
                loss, leave = train_step(base, splits, settings, engine, indices, log.step + 1, preempted())
                run.losses.append(loss)
                log.recent.append(loss)
                log.step += 1
                end_traced_step()
                if log.step % settings.logging_steps == 0:
                    loss = log.take_recent_loss()
                    log.add(epoch=log.step / steps_per_epoch, loss=loss, learning_rate=engine.get_lr()[0])
                    run.announce("train", loss)
                if settings.save_steps and log.step % settings.save_steps == 0 and output is not None:
                    clock.lap("train")
                    if rank == 0:
                        run.write(lambda: save_checkpoint(base, model, settings, log, output, storage))
                    run.save()
                if leave:
                    clock.lap("train")
                    run.save()
                    raise Preempted(f"left at step {log.step}")
            train_loss = sum(run.losses) / len(run.losses)
            run.announce("evaluation", train_loss)
            clock.lap("train")
            with phase("evaluation"):
                evaluation = evaluate(base, splits, eval_batch_size)
                metrics = evaluation.metrics
            log.add(epoch=epoch, **{f"eval_{name}": value for name, value in metrics.items()})
            clock.lap("evaluation")
            last = log.step == num_steps
            if last:
                check_trained(engine, settings, len(splits.train), epoch)
            counts = run.is_best(metrics) or (last and not run.best_epoch)
            if output is not None and rank == 0:
                if counts:
                    folder = output if last else run.state.epoch_folder(epoch)
                    run.write(functools.partial(save_final, base, model, settings, splits, folder, storage, evaluation))
                    run.write(functools.partial(save_predictions, splits, evaluation, folder, storage))
                elif last:
                    kept = run.state.epoch_folder(run.best_epoch)
                    run.write(functools.partial(copy_final, kept, output, storage))
                if last:
                    run.write(functools.partial(save_log, log, output, storage))
                clock.lap("checkpoint")
            if note := compiler_note(base):
                run.note(note)
            message = EpochReport(
                epoch=epoch,
                step=log.step,
                metrics=metrics | {"train_loss": train_loss},
                log=log.take_new(),
                applied=applied,
                seconds=clock.seconds(),
                notes=troubles,
                finished=last,
                best_epoch=run.best_epoch,
            )
            run.reports.append(dataclasses.asdict(message))
            run.epoch, run.losses = epoch + 1, []
            run.save()
            with phase("idle"):
                stop = report(message)
            clock.lap("report")
        if not stop:
            run.write(run.state.remove)  # a stopped trial keeps it: a study that continues may train it further


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
        self.clock.by_phase = saved["seconds"]
        return True

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

    def save(self) -> None:
        """Write the trial's state."""
        log = self.log
        # States of earlier versions have the number of reported entries under "told".
        position = {"step": log.step, "entries": log.entries, "told": log.num_reported, "recent": log.recent}
        position |= {"losses": self.losses, "epoch": self.epoch, "reports": self.reports}
        position |= {"seconds": self.clock.seconds(), "best_epoch": self.best_epoch, "best_score": self.best_score}
        self.write(functools.partial(self.state.save, position, self.engine))
        if self.best_by and self.state.rank == 0:  # only now, because a kill before may go on from the points before
            self.write(functools.partial(self.state.keep_epochs, self.saved_best, self.best_epoch))
        self.saved_best = self.best_epoch
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


@contextlib.contextmanager
def out_of_memory_in_step() -> Iterator[None]:
    """Raise MicroBatchTooLarge when memory runs out in this context. An evaluation that does not fit is another case:
    a smaller micro-batch would not help it."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MicroBatchTooLarge(str(error)) from error
        raise


@out_of_memory_in_step()
def train_step(
    base: Base, splits: Splits, settings: TrialSettings, engine: Any, indices: np.ndarray, step: int, preempted: bool
) -> tuple[float, bool]:
    """One optimizer step.

    Args:
        indices: the images of the global batch [G].
        step: number of this step, from 1.
        preempted: whether this process must shut down.

    Returns:
        The mean loss over all workers, and whether any worker must shut down.

    Raises:
        TrialFailed: on all ranks and before the weights change, when loss or gradient is not finite on one.
        MicroBatchTooLarge: on the ranks that ran out of memory.
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
            chosen = to_device(torch.tensor(images), base.device)
            batch = collate(base, samples, with_answers=True)
        with phase("forward"):
            loss = engine(batch, chosen)
        with phase("backward"):
            engine.backward(loss)
        total += loss.detach()
        if number == num_micro_batches:
            # Here the step waits for the device: all ranks agree on the loss before the weights move.
            with phase("communication"):
                values = [total.item() / num_micro_batches, float(preempted)]
                mean_loss, any_preempted = mean_over_ranks(values, base.device)
            if not np.isfinite(mean_loss):
                raise TrialFailed(f"the training loss became {mean_loss} in step {step}: lower the learning rate")
            if not has_finite_gradient(engine):
                raise TrialFailed(NOT_FINITE.format(step))
        with phase("optimizer"):
            engine.step()
    if engine.skipped_steps:  # ZeRO skips a step whose gradient is not finite, on all ranks alike
        raise TrialFailed(NOT_FINITE.format(step))
    return mean_loss, any_preempted > 0


def has_finite_gradient(engine: Any) -> bool:
    """Whether the step may be taken. ZeRO checks this itself; without ZeRO, all ranks hold the mean gradient by now."""
    if engine.zero_optimization_stage():
        return True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())
