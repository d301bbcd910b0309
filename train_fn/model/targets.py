"""The modules of the base that get an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from train_fn.model import hulumed
from train_fn.model.base import Base
from train_fn.settings import TrialSettings


def adapter_pattern(base: Base, target_modules: Sequence[str], exclude_patterns: Sequence[str]) -> str:
    """A regular expression, matched in full, for the modules that get an adapter.

    These are modules of the language model with one of the target names. The vision tower and the projector may use the
    same names.
    """
    excluded = [*map(re.escape, exclude_patterns), inside(base, base.vision_tower), inside(base, base.projector)]
    names = "|".join(map(re.escape, target_modules))
    return rf"(?!.*(?:{'|'.join(excluded)})){inside(base, base.language_model)}(?:.*\.)?(?:{names})"


def linear_layers(base: Base, target: str = "") -> set[str]:
    """Full names of the language model's linear layers: all, or those with a target name."""
    begin, end = base.language_model + ".", "." + target if target else ""
    return {name for name, module in base.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(begin) and name.endswith(end)}  # fmt: skip


def is_excluded(name: str, settings: TrialSettings) -> bool:
    """Whether a module's full name contains one of `lora_exclude_patterns`."""
    return any(part in name for part in settings.lora_exclude_patterns)


def wanted_modules(base: Base, settings: TrialSettings) -> set[str]:
    """Full names of the linear layers that the settings name, computed without PEFT."""
    layers = {name for target in settings.lora_target_modules for name in linear_layers(base, target)}
    return {name for name in layers if not is_excluded(name, settings)}


def target_problems(base: Base, settings: TrialSettings) -> list[str]:
    """Every name in `lora_target_modules` that matches no linear layer of the language model.

    PEFT would ignore such a name without a message.
    """
    if not settings.use_lora:
        return []
    layers = {target: linear_layers(base, target) for target in settings.lora_target_modules}
    unknown = [target for target, names in layers.items() if not names]
    excluded = [t for t, names in layers.items() if names and all(is_excluded(name, settings) for name in names)]
    problems = []
    if excluded:
        problems.append(
            f"`lora_exclude_patterns` must leave each target module a layer, but "
            f"{', '.join(settings.lora_exclude_patterns)} excludes every {', '.join(map(repr, excluded))}: change the "
            f"patterns"
        )
    if unknown:
        there = sorted({name.rpartition(".")[2] for name in linear_layers(base)})
        problems.append(
            f"`lora_target_modules` must name linear layers of the language model, but got "
            f"{', '.join(map(repr, unknown))}: choose from {', '.join(there)}"
        )
    return problems


def inside(base: Base, part: str) -> str:
    """A regular expression for the beginning of the names of a part's modules. For a Hulu-Med base it also matches the
    original implementation's names, which its adapters have on disk."""
    begins = [part + "."] + [hulumed.original_name(part + ".")] * base.hulumed
    return rf"(?:{'|'.join(map(re.escape, begins))})"
