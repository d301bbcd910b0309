"""What one trial is trained with, and what all trials of a study share: the typed contract between `tune/` and here.

Nothing heavy is imported: every check in this file answers before Ray or torch is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
LR_SCHEDULER_TYPES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial")
PROFILE_PREFIX = "profile_"  # of the seconds that `--profile` adds to those of a trial
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The hyperparameters of one trial. The defaults are those of the Hulu-Med fine-tuning guide."""

    num_train_epochs: int = 3
    """Passes over the training images."""
    max_steps: int = 0
    """Optimizer steps to train for, instead of num_train_epochs. 0: num_train_epochs decides."""
    per_device_train_batch_size: int = 2
    """Images in one forward pass of one worker (the micro-batch)."""
    gradient_accumulation_steps: int = 8
    """Micro-batches in one optimizer step of a single worker. With N workers each does 1/N of them, so that the
    global batch (micro-batch x accumulation, 16 images) and with it the meaning of the learning rate stay."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapter. 1e-4 to 5e-4 is usual for LoRA."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector when it is trained. Not given: the adapter's."""
    lr_scheduler_type: str = "cosine"
    """Learning-rate schedule: cosine, linear, constant, constant_with_warmup or polynomial."""
    warmup_ratio: float = 0.03
    """Share of the optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on all trained weights but biases."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    optim: str = "adamw_torch"
    """Optimizer: adamw_torch, or bitsandbytes' adamw_8bit (a quarter of the state) or paged_adamw_8bit (the state also
    moves to the CPU when the GPU is full)."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time."""
    torch_compile: bool = False
    """Compile the language model's layers with torch.compile: fewer and larger GPU kernels, after a wait for the
    compiler at the begin of every trial. Changes numbers in their last digits."""
    use_lora: bool = True
    """Train an adapter. Without it only the projector is trained (--train-projector)."""
    lora_r: int = 64
    """Rank of the adapter."""
    lora_alpha: float = 128
    """Scaling: an adapter's output is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout probability on an adapter's input."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA, arXiv:2312.03732): large ranks then learn as fast."""
    use_dora: bool = False
    """Learn direction and magnitude apart (DoRA, arXiv:2402.09353): slower, sometimes better at low rank."""
    loraplus_lr_ratio: float = 1.0
    """The rate of an adapter's B matrix as a multiple of its A matrix's (LoRA+, arXiv:2402.12354, advises 16). 1: the
    same."""
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their name."""
    lora_exclude_patterns: tuple[str, ...] = ("vision", "visual")
    """Regular expressions; a module whose full name contains one gets no adapter. Modules outside the language model
    never do."""
    train_projector: bool = False
    """Train the vision-to-language projector (all its weights) beside the adapter."""
    class_balanced_loss: bool = True
    """Weight each image by the inverse frequency of its answer in the training split (mean weight 1)."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer states, 2 also gradients partitioned over the workers."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory (ZeRO-Offload): saves GPU memory, costs time. Needs ZeRO 1 or 2."""
    logging_steps: int = 10
    """Optimizer steps between two records of training loss and learning rate."""
    save_steps: int = 100
    """Optimizer steps between two checkpoints of the adapter. 0: none before the end."""
    save_total_limit: int = 3
    """Checkpoints of a trial to keep, the newest; 0: all."""
    seed: int = 0
    """Seed of adapter initialisation, dropout and data order."""

    @property
    def global_batch_size(self) -> int:
        """Images in one optimizer step, over all workers."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` workers does in one optimizer step."""
        accumulation, rest = divmod(self.global_batch_size, self.per_device_train_batch_size * world_size)
        assert rest == 0 and accumulation > 0, "the study's settings are checked for this before it starts"
        return accumulation

    def problems(self, world_size: int = 1) -> list[str]:
        """Every broken rule as one sentence: rule, value, fix. Empty when the settings can be trained."""
        found: list[str] = []

        def rule(name: str, holds: bool, text: str, fix: str) -> None:
            if not holds:
                found.append(f"`{name}` {text}, but got {getattr(self, name)!r}: {fix}")

        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
            rule(name, getattr(self, name) >= 1, "must be at least 1", "give a positive whole number")
        for name in ("learning_rate", "lora_alpha"):
            rule(name, 0 < getattr(self, name) < float("inf"), "must be a positive number", "the guide's default works")
        rate = self.projector_learning_rate
        rule("projector_learning_rate", rate is None or 0 < rate < float("inf"), "must be positive", "or leave it out")
        for name in ("warmup_ratio", "lora_dropout"):
            rule(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1", "it is a share, not a count")
        for name in ("max_steps", "save_steps", "save_total_limit"):
            rule(name, getattr(self, name) >= 0, "must not be negative", "0 turns it off")
        rule("logging_steps", self.logging_steps >= 1, "must be at least 1", "10 is the default")
        rule("loraplus_lr_ratio", 0 < self.loraplus_lr_ratio < float("inf"), "must be positive", "1 turns it off")
        rule("optim", self.optim in OPTIMIZERS, "must be a known optimizer", "choose from " + ", ".join(OPTIMIZERS))
        rule("use_lora", self.use_lora or self.train_projector, "leaves nothing to train", "add --train-projector")
        for name in ("weight_decay", "max_grad_norm"):
            rule(name, 0 <= getattr(self, name) < float("inf"), "must not be negative", "0 turns it off")
        rule("lora_target_modules", bool(self.lora_target_modules), "must name a layer", "for example q_proj,v_proj")
        rule("lr_scheduler_type", self.lr_scheduler_type in LR_SCHEDULER_TYPES, "must be one of the known schedules",
             "choose from " + ", ".join(LR_SCHEDULER_TYPES))  # fmt: skip
        # Stage 3 would split up the frozen base itself, which a lane keeps whole from trial to trial; and bitsandbytes'
        # 4-bit weights cannot be split (bitsandbytes#1249).
        rule("zero_stage", self.zero_stage in (0, 1, 2), "must be 0, 1 or 2 (3 would split up the frozen base, which a "
             "lane keeps from trial to trial)", "2 is the guide's")  # fmt: skip
        offload = not self.offload_optimizer or self.zero_stage > 0
        rule("offload_optimizer", offload, "needs ZeRO", "give --zero-stage 2")
        rule("seed", 0 <= self.seed < 2**32, "must fit 32 bits", "give a whole number from 0 to 4294967295")
        if not found and self.gradient_accumulation_steps % world_size:
            found.append(
                f"`gradient_accumulation_steps` must be a multiple of the workers per trial, so that the global batch "
                f"of {self.global_batch_size} images stays, but got {self.gradient_accumulation_steps} for "
                f"{world_size} workers: change either"
            )
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialSettings:
        """The settings with `values` put over the defaults. Raises ValueError for an unknown name."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}: a trial is made of {', '.join(known)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)


BUCKET = 50_000_000  # elements of DeepSpeed's communication buffers at most


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The frozen base that all trials of a study share."""

    model: str = "nano"
    """Directory of the base model (an image-text-to-text model that transformers loads), or `nano`: the small one
    that ships with this project."""
    use_qlora: bool = False
    """Hold the language model's linear layers in 4 bit (QLoRA, arXiv:2305.14314: nf4, double quantisation); vision
    tower and projector stay as they are."""
    bf16: bool = False
    """The guide's name for --dtype bfloat16."""
    fp16: bool = False
    """The guide's name for --dtype float16."""
    dtype: str = "auto"
    """Number format of the frozen base: float32, bfloat16 or float16. auto: bfloat16 on a GPU that has it, float16 on
    one that has not, float32 on a CPU. What is trained is always float32."""
    vision_tower: str = ""
    """Full module name of the vision tower. Not given: found by the usual names."""
    projector: str = ""
    """Full module name of the vision-to-language projector. Not given: found by the usual names."""
    language_model: str = ""
    """Full module name of the language model. Not given: found by the usual names."""
    per_device_eval_batch_size: int = 16
    """Images in one forward pass of an evaluation."""
    max_image_tokens: int = 0
    """Most tokens that one image may become; larger images are scaled down. 0: the model's own limit."""
    upright_images: bool = False
    """Hulu-Med only: keep an image's shape. Its weights were trained on images whose height and width the original
    implementation swaps when it resizes, which is the default here."""
    feature_cache_gib: float = 4.0
    """Disk space in GiB for what frozen vision towers made of images, kept for all workers and studies of a machine
    (VideoLLaMA3 and Hulu-Med, in ~/.cache/vlm-tune/features). When room is needed, the files longest unused go first;
    what is used since a worker's start stays, and what no longer fits is computed each time. 0: keep none."""

    @property
    def base_dtype(self) -> str:
        """The number format that was asked for, by either name."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype
