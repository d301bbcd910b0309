"""One optimizer step after another: samples become micro-batches, and these a step of the engine.

Shapes: G samples of the global batch, B samples of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from train_fn.data.augment import Variant, label_of
from train_fn.data.order import by_images, by_tokens
from train_fn.data.samples import Sample
from train_fn.execution import Execution
from train_fn.model.base import Base
from train_fn.model.batches import collate, num_tokens, prompt_size, to_device
from train_fn.model.memory import is_out_of_memory
from train_fn.support import profile
from train_fn.support.profile import phase
from train_fn.support.ranks import mean_over_ranks, world
from train_fn.trial.applied import TrialFailed
from train_fn.trial.engine import MicroBatchTooLarge

NOT_FINITE = "a gradient was not finite in step {}: lower the learning rate (or not --fp16)"


class MicroBatch(NamedTuple):
    """Samples that go through the model at once."""

    batch: dict[str, Any]
    indices: torch.Tensor  # of the training samples [B]
    is_last: bool  # of its optimizer step


def micro_batches(
    base: Base,
    samples: Sequence[Sample],
    execution: Execution,
    order: np.ndarray,
    shown: Sequence[Sequence[str | Variant]] | None = None,
    fed: Counter[str] | None = None,
) -> Generator[MicroBatch]:
    """This worker's micro-batches of several optimizer steps.

    On a GPU the next one is prepared while the device computes. A CPU has no core to spare for that, and a profile's
    phases follow each other.

    Args:
        order: the samples of each step [steps, G].
        shown: what each sample shows in the place of its images. Not given: the images themselves.
        fed: counts the images of the yielded batches by their variant, as `augment.label_of` names it.
    """
    shown = [sample.images for sample in samples] if shown is None else shown

    packed = not execution.images and base.packs([num_tokens(base, sample) for sample in samples])

    def prepare(indices: np.ndarray, is_last: bool) -> tuple[MicroBatch, list[str]]:
        images = [shown[index] for index in indices]
        batch = collate(base, [samples[index] for index in indices], with_answers=True, packed=packed, shown=images)
        labels = [label_of(image) for its in images for image in its]
        return MicroBatch(batch, to_device(torch.tensor(indices), base.device), is_last), labels

    def counted(prepared: tuple[MicroBatch, list[str]]) -> MicroBatch:
        if fed is not None:
            fed.update(prepared[1])
        return prepared[0]

    groups = (group for step in order for group in cut_step(base, samples, execution, packed, step))
    if not prepares_ahead(base.device):
        for group in groups:
            with phase("data"):
                ready = prepare(*group)
            yield counted(ready)
        return
    waiting: Future[tuple[MicroBatch, list[str]]] | None = None
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(base.device,)) as ahead:
        for group in groups:
            following = ahead.submit(prepare, *group)
            if waiting:
                yield counted(waiting.result())
            waiting = following
        if waiting:
            yield counted(waiting.result())


def prepares_ahead(device: torch.device) -> bool:
    """Whether a thread prepares the next micro-batch."""
    return device.type == "cuda" and profile.active is None


def cut_step(
    base: Base, samples: Sequence[Sample], execution: Execution, packed: bool, step: np.ndarray
) -> Iterator[tuple[np.ndarray, bool]]:
    """This worker's part of an optimizer step: for each micro-batch its samples [B], and whether it is the last.

    Args:
        packed: whether a micro-batch is one row without padding.
        step: the samples of the global batch [G].
    """
    rank, world_size = world()
    if execution.images:
        sizes = [prompt_size(base, samples[index]) for index in step]
        cut = by_images(sizes, execution.images, rank, world_size)
    else:
        tokens = [num_tokens(base, samples[index]) for index in step]
        cut = by_tokens(tokens, execution.tokens, rank, world_size, packed)
    for number, positions in enumerate(cut, 1):
        yield step[positions], number == len(cut)


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
def train_step(engine: Any, batches: Iterator[MicroBatch], step: int, preempted: bool) -> tuple[float, bool]:
    """One optimizer step.

    Args:
        batches: what `micro_batches` yields; those of this step are taken from it.
        step: number of this step, from 1.
        preempted: whether this process must shut down.

    Returns:
        The mean loss over all workers, and whether any worker must shut down.

    Raises:
        TrialFailed: on all ranks and before the weights change, when loss or gradient is not finite on one.
        MicroBatchTooLarge: on the ranks that ran out of memory.
    """
    engine.train()
    total = torch.zeros((), device=engine.device)
    is_last = False
    while not is_last:
        batch, indices, is_last = next(batches)
        engine.set_gradient_accumulation_boundary(is_last)
        with phase("forward"):
            loss = engine(batch, indices)
        with phase("backward"):
            engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach()
    # Here the step waits for the device: all ranks agree on the loss before the weights move.
    with phase("communication"):
        mean_loss, any_preempted = mean_over_ranks([total.item(), float(preempted)], engine.device)
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
