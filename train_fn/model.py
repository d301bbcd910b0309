"""The frozen base: loading it, finding its parts, and turning samples into what its forward pass takes.

Shapes: B images, S tokens of the longest sequence, P vision patches of one image, D width of the vision tower,
H width of the language model, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from train_fn import hulumed
from train_fn.checkpoint import resolve_model
from train_fn.data import Sample
from train_fn.features import FeatureStore, features_key
from train_fn.images import image_size, read_image
from train_fn.memory import is_out_of_memory
from train_fn.profile import phase
from train_fn.settings import ModelSettings, TrialSettings

# Where transformers' image-text-to-text models keep their parts, by attribute path from the inner model.
VISION_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder")
PROJECTORS = ("projector", "multi_modal_projector", "mm_projector", "connector", "visual.merger", "embed_vision")
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [B, S] each
LANGUAGE_MODELS = ("language_model", "text_model")


@dataclass
class Base:
    """A loaded base model, where its parts are (full module names), and its processor."""

    model: PreTrainedModel
    processor: Any
    vision_tower: str
    projector: str
    language_model: str
    device: torch.device
    settings: ModelSettings
    hulumed: bool = False  # loaded under transformers' names from a Hulu-Med checkpoint
    tokens: dict[tuple, Any] = field(default_factory=dict)  # tokenized prompts and answers: few, but needed every step
    patches: dict[str, int] = field(default_factory=dict)  # image path -> P
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # image path -> width and height
    processor_files: dict[str, bytes] = field(default_factory=dict)  # see train_fn.lora.processor_files

    autocasts: bool = field(init=False)  # whether the language model's float32 adapters multiply in bfloat16
    as_loaded: Any = None  # `train_fn.lora.Snapshot` of the base before its first adapter

    def __post_init__(self) -> None:
        self.loaded_tower = self.tower_weights()
        self.autocasts = self.model.dtype == torch.bfloat16

    def tower_weights(self) -> list[tuple[int, bool]]:
        """Where the vision tower's weights lie, and which are trained: other weights, an adapter's too, change it."""
        return [(p.data_ptr(), p.requires_grad) for p in self.model.get_submodule(self.vision_tower).parameters()]

    @property
    def takes_features(self) -> bool:
        """Whether batches carry vision features instead of pixels: where they can be taken apart by image and the tower
        is as it was loaded."""
        return self.counts_patches and self.tower_weights() == self.loaded_tower

    @property
    def counts_patches(self) -> bool:
        """Whether an image's size tells its tokens: VideoLlama3's, which packs the patches of a batch."""
        return self.model.config.model_type == "video_llama_3"

    @property
    def needs_no_mask(self) -> bool:
        """Whether causal attention alone keeps the padding, which stands on the right, from the rest. With a mask, the
        fastest attention could not be taken, and keys and values would be copied for every query head."""
        return self.counts_patches and set(self.model.config.get_text_config().layer_types) == {"full_attention"}

    @functools.cached_property
    def features(self) -> FeatureStore | None:
        """Where features are kept; None when they are not."""
        if self.settings.feature_cache_gib == 0:
            return None
        tower, config = self.model.get_submodule(self.vision_tower), self.model.config.vision_config
        key = features_key(tower, config, self.processor.image_processor, self.device)
        return FeatureStore(key, int(self.settings.feature_cache_gib * 2**30))


def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor class without its video part, which needs torchvision and which nothing here uses."""

    class ImageOnly(processor_class):  # type: ignore[valid-type, misc]
        # Some ask their video part for these two when they render any prompt.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            # By name, because some take the video part by position and without a default.
            parts = dict(zip(cls.get_attributes(), args, strict=True)) | {"video_processor": None}
            return super().from_args_and_dict((), processor_dict, **parts, **kwargs)

    ImageOnly.__name__, ImageOnly.__qualname__ = processor_class.__name__, processor_class.__qualname__
    return ImageOnly


def load_processor(directory: Path, settings: ModelSettings | None = None) -> ProcessorMixin:
    """The model's own processor (chat template, tokenizer, image processor), for images and text.

    Raises ValueError when `max_image_tokens` is set for a model whose images all have one size.
    """
    settings = settings or ModelSettings()
    if (directory / "config.json").is_file() and hulumed.is_hulumed(directory):
        processor = hulumed.load_processor(directory, image_only(VideoLlama3Processor), settings.upright_images)
    else:
        processor = load_native_processor(directory)
    if settings.max_image_tokens:
        limit_image_tokens(processor.image_processor, settings.max_image_tokens)
    return processor


