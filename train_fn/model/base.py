"""The frozen base: its parts, and how it is loaded.

Shapes: P vision patches of one image.
"""

from __future__ import annotations

import functools
import gc
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from train_fn.model import hulumed
from train_fn.model.attention import has_varlen_kernel, let_rows_be_packed
from train_fn.model.checkpoint import resolve_model
from train_fn.model.features import FeatureStore, features_key
from train_fn.model.processors import load_processor
from train_fn.settings import ModelSettings

# Attribute paths of the parts of transformers' image-text-to-text models, from the inner model.
VISION_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder")
PROJECTORS = ("projector", "multi_modal_projector", "mm_projector", "connector", "visual.merger", "embed_vision")
LANGUAGE_MODELS = ("language_model", "text_model")


@dataclass
class Base:
    """A loaded base model with its processor."""

    model: PreTrainedModel
    processor: Any
    device: torch.device
    settings: ModelSettings
    # Full module names of the parts.
    vision_tower: str
    projector: str
    language_model: str
    hulumed: bool = False  # loaded from a Hulu-Med checkpoint, under transformers' names
    # Computed once and used in every step.
    tokens: dict[tuple, Any] = field(default_factory=dict)  # tokenized prompts and answers
    patches: dict[str, int] = field(default_factory=dict)  # image path -> P
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # image path -> width and height
    trial_sizes: dict[Any, Any] = field(default_factory=dict)  # see `train_fn.trial.memory.cached_sizes`
    processor_files: dict[str, bytes] = field(default_factory=dict)  # see `train_fn.trial.adapter_files`
    # Changed by trials.
    autocasts: bool = field(init=False)  # whether the language model's float32 adapters multiply in bfloat16
    compiler: Any = None  # `train_fn.trial.compiled.Compiler`
    as_loaded: Any = None  # `train_fn.trial.pristine.Snapshot` of the base before its first adapter

    def __post_init__(self) -> None:
        self.loaded_tower = self.tower_weights()
        self.autocasts = self.model.dtype == torch.bfloat16

    def tower_weights(self) -> list[tuple[int, bool]]:
        """Addresses of the vision tower's weights, and which are trained. An adapter or other weights change this."""
        return [(p.data_ptr(), p.requires_grad) for p in self.model.get_submodule(self.vision_tower).parameters()]

    @property
    def takes_features(self) -> bool:
        """Whether batches carry vision features instead of pixels: where features can be split by image, and the tower
        is as it was loaded."""
        return self.counts_patches and self.tower_weights() == self.loaded_tower

    @property
    def counts_patches(self) -> bool:
        """Whether an image's number of tokens follows from its size, as in VideoLlama3, which packs the patches of a
        batch."""
        return self.model.config.model_type == "video_llama_3"

    @property
    def needs_no_mask(self) -> bool:
        """Whether right padding needs no mask because attention is causal. A mask would rule out the fastest attention
        kernel and copy keys and values for every query head."""
        return self.counts_patches and set(self.model.config.get_text_config().layer_types) == {"full_attention"}

    @property
    def packs_rows(self) -> bool:
        """Whether several sequences can stand in one row without padding, at no loss of speed: not with dropout in the
        attention, which the kernel lacks, and not on GPUs without the kernel."""
        has_dropout = getattr(self.model.config.get_text_config(), "attention_dropout", 0) > 0
        is_fast = self.device.type == "cpu" or has_varlen_kernel(self.device, self.model.dtype)
        return self.needs_no_mask and not has_dropout and is_fast

    def forget_inputs(self) -> None:
        """Drop what is kept of questions and image files: it grows with each of them, and a file may change between
        two calls of a process that predicts without end."""
        for kept in (self.tokens, self.patches, self.sizes):
            kept.clear()

    def packs(self, sizes: Sequence[int]) -> bool:
        """Whether samples of so many tokens should stand in one row instead of a padded batch: where padding would cost
        more than a twentieth. Where lengths are equal, the attention of a padded batch is 8 % faster (benchmarks).

        A compiled layer has another graph for each of the two. So this is decided once, with the sizes of all samples
        of a trial, and not anew for each micro-batch.
        """
        return self.packs_rows and max(sizes) * len(sizes) > 1.05 * sum(sizes)

    @functools.cached_property
    def features(self) -> FeatureStore | None:
        """The cache of vision features; None if the settings turn it off."""
        if self.settings.feature_cache_gib == 0:
            return None
        tower, config = self.model.get_submodule(self.vision_tower), self.model.config.vision_config
        key = features_key(tower, config, self.processor.image_processor, self.device, self.settings.image_options)
        return FeatureStore(key, int(self.settings.feature_cache_gib * 2**30))


# ------------------------------------------------------------------------------------------------ parts


