"""An estimate of a trial's memory, from the model's shapes and before anything is loaded.

The model is built on torch's meta device, where tensors have shapes and take no memory.
"""

from __future__ import annotations

import dataclasses
import math
import unittest.mock
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train_fn.data.samples import Sample
from train_fn.model.memory import GIB
from train_fn.settings import BUCKET, ModelSettings, TrialSettings

WORKER_GIB = 1.0  # a worker's libraries in RAM, or a GPU's context, workspaces and fragments: a guess, not from shapes
FOUR_BIT_BYTES = 4.127 / 8  # of a weight: nf4 with double quantisation (arXiv:2305.14314, section 3)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one trial, independent of batch sizes and workers."""

    base: float
    """Bytes of the base's weights."""
    trained: int
    """Number of trained weights."""
    activations: float
    """Bytes that one image's forward pass keeps for the backward pass."""
    evaluation: float
    """Bytes of keys and values in the evaluation of one image."""


def memory_needed(
    sizes: Sizes, trial: TrialSettings, workers: int, on_gpu: bool, eval_batch_size: int
) -> dict[str, float]:
    """GiB that one worker needs, by purpose.

    A trained weight is float32: 4 bytes, 4 for its gradient, 8 for AdamW's moments (2 in 8 bit). ZeRO
    (arXiv:1910.02054) divides moments among the workers from stage 1 on, gradients in stage 2. DeepSpeed adds a copy
    of a worker's own weights and a bucket for the reduction (two where it overlaps the backward pass of a GPU).
    """
    trained, stage = sizes.trained, trial.zero_stage
    shared = workers if stage else 1
    bucket = min(trained, BUCKET) * 4 * (1 + (on_gpu and workers > 1)) if stage else 0
    training = sizes.activations * trial.per_device_train_batch_size
    taken = {
        "worker": WORKER_GIB * GIB,
        "base": sizes.base,
        "trained": 4 * trained + (4 * trained / shared if stage else 0),
        "gradients": 4 * trained / (shared if stage == 2 else 1) + bucket,
        "AdamW": 0 if trial.offload_optimizer and on_gpu else trained * (2 if "8bit" in trial.optim else 8) / shared,
        "activations": max(training, sizes.evaluation * eval_batch_size),  # never both at once
    }
    return {part: size / GIB for part, size in taken.items()}


def measure(
    settings: ModelSettings, trial: TrialSettings, on_gpu: bool, samples: Sequence[Sample], candidates: Sequence[str]
) -> Sizes:
    """A trial's sizes, from the model's shapes on torch's meta device.

    Activations are those of the language model over the longest prompt: the vision tower is frozen, and the head sees
    the answer's tokens only.

    Raises:
        ValueError: a part of the model or a module for the adapter does not exist.
    """
    import torch

    from train_fn.data.images import image_size
    from train_fn.model.batches import process
    from train_fn.model.prompts import answer_ids
    from train_fn.trial.lora import adapted

    base = skeleton(settings, torch.bfloat16 if on_gpu else torch.float32)
    text = base.model.config.get_text_config()
    # The most images of one sample, each as large as the largest one, and the longest words.
    sides = {image: image_size(image, settings.image_options) for sample in samples for image in sample.images}
    largest = {max(sides, key=lambda image: measured(sides[image])) for measured in (math.prod, min, max)}
    longest = max(
        samples, key=lambda s: (len(s.images), len(s.question) + sum(map(len, (s.system, *sum(s.turns, ())))))
    )
    prompts = [
        process(base, dataclasses.replace(longest, images=(image,) * len(longest.images)))["input_ids"].shape[1]
        for image in largest
    ]
    answers = candidates or {sample.answer for sample in samples}
    tokens = max(prompts) + max(len(answer_ids(base, longest.prompt, answer)) for answer in answers)
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    if settings.use_qlora:
        layers = base.model.get_submodule(base.language_model).modules()
        linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
        rest = sum(p.numel() for p in base.model.parameters()) - linear
        held = linear * FOUR_BIT_BYTES + base.model.dtype.itemsize * rest
    plain = dataclasses.replace(trial, gradient_checkpointing=False, torch_compile=False)
    with torch.device("meta"), adapted(base, plain) as model:
        model.train()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for parameter in model.parameters() if base.autocasts else ():  # the meta device has no autocast
            parameter.data = parameter.to(base.model.dtype)
        kept = saved_bytes(base, tokens)
    if trial.gradient_checkpointing:  # every layer's input, and one layer at a time again
        kept /= text.num_hidden_layers
        kept += tokens * text.num_hidden_layers * text.hidden_size * base.model.dtype.itemsize
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = tokens * text.num_hidden_layers * 2 * heads * head * base.model.dtype.itemsize
    return Sizes(held, trained, kept, cached * (1 + len(candidates)))  # of the prompt, and again for every candidate


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
