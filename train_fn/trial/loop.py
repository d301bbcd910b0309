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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from train_fn.data.augment import shown_images
from train_fn.data.order import epoch_order
from train_fn.data.samples import Splits
from train_fn.execution import Execution
from train_fn.jobs import EpochReport, Verdict
from train_fn.model.base import Base
from train_fn.model.preparation import prepare_features
from train_fn.settings import SAVE_STATE_EVERY_S, TrialSettings
from train_fn.support.cleanup import at_end
from train_fn.support.profile import Clock, phase, profiled, traced
from train_fn.support.ranks import seed_everything, world
from train_fn.support.storage import Storage
from train_fn.trial.applied import (
    TrialFailed,
    check_applied,
    check_schedule,
    check_shown,
    check_trained,
    read_applied,
    read_schedule,
    read_shown,
)
from train_fn.trial.compiled import compiler_note
from train_fn.trial.engine import build_engine
from train_fn.trial.lora import adapted
from train_fn.trial.memory import choose_execution, free_memory
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
from train_fn.trial.steps import micro_batches, train_step

Report = Callable[[EpochReport], Verdict | bool]


class Preempted(Exception):
    """This trial's process must shut down; the trial can continue elsewhere."""


def run_trial(
    base: Base,
    splits: Splits,
    settings: TrialSettings,
    report: Report,
    *,
    execution: Execution | None = None,
    eval_batch_size: int = 16,
    output: Path | None = None,
    storage: Storage | None = None,
    best_by: tuple[str, str] | None = None,
    save_state_every: float = SAVE_STATE_EVERY_S,
    rungs: Sequence[float] = (),
    progress: Progress | None = None,
    preempted: Callable[[], bool] = lambda: False,
    profile: bool = False,
    trace: bool = False,
    collective_timeout_s: float | None = None,
) -> None:
    """Train one adapter and report after each epoch.

    Args:
        report: called on every rank after each epoch and at each rung. Its answer, the same on every rank, is a
            `Verdict`. The last epoch's report has `finished` and comes after the adapter is written. A trial that
            continues after a kill first repeats its reports: the process that received them may be gone.
        execution: how the steps are computed. Not given: as the memory of this device allows.
        output: folder for `state/` while the trial is unfinished, for `checkpoint-N/`, and at the end of a trial that
            is not stopped early for `final_model/` and trainer_state.json.
        storage: where `output` is also kept. Not given: on this disk only.
        best_by: a validation metric, and "max" or "min": the adapter and the validation predictions that are kept are
            those of the epoch that is best by it. Not given, or the metric is finite in no epoch: of the last epoch.
        save_state_every: seconds between two writes of `state/` after an epoch; 0: after every epoch. Every
            `save_steps` steps, and when the trial must pause or shut down, it is written in any case.
        rungs: epochs, whole or not, after which early stopping wants a report. Those within an epoch cost an evaluation
            more, change nothing in the training, and are no candidates for `best_by`. See `rung_steps`.
        progress: called on rank 0 with {"phase", "epoch", "num_epochs", "step", "num_steps", "loss"} when training
            begins, every `logging_steps` optimizer steps, and when an evaluation begins; it must not block.
        preempted: whether this process must shut down soon; called in each optimizer step.
        profile: measure phases (see `train_fn.support.profile`) and report their seconds with the others.
        trace: write `trace.json.gz` of a few optimizer steps into `output`.
        collective_timeout_s: see `build_engine`.

    Raises:
        Preempted: on all ranks, with `state/` just written, when one of them must shut down.
        TrialFailed: on all ranks, when the trial itself is at fault: no module to adapt, a setting that did not reach
            the engine, a loss that is not finite.
    """
    clock = Clock()
    rank, world_size = world()
    if problems := settings.problems(world_size):
        raise TrialFailed("; ".join(problems))
    if execution is None:
        execution, _ = choose_execution(base, splits.train, settings, free_memory(base.device, 1.0), world_size)
    with contextlib.ExitStack() as stack:
        # ---------------------------------------------------------------------------------------- adapter and engine
        seed_everything(settings.seed, 0)  # the adapter starts alike on every rank
        try:
            model = stack.enter_context(adapted(base, settings, execution))
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        steps_per_epoch = -(-len(splits.train) // settings.global_batch_size)
        num_steps = settings.max_steps or steps_per_epoch * settings.num_train_epochs
        num_epochs = -(-num_steps // steps_per_epoch)
        rung_at = rung_steps(rungs, steps_per_epoch, num_steps)
        weights = splits.sample_weights() if settings.class_balanced_loss and splits.has_candidates else []
        sample_weights = torch.tensor(weights, device=base.device)
        engine = build_engine(
            base, model, settings, sample_weights, num_steps, world_size, execution, collective_timeout_s
        )
        stack.enter_context(at_end(engine.destroy))

        # ------------------------------------------------------------------------------- what the live engine applies
        rates = read_schedule(engine, settings, num_steps)
        applied = read_applied(engine) | {"learning_rate_at_step": rates}
        check_applied(applied, settings, execution, world_size, closed_set=splits.has_candidates)
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

        def evaluate_after(epochs: float) -> tuple[Evaluation, EpochReport]:
            """Evaluate after so many epochs. Returns the evaluation, and a report on it for `send`."""
            train_loss = sum(run.losses) / len(run.losses)
            run.announce("evaluation", train_loss)
            clock.lap("train")
            devices = [base.device] if base.device.type == "cuda" else []
            # Whether an epoch is evaluated before its end changes no draw of what follows.
            with phase("evaluation"), torch.random.fork_rng(devices, enabled=epochs != run.epoch):
                evaluation = evaluate(base, splits, eval_batch_size)
            log.add(epoch=epochs, **{f"eval_{name}": value for name, value in evaluation.metrics.items()})
            clock.lap("evaluation")
            metrics = evaluation.metrics | {"train_loss": train_loss}
            return evaluation, EpochReport(epoch=run.epoch, progress=epochs, step=log.step, metrics=metrics)

        def send(message: EpochReport) -> Verdict:
            """Complete a report and send it. Returns the answer."""
            if note := compiler_note(base):
                run.note(note)
            message.log, message.applied, message.notes = log.take_new(), dict(applied), troubles
            message.seconds, message.best_epoch = clock.seconds(), run.best_epoch
            run.reports.append(dataclasses.asdict(message))
            with phase("idle"):
                answer = Verdict(report(message))
            clock.lap("report")
            return answer

        # ------------------------------------------------------------------------------------------- epoch after epoch
        run.announce("train", None)
        while verdict == Verdict.GO_ON and run.epoch <= num_epochs:
            epoch = run.epoch
            first = (epoch - 1) * steps_per_epoch
            whole = epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch)
            whole = whole[: num_steps - first]
            order = whole[log.step - first :]
            shown = shown_images(splits, settings, epoch)
            # Of this epoch only: a trial that is stopped, or is shorter than an epoch, does not use all.
            used = [shown[index] for index in np.unique(order)] + [sample.images for sample in splits.validation]
            prepare_features(base, [image for images in used for image in images], preempted)
            batches = micro_batches(base, splits.train, execution, order, shown, run.shown)
            steps = stack.enter_context(contextlib.closing(batches))
            for _ in order:
                if rung_at.get(log.step, 0.0) > run.progress_reported:  # here, since an attempt may go on at a rung
                    _, message = evaluate_after(rung_at[log.step])
                    verdict = send(message)
                    if verdict != Verdict.GO_ON:
                        break
                    run.announce("train", None)
                loss, leave = train_step(engine, steps, log.step + 1, preempted())
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
            if verdict != Verdict.GO_ON:
                if verdict == Verdict.PAUSE:
                    run.save()
                break
            applied |= read_shown(run.shown)
            check_shown(applied, settings, splits, whole, epoch)
            evaluation, message = evaluate_after(epoch)
            last = log.step == num_steps
            if last:
                check_trained(engine, settings, len(splits.train), epoch)
            counts = run.is_best(evaluation.metrics) or (last and not run.best_epoch)

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
            message.finished = last
            run.epoch, run.losses, run.shown = epoch + 1, [], Counter()
            verdict = send(message)
            # Only now is it certain that the epoch's adapter and state can be of use.
            if output is not None and rank == 0 and counts and not last and verdict != Verdict.END:
                run.writer.wait()  # the write of an earlier point removes the folders of epochs that it does not know
                save_epoch(run.state.epoch_folder(epoch))  # before the state that refers to it
                clock.lap("checkpoint")
            if verdict == Verdict.PAUSE or (verdict == Verdict.GO_ON and not last and run.is_due()):
                run.save()
        run.finish_writes()
        if verdict != Verdict.PAUSE:
            run.write(run.state.remove)


def rung_steps(rungs: Sequence[float], steps_per_epoch: int, num_steps: int) -> dict[int, float]:
    """The optimizer steps within an epoch after which a trial reports, each with its rung.

    A rung lies after the first step by which that many epochs are trained. Where that step ends an epoch, the report on
    the epoch serves. Of several rungs at one step the last one stays. In a training that is shorter than an epoch, the
    rungs count the whole training as one.

    Args:
        rungs: epochs, whole or not.
        num_steps: steps of the whole training.
    """
    length = min(steps_per_epoch, num_steps)
    steps = {math.ceil(round(rung * length, 6)): rung for rung in sorted(rungs)}  # 0.3 * 10 steps are a little above 3
    return {step: rung for step, rung in steps.items() if step % length and step < num_steps}
