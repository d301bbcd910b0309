"""From samples to batches, through the forward pass, to the answers' losses.

Shapes: B images, S tokens of the longest sequence, P vision patches of one image, D width of the vision tower,
H width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from train_fn.data.images import image_size, read_image
from train_fn.data.samples import Sample
from train_fn.model.base import Base
from train_fn.model.memory import is_out_of_memory
from train_fn.model.prompts import TOKEN_KEYS, answer_tail, prompt_text, prompt_tokens, special_tokens
from train_fn.support.profile import phase


def num_patches(base: Base, image: str) -> int:
    """P, which is also the image's number of tokens in the prompt, from the size in the file's header."""
    if image not in base.patches:
        width, height = image_size(image, base.settings.image_options)
        processor = base.processor.image_processor
        base.patches[image] = processor.get_number_of_image_patches(height, width) // processor.merge_size**2
    return base.patches[image]


def prompt_size(base: Base, sample: Sample) -> tuple[int, ...]:
    """A measure that grows with the tokens of a sample's images: their patches, or where these cannot be counted their
    pixels, and width and height of the first."""
    if base.counts_patches:
        return (sum(num_patches(base, image) for image in sample.images),)
    for image in sample.images:
        if image not in base.sizes:
            base.sizes[image] = image_size(image, base.settings.image_options)
    sizes = [base.sizes[image] for image in sample.images]
    return sum(width * height for width, height in sizes), *sizes[0]


@torch.no_grad()
def image_features(base: Base, image: str) -> torch.Tensor:
    """The vision tower's output for an image [P, D], before the projector; from the cache or computed.

    It is always computed for one image at a time. Packed with others, an image's features differ in the last bits (on a
    CPU in float32 at Hulu-Med's shapes: all images, by up to 1e-6), and metrics would depend on who filled the cache.
    """
    shape = num_patches(base, image), base.model.config.vision_config.hidden_size
    cached = base.features.find(image, shape) if base.features else None
    if cached is not None:
        return cached
    tower = base.model.get_submodule(base.vision_tower).eval()
    picture = read_image(image, base.settings.image_options)
    pixels = base.processor.image_processor([picture], return_tensors="pt").to(base.device)
    with phase("encoder"):
        computed = tower(
            pixel_values=pixels["pixel_values"].to(base.model.dtype),
            grid_thw=pixels["image_grid_thw"],
            merge_sizes=pixels["image_merge_sizes"],
        ).last_hidden_state
    if base.features:
        base.features.keep(image, computed)
    return computed


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, copied from pinned memory: neither CPU nor GPU then waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class BatchFailed(ValueError):
    """A batch could not be made of its images and questions. The settings of a trial have no influence on that."""


def collate(base: Base, samples: Sequence[Sample], with_answers: bool) -> dict[str, Any]:
    """A batch, see `make_batch`. Raises BatchFailed for every error that is not the device's."""
    try:
        return make_batch(base, samples, with_answers)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        images = ", ".join(s.image for s in samples[:2]) + (" ..." if len(samples) > 2 else "")
        raise BatchFailed(
            f"the processor must take every image and question, but not {images}: {type(error).__name__}: {error}"
        ) from error


def make_batch(base: Base, samples: Sequence[Sample], with_answers: bool) -> dict[str, Any]:
    """One batch for `forward_hidden`.

    Sequences are padded on the right: with causal attention, padding there influences nothing.

    Returns:
        Token tensors [B, S], and `vision_features` or pixels. With answers also `labels` [B, S], -100 outside the
        answer and its end token; and `positions`: row and column of all other labels, in labels[:, 1:] [B, S-1], which
        aligns each label with the token before it.
    """
    batch: dict[str, Any] = {}
    if base.takes_features:
        encoded = [prompt_tokens(base, s.prompt, [num_patches(base, image) for image in s.images]) for s in samples]
        images = [image for sample in samples for image in sample.images]
        features = [to_device(image_features(base, image), base.device) for image in images]
        batch["vision_features"] = torch.cat(features)
    else:
        encoded = [process(base, sample) for sample in samples]
        for key in encoded[0].keys() - set(TOKEN_KEYS):
            batch[key] = to_device(pad_and_join([one[key] for one in encoded]), base.device)
            if batch[key].is_floating_point():
                batch[key] = batch[key].to(base.model.dtype)
    # After each prompt come the answer and the template's text after the answer, which has no label.
    tails = [answer_tail(base, s.prompt, s.answer) if with_answers else ([], []) for s in samples]
    rows = [torch.tensor([[*answer, *after]], dtype=torch.long) for answer, after in tails]
    for key in TOKEN_KEYS:
        if key in encoded[0]:
            filler = {"input_ids": None, "attention_mask": 1}.get(key, 0)
            whole = [
                torch.cat([one[key], row if filler is None else torch.full_like(row, filler)], 1)
                for one, row in zip(encoded, rows, strict=True)
            ]
            pad = base.processor.tokenizer.pad_token_id or 0 if key == "input_ids" else 0
            batch[key] = to_device(pad_and_stack(whole, pad), base.device)
    if with_answers:
        labels = [
            torch.tensor([[-100] * one["input_ids"].shape[1] + answer + [-100] * len(after)])
            for one, (answer, after) in zip(encoded, tails, strict=True)
        ]
        joined = pad_and_stack(labels, -100)
        # Computed on the CPU: on a GPU, the program would wait for the result.
        positions = (joined[:, 1:] != -100).nonzero(as_tuple=True)
        batch["labels"] = to_device(joined, base.device)
        batch["positions"] = tuple(to_device(index, base.device) for index in positions)
    return batch


