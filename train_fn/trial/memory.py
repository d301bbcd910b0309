"""An estimate of a trial's memory, from the model's shapes and before anything is loaded.

The model is built on torch's meta device, where tensors have shapes and take no memory.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from train_fn.data.samples import Sample
from train_fn.execution import BUDGET, MEMORY_SETTINGS, Execution, change, needs_as_much, smaller
from train_fn.model.memory import GIB
from train_fn.settings import BUCKET, ModelSettings, TrialSettings

if TYPE_CHECKING:
    from train_fn.model.base import Base

WORKER_GIB = 1.0  # a worker's libraries in RAM, or a GPU's context, workspaces and fragments: a guess, not from shapes
SOME_TOKENS = 1024  # what a forward pass keeps grows linearly with its tokens
# Share of a plain layer's activations that a compiled one keeps, by activation budget: measured on an H200 with torch
# 2.11, 7.1 and 2.8 of 8.8 GiB an image of 1,225 tokens (benchmarks/README.md).
COMPILED_SHARE = {1.0: 0.81, BUDGET: 0.32}
FILLED = 0.9  # of the free memory; the rest is for workspaces and fragments
# Larger forward passes are no faster: 10,240 tokens are eight images of 1,225 on an H200 (benchmarks/README.md), and on
# a CPU 16 images of the nano base are 400.
MOST_TOKENS_GPU, MOST_TOKENS_CPU = 10_240, 8192
FOUR_BIT_BYTES = 4.127 / 8  # of a weight: nf4 with double quantisation (arXiv:2305.14314, section 3)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one trial, independent of batch sizes and workers."""

    base: float
    """Bytes of the base's weights."""
    trained: int
    """Number of trained weights."""
    activations: float
    """Bytes that the forward pass of one token keeps for the backward pass."""
    checkpointed: float
    """The same with gradient checkpointing: every layer's input."""
    layer: float
    """Bytes a token that one layer keeps while it is computed again."""
    evaluation: float
    """Bytes a token of keys and values."""
    tower: float = 0.0
    """Bytes that the vision tower keeps for the backward pass for each token of the language model; 0 if frozen."""
    tower_checkpointed: float = 0.0
    """The same with gradient checkpointing: every layer's input, and a layer that is computed again."""


def memory_needed(
    sizes: Sizes, trial: TrialSettings, execution: Execution, workers: int, on_gpu: bool, longest: int, candidates: int
) -> dict[str, float]:
    """GiB that one worker needs, by purpose.

    A trained weight is float32: 4 bytes, 4 for its gradient, 8 for AdamW's moments (2 in 8 bit). ZeRO
    (arXiv:1910.02054) divides moments among the workers from stage 1 on, gradients in stage 2. DeepSpeed adds a copy
    of a worker's own weights and a bucket for the reduction (two where it overlaps the backward pass of a GPU).

    Args:
        longest: tokens of the longest sample.
        candidates: number of candidate answers; an evaluation that does not fit halves its batch down to one sample.
    """
    trained, stage = sizes.trained, trial.zero_stage
    shared = workers if stage else 1
    bucket = min(trained, BUCKET) * 4 * (1 + (on_gpu and workers > 1)) if stage else 0
    evaluation = sizes.evaluation * longest * (1 + candidates)  # of the prompt, and again for every candidate
    taken = {
        "worker": WORKER_GIB * GIB,
        "base": sizes.base,
        "trained": 4 * trained + (4 * trained / shared if stage else 0),
        "gradients": 4 * trained / (shared if stage == 2 else 1) + bucket,
        "AdamW": 0 if trial.offload_optimizer and on_gpu else trained * (2 if "8bit" in trial.optim else 8) / shared,
        "activations": max(activation_bytes(sizes, execution, longest), evaluation),  # never both at once
    }
    return {part: size / GIB for part, size in taken.items()}


def activation_bytes(sizes: Sizes, execution: Execution, longest: int) -> float:
    """Bytes that the largest forward pass keeps for the backward pass."""
    tokens = max(execution.images * longest, execution.tokens, longest)
    if execution.gradient_checkpointing:
        return tokens * (sizes.checkpointed + sizes.layer + sizes.tower_checkpointed)
    share = COMPILED_SHARE[execution.activation_budget] if execution.compiled else 1
    return tokens * (sizes.activations * share + sizes.tower)