def limit_image_tokens(image_processor: Any, most: int) -> None:
    """Bound the pixels of an image so that it becomes at most `most` tokens."""
    size = dict(image_processor.size)
    if "longest_edge" not in size or not hasattr(image_processor, "merge_size"):
        raise ValueError("`max_image_tokens` must be 0 for this model: all its images have one size; leave it out")
    # These processors call their pixel limits edges.
    pixels = most * (image_processor.patch_size * image_processor.merge_size) ** 2
    size["shortest_edge"] = min(size["shortest_edge"], pixels)
    size["longest_edge"] = pixels
    image_processor.size = size


def load_native_processor(directory: Path) -> ProcessorMixin:
    """The processor of a model that transformers knows by its own name."""
    saved = directory / "processor_config.json"
    name = json.loads(saved.read_text(encoding="utf-8")).get("processor_class") if saved.is_file() else None
    if name:  # all that the folder of an adapter tells
        found = processor_class_from_name(name)
    else:
        found = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(directory, trust_remote_code=False))]
    return image_only(found).from_pretrained(directory, local_files_only=True)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of the base: what `--dtype` says, or what the device does well."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_part(model: torch.nn.Module, names: Sequence[str], what: str, chosen: str = "") -> str:
    """The full name of the first of `names` that the inner model has, or the `chosen` one.

    Raises ValueError, with the modules that are there, when it is not.
    """
    inner = getattr(model, "base_model_prefix", "") or "model"
    present = {name for name, _ in model.named_modules() if name}
    wanted = [chosen] if chosen else [f"{inner}.{name}" for name in names]
    found = next((name for name in wanted if name in present), None)
    if found:
        return found
    flag = "--" + what.replace(" ", "-")
    near = sorted(name for name in present if name.count(".") <= 1)
    fix = f"give {flag} the full name of another module" if chosen else f"name it with {flag}"
    raise ValueError(
        f"the {what} of {type(model).__name__} must be {' or '.join(wanted)}, but its modules are {', '.join(near)} "
        f"(and theirs): {fix}"
    )


def four_bit(settings: ModelSettings, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that hold the language model in 4 bit, as QLoRA does.

    The whole model goes to this worker's own device: "auto" would spread it over those of other workers.
    """
    parts = {path.split(".")[0] for path in (*VISION_TOWERS, *PROJECTORS)} | {"lm_head"}
    chosen = [re.escape(part) for part in (settings.vision_tower, settings.projector) if part]
    spared = [rf"(?:.*\.)?{part}" for part in sorted(parts)] + chosen  # matched from the start of a module's full name
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=spared,  # its name is older than 4 bit
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def base_gib(model: torch.nn.Module) -> tuple[float, float]:
    """GiB of the base's weights as they are held, and as they would be without quantisation (2 bytes a weight)."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    held = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    whole = sum(math.prod(getattr(getattr(p, "quant_state", None), "shape", p.shape)) * 2 for p in parameters)
    return held / 2**30, whole / 2**30


def load_model(directory: Path, **options: Any) -> PreTrainedModel:
    """The model with its weights; with `device_map={"": "meta"}` only its shapes, which reads no weights.

    Raises:
        ValueError: a tensor is missing or has another shape. transformers would draw it at random.
    """
    options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    options["ignore_mismatched_sizes"] = True  # they are named below
    if hulumed.is_hulumed(directory):
        return hulumed.load_model(directory, **options)
    load: Any = AutoModelForImageTextToText.from_pretrained
    model, found = load(directory, output_loading_info=True, **options)
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"the weights in {directory} must hold every tensor of the model in its shape, but {len(wrong)} are "
            f"missing or of another shape, {wrong[0]} among them: fetch the model again"
        )
    return model


