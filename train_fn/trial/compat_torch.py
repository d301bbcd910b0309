"""What torch's compiler offers no public way for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

RECOMPILE_LIMIT = 64  # graphs of one lane: kinds of adapters, of layers, and of their inputs


@contextlib.contextmanager
def dynamic_adapters() -> Iterator[None]:
    """Let `mark_dynamic` work on weights, whose shapes torch otherwise compiles in, and raise an error where torch
    would silently stop to compile. There is no public setting for either, and torch.compile takes none.

    torch keeps settings by thread: enter this in the thread that trains.
    """
    import torch._dynamo
    import torch.fx.experimental._config

    # Otherwise sizes and offsets that are equal in the first call must stay equal.
    shapes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    settings = torch._dynamo.config.patch(
        force_parameter_static_shapes=False,
        force_nn_module_property_static_shapes=False,  # a weight is a property of its module, so both are needed
        fail_on_recompile_limit_hit=True,
    )
    with shapes, settings:
        yield


def mark_dynamic(tensor: torch.Tensor, dims: Iterable[int]) -> None:
    """Let these dimensions vary from the first call on. torch.compile itself only learns from a second shape, and its
    `dynamic=True` would make the shapes of the base's weights dynamic, too.

    A dimension of size 1 is left out: torch compiles it in.
    """
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, [dim for dim in dims if tensor.shape[dim] > 1])


def budgeted(backend: str, activation_budget: float) -> Callable:
    """A backend of torch.compile that keeps a share of the activations for the backward pass. There is no option of
    torch.compile for that."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        import torch._dynamo
        import torch._functorch.config

        # The backward pass is compiled now, so that an error of the compiler comes out of the forward pass.
        with torch._functorch.config.patch(
            activation_memory_budget=activation_budget, force_non_lazy_backward_lowering=True
        ):
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compile_graph


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a call of a compiled function raises when the compiler fails. torch documents no exception for that."""
    import torch._dynamo.exc

    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
