"""Worker processes for tests, forked from a server that has loaded the libraries once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# Loading them takes several seconds of CPU, which `spawn` would spend in each process.
multiprocessing.set_forkserver_preload(["train_fn.trial.loop", "train_fn.trial.scoring"])


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], num_ranks: int = 2) -> None:
    """Run `function(rank, *arguments)` in processes of their own. Their environment is that of the server's start."""
    torch.multiprocessing.start_processes(function, arguments, num_ranks, start_method="forkserver")