def load_base(settings: ModelSettings, device: torch.device) -> Base:
    """Load and freeze the base model. No code from the model directory is run, and no pickle is read.

    `from_pretrained(dtype=...)` keeps rotary frequencies in float32, which `.to(bfloat16)` would round.
    """
    directory = resolve_model(settings.model)
    options: dict[str, Any] = {
        "dtype": choose_dtype(settings.base_dtype, device),
        "attn_implementation": "sdpa",
    }
    if settings.use_qlora:
        options |= four_bit(settings, options["dtype"], device)
    elif device.type == "cuda":
        options["device_map"] = {"": device}  # straight there: all lanes of a machine would need its memory otherwise
    if device.type == "cuda" and options["dtype"] != torch.float32:
        # What is multiplied in float32 all the same (a trained projector, DoRA, all adapters of a float16 base) tensor
        # cores do not take; TF32 holds what a 16-bit base gives.
        torch.set_float32_matmul_precision("high")
    model = load_model(directory, **options)
    if settings.use_qlora:
        # What is not in 4 bit keeps the base's format. PEFT's preparation would make it float32, and with it all that
        # passes between the layers, for nothing here casts it back.
        for module in model.modules():
            # On a CPU, bitsandbytes would repack the weights at the first evaluation, for a faster kernel that rounds
            # to bfloat16: the base would change under the trial.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    else:
        model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # read by all ranks: DeepSpeed need not send it
    base = Base(
        model=model,
        processor=load_processor(directory, settings),
        vision_tower=find_part(model, VISION_TOWERS, "vision tower", settings.vision_tower),
        projector=find_part(model, PROJECTORS, "projector", settings.projector),
        language_model=find_part(model, LANGUAGE_MODELS, "language model", settings.language_model),
        device=device,
        settings=settings,
        hulumed=hulumed.is_hulumed(directory),
    )
    bridge_formats(model.get_submodule(base.projector), model.dtype)
    autocast_language_model(base)
    # Without this every later full collection, which DeepSpeed and torch ask for, walks the million objects that
    # transformers and torch have made by now: 0.5 to 1 s each.
    gc.collect()
    gc.freeze()
    return base


def autocast_language_model(base: Base) -> None:
    """Let the float32 adapters of a bfloat16 base multiply in its format, as in the guide's training.

    In float32 each of the seven in a layer would keep its input for the backward pass at twice the size. Not so in
    float16, whose range is narrow.
    """
    language_model = base.model.get_submodule(base.language_model)
    plain = language_model.forward

    @functools.wraps(plain)
    def forward(*given: Any, **named: Any) -> Any:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.autocasts):
            found = plain(*given, **named)
        if base.autocasts:  # a layer norm leaves float32 behind, which the head does not take
            found.last_hidden_state = found.last_hidden_state.to(base.model.dtype)
        return found

    language_model.forward = forward


def bridge_formats(projector: torch.nn.Module, outside: torch.dtype) -> None:
    """Let the projector compute in the format of its own weights: float32 while it is trained, whatever the base has.

    outside: the base's format, in which its output is given back.
    """

    def cast(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def into(module: torch.nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        dtype = next(module.parameters()).dtype
        return tuple(cast(value, dtype) for value in given), {key: cast(value, dtype) for key, value in named.items()}

    projector.register_forward_pre_hook(into, with_kwargs=True)
    projector.register_forward_hook(lambda module, given, output: cast(output, outside))


# ------------------------------------------------------------------------------------------------ text


def prompt_text(processor: Any, question: str) -> str:
    """The rendered user turn with its image placeholder, up to where the answer begins."""
    return processor.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)


def messages(question: str) -> list[dict[str, Any]]:
    """One user turn: the image, then the question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer_ids(base: Base, question: str, answer: str) -> list[int]:
    """Token ids [T] of an answer and its end token: what the loss is taken over."""
    return answer_tail(base, question, answer)[0]


def answer_tail(base: Base, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of an answer and its end token, and of what the template writes after that."""
    if (question, answer) not in base.tokens:
        base.tokens[question, answer] = tokenize_answer(base.processor, question, answer)
    return base.tokens[question, answer]


def tokenize_answer(processor: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """See `answer_tail`.

    What ends an answer is read off the chat template: the text that follows the answer in a rendered conversation,
    up to and including the first special token. A template that has none, or that rewrites the turn (such as one that
    adds an empty thinking block), is completed with the tokenizer's end-of-sequence token instead.
    """
    tokenizer = processor.tokenizer
    prompt = prompt_text(processor, question)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([*messages(question), turn], tokenize=False)
    rest = whole[len(prompt) :].rstrip(" ")  # that is where the next turn would begin
    if not (whole.startswith(prompt) and rest.lstrip().startswith(answer)):
        rest = answer + tokenizer.eos_token
    # Behind the prompt: tokenizers may treat the beginning of a text unlike its middle.
    head, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + rest))
    ids = ids[len(head) :] if ids[: len(head)] == head else tokenizer(rest, add_special_tokens=False)["input_ids"]
    added = {token for token, told in tokenizer.added_tokens_decoder.items() if told.special}
    ends = added | {*tokenizer.all_special_ids, tokenizer.eos_token_id}
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return (ids[: end + 1], ids[end + 1 :]) if end is not None else ([*ids, tokenizer.eos_token_id], [])


