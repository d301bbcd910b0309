"""The order of the training samples, and how a step's samples are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(num_images: int, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of one epoch as [steps, global_batch_size] indices, shuffled by seed and epoch.

    The last batch is filled up from the epoch's beginning, so that every step has the same number of images.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    steps = -(-num_images // global_batch_size)
    return np.resize(order, (steps, global_batch_size))


def by_images(sizes: Sequence, micro_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This worker's micro-batches of `micro_batch_size` samples.

    Samples of like size go together: less padding, and workers wait less for each other. Samples of one size keep
    their order.

    Args:
        sizes: a measure of the tokens of each sample of a step [G].

    Returns: positions in the step, an array for each micro-batch.
    """
    order = np.array(sorted(range(len(sizes)), key=lambda position: sizes[position]))
    return list(order.reshape(-1, world_size, micro_batch_size)[:, rank])


def by_tokens(tokens: Sequence[int], most: int, rank: int, world_size: int, packed: bool) -> list[np.ndarray]:
    """This worker's micro-batches of at most `most` tokens, as few as possible; a longer sample goes alone.

    All workers get the same number of micro-batches and as many samples, give or take one, because they reduce their
    gradients after each.

    Args:
        tokens: tokens of each sample of a step [G].
        packed: whether samples stand in one row; otherwise they are padded to the longest.

    Returns: as `by_images`.
    """
    lengths = np.asarray(tokens)
    order = np.argsort(lengths, kind="stable")
    for number in range(1, -(-len(order) // world_size) + 1):
        if packed:  # long and short ones together: all micro-batches have about the same number of tokens
            turns = np.arange(len(order)) % (2 * world_size * number)
            group = np.minimum(turns, 2 * world_size * number - 1 - turns)  # 0 1 2 2 1 0 0 1 ...
            groups = [np.sort(order[::-1][group == index]) for index in range(world_size * number)]
            fits = all(len(g) == 1 or lengths[g].sum() <= most for g in groups)
        else:
            groups = np.array_split(order, world_size * number)
            fits = all(len(g) == 1 or lengths[g].max() * len(g) <= most for g in groups)
        if fits:
            break
    return groups[rank::world_size]
