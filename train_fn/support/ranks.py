"""The processes of a trial: ranks, seeds and means over ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator that training uses. torch's, which draws dropout, differs by rank, as the images do."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100_003 * rank)


def gather(value: Any) -> list[Any]:
    """The value of each rank, on every rank. Values are pickled."""
    values = [value] * world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The mean of each number over the ranks. Every rank gets the same result, so all take the same decisions on it."""
    _, world_size = world()
    if world_size == 1:
        return values
    tensor = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / world_size).tolist()
