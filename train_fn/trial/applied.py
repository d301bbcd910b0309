"""Settings read back from the live engine and compared with those that were asked for.

A setting that does not arrive is the worst fault of a search: its scores then belong to other settings. So every field
of `TrialSettings` that decides what is trained is read back; tests/test_applied.py lists where each one is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from train_fn.data.augment import ITSELF, variant_numbers
from train_fn.data.samples import Splits
from train_fn.execution import PADDED_PAIRS, Execution, run_stage
from train_fn.model.targets import part_of
from train_fn.settings import TrialSettings
from train_fn.support.ranks import gather
from train_fn.trial.compiled import compiler_note, is_compiled
from train_fn.trial.lora import LORA_GROUPS, PEFT_PREFIX, adapter_layers, group_rates

OPTIMIZER_CLASSES = {"adamw_torch": "AdamW", "adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
NOT_APPLIED = "the engine does not train what the search asked for: "
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of warm-up and of decay, at whose steps schedules are compared


class TrialFailed(Exception):
    """The trial cannot continue, by its own fault, and every rank has raised this: the worker group stays sound."""


# ------------------------------------------------------------------------------------------------ before the first step


def read_applied(engine: Any) -> dict[str, Any]:
    """The settings in effect, from the engine's live objects and not from `TrialSettings`.

    Where layers or groups differ in a value, the value is the list of all that occur.
    """
    model: PeftModel = engine.module.model
    base = engine.module.base
    base_model = base.model
    layers = adapter_layers(model).values()
    groups = {group["name"]: group for group in engine.optimizer.param_groups}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config: Any = model.peft_config["default"]

    def only(values: Any) -> Any:
        values = sorted(set(values))
        return values[0] if len(values) == 1 else values

    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    applied = {
        "use_lora": "adapter" in groups,
        "train_projector": "projector" in groups or "projector_lora" in groups,
        "projector_lora": "projector_lora" in groups,
        "train_vision": "lora" if "vision" in groups else "none",
        "weight_decay": only(group["weight_decay"] for name, group in groups.items() if name != "projector_bias"),
        "max_grad_norm": engine.gradient_clipping(),
        "execution": dataclasses.asdict(engine.module.execution),
        "global_batch_size": engine.train_batch_size(),
        "class_balanced_loss": len(engine.module.sample_weights) > 0,
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer_class": type(optimizer).__name__,
        "gradient_checkpointing": base_model.is_activation_checkpointing,
        "offload_optimizer": bool(getattr(engine.optimizer, "cpu_offload", False)),
        "seed": torch.initial_seed(),
        "trainable_params": sum(parameter.numel() for parameter in trainable),
        "trainable_dtype": only(str(parameter.dtype).removeprefix("torch.") for parameter in trainable),
        "base_dtype": str(base_model.dtype).removeprefix("torch."),
        "engine": type(engine).__name__,
        "optimizer": type(engine.optimizer).__name__,
    }
    if not compiler_note(base):  # else layers run plain whatever was asked for, and a note says so
        applied["torch_compile"] = any(map(is_compiled, base_model.modules()))
    adapters = [name for name in LORA_GROUPS.values() if name in groups]
    if adapters:
        parts = Counter(part_of(base, name.removeprefix(PEFT_PREFIX)) for name in adapter_layers(model))
        applied |= {
            "lora_r": only(layer.r["default"] for layer in layers),
            "lora_alpha": only(layer.lora_alpha["default"] for layer in layers),
            "lora_scaling": only(layer.scaling["default"] for layer in layers),
            "lora_dropout": only(getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers),
            "use_rslora": config.use_rslora,
            "use_dora": only(bool(layer.use_dora["default"]) for layer in layers),
            "num_adapted_modules": len(layers),
            "adapted_parts": dict(parts),
            "adapted_modules": sorted({name.rpartition(".")[2] for name in adapter_layers(model)}),
            "loraplus_lr_ratio": only(
                groups[f"{name}_b"]["initial_lr"] / groups[name]["initial_lr"] for name in adapters
            ),
        }
    rates = {name: group["initial_lr"] for name, group in groups.items()}
    if "adapter" in rates:
        applied["learning_rate"] = rates["adapter"]
    if "vision" in rates:
        applied["vision_learning_rate"] = rates["vision"]
    if of_projector := [rates[n] for n in ("projector_lora", "projector", "projector_bias") if n in rates]:
        applied["projector_learning_rate"] = only(of_projector)
    return applied


def check_applied(
    applied: dict[str, Any],
    settings: TrialSettings,
    execution: Execution = PADDED_PAIRS,
    world_size: int = 1,
    closed_set: bool = True,
) -> None:
    """Compare what `read_applied` returned with the settings.

    Args:
        execution: how the steps are to be computed.
        closed_set: whether the data has a closed set of answers; without one no image is weighted.

    Raises:
        TrialFailed: a setting did not reach the engine; the message has all of them, each with both values.
    """
    wanted = {name: getattr(settings, name) for name in applied if hasattr(settings, name)} | {
        "execution": dataclasses.asdict(execution),
        "gradient_checkpointing": execution.gradient_checkpointing,
        "torch_compile": execution.compiled,
        "zero_stage": run_stage(settings, world_size),
        "optimizer_class": OPTIMIZER_CLASSES[settings.optim],
        "class_balanced_loss": settings.class_balanced_loss and closed_set,
        "lora_scaling": settings.lora_alpha / (settings.lora_r**0.5 if settings.use_rslora else settings.lora_r),
        "projector_learning_rate": settings.projector_learning_rate or settings.learning_rate,
        "vision_learning_rate": settings.vision_learning_rate or settings.learning_rate,
    }

    def same(got: Any, value: Any) -> bool:
        """Computed numbers may differ in their last digits."""
        return got == value or (isinstance(got, float) and math.isclose(got, value, rel_tol=1e-9))

    # Without an adapter or a projector, `applied` has none of its values; `use_lora` and `train_projector` show that.
    wrong = [
        f"{name} should be {value!r} but is {applied[name]!r}"
        for name, value in wanted.items()
        if name in applied and not same(applied[name], value)
    ]
    if wrong:
        raise TrialFailed(NOT_APPLIED + "; ".join(wrong))


# ------------------------------------------------------------------------------------------------ learning rate


def read_schedule(engine: Any, settings: TrialSettings, num_steps: int) -> dict[str, float]:
    """The first group's learning rate by optimizer step, as the live scheduler will set it."""
    schedule = engine.lr_scheduler
    steps = sampled_steps(round(settings.warmup_ratio * num_steps), num_steps)
    return {str(step): schedule.base_lrs[0] * schedule.lr_lambdas[0](step) for step in steps}


