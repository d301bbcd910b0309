"""One trial, from its settings to its adapter: the training loop. It does not know Ray.

It runs in one process, or in each process of a torch.distributed group. A trial that is killed continues from `state/`
and ends with the same numbers, to the last bit.

Shapes: G images of the global batch, C candidate answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_fn.data.order import epoch_order, micro_batches
from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport, Verdict
from train_fn.model.base import Base
from train_fn.model.batches import collate, prompt_size, to_device
from train_fn.model.memory import is_out_of_memory
from train_fn.settings import SAVE_STATE_EVERY_S, TrialSettings
from train_fn.support.profile import Clock, phase, profiled, traced
from train_fn.support.ranks import mean_over_ranks, seed_everything, world
from train_fn.support.storage import Storage
from train_fn.trial.applied import (
    TrialFailed,
    check_applied,
    check_schedule,
    check_trained,
    read_applied,
    read_schedule,
)
from train_fn.trial.engine import MicroBatchTooLarge, build_engine
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import (
    checkpoints,
    copy_final,
    save_checkpoint,
    save_final,
    save_log,
    save_predictions,
)
from train_fn.trial.resume_state import ResumeState
from train_fn.trial.run import Progress, Run
from train_fn.trial.scoring import Evaluation, evaluate

Report = Callable[[EpochReport], Verdict | bool]
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
    save_state_every: float = SAVE_STATE_EVERY_S,
    progress: Progress | None = None,
    preempted: Callable[[], bool] = lambda: False,
    profile: bool = False,
    trace: bool = False,
) -> None:
    """Train one adapter and report after each epoch.

    Args:
        report: called on every rank after each epoch. Its answer, the same on every rank, is a `Verdict`. The last
            epoch's report has `finished` and comes after the adapter is written. A trial that continues after a kill
            first repeats its reports: the process that received them may be gone.
        output: folder for `state/` while the trial is unfinished, for `checkpoint-N/`, and at the end of a trial that
            is not stopped early for `final_model/` and trainer_state.json.
        storage: where `output` is also kept. Not given: on this disk only.
        best_by: a validation metric, and "max" or "min": the adapter and the validation predictions that are kept are
            those of the epoch that is best by it. Not given, or the metric is finite in no epoch: of the last epoch.
        save_state_every: seconds between two writes of `state/` after an epoch; 0: after every epoch. Every
            `save_steps` steps, and when the trial must pause or shut down, it is written in any case.
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
        state = ResumeState(output, storage, settings)
        run = Run(engine, state, clock, progress, totals, best_by, save_state_every)
        stack.callback(run.writer.close)
        if not run.resume():
            run.state.discard()
            for old in checkpoints(output, storage) if output is not None and rank == 0 else []:
                storage.remove(old)
        clock.lap("setup")
        if profile:
            stack.enter_context(profiled(clock.by_phase, base.device))
        log, troubles, verdict = run.log, run.notes, Verdict.GO_ON
        for earlier in run.reports:
            verdict = verdict or Verdict(report(EpochReport.from_dict(earlier)))

        # ------------------------------------------------------------------------------------------- epoch after epoch
        run.announce("train", None)
        while verdict == Verdict.GO_ON and run.epoch <= num_epochs:
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
                    run.finish_writes()
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

            def save_epoch(folder: Path, evaluation: Evaluation = evaluation) -> None:
                run.write(functools.partial(save_final, base, model, settings, splits, folder, storage, evaluation))
                run.write(functools.partial(save_predictions, splits, evaluation, folder, storage))

            if output is not None and last:
                run.finish_writes()
                if rank == 0:
                    if counts:
                        save_epoch(output)
                    else:
                        kept = run.state.epoch_folder(run.best_epoch)
                        run.write(functools.partial(copy_final, kept, output, storage))
                    run.write(functools.partial(save_log, log, output, storage))
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
                best_epoch=run.best_epoch,
            )
            run.reports.append(dataclasses.asdict(message))
            run.epoch, run.losses = epoch + 1, []
            with phase("idle"):
                verdict = Verdict(report(message))
            clock.lap("report")
            # Only now is it certain that the epoch's adapter and state can be of use.
            if output is not None and rank == 0 and counts and not last and verdict != Verdict.END:
                save_epoch(run.state.epoch_folder(epoch))  # before the state that refers to it
                clock.lap("checkpoint")
            if verdict == Verdict.PAUSE or (verdict == Verdict.GO_ON and not last and run.is_due()):
                run.save()
        run.finish_writes()
        if verdict != Verdict.PAUSE:
            run.write(run.state.remove)


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
