"""Loading a base's processor (chat template, tokenizer, image processor), without its video part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from train_fn.model import hulumed
from train_fn.settings import ModelSettings


def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class without its video part, which needs torchvision and is not used here."""

    class ImageOnly(processor_class):  # type: ignore[valid-type, misc]
        # Some classes read these two from their video part whenever they render a prompt.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            # By name: some classes have the video part as a positional argument without a default.
            parts = dict(zip(cls.get_attributes(), args, strict=True)) | {"video_processor": None}
            return super().from_args_and_dict((), processor_dict, **parts, **kwargs)

    ImageOnly.__name__, ImageOnly.__qualname__ = processor_class.__name__, processor_class.__qualname__
    return ImageOnly


def load_processor(directory: Path, settings: ModelSettings | None = None) -> ProcessorMixin:
    """The model's own processor, for images and text.

    Raises:
        ValueError: `max_image_tokens` is set, but all images of the model have one size.
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
    """Limit the pixels of an image so that it becomes at most `most` tokens."""
    size = dict(image_processor.size)
    if "longest_edge" not in size or not hasattr(image_processor, "merge_size"):
        raise ValueError("`max_image_tokens` must be 0 for this model: all its images have one size; leave it out")
    # These processors call their pixel limits edges.
    pixels = most * (image_processor.patch_size * image_processor.merge_size) ** 2
    size["shortest_edge"] = min(size["shortest_edge"], pixels)
    size["longest_edge"] = pixels
    image_processor.size = size


def load_native_processor(directory: Path) -> ProcessorMixin:
    """The processor of a model in transformers' own format."""
    saved = directory / "processor_config.json"
    name = json.loads(saved.read_text(encoding="utf-8")).get("processor_class") if saved.is_file() else None
    if name:  # an adapter's folder has no configuration of the model
        processor_class = processor_class_from_name(name)
    else:
        processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(directory, trust_remote_code=False))]
    return image_only(processor_class).from_pretrained(directory, local_files_only=True)
