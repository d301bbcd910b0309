"""The base as it was loaded: a snapshot, restored after each trial and compared before each trial."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from train_fn.model.base import Base


class BaseChanged(RuntimeError):
    """The base is not as it was loaded: an earlier trial has left something on it. The worker must load it again."""


class Snapshot(NamedTuple):
    """Modules, parameters, buffers, hooks and flags of a base at one moment. Holds no copies of weights."""

    modules: dict[str, tuple[torch.nn.Module, dict[str, Any]]]
    """The module and its attributes, by full name."""
    weights: dict[str, tuple]
    """The model's `weight_facts`."""
    autocasts: bool


def pristine(base: Base) -> Snapshot:
    """The base as it was when the first adapter was attached."""
    base.as_loaded = base.as_loaded or snapshot(base)
    return base.as_loaded


def snapshot(base: Base) -> Snapshot:
    """The base as it is now."""
    modules = {
        name: (module, {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()})
        for name, module in base.model.named_modules()
    }
    return Snapshot(modules, weight_facts(base.model), base.autocasts)


def weight_facts(model: torch.nn.Module) -> dict[str, tuple]:
    """Address, format and shape of each parameter, and whether it is trained, by name."""
    return {
        name: (p.data_ptr(), p.dtype, p.shape, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    }


def restore(base: Base, before: Snapshot) -> None:
    """Undo every change to the base since the snapshot."""
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
    """Full names of the modules and parameters that differ from the snapshot: an adapter layer, a hook, another
    format."""
    now = snapshot(base)
    changed = {name for name, (module, _) in now.modules.items() if before.modules.get(name, (None,))[0] is not module}
    # The dictionaries that every module has: parameters, children, hooks.
    compared = [key for key, value in vars(torch.nn.Module()).items() if isinstance(value, dict)]
    for name, (module, then) in before.modules.items():
        if any(identities(then[key]) != identities(vars(module)[key]) for key in compared):
            changed.add(name)
    changed |= {name for name, facts in now.weights.items() if before.weights.get(name) != facts}
    return sorted(changed) + ["autocast"] * (now.autocasts != before.autocasts)


def identities(held: dict[Any, Any]) -> dict[Any, int]:
    """Identities of the modules, parameters and hooks in a dictionary.

    Left out are buffers, which a forward pass may replace, and the hooks that transformers adds at the first one.
    """

    def compared(value: Any) -> bool:
        if isinstance(value, torch.nn.Module | torch.nn.Parameter):
            return True
        is_buffer = value is None or isinstance(value, torch.Tensor)
        return not (is_buffer or getattr(value, "__module__", "").startswith("transformers."))

    return {key: id(value) for key, value in held.items() if compared(value)}
