"""Hulu-Med checkpoints (`hulumed_qwen3`, `hulumed_qwen2`) in transformers' own VideoLlama3 and Qwen classes.

The published folders contain code, which is never run. Their tensors are renamed on loading, and images and prompts are
prepared as in the original implementation (ZJUI-AI4H/Hulu-Med, src/hulumed_qwen3), quirks included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Qwen2Tokenizer, VideoLlama3Config, VideoLlama3ForConditionalGeneration
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
    smart_resize,
)

PREFIX = "hulumed_"
# Hulu-Med's names -> transformers' names. An older layout nests the vision encoder twice.
KEY_MAPPING = {
    r"^model\.vision_encoder\.(vision_encoder\.)?": "model.vision_model.",
    r"^model\.mm_projector\.": "model.projector.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}
# The reverse, as prefixes, for adapters and merged models that the original implementation can load.
ORIGINAL_NAMES = {
    "model.vision_model.": "model.vision_encoder.",
    "model.projector.": "model.mm_projector.",
    "model.language_model.": "model.",
}
IMAGE_TOKEN = "<image>"
# Renders a question with one image and its answer as the original's default template does. The folder's own template
# may be that of the text model, which has no images.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
NOT_THE_TEXT_MODELS = ("model_type", "architectures", "auto_map", "vision_encoder_config", "torch_dtype", "dtype")


def read_config(directory: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def is_hulumed(directory: Path) -> bool:
    """Whether a model directory holds a Hulu-Med checkpoint."""
    return str(read_config(directory).get("model_type", "")).startswith(PREFIX)


def native_config(original: dict[str, Any]) -> VideoLlama3Config:
    """The configuration in transformers' terms. Raises ValueError for a text model other than Qwen2 and Qwen3."""
    kind = original["model_type"].removeprefix(PREFIX)
    if kind not in ("qwen2", "qwen3"):
        raise ValueError(f"a Hulu-Med model must be hulumed_qwen2 or hulumed_qwen3, but is {original['model_type']!r}")
    text = {name: value for name, value in original.items() if name not in NOT_THE_TEXT_MODELS}
    vision = {name: original["vision_encoder_config"][name] for name in VISION_KEYS}
    return VideoLlama3Config(
        text_config=text | {"model_type": kind},
        vision_config=vision | {"model_type": "video_llama_3_vision"},
        image_token_id=original["image_token_index"],
        video_token_id=-1,  # no token stands for a video
        tie_word_embeddings=original.get("tie_word_embeddings", False),
    )


def load_model(directory: Path, **options: Any) -> PreTrainedModel:
    """The model with its weights. Raises ValueError if a tensor is missing, left over or of another shape."""
    load: Any = VideoLlama3ForConditionalGeneration.from_pretrained
    options.pop("trust_remote_code", None)  # this class has no remote code to trust
    model, info = load(
        directory,
        config=native_config(read_config(directory)),
        key_mapping=KEY_MAPPING,
        output_loading_info=True,
        **options,
    )
    wrong = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"the tensors of {directory} must be Hulu-Med's, but {wrong}: fetch the checkpoint again")
    return model


class HulumedImageProcessor(VideoLlama3ImageProcessorPil):
    """VideoLlama3's image processor with the target size of the original implementation.

    The original reads Pillow's (width, height) as (height, width): an image of 562 x 471 pixels becomes 476 wide and
    560 high. The published weights were trained on such images, so this is the default. `upright` keeps the shape.
    """

    upright: bool = False

    def resize(self, image: Any, size: SizeDict, resample: Any, factor: int, **kwargs: Any) -> Any:  # type: ignore[override]
        """Resize [C, H, W] to multiples of the patch size within the token limits."""
        height, width = image.shape[-2:] if self.upright else image.shape[:-3:-1]
        limits: dict[str, Any] = {"min_pixels": size.shortest_edge, "max_pixels": size.longest_edge}
        height, width = smart_resize(height, width, factor=factor, **limits)
        return PilBackend.resize(self, image=image, size=SizeDict(height=height, width=width), resample=resample)


def load_processor(directory: Path, processor_class: type, upright: bool = False) -> Any:
    """A processor with the original's image preparation, prompt and image token.

    processor_class: VideoLlama3's processor class, without its video part.
    """
    stored = json.loads((directory / "preprocessor_config.json").read_text(encoding="utf-8"))
    patch = stored.get("patch_size", 14)
    pixels_per_token = patch * patch
    images = HulumedImageProcessor(
        patch_size=patch,
        merge_size=1,
        size={
            "shortest_edge": stored.get("min_tokens", 16) * pixels_per_token,
            "longest_edge": stored.get("max_tokens", 16384) * pixels_per_token,
        },
        image_mean=stored.get("image_mean", [0.5] * 3),
        image_std=stored.get("image_std", [0.5] * 3),
        resample=stored.get("resample", 3),
    )
    images.upright = upright
    # As an option, and not as an attribute, so that it is saved with the tokenizer.
    named = {"image_token": IMAGE_TOKEN}
    tokenizer = Qwen2Tokenizer.from_pretrained(directory, local_files_only=True, model_specific_special_tokens=named)
    return processor_class(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def original_name(name: str) -> str:
    """A parameter's or module's name in the original implementation. A PEFT prefix is kept."""
    native = next((native for native in ORIGINAL_NAMES if native in name), None)
    return name.replace(native, ORIGINAL_NAMES[native], 1) if native else name


def native_name(name: str) -> str:
    """The reverse of `original_name`."""
    for native, original in ORIGINAL_NAMES.items():
        if original != "model." and original in name:
            return name.replace(original, native, 1)
    head, layers, tail = name.partition("model.layers.")
    return f"{head}model.language_model.layers.{tail}" if layers and not head.endswith("language_") else name