def sampled_steps(warmup: int, num_steps: int) -> list[int]:
    """Steps at which the kinds of schedules and lengths of warm-up differ, from the first to the last."""
    steps = [round(warmup * share) for share in SHARES]
    steps += [round(warmup + (num_steps - warmup) * share) for share in SHARES]
    return sorted({min(step, num_steps - 1) for step in (*steps, max(0, warmup - 1))})


def check_schedule(rates: dict[str, float], settings: TrialSettings, num_steps: int) -> None:
    """Compare the live schedule with the settings.

    Args:
        rates: learning rates by step, from `read_schedule`.
        num_steps: optimizer steps of the whole trial.

    Raises:
        TrialFailed: a rate is another one than the settings ask for.
    """
    peak = max(wanted_rate(settings, int(step), num_steps) for step in rates)
    for step, rate in rates.items():
        wanted = wanted_rate(settings, int(step), num_steps)
        if not math.isclose(rate, wanted, rel_tol=1e-6, abs_tol=2e-4 * peak):  # a polynomial ends at 1e-4 of its peak
            raise TrialFailed(
                f"{NOT_APPLIED}the learning rate in step {step} of {num_steps} should be {wanted:g} but is {rate:g} "
                f"(lr_scheduler_type {settings.lr_scheduler_type}, warmup_ratio {settings.warmup_ratio:g})"
            )


def wanted_rate(settings: TrialSettings, step: int, num_steps: int) -> float:
    """The learning rate of one step by the settings, computed without the scheduler's library."""
    warmup = round(settings.warmup_ratio * num_steps)
    kind, peak = settings.lr_scheduler_type, next(iter(group_rates(settings).values()))
    if kind != "constant" and step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "polynomial": 1 - progress}
    return peak * decay.get(kind, 1.0)


# ------------------------------------------------------------------------------------------------ after an epoch


def read_shown(shown: Counter[str]) -> dict[str, Any]:
    """What an epoch's images were varied by, from what all ranks have fed to the model.

    Args:
        shown: this rank's images by variant, as `train_fn.data.augment.label_of` names it.
    """
    total = sum(gather(shown), Counter[str]())
    strengths = sorted({label.split()[0] for label in total if label != ITSELF})
    return {"augment": "+".join(strengths) or "none", "images_shown": dict(sorted(total.items()))}


def check_shown(
    applied: dict[str, Any], settings: TrialSettings, splits: Splits, order: np.ndarray, epoch: int
) -> None:
    """Compare the images that an epoch has shown with the settings.

    Args:
        applied: with the values of `read_shown`.
        order: the training samples of the epoch's steps [steps, G].

    Raises:
        TrialFailed: other variants were shown, or another number of images.
    """
    wanted: Counter[str] = Counter()
    flips = ", flips allowed" * splits.allow_flips
    numbers = variant_numbers(splits.train, settings, epoch)
    for index in order.flat:
        its = numbers[index][: len(splits.train[index].images)]
        wanted.update(f"{settings.augment} {n}{flips}" if n and settings.augment != "none" else ITSELF for n in its)
    if applied["images_shown"] != wanted:
        raise TrialFailed(
            f"{NOT_APPLIED}images_shown should be {dict(sorted(wanted.items()))} but is {applied['images_shown']}"
        )


# ------------------------------------------------------------------------------------------------ after the last step


def check_trained(engine: Any, settings: TrialSettings, num_images: int, num_epochs: int) -> None:
    """Compare the steps and epochs of a finished trial with its settings.

    Args:
        num_images: images in the training part.
        num_epochs: epochs that the trial has trained.

    Raises:
        TrialFailed: the trial has taken more or fewer.
    """
    per_epoch = math.ceil(num_images / settings.global_batch_size)
    steps = settings.max_steps or settings.num_train_epochs * per_epoch
    wanted = {"optimizer steps": steps, "epochs": math.ceil(steps / per_epoch)}
    got = {"optimizer steps": engine.lr_scheduler.last_epoch, "epochs": num_epochs}
    wrong = [f"{name} should be {want} but are {got[name]}" for name, want in wanted.items() if got[name] != want]
    if wrong:
        raise TrialFailed(f"the engine did not train what the search asked for: {'; '.join(wrong)}")