def forward_hidden(base: Base, batch: dict[str, Any], **options: Any) -> Any:
    """The inner model's output. `last_hidden_state` [B, S, H] is the input of the language-model head.

    The projector runs here, on features or pixels, so that it can be trained. The head does not: with a vocabulary of
    152 k, logits at every position of a batch are gigabytes.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "positions", "vision_features")}
    if "vision_features" in batch:
        projected = base.model.get_submodule(base.projector)(batch["vision_features"])
        # The model concatenates a tuple of images; here they are concatenated already.
        encoded = BaseModelOutputWithPooling(pooler_output=(projected,))  # type: ignore[arg-type]
        inputs["mm_encoder_outputs"] = {"image": encoded}
        if base.needs_no_mask:
            inputs["attention_mask"] = {"full_attention": None}
    inner = getattr(base.model, base.model.base_model_prefix)
    return inner(**inputs, **options)


def answer_losses(base: Base, batch: dict[str, Any]) -> torch.Tensor:
    """Mean cross-entropy over each answer's tokens [B]. Logits are computed at those positions only."""
    hidden = forward_hidden(base, batch, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    rows, columns = batch["positions"]
    logits = base.model.get_output_embeddings()(hidden[rows, columns]).float()  # [answer tokens, V]
    losses = torch.nn.functional.cross_entropy(logits, targets[rows, columns], reduction="none")
    counts = (targets != -100).sum(1)
    return torch.zeros(len(targets), device=losses.device).index_add(0, rows, losses) / counts


def process(base: Base, sample: Sample) -> dict[str, torch.Tensor]:
    """The processor's output for one prompt: input_ids [1, S], pixel_values, and other inputs of the model."""
    text = prompt_text(base.processor, sample.prompt)
    begins = special_tokens(base.processor, text)
    images = [read_image(image, base.settings.image_options) for image in sample.images]
    # Nested: one list of images for each text. Some processors would otherwise take each image for another sample.
    return dict(base.processor(images=[images], text=[text], return_tensors="pt", **begins))


def pad_and_join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [N_i, ...] as one [N, ...]. Images with fewer tiles or pixels are padded with zeros, as processors do."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        missing = [(0, most - size) for size, most in zip(tensor.shape[1:], largest, strict=True)]
        return torch.nn.functional.pad(tensor, [end for pair in reversed(missing) for end in pair])

    return torch.cat([filled(tensor) for tensor in tensors])


def pad_and_stack(tensors: Sequence[torch.Tensor], value: float = 0) -> torch.Tensor:
    """[1, S_i] tensors as one [B, S] tensor, padded on the right."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors])


def prompt_length(base: Base, sample: Sample) -> Any:
    """A value that is equal for prompts of equal length: their number of tokens if it can be computed, else the image's
    size and the question."""
    if base.counts_patches:
        patches = [num_patches(base, image) for image in sample.images]
        return prompt_tokens(base, sample.prompt, patches)["input_ids"].shape[1]
    prompt_size(base, sample)  # fills `base.sizes`
    return tuple(base.sizes[image] for image in sample.images), sample.prompt


def num_tokens(base: Base, sample: Sample) -> int:
    """TEMPORARY, until worktree rows is merged."""
    patches = [num_patches(base, image) for image in sample.images]
    answer, after = answer_tail(base, sample.prompt, sample.answer)
    return prompt_tokens(base, sample.prompt, patches)["input_ids"].shape[1] + len(answer) + len(after)
