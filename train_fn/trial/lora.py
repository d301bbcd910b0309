"""An adapter on the frozen base: attached, removed without a trace, and its parameters in the optimizer's groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from train_fn.execution import Execution
from train_fn.model.base import Base
from train_fn.model.targets import adapter_pattern, part_of, target_problems, wanted_modules
from train_fn.settings import TrialSettings
from train_fn.trial.compiled import compiled
from train_fn.trial.pristine import BaseChanged, changes, pristine, restore

PEFT_PREFIX = "base_model.model."  # of the base's names in an adapted model
# The optimizer's groups of each part's adapter: of its A matrices and of its B matrices.
LORA_GROUPS = {"language_model": "adapter", "vision_tower": "vision", "projector": "projector_lora"}

# ------------------------------------------------------------------------------------------------ a trial's adapter


@contextlib.contextmanager
def adapted(base: Base, settings: TrialSettings, execution: Execution | None = None) -> Iterator[PeftModel]:
    """Put a fresh adapter on the base and, with `train_projector` but not `projector_lora`, a trainable float32
    projector; remove both at the end.

    Args:
        execution: whether layers are compiled, and what they keep. Not given: plain layers.

    Raises:
        ValueError: a name in `lora_target_modules` matches no module, or PEFT adapts other modules than the settings
            name.
        BaseChanged: an earlier trial has left something on the base.
    """
    if problems := target_problems(base, settings):
        raise ValueError("; ".join(problems))
    torch.manual_seed(settings.seed)
    wanted = wanted_modules(base, settings)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(attached(base, lora_config(base, settings)))
        adapted_modules = {name.removeprefix(PEFT_PREFIX) for name in adapter_layers(model)}
        if settings.lora_parts and (other := wanted ^ adapted_modules):
            raise ValueError(f"the adapter must be on the modules that the settings name, but differs in {min(other)}")
        if not settings.lora_parts:  # the adapter keeps its initial value, which changes nothing
            model.requires_grad_(False)
        if settings.train_projector and not settings.projector_lora:
            weights = base.model.get_submodule(base.projector).named_parameters()
            replace_projector(base, {name: p.detach().to(torch.float32, copy=True) for name, p in weights})
        if execution and execution.gradient_checkpointing:
            # Re-entrant checkpointing gives no gradient where no input needs one: the frozen embeddings.
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if execution and execution.compiled:
            stack.enter_context(compiled(base, execution.activation_budget))
        yield model


def lora_config(base: Base, settings: TrialSettings) -> LoraConfig:
    """PEFT's configuration of a trial's adapter."""
    return LoraConfig(
        r=settings.lora_r if settings.lora_parts else 1,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int, computes with float
        lora_dropout=settings.lora_dropout,
        target_modules=adapter_pattern(base, settings),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.model.name_or_path),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


@contextlib.contextmanager
def attached(base: Base, config: LoraConfig) -> Iterator[PeftModel]:
    """Put an adapter of this configuration on the base; restore the base at the end, projector included, also when
    attaching fails halfway.

    Raises:
        BaseChanged: an earlier trial has left something on the base.
    """
    before = pristine(base)
    if different := changes(base, before):
        raise BaseChanged(f"the base must be as it was loaded, but differs in {', '.join(different[:5])}")
    try:
        base.autocasts = base.autocasts and not config.use_dora  # whose norms need float32
        # The adapter is float32 also on a bfloat16 base: 2e-4 of a weight is less than bfloat16's spacing.
        model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
        for name, layer in adapter_layers(model).items():
            # Only the language model autocasts. Elsewhere PEFT casts a layer's input to the adapter's float32, and its
            # output back.
            inside = part_of(base, name.removeprefix(PEFT_PREFIX)) == "language_model"
            layer.cast_input_dtype_enabled = not (base.autocasts and inside)
        yield model
    finally:
        restore(base, before)


def adapter_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The modules that carry an adapter, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def replace_projector(base: Base, weights: dict[str, torch.Tensor]) -> None:
    """Give the projector other weights, until `attached` restores the base."""
    projector = base.model.get_submodule(base.projector)
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        setattr(projector.get_submodule(module), last, torch.nn.Parameter(weight.to(base.device)))


# ------------------------------------------------------------------------------------------------ for the optimizer


def group_rates(settings: TrialSettings) -> dict[str, float]:
    """Peak learning rates of AdamW's groups by name, in their order."""
    projector = settings.projector_learning_rate or settings.learning_rate
    vision = settings.vision_learning_rate or settings.learning_rate
    by_part = {"language_model": settings.learning_rate, "vision_tower": vision, "projector": projector}
    rates = {}
    for part in settings.lora_parts:
        rates[LORA_GROUPS[part]] = by_part[part]
        rates[LORA_GROUPS[part] + "_b"] = by_part[part] * settings.loraplus_lr_ratio
    if settings.train_projector and not settings.projector_lora:
        rates |= {"projector": projector, "projector_bias": projector}
    return rates


def parameter_groups(base: Base, model: torch.nn.Module, settings: TrialSettings) -> list[dict]:
    """AdamW's groups: the adapter of each part (its B matrices apart), projector weights, projector biases (without
    decay). Each has a name, so that it can be read back."""
    rates = group_rates(settings)
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            group = LORA_GROUPS[part_of(base, name.removeprefix(PEFT_PREFIX))]
            groups[f"{group}_b" if ".lora_B." in name else group].append(parameter)
        elif parameter.requires_grad:
            groups["projector_bias" if name.endswith("bias") else "projector"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "weight_decay": 0.0 if name.endswith("bias") else settings.weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]
