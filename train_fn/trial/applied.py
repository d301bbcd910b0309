"""What the live engine trains with, read back and compared with what was asked for."""

from __future__ import annotations

import math
from typing import Any

from peft import PeftModel

from train_fn.settings import TrialSettings
from train_fn.trial.lora import adapter_layers

OPTIMIZER_CLASSES = {"adamw_torch": "AdamW", "adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


class TrialFailed(Exception):
    """The trial cannot go on by its own fault, and every rank knows it: the worker group is sound and goes on."""


def read_applied(engine: Any) -> dict[str, Any]:
    """What the live engine trains with, read back from its objects and not from the settings."""
    model: PeftModel = engine.module.model
    layers = adapter_layers(model).values()
    groups = {group["name"]: group for group in engine.optimizer.param_groups}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config: Any = model.peft_config["default"]

    def only(values: Any) -> Any:
        values = sorted(set(values))
        return values[0] if len(values) == 1 else values

    client = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    applied = {
        "use_lora": "adapter" in groups,
        "train_projector": "projector" in groups,
        "weight_decay": only(group["weight_decay"] for name, group in groups.items() if name != "projector_bias"),
        "max_grad_norm": engine.gradient_clipping(),
        "per_device_train_batch_size": engine.train_micro_batch_size_per_gpu(),
        "global_batch_size": engine.train_batch_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer_class": type(client).__name__,
        "gradient_checkpointing": engine.module.base.model.is_gradient_checkpointing,
        "offload_optimizer": bool(getattr(engine.optimizer, "cpu_offload", False)),
        "torch_compile": any(layer._compiled_call_impl for layer in engine.module.base.model.modules()),
        "trainable_params": sum(p.numel() for p in trainable.values()),
        "trainable_dtype": only(str(p.dtype).removeprefix("torch.") for p in trainable.values()),
        "base_dtype": str(engine.module.base.model.dtype).removeprefix("torch."),
        "engine": type(engine).__name__,
        "optimizer": type(engine.optimizer).__name__,
    }
    if "adapter" in groups:
        applied |= {
            "lora_r": only(layer.r["default"] for layer in layers),
            "lora_alpha": only(layer.lora_alpha["default"] for layer in layers),
            "lora_scaling": only(layer.scaling["default"] for layer in layers),
            "lora_dropout": only(getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers),
            "use_rslora": config.use_rslora,
            "use_dora": only(bool(layer.use_dora["default"]) for layer in layers),
            "num_adapted_modules": len(layers),
            "adapted_modules": sorted({name.rpartition(".")[2] for name in adapter_layers(model)}),
            "learning_rate": groups["adapter"]["initial_lr"],
            "loraplus_lr_ratio": groups["adapter_b"]["initial_lr"] / groups["adapter"]["initial_lr"],
        }
    if "projector" in groups:
        rates = [group["initial_lr"] for name, group in groups.items() if name.startswith("projector")]
        applied["projector_learning_rate"] = only(rates)
    return applied


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of warm-up and of decay, at whose steps schedules are compared


def sampled_steps(warmup: int, num_steps: int) -> list[int]:
    """Steps at which the kinds of schedules and lengths of warm-up differ, from the first to the last."""
    steps = [round(warmup * share) for share in SHARES]
    steps += [round(warmup + (num_steps - warmup) * share) for share in SHARES]
    return sorted({min(step, num_steps - 1) for step in (*steps, max(0, warmup - 1))})


def read_schedule(engine: Any, settings: TrialSettings, num_steps: int) -> dict[str, float]:
    """The first group's learning rate by optimizer step, as the live scheduler will set it."""
    schedule = engine.lr_scheduler
    steps = sampled_steps(round(settings.warmup_ratio * num_steps), num_steps)
    return {str(step): schedule.base_lrs[0] * schedule.lr_lambdas[0](step) for step in steps}


def wanted_rate(settings: TrialSettings, step: int, num_steps: int) -> float:
    """The learning rate of one step as the settings ask for it, worked out without the scheduler's library."""
    warmup = round(settings.warmup_ratio * num_steps)
    kind, peak = settings.lr_scheduler_type, settings.learning_rate
    if not settings.use_lora:
        peak = settings.projector_learning_rate or peak
    if kind != "constant" and step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "polynomial": 1 - progress}
    return peak * decay.get(kind, 1.0)


def check_schedule(rates: dict[str, float], settings: TrialSettings, num_steps: int) -> None:
    """Raise TrialFailed when the live schedule's rates are not those of the settings.

    Args:
        rates: learning rates by step, from `read_schedule`.
        num_steps: of the whole trial.
    """
    peak = max(wanted_rate(settings, int(step), num_steps) for step in rates)
    for step, rate in rates.items():
        wanted = wanted_rate(settings, int(step), num_steps)
        if not math.isclose(rate, wanted, rel_tol=1e-6, abs_tol=2e-4 * peak):  # a polynomial ends at 1e-4 of its peak
            raise TrialFailed(
                f"the engine does not train what the search asked for: the learning rate in step {step} of {num_steps} "
                f"should be {wanted:g} but is {rate:g} (lr_scheduler_type {settings.lr_scheduler_type}, warmup_ratio "
                f"{settings.warmup_ratio:g})"
            )


def check_trained(engine: Any, settings: TrialSettings, num_images: int, num_epochs: int) -> None:
    """Raise TrialFailed when a finished trial has not taken the steps and epochs that its settings ask for.

    Args:
        num_images: of the training part.
        num_epochs: epochs that the trial has reported.
    """
    per_epoch = math.ceil(num_images / settings.global_batch_size)
    steps = settings.max_steps or settings.num_train_epochs * per_epoch
    wanted = {"optimizer steps": steps, "epochs": math.ceil(steps / per_epoch)}
    got = {"optimizer steps": engine.lr_scheduler.last_epoch, "epochs": num_epochs}
    wrong = {name: (want, got[name]) for name, want in wanted.items() if got[name] != want}
    if wrong:
        told = "; ".join(f"{name} should be {want} but are {have}" for name, (want, have) in wrong.items())
        raise TrialFailed(f"the engine did not train what the search asked for: {told}")


def check_applied(applied: dict[str, Any], settings: TrialSettings) -> None:
    """Raise TrialFailed, with both values, for every setting that did not reach the engine."""
    wanted = {name: getattr(settings, name) for name in applied if hasattr(settings, name)}
    wanted["optimizer_class"] = OPTIMIZER_CLASSES[settings.optim]
    if settings.use_lora:
        root = settings.lora_r**0.5 if settings.use_rslora else settings.lora_r
        wanted["lora_scaling"] = settings.lora_alpha / root
    if settings.train_projector:
        wanted["projector_learning_rate"] = settings.projector_learning_rate or settings.learning_rate

    def same(got: Any, value: Any) -> bool:
        """Computed numbers may differ in their last digits."""
        return got == value or (isinstance(got, float) and math.isclose(got, value, rel_tol=1e-9))

    wrong = {name: (value, applied[name]) for name, value in wanted.items() if not same(applied[name], value)}
    if wrong:
        told = "; ".join(f"{name} should be {want!r} but is {got!r}" for name, (want, got) in wrong.items())
        raise TrialFailed(f"the engine does not train what the search asked for: {told}")
