"""From samples to what the forward pass takes, and to the answers' losses."""

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
    """P, from the size in the file's header: the rows of an image's features and its tokens in the prompt."""
    if image not in base.patches:
        width, height = image_size(image)
        processor = base.processor.image_processor
        base.patches[image] = processor.get_number_of_image_patches(height, width) // processor.merge_size**2
    return base.patches[image]


def prompt_size(base: Base, sample: Sample) -> tuple[int, ...]:
    """What decides how many tokens an image takes, and grows with them: its patches, or where those are not known its
    pixels, width and height."""
    if base.counts_patches:
        return (num_patches(base, sample.image),)
    if sample.image not in base.sizes:
        base.sizes[sample.image] = image_size(sample.image)
    width, height = base.sizes[sample.image]
    return width * height, width, height


@torch.no_grad()
def image_features(base: Base, image: str) -> torch.Tensor:
    """What the vision tower makes of an image: [P, D], before the projector; from the store, or newly computed.

    One image at a time, stored or not: packed with others it comes out different in the last bits (on a CPU in float32
    at Hulu-Med's shapes: all images, by up to 1e-6), and a metric would depend on who filled the store.
    """
    shape = num_patches(base, image), base.model.config.vision_config.hidden_size
    found = base.features.find(image, shape) if base.features else None
    if found is not None:
        return found
    tower = base.model.get_submodule(base.vision_tower).eval()
    pixels = base.processor.image_processor([read_image(image)], return_tensors="pt").to(base.device)
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
    """The tensor on the device, through pinned memory: the copy then waits for nothing, and nothing for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class BatchFailed(ValueError):
    """A batch could not be made of its images and questions. No setting of a trial has a part in that."""


def collate(base: Base, samples: Sequence[Sample], with_answers: bool) -> dict[str, Any]:
    """See `make_batch`. Raises BatchFailed for all but what the device may be to blame for."""
    try:
        return make_batch(base, samples, with_answers)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        told = f"{type(error).__name__}: {error}"
        images = ", ".join(sample.image for sample in samples[:2]) + (" ..." if len(samples) > 2 else "")
        raise BatchFailed(f"the processor must take every image and question, but not {images}: {told}") from error


def make_batch(base: Base, samples: Sequence[Sample], with_answers: bool) -> dict[str, Any]:
    """One batch for `forward_hidden`: token tensors, `vision_features` or pixels, and, with answers, `labels` [B, S]
    and their `places`.

    labels: -100 outside the answer and its end token. places: row and column of the others, in the labels [B, S-1] that
    follow a position's token. Sequences are padded on the right, where causal attention keeps
    padding from touching anything.
    """
    batch: dict[str, Any] = {}
    if base.takes_features:
        encoded = [prompt_tokens(base, sample.text, num_patches(base, sample.image)) for sample in samples]
        features = [to_device(image_features(base, sample.image), base.device) for sample in samples]
        batch["vision_features"] = torch.cat(features)
    else:
        encoded = [process(base, sample) for sample in samples]
        for key in encoded[0].keys() - set(TOKEN_KEYS):
            batch[key] = to_device(pad_and_join([one[key] for one in encoded]), base.device)
            if batch[key].is_floating_point():
                batch[key] = batch[key].to(base.model.dtype)
    # What is added behind each prompt: the answer, and what the template writes after it, which has no label.
    tails = [answer_tail(base, s.text, s.answer) if with_answers else ([], []) for s in samples]
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
        # Found on the CPU: a GPU would have to be waited for.
        places = (joined[:, 1:] != -100).nonzero(as_tuple=True)
        batch["labels"] = to_device(joined, base.device)
        batch["places"] = tuple(to_device(place, base.device) for place in places)
    return batch


def forward_hidden(base: Base, batch: dict[str, Any], **options: Any) -> Any:
    """The inner model's output; `last_hidden_state` [B, S, H] is before the language-model head.

    The projector runs here, on features or pixels, so that it can be trained. The head does not: with a vocabulary of
    152 k, logits at every position of a batch are gigabytes.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "places", "vision_features")}
    if "vision_features" in batch:
        projected = base.model.get_submodule(base.projector)(batch["vision_features"])
        # The model joins a tuple of images; here they are joined already.
        encoded = BaseModelOutputWithPooling(pooler_output=(projected,))  # type: ignore[arg-type]
        inputs["mm_encoder_outputs"] = {"image": encoded}
        if base.needs_no_mask:
            inputs["attention_mask"] = {"full_attention": None}
    inner = getattr(base.model, base.model.base_model_prefix)
    return inner(**inputs, **options)


def answer_losses(base: Base, batch: dict[str, Any]) -> torch.Tensor:
    """Mean cross-entropy over each answer's tokens: [B], logits computed at those positions only."""
    hidden = forward_hidden(base, batch, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    rows, columns = batch["places"]
    logits = base.model.get_output_embeddings()(hidden[rows, columns]).float()  # [answer tokens, V]
    losses = torch.nn.functional.cross_entropy(logits, targets[rows, columns], reduction="none")
    counts = (targets != -100).sum(1)
    return torch.zeros(len(targets), device=losses.device).index_add(0, rows, losses) / counts


def process(base: Base, sample: Sample) -> dict[str, torch.Tensor]:
    """The processor's output for one prompt: input_ids [1, S], pixel_values, and whatever else the model takes."""
    text = prompt_text(base.processor, sample.text)
    begins = special_tokens(base.processor, text)
    return dict(base.processor(images=[read_image(sample.image)], text=[text], return_tensors="pt", **begins))


def pad_and_join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [N_i, ...] as one [N, ...]: where images differ in tiles or pixels, zeros fill up, as processors do."""
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
    """Equal for prompts of equal length: their tokens where they can be counted, else the image's size and the
    question."""
    if base.counts_patches:
        return prompt_tokens(base, sample.text, num_patches(base, sample.image))["input_ids"].shape[1]
    return prompt_size(base, sample), sample.text