# ------------------------------------------------------------------------------------------------ batches


def process(base: Base, sample: Sample) -> dict[str, torch.Tensor]:
    """The processor's output for one prompt: input_ids [1, S], pixel_values, and whatever else the model takes."""
    text = prompt_text(base.processor, sample.text)
    begins = special_tokens(base.processor, text)
    return dict(base.processor(images=[read_image(sample.image)], text=[text], return_tensors="pt", **begins))


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Tell the tokenizer not to begin with a token that the chat template has written already."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": not (first and text.startswith(first))}


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


def prompt_length(base: Base, sample: Sample) -> Any:
    """Equal for prompts of equal length: their tokens where they can be counted, else the image's size and the
    question."""
    if base.counts_patches:
        return prompt_tokens(base, sample.text, num_patches(base, sample.image))["input_ids"].shape[1]
    return prompt_size(base, sample), sample.text


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


def prompt_tokens(base: Base, question: str, patches: int) -> dict[str, torch.Tensor]:
    """Token ids and mask [1, S] of a prompt, as the processor makes them, for an image of that many patches."""
    key = ("prompt", question, patches)
    if key not in base.tokens:
        token = base.processor.image_token
        text = prompt_text(base.processor, question).replace(token, token * patches)
        begins = special_tokens(base.processor, text)
        base.tokens[key] = dict(base.processor.tokenizer([text], return_tensors="pt", **begins))
    return base.tokens[key]


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


# ------------------------------------------------------------------------------------------------ forward


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


def adapter_pattern(base: Base, target_modules: Sequence[str], exclude_patterns: Sequence[str]) -> str:
    """One regular expression (matched in full, as PEFT does) for the modules that get an adapter: all of the language
    model's that have one of these names, for the tower and the projector may use the same."""
    spared = [*map(re.escape, exclude_patterns), inside(base, base.vision_tower), inside(base, base.projector)]
    names = "|".join(map(re.escape, target_modules))
    return rf"(?!.*(?:{'|'.join(spared)})){inside(base, base.language_model)}(?:.*\.)?(?:{names})"


def target_problems(base: Base, settings: TrialSettings) -> list[str]:
    """Every name in `lora_target_modules` that matches no linear layer of the language model.

    PEFT adapts what matches and drops the rest in silence.
    """
    layers = [name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    begins = re.compile(inside(base, base.language_model))
    there = sorted({name.rpartition(".")[2] for name in layers if begins.match(name)})
    excluded: list[str] = []
    unknown: list[str] = []
    for target in dict.fromkeys(settings.lora_target_modules):
        pattern = adapter_pattern(base, [target], settings.lora_exclude_patterns)
        if not any(re.fullmatch(pattern, name) for name in layers):
            ends = [name for name in layers if begins.match(name) and f".{name}".endswith(f".{target}")]
            hit = any(part in name for part in settings.lora_exclude_patterns for name in ends)
            (excluded if hit else unknown).append(target)
    found = []
    if excluded:
        found.append(
            f"`lora_exclude_patterns` must leave each target module a layer, but "
            f"{', '.join(settings.lora_exclude_patterns)} excludes every {', '.join(map(repr, excluded))}: change the "
            f"patterns"
        )
    if unknown:
        found.append(
            f"`lora_target_modules` must name linear layers of the language model, but got "
            f"{', '.join(map(repr, unknown))}: choose from {', '.join(there)}"
        )
    return found if settings.use_lora else []


def inside(base: Base, part: str) -> str:
    """A regular expression for how the names of a part's modules begin. For a Hulu-Med base also in the original
    implementation, for which its adapters are written."""
    begins = [part + "."] + [hulumed.original_name(part + ".")] * base.hulumed
    return rf"(?:{'|'.join(map(re.escape, begins))})"
