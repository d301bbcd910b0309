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


def target_problems(base: Base, settings: TrialSettings) -> list[str]:
    """Every name in `lora_target_modules` that matches no linear layer of the language model.

    PEFT would ignore such a name without a message.
    """
    layers = [name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    begins = re.compile(inside(base, base.language_model))
    there = sorted({name.rpartition(".")[2] for name in layers if begins.match(name)})
    excluded: list[str] = []
    unknown: list[str] = []
    for target in dict.fromkeys(settings.lora_target_modules):
        pattern = adapter_pattern(base, [target], settings.lora_exclude_patterns)
        if not any(re.fullmatch(pattern, name) for name in layers):
            ends = [name for name in layers if begins.match(name) and f".{name}".endswith(f".{target}")]
            hit = any(part in name for part in settings.lora_exclude_patterns for name in ends)
            (excluded if hit else unknown).append(target)
    found = []
    if excluded:
        found.append(
            f"`lora_exclude_patterns` must leave each target module a layer, but "
            f"{', '.join(settings.lora_exclude_patterns)} excludes every {', '.join(map(repr, excluded))}: change the "
            f"patterns"
        )
    if unknown:
        found.append(
            f"`lora_target_modules` must name linear layers of the language model, but got "
            f"{', '.join(map(repr, unknown))}: choose from {', '.join(there)}"
        )
    return found if settings.use_lora else []


def inside(base: Base, part: str) -> str:
    """A regular expression for the beginning of the names of a part's modules. For a Hulu-Med base it also matches the
    original implementation's names, which its adapters have on disk."""
    begins = [part + "."] + [hulumed.original_name(part + ".")] * base.hulumed
    return rf"(?:{'|'.join(map(re.escape, begins))})"
