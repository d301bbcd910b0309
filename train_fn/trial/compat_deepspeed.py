"""What DeepSpeed offers no public way for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from unittest.mock import patch

import deepspeed.ops
import deepspeed.runtime.compiler
import torch


def without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce.

    On a CPU it would compile one at the first start: a minute, and a compiler that a user's machine need not have. It
    serves inference only; gloo runs the collectives of training either way. DeepSpeed takes no setting for this: it
    looks the op up in this table, which it fills when it is first read.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def without_compiled_muon() -> None:
    """Import DeepSpeed's Muon optimizer without loading torch's compiler, which takes 0.8 s of each worker.

    ZeRO imports it to compare every optimizer with it, and the import wraps its functions in torch.compile. No trial
    uses them.
    """

    def as_it_is(function: Callable) -> Callable:
        return function

    with patch.object(deepspeed.runtime.compiler, "compile", lambda: as_it_is):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def remove_hooks(parameters: Iterable[torch.Tensor]) -> None:
    """Remove the hooks that ZeRO has put on trained weights, after an engine that could not be built.

    `engine.destroy` removes them, but the error leaves no engine. They hold the optimizer, and with it two copies of
    the weights, for as long as the process lives: the cycle runs through torch's C++ objects, which Python's garbage
    collector does not see.
    """
    for parameter in parameters:
        if hooks := parameter._post_accumulate_grad_hooks:
            hooks.clear()
