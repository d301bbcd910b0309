"""The modules of the base that get an adapter."""

from __future__ import annotations

import re

import torch

from train_fn.model import hulumed
from train_fn.model.base import Base
from train_fn.settings import TrialSettings


def adapter_pattern(base: Base, settings: TrialSettings) -> str:
    """A regular expression, matched in full, for the modules that get an adapter.

    In the language model these are the modules with one of the target names. The vision tower and the projector may use
    the same names. Of these two parts every linear layer gets an adapter, and the pattern has their full names, because
    a convolution may have the same last name.
    """
    patterns = {part: exact_pattern(base, part) for part in settings.lora_parts if part != "language_model"}
    if "language_model" in settings.lora_parts or not patterns:
        excluded = [*map(re.escape, settings.lora_exclude_patterns)]
        excluded += [inside(base, base.vision_tower), inside(base, base.projector)]
        names = "|".join(map(re.escape, settings.lora_target_modules))
        begin = inside(base, base.language_model)
        patterns["language_model"] = rf"(?!.*(?:{'|'.join(excluded)})){begin}(?:.*\.)?(?:{names})"
    return "|".join(patterns.values())


def exact_pattern(base: Base, part: str) -> str:
    """A regular expression for exactly the linear layers of the vision tower or the projector. Names that differ in
    their first number only are joined, so that it stays short."""
    begin = getattr(base, part)
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in sorted(part_layers(base, part)):
        words = name.removeprefix(begin + ".").split(".")
        at = next((place for place, word in enumerate(words) if word.isdecimal()), len(words) - 1)
        head, tail = "".join(word + "." for word in words[:at]), "".join("." + word for word in words[at + 1 :])
        numbers.setdefault((head, tail), []).append(words[at])
    joined = [rf"{re.escape(head)}(?:{'|'.join(its)}){re.escape(tail)}" for (head, tail), its in numbers.items()]
    return rf"{inside(base, begin)}(?:{'|'.join(joined)})"


def part_layers(base: Base, part: str) -> set[str]:
    """Full names of the linear layers of a part. The projector may stand inside the vision tower: its layers are the
    projector's then.

    Args:
        part: the field of `Base` that names it.
    """
    begin, other = getattr(base, part) + ".", base.projector + "."
    return {
        name
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(begin)
        and (part == "projector" or not name.startswith(other))
    }


def part_of(base: Base, name: str) -> str:
    """The part of a module or parameter, by its field of `Base`; "language_model" for those of no other part."""
    parts = ("projector", "vision_tower")  # in this order: the projector may stand inside the tower
    return next((part for part in parts if name.startswith(getattr(base, part) + ".")), "language_model")


def linear_layers(base: Base, target: str = "") -> set[str]:
    """Full names of the language model's linear layers: all, or those with a target name."""
    end = "." + target if target else ""
    return {name for name in part_layers(base, "language_model") if name.endswith(end)}


def is_excluded(name: str, settings: TrialSettings) -> bool:
    """Whether a module's full name contains one of `lora_exclude_patterns`."""
    return any(part in name for part in settings.lora_exclude_patterns)


def wanted_modules(base: Base, settings: TrialSettings) -> set[str]:
    """Full names of the linear layers that the settings name, computed without PEFT."""
    found: set[str] = set()
    for part in settings.lora_parts:
        if part != "language_model":
            found |= part_layers(base, part)
            continue
        layers = {name for target in settings.lora_target_modules for name in linear_layers(base, target)}
        found |= {name for name in layers if not is_excluded(name, settings)}
    return found


def target_problems(base: Base, settings: TrialSettings) -> list[str]:
    """Every name in `lora_target_modules` that matches no linear layer of the language model, and every other part
    that should get an adapter and has no linear layer.

    PEFT would ignore such a name without a message.
    """
    problems = [
        f"`{option}` must find linear layers, but the {part.replace('_', ' ')} {getattr(base, part)} of this model has "
        f"none: leave it out"
        for option, part in (("train_vision", "vision_tower"), ("projector_lora", "projector"))
        if part in settings.lora_parts and not part_layers(base, part)
    ]
    if not settings.use_lora:
        return problems
    layers = {target: linear_layers(base, target) for target in settings.lora_target_modules}
    unknown = [target for target, names in layers.items() if not names]
    excluded = [t for t, names in layers.items() if names and all(is_excluded(name, settings) for name in names)]
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
