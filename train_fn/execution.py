"""How a worker computes a trial's steps. Time, memory and the last digits depend on it; what is learned does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from train_fn.settings import GUIDE_MICRO_BATCH, TrialSettings


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One way to compute an optimizer step. Either `tokens` or `images` limits a forward pass; the other one is 0."""

    tokens: int = 0
    """Most tokens of one forward pass, padding included. A single longer sample goes through alone."""
    images: int = 0
    """Samples of one forward pass."""
    compiled: bool = False
    """Whether the language model's layers are compiled."""
    activation_budget: float = 1.0
    """Share of a compiled layer's activations that is kept for the backward pass; the rest is computed again."""
    gradient_checkpointing: bool = False
    """Whether only each layer's input is kept for the backward pass."""


PADDED_PAIRS = Execution(images=GUIDE_MICRO_BATCH)  # the guide's own micro-batches
BUDGET = 0.6  # share of the activations that costs 3 to 6 % of a step's time on an H200 (benchmarks/README.md)
# What a fine-tuning guide advises where nothing of the ladder is left, in its order.
OUT_OF_MEMORY_ADVICE = "In this order: --use-qlora; --lora-r 32; --optim paged_adamw_8bit; --max-image-tokens N"


def smaller(execution: Execution, longest: int) -> Execution | None:
    """The next way that takes less memory; None if there is none.

    The micro-batch is halved down to one sample, then compiled layers keep less, then each layer's input only.

    Args:
        longest: tokens of the longest sample.
    """
    if execution.images > 1:
        return replace(execution, images=execution.images // 2 if execution.images % 2 == 0 else 1)
    if execution.tokens > longest:
        return replace(execution, tokens=max(execution.tokens // 2, longest))
    if execution.gradient_checkpointing:
        return None
    if execution.compiled and execution.activation_budget > BUDGET:
        return replace(execution, activation_budget=BUDGET)
    return replace(execution, activation_budget=1.0, gradient_checkpointing=True)


def change(before: Execution, after: Execution) -> str:
    """What differs between two ways of a ladder, for a trial's notes."""
    if after.images != before.images:
        return f"micro-batch {before.images} -> {after.images} images, same global batch"
    if after.tokens != before.tokens:
        return f"micro-batch {before.tokens:,} -> {after.tokens:,} tokens, same global batch"
    if after.gradient_checkpointing:
        return "gradient checkpointing turned on"
    return f"compiled layers keep {after.activation_budget:.0%} of their activations"


# Settings that decide, beside rank and dropout, how much memory a sample takes.
MEMORY_SETTINGS = ("use_lora", "use_dora", "lora_target_modules", "lora_exclude_patterns", "train_projector",
                   "projector_lora", "train_vision", "optim", "zero_stage", "offload_optimizer")  # fmt: skip


def needs_as_much(settings: TrialSettings, execution: Execution, other: TrialSettings, before: Execution) -> bool:
    """Whether a trial, computed this way, needs at least the memory of another one, computed as `before`."""
    if any(getattr(settings, name) != getattr(other, name) for name in MEMORY_SETTINGS):
        return False
    # They must differ in the size of the micro-batch only, and a limit in images does not compare with one in tokens.
    if replace(execution, tokens=before.tokens, images=before.images) != before:
        return False
    larger = bool(execution.images) == bool(before.images) and execution.images >= before.images
    larger = larger and execution.tokens >= before.tokens and settings.lora_r >= other.lora_r
    return larger and (settings.lora_dropout > 0 or other.lora_dropout == 0)


def run_stage(settings: TrialSettings, world_size: int) -> int:
    """The ZeRO stage that DeepSpeed runs. A single worker has nothing to partition, so stage 2 runs as stage 1: the
    same bits (tests/test_steps.py) without a reduction after each micro-batch."""
    return min(settings.zero_stage, 1) if world_size == 1 else settings.zero_stage
