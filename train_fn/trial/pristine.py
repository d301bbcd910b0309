"""The base as it was loaded: noted, restored, compared."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from train_fn.model.base import Base


class Snapshot(NamedTuple):
    """What a base consisted of at one moment. Holds no copies of weights."""

    modules: dict[str, tuple[torch.nn.Module, dict[str, Any]]]
    """By full name: the module and its attributes."""
    weights: dict[str, tuple]
    """`weight_facts` of the model."""
    autocasts: bool


class BaseChanged(RuntimeError):
    """The base is not as it was loaded: an earlier trial has left something on it. The worker must load it anew."""


def snapshot(base: Base) -> Snapshot:
    """What the base consists of now: modules, parameters, buffers, hooks and flags. Copies no weights."""
    modules = {
        name: (module, {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()})
        for name, module in base.model.named_modules()
    }
    return Snapshot(modules, weight_facts(base.model), base.autocasts)


def pristine(base: Base) -> Snapshot:
    """The base as it was when the first adapter was attached."""
    base.as_loaded = base.as_loaded or snapshot(base)
    return base.as_loaded


def weight_facts(model: torch.nn.Module) -> dict[str, tuple]:
    """By parameter name: where its values lie, their format and shape, and whether it is trained."""
    return {
        name: (p.data_ptr(), p.dtype, p.shape, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    }


def restore(base: Base, before: Snapshot) -> None:
    """Undo every change to the base's modules, parameters, buffers, hooks and flags since the snapshot."""
    base.autocasts = before.autocasts
    for module, attributes in before.modules.values():
        now = vars(module)
        for name in now.keys() - attributes.keys():
            del now[name]
        for name, value in attributes.items():
            if isinstance(value, dict) and name in now:  # a handle that removes a hook refers to this very dictionary
                now[name].clear()
                now[name].update(value)
            else:
                now[name] = copy.copy(value) if isinstance(value, dict) else value
    base.model.requires_grad_(False)


def changes(base: Base, before: Snapshot) -> list[str]:
    """The full names of modules and parameters that are not as they were: an adapter layer, a hook, another format."""
    now = snapshot(base)
    found = {name for name, (module, _) in now.modules.items() if before.modules.get(name, (None,))[0] is not module}
    # What every module has: parameters, children, hooks. A forward pass may replace buffers.
    compared = [key for key, value in vars(torch.nn.Module()).items() if isinstance(value, dict) and key != "_buffers"]
    for name, (module, then) in before.modules.items():
        if any(identities(then[key]) != identities(vars(module)[key]) for key in compared):
            found.add(name)
    found |= {name for name, facts in now.weights.items() if before.weights.get(name) != facts}
    return sorted(found) + ["autocast"] * (now.autocasts != before.autocasts)


def identities(held: dict[Any, Any]) -> dict[Any, int]:
    """Which objects a dictionary holds, without the hooks that transformers adds at the first forward pass."""
    return {
        key: id(value)
        for key, value in held.items()
        if isinstance(value, torch.nn.Module | torch.Tensor)
        or not getattr(value, "__module__", "").startswith("transformers.")
    }