def measure(settings: ModelSettings, trial: TrialSettings, dtype: Any) -> Sizes:
    """A trial's sizes, from the model's shapes on torch's meta device.

    Activations are those of the language model, and of a vision tower that is trained. The head sees the answer's
    tokens only.

    Args:
        dtype: the base's number format where the settings say "auto".

    Raises:
        ValueError: a part of the model or a module for the adapter does not exist.
    """
    import torch

    from train_fn.trial.lora import adapted

    base = skeleton(settings, dtype)
    text = base.model.config.get_text_config()
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    if settings.use_qlora:
        layers = base.model.get_submodule(base.language_model).modules()
        linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
        rest = sum(p.numel() for p in base.model.parameters()) - linear
        held = linear * FOUR_BIT_BYTES + base.model.dtype.itemsize * rest
    with torch.device("meta"), adapted(base, trial) as model:
        model.train()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for parameter in model.parameters() if base.autocasts else ():  # the meta device has no autocast
            parameter.data = parameter.to(base.model.dtype)
        kept = saved_bytes(base, SOME_TOKENS) / SOME_TOKENS
    kept_by_tower, checkpointed_tower = tower_bytes(base, trial) if trial.train_vision == "lora" else (0.0, 0.0)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        base=held,
        trained=trained,
        activations=kept,
        checkpointed=text.num_hidden_layers * text.hidden_size * base.model.dtype.itemsize,
        layer=kept / text.num_hidden_layers,
        evaluation=text.num_hidden_layers * 2 * heads * head * base.model.dtype.itemsize,
        tower=kept_by_tower,
        tower_checkpointed=checkpointed_tower,
    )


def tower_bytes(base: Base, trial: TrialSettings) -> tuple[float, float]:
    """Bytes that the adapted vision tower keeps for the backward pass for each token of the language model: plain, and
    with gradient checkpointing.

    An upper estimate from the shapes of its linear layers, because towers of different families take different inputs.
    An adapter keeps its input, float32 and after dropout, with the mask of the dropout. What stands behind a layer
    (attention, activation, normalisation) keeps at most its output twice: tests/test_vision.py compares.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from train_fn.model.targets import part_layers

    size = base.model.dtype.itemsize
    layers = part_layers(base, "vision_tower")
    shapes = [tuple(base.model.get_submodule(name).get_parameter("weight").shape) for name in layers]  # [out, in]
    kept = sum(5 * before + 4 * trial.lora_r + 2 * size * after for after, before in shapes)
    tower = base.model.get_submodule(base.vision_tower).modules()
    num_layers = sum(isinstance(module, GradientCheckpointingLayer) for module in tower)
    again = float(kept)
    if num_layers:
        again = kept / num_layers + num_layers * size * max(min(shape) for shape in shapes)
    ratio = patches_per_token(base)
    return ratio * kept, ratio * again


def patches_per_token(base: Base) -> float:
    """Patches in the vision tower for each token that an image has in the language model, from a blank image."""
    from PIL import Image

    from train_fn.data.samples import Prompt
    from train_fn.model.prompts import prompt_text, special_tokens

    text = prompt_text(base.processor, Prompt("?"))
    begins = special_tokens(base.processor, text)
    made = base.processor(images=[[Image.new("RGB", (448, 448))]], text=[text], return_tensors="pt", **begins)
    config: Any = base.model.config
    tokens = max(1, int((made["input_ids"] == getattr(config, "image_token_id", -1)).sum()))
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    values = 3 * patch**2 * getattr(vision, "temporal_patch_size", 1)
    return made["pixel_values"].numel() / values / tokens


# ------------------------------------------------------------------------------------------------ what fits


def free_memory(device: Any, share: float) -> float:
    """GiB that a worker may still take, once its base is loaded.

    Args:
        share: the part of the GPU, or of the machine's memory, that belongs to this worker.
    """
    import psutil
    import torch

    if device.type != "cuda":
        return psutil.virtual_memory().available * share / GIB
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free + unused, total * share - torch.cuda.memory_allocated(device)) / GIB


def wanted_execution(settings: TrialSettings, device: Any) -> Execution:
    """How a trial's steps are computed where the memory does not matter."""
    from train_fn.trial.compiled import compiles_by_default

    return roomy_execution(settings, device.type == "cuda", compiles_by_default(device))


