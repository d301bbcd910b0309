"""From samples to batches, through the forward pass, to the answers' losses.

Shapes: B images, S tokens of the longest sequence, P vision patches of one image, D width of the vision tower,
H width of the language model, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from train_fn.data.augment import Variant, path_of, read_shown
from train_fn.data.images import image_size
from train_fn.data.samples import Sample
from train_fn.model.attention import has_varlen_kernel, max_length
from train_fn.model.base import Base
from train_fn.model.compat_transformers import image_tokens
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


def image_features(base: Base, image: str | Variant) -> torch.Tensor:
    """The vision tower's output for an image or variant [P, D], before the projector; from the cache or computed.

    If another process computes it now, its result is waited for.
    """
    store = base.features
    if store is None:
        return compute_features(base, image)
    shape, num_bytes = features_size(base, image)
    cached = store.find_or_claim(image, shape, num_bytes)
    return compute_and_keep(base, image) if cached is None else cached


def features_size(base: Base, image: str | Variant) -> tuple[tuple[int, int], int]:
    """Shape [P, D] and bytes of the features of an image or variant."""
    shape = num_patches(base, path_of(image)), base.model.config.vision_config.hidden_size
    return shape, shape[0] * shape[1] * base.model.dtype.itemsize


def compute_and_keep(base: Base, image: str | Variant) -> torch.Tensor:
    """Compute the features of an image that this process has claimed, and store them."""
    store = base.features
    assert store is not None
    try:
        computed = compute_features(base, image)
        store.keep(image, computed)
    finally:
        store.release(image)
    return computed


@torch.no_grad()
def compute_features(base: Base, image: str | Variant) -> torch.Tensor:
    """The vision tower's output for an image or variant [P, D].

    It is always computed for one image at a time. Packed with others, an image's features differ in the last bits (on a
    CPU in float32 at Hulu-Med's shapes: all images, by up to 1e-6), and metrics would depend on who filled the cache.
    """
    base.model.get_submodule(base.vision_tower).eval()
    return run_tower(base, tower_inputs(base, [image]))


def tower_inputs(base: Base, images: Sequence[str | Variant]) -> dict[str, torch.Tensor]:
    """Images as the vision tower's arguments, their patches one behind the other."""
    pictures = [read_shown(image, base.settings.image_options) for image in images]
    pixels = base.processor.image_processor(pictures, return_tensors="pt")
    return {
        "pixel_values": to_device(pixels["pixel_values"].to(base.model.dtype), base.device),
        "grid_thw": to_device(pixels["image_grid_thw"], base.device),
        "merge_sizes": to_device(pixels["image_merge_sizes"], base.device),
    }


