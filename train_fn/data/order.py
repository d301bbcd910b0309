"""The order of the training samples, the variants that they show, and how a step is cut into micro-batches."""

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


def epoch_variants(num_samples: int, num_images: int, num_variants: int, seed: int, epoch: int) -> np.ndarray:
    """The number of the variant, from 0, that each image of each sample shows in an epoch [num_samples, num_images].

    Decided by seed and epoch. In `num_variants` epochs, each image shows each variant once.
    """
    cycle, place = divmod(epoch - 1, num_variants)
    # The third number sets this apart from `epoch_order`.
    draws = np.random.default_rng((seed, cycle, 1)).random((num_samples, num_images, num_variants))
    return draws.argsort(axis=-1)[..., place]


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

    All workers get the same number of micro-batches, because they reduce their gradients after each.

    Args:
        tokens: tokens of each sample of a step [G].
        packed: whether samples stand in one row; otherwise they are padded to the longest.

    Returns: as `by_images`.
    """
    lengths = np.asarray(tokens)
    order = np.argsort(lengths, kind="stable")
    for number in range(1, -(-len(order) // world_size) + 1):
        groups = (
            fill_rows(lengths, order, world_size * number) if packed else np.array_split(order, world_size * number)
        )
        sizes = [lengths[g].sum() if packed else lengths[g].max(initial=0) * len(g) for g in groups]
        if all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True)):
            break
    return groups[rank::world_size]


def fill_rows(lengths: np.ndarray, order: np.ndarray, number: int) -> list[np.ndarray]:
    """Samples in `number` rows of about as many tokens: each one, the longest first, goes to the shortest row so far.

    Args:
        order: the samples by length, the longest last.
    """
    rows: list[list[int]] = [[] for _ in range(number)]
    totals = np.zeros(number, dtype=int)
    for position in order[::-1]:
        shortest = int(totals.argmin())
        rows[shortest].append(position)
        totals[shortest] += lengths[position]
    return [np.array(sorted(row), dtype=int) for row in rows]