def find_parts(model: torch.nn.Module, settings: ModelSettings) -> dict[str, Any]:
    """Full module names of vision tower, projector and language model, by field of `Base`.

    Raises:
        ValueError: a part does not exist; a line for each, with the modules that do.
    """
    usual = {"vision_tower": VISION_TOWERS, "projector": PROJECTORS, "language_model": LANGUAGE_MODELS}
    inner = getattr(model, "base_model_prefix", "") or "model"
    present = {name for name, _ in model.named_modules() if name}
    parts, problems = {}, []
    for part, names in usual.items():
        chosen = getattr(settings, part)
        wanted = [chosen] if chosen else [f"{inner}.{name}" for name in names]
        if found := next((name for name in wanted if name in present), None):
            parts[part] = found
            continue
        flag = "--" + part.replace("_", "-")
        near = ", ".join(sorted(name for name in present if name.count(".") <= 1))
        fix = f"give {flag} the full name of another module" if chosen else f"name it with {flag}"
        problems.append(
            f"the {part.replace('_', ' ')} of {type(model).__name__} must be {' or '.join(wanted)}, but its modules "
            f"are {near} (and theirs): {fix}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return parts


# ------------------------------------------------------------------------------------------------ loading


def load_base(settings: ModelSettings, device: torch.device) -> Base:
    """Load and freeze the base model. Runs no code from the model directory and reads no pickle.

    `from_pretrained(dtype=...)` keeps rotary frequencies in float32; `.to(bfloat16)` would round them.

    Raises:
        ValueError: a part or a tensor of the model is missing.
    """
    directory = resolve_model(settings.model)
    options: dict[str, Any] = {
        "dtype": choose_dtype(settings.base_dtype, device),
        "attn_implementation": "sdpa",
    }
    if settings.use_qlora:
        options |= four_bit(settings, options["dtype"], device)
    elif device.type == "cuda":
        options["device_map"] = {"": device}  # straight to the GPU: otherwise every lane would need the RAM for it
    if device.type == "cuda" and options["dtype"] != torch.float32:
        # Some products stay in float32, for which there are no tensor cores: a trained projector, DoRA, all adapters of
        # a float16 base. TF32 has tensor cores, and enough digits beside a 16-bit base.
        torch.set_float32_matmul_precision("high")
    model = load_model(directory, **options)
    if settings.use_qlora:
        # Weights outside 4 bit keep the base's format. PEFT's preparation would make them float32, and with them all
        # values that pass between the layers, because nothing here casts them back.
        for module in model.modules():
            # On a CPU, bitsandbytes would repack the weights at the first evaluation, for a faster kernel that rounds
            # to bfloat16: the base would change during the trial.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    else:
        model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed need not send it: every rank reads it
    base = Base(
        model=model,
        processor=load_processor(directory, settings),
        device=device,
        settings=settings,
        hulumed=hulumed.is_hulumed(directory),
        **find_parts(model, settings),
    )
    if base.needs_no_mask:
        let_rows_be_packed(model)
    bridge_formats(model.get_submodule(base.projector), model.dtype)
    autocast_language_model(base)
    # DeepSpeed and torch request full garbage collections. Each would walk the million objects that transformers and
    # torch have made by now: 0.5 to 1 s.
    gc.collect()
    gc.freeze()
    return base


def load_model(directory: Path, **options: Any) -> PreTrainedModel:
    """The model with its weights. With `device_map={"": "meta"}` only its shapes; then no weights are read.

    Raises:
        ValueError: a tensor is missing or has another shape. transformers would initialise it at random.
    """
    options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    options["ignore_mismatched_sizes"] = True  # the message below names them
    if hulumed.is_hulumed(directory):
        return hulumed.load_model(directory, **options)
    load: Any = AutoModelForImageTextToText.from_pretrained
    model, info = load(directory, output_loading_info=True, **options)
    wrong = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"the weights in {directory} must hold every tensor of the model in its shape, but {len(wrong)} are "
            f"missing or of another shape, {wrong[0]} among them: fetch the model again"
        )
    return model


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of the base: a `--dtype` by name, or for "auto" the best one of the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def four_bit(settings: ModelSettings, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` for a language model in 4 bit, as in QLoRA.

    The whole model goes to this worker's own device: "auto" would distribute it over the devices of other workers.
    """
    parts = {path.split(".")[0] for path in (*VISION_TOWERS, *PROJECTORS)} | {"lm_head"}
    chosen = [re.escape(part) for part in (settings.vision_tower, settings.projector) if part]
    skipped = [rf"(?:.*\.)?{part}" for part in sorted(parts)] + chosen  # matched from the start of a module's full name
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,  # in spite of its name also for 4 bit
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def autocast_language_model(base: Base) -> None:
    """Let the float32 adapters of a bfloat16 base multiply in bfloat16, as in the guide's training.

    In float32 each of the seven adapters of a layer would keep its input for the backward pass at twice the size. A
    float16 base does not autocast: its range is narrow.
    """
    language_model = base.model.get_submodule(base.language_model)
    plain = language_model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.autocasts):
            output = plain(*args, **kwargs)
        if base.autocasts:  # a layer norm returns float32, which the head does not accept
            output.last_hidden_state = output.last_hidden_state.to(base.model.dtype)
        return output

    language_model.forward = forward


def bridge_formats(projector: torch.nn.Module, outside: torch.dtype) -> None:
    """Let the projector compute in the format of its own weights, which is float32 while it is trained.

    outside: the base's format, to which the projector's output is cast.
    """

    def cast(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def cast_inputs(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        dtype = next(module.parameters()).dtype
        return tuple(cast(value, dtype) for value in args), {key: cast(value, dtype) for key, value in kwargs.items()}

    projector.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    projector.register_forward_hook(lambda module, args, output: cast(output, outside))


def base_gib(model: torch.nn.Module) -> tuple[float, float]:
    """GiB of the base's weights in memory, and without quantisation (2 bytes a weight)."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    held = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    whole = sum(math.prod(getattr(getattr(p, "quant_state", None), "shape", p.shape)) * 2 for p in parameters)
    return held / 2**30, whole / 2**30