def run_tower(base: Base, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The vision tower's output [patches of all images, D] for `tower_inputs`."""
    with phase("encoder"):
        return base.model.get_submodule(base.vision_tower)(**inputs).last_hidden_state


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, copied from pinned memory: neither CPU nor GPU then waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class BatchFailed(ValueError):
    """A batch could not be made of its images and questions. The settings of a trial have no influence on that."""


@contextlib.contextmanager
def blames_images(images: Sequence[str | Variant]) -> Iterator[None]:
    """Raise BatchFailed for every error in this context that is not the device's."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        some = ", ".join(map(path_of, images[:2])) + (" ..." if len(images) > 2 else "")
        raise BatchFailed(
            f"the processor must take every image and question, but not {some}: {type(error).__name__}: {error}"
        ) from error


Shown = Sequence[Sequence[str | Variant]]
"""What each sample of a batch shows in the place of each of its images: itself, or a variant."""


def collate(
    base: Base, samples: Sequence[Sample], with_answers: bool, packed: bool = False, shown: Shown | None = None
) -> dict[str, Any]:
    """A batch, see `make_batch`. Raises BatchFailed for every error that is not the device's."""
    with blames_images([sample.image for sample in samples]):
        return make_batch(base, samples, with_answers, packed, shown or [sample.images for sample in samples])


def make_batch(base: Base, samples: Sequence[Sample], with_answers: bool, packed: bool, shown: Shown) -> dict[str, Any]:
    """One batch for `forward_hidden`.

    Sequences are padded on the right: with causal attention, padding there influences nothing.

    Args:
        packed: one row [1, S] of all sequences without padding, instead of a row for each. Only if `base.packs_rows`.

    Returns:
        Token tensors [B, S], and `vision_features`, `tower_inputs` (of a tower that is trained) or pixels. With answers
        also `labels` [B, S], -100 outside the answer and its end token; and `positions`: for all other labels, the
        sample of each, and the place of the token before it among the B * S. All tensors are made on the CPU: on a GPU,
        the program would wait for the result.
    """
    batch: dict[str, Any] = {}
    if base.counts_patches:
        encoded = [prompt_tokens(base, s.prompt, [num_patches(base, image) for image in s.images]) for s in samples]
        images = [image for its in shown for image in its]
        if base.takes_features:
            features = [to_device(image_features(base, image), base.device) for image in images]
            batch["vision_features"] = torch.cat(features)
        else:
            batch["tower_inputs"] = tower_inputs(base, images)
    else:
        encoded = [process(base, sample, its) for sample, its in zip(samples, shown, strict=True)]
        for key in encoded[0].keys() - set(TOKEN_KEYS):
            batch[key] = to_device(pad_and_join([one[key] for one in encoded]), base.device)
            if batch[key].is_floating_point():
                batch[key] = batch[key].to(base.model.dtype)
    # After each prompt come the answer and the template's text after the answer, which has no label.
    tails = [answer_tail(base, s.prompt, s.answer) if with_answers else ([], []) for s in samples]
    rows = [torch.tensor([[*answer, *after]], dtype=torch.long) for answer, after in tails]
    for key in TOKEN_KEYS:
        if key in encoded[0] and not (packed and key == "attention_mask"):
            filler = {"input_ids": None, "attention_mask": 1}.get(key, 0)
            whole = [
                torch.cat([one[key], row if filler is None else torch.full_like(row, filler)], 1)
                for one, row in zip(encoded, rows, strict=True)
            ]
            pad = base.processor.tokenizer.pad_token_id or 0 if key == "input_ids" else 0
            joined = torch.cat(whole, 1) if packed else pad_and_stack(whole, pad)
            batch[key] = to_device(joined, base.device)
            if key == "input_ids" and base.counts_patches:
                (places,) = (joined.flatten() == base.model.config.image_token_id).nonzero(as_tuple=True)
                batch["image_positions"] = to_device(places, base.device)
    if packed:
        lengths = [one["input_ids"].shape[1] + row.shape[1] for one, row in zip(encoded, rows, strict=True)]
        batch |= row_of(base, lengths)
    if with_answers:
        labels = [
            torch.tensor([[-100] * one["input_ids"].shape[1] + answer + [-100] * len(after)])
            for one, (answer, after) in zip(encoded, tails, strict=True)
        ]
        joined = torch.cat(labels, 1) if packed else pad_and_stack(labels, -100)
        owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(answer) for answer, _ in tails]))
        (places,) = (joined.flatten() != -100).nonzero(as_tuple=True)
        batch["labels"] = to_device(joined, base.device)
        batch["positions"] = to_device(owners, base.device), to_device(places - 1, base.device)
    return batch


def row_of(base: Base, lengths: Sequence[int]) -> dict[str, Any]:
    """Inputs that tell the language model where each sequence of a row ends: positions begin anew in each, and
    attention stays within each.

    Args:
        lengths: tokens of each sequence; S in all.

    Returns:
        `position_ids` [1, S], and `cu_seq_lens_q` and `max_length_q` for `attention.sdpa_or_packed`.
    """
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    has_kernel = has_varlen_kernel(base.device, base.model.dtype)
    return {
        "position_ids": to_device(positions, base.device),
        "cu_seq_lens_q": to_device(ends, base.device) if has_kernel else ends,
        "max_length_q": max_length(max(lengths)),
    }


