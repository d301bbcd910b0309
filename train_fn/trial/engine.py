"""The DeepSpeed engine of one trial: its configuration, optimizer and loss, and its state between two steps.

Import this module only where training runs: importing DeepSpeed takes seconds.

Shapes: B samples of a micro-batch.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from peft import PeftModel

from train_fn.execution import PADDED_PAIRS, Execution, run_stage
from train_fn.model.base import Base
from train_fn.model.batches import answer_losses
from train_fn.settings import BUCKET, TrialSettings
from train_fn.trial.applied import OPTIMIZER_CLASSES, TrialFailed
from train_fn.trial.lora import parameter_groups

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # chooses its accelerator at import
from transformers import get_scheduler

from train_fn.trial.compat_bitsandbytes import recycling
from train_fn.trial.compat_deepspeed import remove_hooks, without_compiled_muon, without_shared_memory_op

without_shared_memory_op()
without_compiled_muon()
FP16_LOSS_SCALE = 2.0**10  # keeps the gradients of long prompts above what fp16 can hold


class MicroBatchTooLarge(torch.OutOfMemoryError):
    """Out of memory in a training step."""


class AnswerLoss(torch.nn.Module):
    """The module that the engine trains: from a batch to one number, a part of the step's loss."""

    def __init__(
        self, base: Base, model: PeftModel, sample_weights: torch.Tensor, execution: Execution, share: int
    ) -> None:
        super().__init__()
        self.model = model
        self.base = base
        self.execution = execution
        self.sample_weights = sample_weights  # [training samples], mean 1; empty: all weigh the same
        self.share = share  # samples of an optimizer step that are this worker's

    def forward(self, batch: dict[str, Any], indices: torch.Tensor) -> torch.Tensor:
        """What a micro-batch adds to the step's loss; indices: its training samples [B].

        The sum is divided by the worker's samples of the whole step, and not by their weights: the accumulated loss is
        then the same however the global batch is cut into micro-batches and workers.
        """
        losses = answer_losses(self.base, batch)
        if len(self.sample_weights):
            losses = losses * self.sample_weights[indices]
        return losses.sum() / self.share


def deepspeed_config(settings: TrialSettings, world_size: int, num_trainable: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of one trial.

    Neither bf16 nor fp16 is on: the frozen base already has its format, and trained weights are float32, so there is
    no master copy to keep and nothing to cast.
    """
    config: dict[str, Any] = {
        # `train_step` cuts this into micro-batches, which may be unequal, and tells the engine which is the last.
        "train_micro_batch_size_per_gpu": settings.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": run_stage(settings, world_size),
            "contiguous_gradients": True,
            "overlap_comm": on_gpu and world_size > 1,
            # Buckets are allocated whole, for each trial, and a bucket overlaps with the backward pass only if it is
            # full before that ends: a tenth of the guide's 5e8 elements at most.
            "reduce_bucket_size": min(BUCKET, num_trainable),
            "allgather_bucket_size": min(BUCKET, num_trainable),
        },
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # bitsandbytes'
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also when offloaded: DeepSpeed's own is compiled
    }
    if settings.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return config


def build_optimizer(base: Base, model: PeftModel, settings: TrialSettings, on_gpu: bool) -> torch.optim.Optimizer:
    """AdamW over the trial's parameter groups."""
    groups = parameter_groups(base, model, settings)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    if settings.optim == "adamw_torch":
        return torch.optim.AdamW(groups, fused=not (on_gpu and settings.offload_optimizer), **options)
    import bitsandbytes.optim

    chosen = getattr(bitsandbytes.optim, OPTIMIZER_CLASSES[settings.optim])
    return (recycling(chosen) if settings.optim.startswith("paged") else chosen)(groups, **options)


def build_engine(
    base: Base,
    model: PeftModel,
    settings: TrialSettings,
    sample_weights: torch.Tensor,
    num_steps: int,
    world_size: int,
    execution: Execution = PADDED_PAIRS,
    collective_timeout_s: float | None = None,
) -> Any:
    """A DeepSpeed engine around the adapted base: AdamW, learning-rate schedule over `num_steps`, ZeRO.

    Args:
        sample_weights: weight of each training sample in the loss; empty: all weigh the same.
        execution: how `train_step` will cut the steps.
        collective_timeout_s: time-out of the engine's collectives. Not given: torch's default for its backend.

    Raises TrialFailed for a float16 base without ZeRO.
    """
    on_gpu = base.device.type == "cuda"
    if base.model.dtype == torch.float16 and not settings.zero_stage:
        raise TrialFailed("a float16 base needs the loss scale of ZeRO: give --zero-stage 1 or 2, or another --dtype")
    optimizer = build_optimizer(base, model, settings, on_gpu)
    warmup = round(settings.warmup_ratio * num_steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, num_steps)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    num_trainable = sum(parameter.numel() for parameter in trained)
    try:
        engine, *_ = deepspeed.initialize(
            model=AnswerLoss(base, model, sample_weights, execution, settings.global_batch_size // world_size),
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(settings, world_size, num_trainable, on_gpu),
            dist_init_required=False,
        )
    except BaseException:
        remove_hooks(trained)
        raise
    if collective_timeout_s is not None:
        # DeepSpeed's process group is a copy of the lane's, with torch's default time-out.
        engine.data_parallel_group.set_timeout(timedelta(seconds=collective_timeout_s))
    if base.model.dtype == torch.float16:
        engine.optimizer.override_loss_scale(FP16_LOSS_SCALE)  # ZeRO divides the gradients by it
    return engine


# The part of ZeRO's state that training changes. The rest is made again, and is no plain data.
ZERO_STATE = ("base_optimizer_state", "group_paddings", "param_alignment_paddings", "clip_grad", "ds_version")


def engine_state(engine: Any) -> dict[str, Any]:
    """What training has changed in this rank's engine, between two optimizer steps. Only tensors, numbers and text, so
    that reading it back executes nothing."""
    trainable = {name: p.detach() for name, p in engine.module.model.named_parameters() if p.requires_grad}
    optimizer = engine.optimizer.state_dict()
    if engine.zero_optimization_stage() > 0:
        optimizer = {name: optimizer[name] for name in ZERO_STATE if name in optimizer}
    schedule = {name: value for name, value in engine.lr_scheduler.state_dict().items() if name != "lr_lambdas"}
    return {"trainable": trainable, "optimizer": optimizer, "schedule": schedule}


def load_engine_state(engine: Any, state: dict[str, Any], rank: int) -> None:
    """Restore an `engine_state` in a fresh engine of the same settings and the same number of workers."""
    parameters = dict(engine.module.model.named_parameters())
    with torch.no_grad():
        for name, saved in state["trainable"].items():
            parameters[name].copy_(saved)
    if engine.zero_optimization_stage() > 0:
        # ZeRO takes a list with every rank's state and reads its own. Its copy of the weights comes from the model,
        # which is float32, too.
        states = [None] * rank + [state["optimizer"]]
        engine.optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=False)
    else:
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.lr_scheduler.load_state_dict({**engine.lr_scheduler.state_dict(), **state["schedule"]})
