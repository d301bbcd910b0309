"""Scores of a part of the data, with the adapted base, with a saved adapter, or with the base alone.

Shapes: I images, P vision patches of one image, D width of the vision tower.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from train_fn.data.samples import MAX_GENERATED, Splits
from train_fn.model.base import Base
from train_fn.model.batches import image_features
from train_fn.scoring.evaluation import Predictions, predict
from train_fn.scoring.fitting import Decided, decide_out_of_fold
from train_fn.scoring.probe import probe_images, probe_tasks
from train_fn.scoring.scores import metrics_of
from train_fn.support.profile import count_work
from train_fn.support.ranks import gather, world
from train_fn.trial.adapter_files import load_adapter
from train_fn.trial.applied import TrialFailed


@dataclass(frozen=True)
class Evaluation:
    """What the adapted base makes of the validation part."""

    metrics: dict[str, float]
    """Without those that these samples cannot give, such as the positive predictive value of no positive answer."""
    predicted: Predictions
    decided: dict[str, Decided]
    """Probabilities and answers under decisions that were fitted without the sample itself, by the task's name."""


def evaluate(base: Base, splits: Splits, batch_size: int) -> Evaluation:
    """Predictions of the adapted base on the validation part, and their metrics."""
    samples = splits.validation
    predicted = predict(base, samples, splits, batch_size, generated_indices(splits, "validation"))
    decided = decide_out_of_fold(predicted, samples, splits)
    try:
        found = metrics_of(predicted, samples, splits, decided)
    except ValueError as error:
        if not splits.own_metric:
            raise
        raise TrialFailed(f"a metric of one's own failed: {error}") from error
    metrics = {name: value for name, value in found.items() if math.isfinite(value) or name == "loss"}
    return Evaluation(metrics, predicted, decided)


def generated_indices(splits: Splits, part: str) -> list[int]:
    """Samples of a part whose answer is generated at the end of each epoch: of those without candidates all, or a fixed
    sample of `MAX_GENERATED`, since generation takes much longer than a loss."""
    samples = getattr(splits, part)
    written = [index for index, sample in enumerate(samples) if not splits.task_of(sample).candidates]
    chosen = np.random.default_rng(0).permutation(len(written))[:MAX_GENERATED]
    return sorted(written[number] for number in chosen)


def score_adapter(base: Base, splits: Splits, part: str, batch_size: int, adapter: Path) -> Predictions:
    """Predictions of a saved adapter on one part of the data."""
    with load_adapter(base, adapter):
        return predict(base, getattr(splits, part), splits, batch_size)


def try_adapter(base: Base, splits: Splits, part: str, batch_size: int, adapter: Path) -> dict[str, Any]:
    """The result of `score_adapter`, or {"error": ...} on every rank when a rank cannot load the adapter."""
    with contextlib.ExitStack() as stack:
        error = ""
        try:
            stack.enter_context(load_adapter(base, adapter))
        except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as failure:
            if isinstance(failure, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise  # a fault of the device, not of the adapter
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if errors := list(filter(None, gather(error))):  # all ranks predict, or none
            return {"error": errors[0]}
        return predict(base, getattr(splits, part), splits, batch_size)


def baselines(base: Base, splits: Splits, batch_size: int) -> tuple[dict[str, Predictions], np.ndarray | None]:
    """What the base gives without any training.

    Returns:
        Its predictions of validation (without generated answers: they are only for a decision) and test, and the
        features that a linear probe takes; None where the base keeps none by image.
    """
    generated: dict[str, list[int] | None] = {"validation": [], "test": None}
    untuned = {
        part: predict(base, getattr(splits, part), splits, batch_size, its)
        for part, its in generated.items()
        if getattr(splits, part) and (part == "test" or probe_tasks(splits))
    }
    images = probe_images(splits)
    return untuned, pooled_features(base, images) if images and base.takes_features else None


def pooled_features(base: Base, images: Sequence[str]) -> np.ndarray:
    """Mean and standard deviation of each image's vision features over its patches [I, 2 D], float32, on every worker.

    Each worker takes every world_size-th image, one at a time: no more than one image's patches are in memory.
    """
    rank, world_size = world()
    rows = []
    for image in images[rank::world_size]:
        count_work()
        features = image_features(base, image).float()  # [P, D]
        rows.append(torch.cat([features.mean(0), features.std(0, correction=0)]).cpu().numpy())
    pooled = np.empty((len(images), 2 * base.model.config.vision_config.hidden_size), dtype=np.float32)
    for first, share in enumerate(gather(np.array(rows, dtype=np.float32))):
        if len(share):
            pooled[first::world_size] = share
    return pooled