def forward_hidden(base: Base, batch: dict[str, Any], **options: Any) -> Any:
    """The inner model's output. `last_hidden_state` [B, S, H] is the input of the language-model head.

    The projector runs here, on features or pixels, so that it can be trained; so does a tower that is trained. The head
    does not: with a vocabulary of 152 k, logits at every position of a batch are gigabytes.
    """
    apart = ("labels", "positions", "vision_features", "tower_inputs", "image_positions")
    inputs = {key: value for key, value in batch.items() if key not in apart}
    inner = getattr(base.model, base.model.base_model_prefix)
    if "image_positions" in batch:
        features = run_tower(base, batch["tower_inputs"]) if "tower_inputs" in batch else batch["vision_features"]
        # As the inner model does it with `mm_encoder_outputs`, but that counts the image tokens on the device, and the
        # program would wait for it twice.
        tokens = inner.get_input_embeddings()(inputs.pop("input_ids"))  # [B, S, H]
        projected = base.model.get_submodule(base.projector)(features).to(tokens.dtype)
        embedded = tokens.flatten(0, 1).index_copy(0, batch["image_positions"], projected)
        inputs["inputs_embeds"] = embedded.view_as(tokens)
        if base.needs_no_mask:
            inputs["attention_mask"] = {"full_attention": None}
    return inner(**inputs, **options)


def answer_losses(base: Base, batch: dict[str, Any]) -> torch.Tensor:
    """Mean cross-entropy over each answer's tokens, one for each sample [B]. Logits are computed at those positions
    only."""
    owners, places = batch["positions"]
    hidden = forward_hidden(base, batch, use_cache=False).last_hidden_state.flatten(0, 1)  # [B * S, H]
    logits = base.model.get_output_embeddings()(hidden[places]).float()  # [answer tokens, V]
    targets = batch["labels"].flatten()[places + 1]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    num_samples = len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["labels"])
    none = torch.zeros(num_samples, device=losses.device)
    return none.index_add(0, owners, losses) / none.index_add(0, owners, torch.ones_like(losses))


def process(base: Base, sample: Sample, shown: Sequence[str | Variant] = ()) -> dict[str, torch.Tensor]:
    """The processor's output for one prompt: input_ids [1, S], pixel_values, and other inputs of the model.

    Args:
        shown: what is shown in the place of each image of the sample. Empty: the images themselves.
    """
    text = prompt_text(base.processor, sample.prompt)
    begins = special_tokens(base.processor, text)
    images = [read_shown(image, base.settings.image_options) for image in shown or sample.images]
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


def num_text_tokens(base: Base, sample: Sample) -> int:
    """Tokens of a sample's prompt, with one placeholder for each image."""
    key = ("text", sample.prompt)
    if key not in base.tokens:
        text = prompt_text(base.processor, sample.prompt)
        base.tokens[key] = len(base.processor.tokenizer(text, **special_tokens(base.processor, text))["input_ids"])
    return base.tokens[key]


def prompt_length(base: Base, sample: Sample) -> Any:
    """A value that is equal for prompts of equal length: their number of tokens if it can be computed, else the image's
    size and the question."""
    if base.counts_patches:
        return num_text_tokens(base, sample) + sum(num_patches(base, image) - 1 for image in sample.images)
    prompt_size(base, sample)  # fills `base.sizes`
    return tuple(base.sizes[image] for image in sample.images), sample.prompt


def num_tokens(base: Base, sample: Sample) -> int:
    """Tokens of a sample's prompt and answer, from the sizes in its images' headers.

    Exact where `base.counts_patches`; elsewhere an estimate, which may lack a few tokens around an image. It depends on
    the sample only, not on what was processed before.
    """
    answer, after = answer_tail(base, sample.prompt, sample.answer)
    if base.counts_patches:
        return prompt_length(base, sample) + len(answer) + len(after)
    sizes, _ = key = prompt_length(base, sample)
    if key not in base.tokens:
        images = image_tokens(base.processor, sizes)
        if images is None:  # it is prepared an additional time
            base.tokens[key] = process(base, sample)["input_ids"].shape[1]
        else:
            base.tokens[key] = num_text_tokens(base, sample) + sum(images) - len(images)
    return base.tokens[key] + len(answer) + len(after)
