"""How samples are divided among parts: groups are never divided and are dealt fairly.

Shapes: P parts, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_indices(
    labels: Sequence[int], fractions: dict[str, float], seed: int, groups: Sequence[int] | None = None
) -> dict[str, list[int]]:
    """Divide all indices among the parts, each label in proportion to `fractions`.

    Groups are dealt at random, stratified by size (1, 2 to 3, 4 to 7, ...) and by the labels in them: the part that is
    furthest behind its share is next, give or take half a group by chance. So every part gets its share of large and
    small groups, and is a sample of the data. A group that has no room in any part goes to the part that it makes least
    uneven. Single images then balance the parts.

    Args:
        fractions: by part, with sum 1; the first part (train) also gets what rounding leaves. A part with a positive
            fraction gets at least one image of every label where the groups allow it.
        groups: group number of each index; a group is never divided.
    """
    wanted = [name for name, fraction in fractions.items() if fraction > 0]
    shares = np.array([fractions[name] for name in wanted])
    kinds, columns = np.unique(np.asarray(labels), return_inverse=True)  # a column: a label's number, from 0
    sizes = part_sizes(np.bincount(columns, minlength=len(kinds)), shares)  # [P, K]
    lacking = sizes.astype(float)  # images that a part still needs, by label
    holds = np.zeros(lacking.shape, dtype=bool)  # whether a part has an image of a label

    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for index in rng.permutation(len(labels)).tolist():
        members.setdefault(index if groups is None else int(groups[index]), []).append(index)
    one = np.ones(1, dtype=int)
    dealt = [  # each group's indices, its labels' columns, and its images of each of them
        (its, columns[its], one) if len(its) == 1 else (its, *np.unique(columns[its], return_counts=True))
        for its in members.values()
    ]
    dealt.sort(key=lambda group: (-len(group[0]).bit_length(), group[1].tolist()))
    groups_left = np.bincount(np.concatenate([columns[:0], *(its for _, its, _ in dealt)]), minlength=len(kinds))

    parts: dict[str, list[int]] = {name: [] for name in fractions}
    for indices, its, counts in dealt:
        # Where a label has no more groups than parts without it, only those parts may get one.
        scarce = its[groups_left[its] <= (~holds[:, its]).sum(0)]
        allowed = ~holds[:, scarce].all(1) if len(scarce) else np.ones(len(wanted), dtype=bool)
        has_room = allowed & (lacking[:, its] >= counts).all(1)
        if len(indices) > 1 and has_room.any():
            # The part that is furthest behind, with half a group added to what it has (Webster's method, which favours
            # neither large parts nor small ones). The half is the mean of exponential draws: so the first group of a
            # label goes to each part with the probability of the part's share, and not always to the largest.
            ahead = rng.exponential(0.5, len(wanted))[:, None] * counts
            need = (lacking[:, its] - ahead) / np.maximum(sizes[:, its], 1) @ counts
            row = int(np.where(has_room, need, -np.inf).argmax())
        else:
            # The smallest sum of squares of what it would lack: an overfull part costs more than a short one.
            cost = ((lacking[:, its] - counts) ** 2 - lacking[:, its] ** 2).sum(1)
            row = int(np.where(allowed, cost, np.inf).argmin())
        lacking[row, its] -= counts
        holds[row, its] = True
        groups_left[its] -= 1
        parts[wanted[row]] += indices
    return {name: sorted(indices) for name, indices in parts.items()}


def part_sizes(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Images [P, K] that each part should get of labels with these totals [K]: at least one, as long as there are
    any; the first part gets what rounding leaves."""
    sizes = np.zeros((len(shares), len(totals)), dtype=int)
    for row, share in list(enumerate(shares))[1:]:
        spare = totals - sizes.sum(0) - 1
        sizes[row] = np.maximum(0, np.minimum(np.maximum(1, np.round(share * totals)), spare))
    sizes[0] = totals - sizes[1:].sum(0)
    return sizes
