"""The language model's layers, compiled once for all trials of a lane.

A trial's rank, alpha and dropout rate, and the number and length of its samples, are inputs of the compiled graph and
no constants in it. So one graph serves all layers of all trials, and the first trial's numbers come from the same code
as the tenth's. Dropout 0, DoRA, other target modules, and a batch of one sample have graphs of their own.

Shapes: B samples, S tokens, H hidden size, R rank.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from train_fn.model.base import Base
from train_fn.model.memory import is_out_of_memory
from train_fn.support.cache import cache_folder
from train_fn.trial.compat_torch import RECOMPILE_LIMIT, budgeted, compiler_errors, dynamic_adapters, mark_dynamic

BACKEND = "inductor"  # tests set "aot_eager", which needs no C++ compiler


def compiles_by_default(device: torch.device) -> bool:
    """Whether layers are compiled if the user does not choose: on GPUs that Triton supports with bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class Compiler:
    """What a lane has compiled. Kept on the base from trial to trial."""

    runs: dict[float, Callable] = field(default_factory=dict)
    """The compiled `run_layer` by activation budget."""
    error: str = ""
    """Why the lane no longer compiles; empty while it does."""


@contextlib.contextmanager
def compiled(base: Base, activation_budget: float = 1.0) -> Iterator[None]:
    """Compile the language model's layers for training. Attach the adapter before.

    An evaluation stays plain: its cache of keys and values would be compiled again for every layer. When the compiler
    fails, all later layers of the lane run plain, and `compiler_note` returns the reason.

    Args:
        activation_budget: share of a layer's activations that is kept for the backward pass, up to 1; the rest is
            computed again.
    """
    compiler = base.compiler = base.compiler or Compiler()
    if activation_budget not in compiler.runs:
        # Beside the base's features, so that the next study need not compile. torch reads it when it first compiles.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        compiler.runs[activation_budget] = torch.compile(  # type: ignore[call-overload]  # its stub lacks two options
            run_layer,
            backend=budgeted(BACKEND, activation_budget),
            recompile_limit=RECOMPILE_LIMIT,
            isolate_recompiles=True,  # another base's layers would count, too
        )
    layers = [layer for layer in base.model.get_submodule(base.language_model).modules()
              if isinstance(layer, GradientCheckpointingLayer)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(dynamic_adapters())
        for layer in layers:
            call = functools.partial(
                call_layer, compiler, compiler.runs[activation_budget], layer, tensor_scalings(layer)
            )
            stack.callback(vars(layer).pop, "forward", None)
            layer.forward = call
        yield


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module's forward pass in training is a compiled one."""
    call: Any = vars(module).get("forward")
    return getattr(call, "func", None) is call_layer and not call.args[0].error


def compiler_note(base: Base) -> str:
    """One line on why this lane's layers are not compiled although they should be; empty if the compiler works."""
    return base.compiler.error if base.compiler else ""


# ------------------------------------------------------------------------------------------------ one layer


Scalings = list[tuple[dict[str, Any], float, torch.Tensor]]


def tensor_scalings(layer: torch.nn.Module) -> Scalings:
    """Prepare a layer's adapters for compiling: dynamic ranks, and dropout with a rate that may vary.

    Returns:
        Each adapter's dictionary of scalings, its scaling, and the same as a tensor.
    """
    scalings: Scalings = []
    for adapter in layer.modules():
        if isinstance(adapter, LoraLayer) and "default" in adapter.lora_A:
            weight, weight_b = (
                module["default"].get_parameter("weight") for module in (adapter.lora_A, adapter.lora_B)
            )
            mark_dynamic(weight, [0])  # [R, in]
            mark_dynamic(weight_b, [1])  # [out, R]
            dropout = adapter.lora_dropout["default"]
            if isinstance(dropout, torch.nn.Dropout):
                adapter.lora_dropout["default"] = Dropout(dropout.p, weight.device)
            scaling = adapter.scaling["default"]
            scalings.append((adapter.scaling, scaling, torch.tensor(float(scaling), device=weight.device)))
    return scalings


class Dropout(torch.nn.Dropout):
    """Dropout whose rate is a tensor in a compiled graph, so that another rate needs no other graph."""

    def __init__(self, p: float, device: torch.device) -> None:
        super().__init__(p)
        self.rate = torch.tensor(p, device=device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() or not self.training:
            return super().forward(input)
        kept = torch.rand_like(input, dtype=torch.float32) >= self.rate
        return input * kept * (1 / (1 - self.rate))


def call_layer(
    compiler: Compiler, run: Callable, layer: torch.nn.Module, scalings: Scalings, hidden: torch.Tensor, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """A layer's output: compiled where gradients are wanted, plain elsewhere and after the compiler has failed.

    Args:
        hidden: [B, S, H].
        kwargs: as transformers gives them; with `cu_seq_lens_q` [sequences + 1] and `max_length_q` for packed rows.
    """
    if compiler.error or not torch.is_grad_enabled():
        return run_layer(layer, hidden, *args, **kwargs)
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # the first layer as all others: one graph less
    mark_dynamic(hidden, range(2))
    for name, value in kwargs.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                # Rotary embeddings [B, S, head size]; positions, masks and lengths have no dimension of the model.
                mark_dynamic(tensor, range(tensor.dim() - (tensor.is_floating_point() and name != "attention_mask")))
    # The compiled graph takes the scaling as a tensor: a number would be compiled in. All others see the number, which
    # eager torch multiplies with in float32, while it would round a tensor to bfloat16 first.
    for owner, _, tensor in scalings:
        owner["default"] = tensor
    try:
        return run(layer, hidden, *args, **kwargs)
    except compiler_errors() as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        compiler.error = f"layers are not compiled on this lane, because torch.compile failed: {reason}"
    finally:
        for owner, scaling, _ in scalings:
            owner["default"] = scaling
    return run_layer(layer, hidden, *args, **kwargs)


def run_layer(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward pass, with gradient checkpointing where it is on."""
    return type(layer).forward(layer, *args, **kwargs)
