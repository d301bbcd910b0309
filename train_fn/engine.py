"""The DeepSpeed engine of one trial, and what it says of itself.

Import this module only where training runs: importing DeepSpeed takes seconds.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel

from train_fn.lora import adapter_layers, parameter_groups
from train_fn.model import Base, answer_losses
from train_fn.settings import TrialSettings

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # picks its accelerator at import
import deepspeed.ops
from transformers import get_scheduler

# On a CPU, DeepSpeed would compile a shared-memory all-reduce at the first start: a minute, and a compiler that a
# user's machine need not have. It serves inference only; gloo does the collectives of training either way.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class TrialFailed(Exception):
    """The trial cannot go on by its own fault, and every rank knows it: the worker group is sound and goes on."""


class AnswerLoss(torch.nn.Module):
    """What the engine trains: from a batch to one number, the weighted mean of the answers' losses."""

    def __init__(self, base: Base, model: PeftModel, class_weights: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.base = base
        self.class_weights = class_weights  # [C], mean 1 over the training images; empty without a closed set

    def forward(self, batch: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """labels: class indices [B]. Divided by the images, not by their weights: over a full global batch the
        accumulated sum is then the same however the batch is cut into micro-batches and workers."""
        losses = answer_losses(self.base, batch)
        if len(self.class_weights):
            losses = losses * self.class_weights[labels]
        return losses.mean()


def deepspeed_config(settings: TrialSettings, world_size: int, num_trainable: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of one trial. Neither bf16 nor fp16 is on: the frozen base already has its format, and
    what is trained is float32, so there is no master copy to keep and nothing to cast."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps(world_size),
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            # The guide's 5e8 elements are a ceiling: the buffer is allocated whole, per trial.
            "reduce_bucket_size": min(int(5e8), num_trainable),
            "allgather_bucket_size": min(int(5e8), num_trainable),
        },
        "steps_per_print": 10**9,
    }
    return config


def build_engine(
    base: Base, model: PeftModel, settings: TrialSettings, class_weights: torch.Tensor, num_steps: int, world_size: int
) -> Any:
    """A DeepSpeed engine around the adapted base: AdamW, learning-rate schedule over `num_steps`, ZeRO."""
    groups = parameter_groups(model, settings)
    fused = base.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused or None)
    warmup = round(settings.warmup_ratio * num_steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, num_steps)
    num_trainable = sum(p.numel() for group in groups for p in group["params"])
    engine, *_ = deepspeed.initialize(
        model=AnswerLoss(base, model, class_weights),
        model_parameters=[p for group in groups for p in group["params"]],
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(settings, world_size, num_trainable, base.device.type == "cuda"),
        dist_init_required=False,
    )
    return engine


def read_applied(engine: Any) -> dict[str, Any]:
    """What the live engine trains with, read back from its objects and not from the settings."""
    model: PeftModel = engine.module.model
    layers = adapter_layers(model).values()
    groups = {group["name"]: group for group in engine.optimizer.param_groups}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def only(values: Any) -> Any:
        values = sorted(set(values))
        return values[0] if len(values) == 1 else values

    applied = {
        "lora_r": only(layer.r["default"] for layer in layers),
        "lora_alpha": only(layer.lora_alpha["default"] for layer in layers),
        "lora_dropout": only(getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers),
        "learning_rate": groups["adapter"]["initial_lr"],
        "weight_decay": groups["adapter"]["weight_decay"],
        "max_grad_norm": engine.gradient_clipping(),
        "per_device_train_batch_size": engine.train_micro_batch_size_per_gpu(),
        "global_batch_size": engine.train_batch_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "train_projector": "projector" in groups,
        "trainable_params": sum(p.numel() for p in trainable.values()),
        "num_adapted_modules": len(layers),
        "trainable_dtype": only(str(p.dtype).removeprefix("torch.") for p in trainable.values()),
        "engine": type(engine).__name__,
        "optimizer": type(engine.optimizer).__name__,
    }
    if "projector" in groups:
        applied["projector_learning_rate"] = groups["projector"]["initial_lr"]
    return applied


def check_applied(applied: dict[str, Any], settings: TrialSettings) -> None:
    """Raise TrialFailed, with both values, for every setting that did not reach the engine."""
    wanted = {name: getattr(settings, name) for name in applied if hasattr(settings, name)}
    if settings.train_projector:
        wanted["projector_learning_rate"] = settings.projector_learning_rate or settings.learning_rate
    wrong = {name: (value, applied[name]) for name, value in wanted.items() if applied[name] != value}
    if wrong:
        told = "; ".join(f"{name} should be {want!r} but is {got!r}" for name, (want, got) in wrong.items())
        raise TrialFailed(f"the engine does not train what the search asked for: {told}")
