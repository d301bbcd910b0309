"""The frozen base: loading it, finding its parts, and turning samples into what its forward pass takes.

Shapes: B images, S tokens of the longest sequence, P vision patches of one image, D width of the vision tower,
H width of the language model, T tokens of an answer, V vocabulary.
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
from train_fn.model.checkpoint import resolve_model
from train_fn.model.features import FeatureStore, features_key
from train_fn.model.processors import load_processor
from train_fn.settings import ModelSettings

# Where transformers' image-text-to-text models keep their parts, by attribute path from the inner model.
VISION_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder")
PROJECTORS = ("projector", "multi_modal_projector", "mm_projector", "connector", "visual.merger", "embed_vision")
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
    as_loaded: Any = None  # `train_fn.trial.pristine.Snapshot` of the base before its first adapter

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
