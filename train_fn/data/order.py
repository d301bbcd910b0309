"""The order of the training samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(num_images: int, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of one epoch as [steps, global_batch_size] indices, shuffled by seed and epoch.

    The last batch is filled up from the epoch's beginning, so that every step has the same number of images.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    steps = -(-num_images // global_batch_size)
    return np.resize(order, (steps, global_batch_size))


def micro_batches(step: np.ndarray, micro_batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This worker's micro-batches [micro_batch_size] of one step's indices [global_batch_size]."""
    yield from step.reshape(-1, world_size, micro_batch_size)[:, rank]
