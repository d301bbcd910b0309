"""Scores of a part of the data, with the adapted base or with a saved adapter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from train_fn.data.samples import MAX_GENERATED, Splits
from train_fn.model.base import Base
from train_fn.scoring.evaluation import Predictions, predict
from train_fn.scoring.scores import metrics_of
from train_fn.support.ranks import gather
from train_fn.trial.adapter_files import load_adapter
from train_fn.trial.applied import TrialFailed


def evaluate(base: Base, splits: Splits, part: str, batch_size: int) -> tuple[dict[str, float], Predictions]:
    """Metrics of the adapted base on one part of the data, and its predictions."""
    samples = getattr(splits, part)
    predicted = predict(base, samples, splits, batch_size, generated_indices(splits, part))
    try:
        return metrics_of(predicted, samples, splits), predicted
    except ValueError as error:
        if not splits.own_metric:
            raise
        raise TrialFailed(f"a metric of one's own failed: {error}") from error


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