def roomy_execution(settings: TrialSettings, on_gpu: bool, compiles: bool) -> Execution:
    """The same of a device that is not at hand. compiles: whether it compiles if the user does not choose."""
    images, compiled = settings.per_device_train_batch_size, settings.torch_compile
    return Execution(
        images=images or 0,
        tokens=0 if images else MOST_TOKENS_GPU if on_gpu else MOST_TOKENS_CPU,
        compiled=compiles if compiled is None else compiled,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def fitting_execution(
    sizes: Sizes, settings: TrialSettings, execution: Execution, free_gib: float, workers: int, on_gpu: bool,
    longest: int,
) -> tuple[Execution, bool]:  # fmt: skip
    """The first way from `execution` downwards that should fit, with as many tokens as then fit.

    Args:
        free_gib: GiB of memory beside the base and the worker's own.
        longest: tokens of the longest sample.

    Returns: the way, and whether it fits. If none does, it is the last one.
    """
    fixed = {"worker", "base"}  # already taken

    def fits(way: Execution) -> bool:
        parts = memory_needed(sizes, settings, way, workers, on_gpu, longest, candidates=0)
        return sum(gib for part, gib in parts.items() if part not in fixed) <= free_gib * FILLED

    most = execution.tokens
    while not fits(execution):
        if (less := smaller(execution, longest)) is None:
            return execution, False
        execution = less
    # What keeps less may leave room for more samples again.
    while execution.tokens < most and fits(more := replace(execution, tokens=min(2 * execution.tokens, most))):
        execution = more
    return execution, True


def choose_execution(
    base: Base,
    samples: Sequence[Sample],
    settings: TrialSettings,
    free_gib: float,
    workers: int = 1,
    too_large: Sequence[tuple[TrialSettings, Execution]] = (),
) -> tuple[Execution, list[str]]:
    """How this base's device computes a trial's steps: the fastest way that should fit.

    Args:
        samples: the training samples.
        free_gib: GiB of memory beside the base.
        workers: of the trial.
        too_large: trials that ran out of memory on this lane, and how.

    Returns: the execution, and a note for each way that ran out of memory here before.

    Raises TrialFailed for settings that name no module to adapt.
    """
    from train_fn.trial.applied import TrialFailed
    from train_fn.trial.compiled import compiler_note

    on_gpu = base.device.type == "cuda"
    execution = wanted_execution(settings, base.device)
    if compiler_note(base):  # it has failed on this lane
        execution = replace(execution, compiled=False)
    longest = longest_sample(base, samples)
    notes: list[str] = []
    if not execution.images:
        try:
            sizes = cached_sizes(base, settings)
        except ValueError as error:
            raise TrialFailed(str(error)) from error
        execution, _ = fitting_execution(sizes, settings, execution, free_gib, workers, on_gpu, longest)
    while any(needs_as_much(settings, execution, *other) for other in too_large):
        if (less := smaller(execution, longest)) is None:
            break
        notes.append(f"an earlier trial of this size ran out of memory here: {change(execution, less)}")
        execution = less
    return execution, notes


def longest_sample(base: Base, samples: Sequence[Sample]) -> int:
    """Tokens of the longest sample."""
    from train_fn.model.batches import num_tokens

    return max(num_tokens(base, sample) for sample in samples)


def cached_sizes(base: Base, settings: TrialSettings) -> Sizes:
    """`measure` for a loaded base, once for all trials that take the same memory."""
    key = (settings.lora_r, settings.lora_dropout > 0, *(getattr(settings, name) for name in MEMORY_SETTINGS))
    if key not in base.trial_sizes:
        base.trial_sizes[key] = measure(base.settings, settings, base.model.dtype)
    return base.trial_sizes[key]


# ------------------------------------------------------------------------------------------------ shapes


def skeleton(settings: ModelSettings, dtype: Any) -> Any:
    """A `train_fn.model.base.Base` without weights. dtype: the number format where the settings say "auto"."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from train_fn.model import base as bases
    from train_fn.model import hulumed

    directory = bases.resolve_model(settings.model)
    if hulumed.is_hulumed(directory):
        config: Any = hulumed.native_config(hulumed.read_config(directory))
    else:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if settings.base_dtype != "auto":
        dtype = getattr(torch, settings.base_dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return bases.Base(
        model=model.requires_grad_(False),
        processor=bases.load_processor(directory, settings),
        device=torch.device("meta"),
        settings=settings,
        **bases.find_parts(model, settings),
    )


def saved_bytes(base: Any, tokens: int) -> int:
    """Bytes that autograd keeps of one sequence in the adapted language model, without the weights."""
    import torch

    # All tensors of one memory return the same storage object while that object is held.
    weights = {parameter.untyped_storage() for parameter in base.model.parameters()}
    saved: set[torch.UntypedStorage] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    width = base.model.get_input_embeddings().weight.shape[1]
    embedded = torch.empty(1, tokens, width, dtype=base.model.dtype, device=base.device)
    # transformers would read the values of a mask that it makes itself, and on the meta device there are none.
    mask: Any = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=base.device)
    if base.needs_no_mask:
        mask = {"full_attention": None}
    language_model = base.model.get_submodule(base.language_model)
    with (
        unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in saved - weights)


def fused_attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> Any:
    """Attention that keeps its inputs and its output for the backward pass, as a fused kernel does. On the meta device
    torch would take the plain one, which keeps all probabilities."""
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *inputs: Any) -> Any:  # type: ignore[override]
            output = torch.empty_like(inputs[0])
            context.save_for_backward(*inputs, output)
            return output

    return Fused.apply(query, key, value)
