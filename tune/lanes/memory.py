"""What happens to a trial that does not fit the memory."""

from __future__ import annotations

from dataclasses import replace

from train_fn.jobs import TrainJob
from train_fn.settings import TrialSettings

# The fine-tuning guide's advice, in its order.
OUT_OF_MEMORY_ADVICE = (
    "In this order: --use-qlora; --per-device-train-batch-size 1 --gradient-accumulation-steps 16; --lora-r 32; "
    "--gradient-checkpointing; --optim paged_adamw_8bit"
)
# Settings that decide, beside rank and dropout, how much memory a micro-batch takes.
MEMORY_SETTINGS = ("use_lora", "use_dora", "lora_target_modules", "train_projector", "gradient_checkpointing",
                   "torch_compile", "optim", "zero_stage", "offload_optimizer")  # fmt: skip


def needs_as_much(settings: TrialSettings, other: TrialSettings) -> bool:
    """Whether a trial needs at least the memory of another one, and could run with a smaller micro-batch."""
    if settings.per_device_train_batch_size == 1:
        return False
    alike = all(getattr(settings, name) == getattr(other, name) for name in MEMORY_SETTINGS)
    larger = settings.per_device_train_batch_size >= other.per_device_train_batch_size
    dropout = settings.lora_dropout > 0 or other.lora_dropout == 0
    return alike and larger and dropout and settings.lora_r >= other.lora_r


def halve(job: TrainJob, reason: str) -> TrainJob:
    """The job with half the micro-batch at the same global batch, and a note of the reason."""
    micro = job.settings.per_device_train_batch_size
    smaller = micro // 2 if micro % 2 == 0 else 1
    settings = replace(
        job.settings,
        per_device_train_batch_size=smaller,
        gradient_accumulation_steps=job.settings.gradient_accumulation_steps * (micro // smaller),
    )
    note = f"{reason}: micro-batch {micro} -> {smaller}, same global batch"
    return replace(job, settings=settings, notes=(*job.notes, note))
