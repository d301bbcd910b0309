"""Loading a base's processor (chat template, tokenizer, image processor), without its video part."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from train_fn.model import hulumed
from train_fn.settings import ModelSettings

PROCESSOR = "processor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"


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


def saved_processor(processor: Any, source: Path) -> dict[str, bytes]:
    """The files of a processor by name, complete enough for transformers' own AutoProcessor.

    A class with a video part does not load without one, though no video is ever used here. So the part that was left
    out is put back: the base's own, or else what transformers would infer from the image part.

    Args:
        source: the base's folder.

    Raises:
        OSError: the disk is full. tokenizers raises a plain Exception for that.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            processor.save_pretrained(folder)
        except Exception as error:
            if type(error) is Exception:
                raise OSError(f"the processor could not be saved: {error}") from error
            raise
        found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    settings = json.loads(found[PROCESSOR])
    images = settings["image_processor"]
    # The class of this project exists on no other machine.
    images["image_processor_type"] = images["image_processor_type"].replace("Hulumed", "VideoLlama3")
    own_class: Any = type(processor).__mro__[1]  # of which `image_only` left the video part out
    if "video_processor" in own_class.get_attributes():
        settings["video_processor"] = video_part(source, images, type(processor).__name__)
    found[PROCESSOR] = json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n"
    return found


def video_part(source: Path, images: Mapping[str, Any], whole: str) -> dict[str, Any]:
    """The settings of a base's video part: its own, or those of its image part with the video part's class.

    Args:
        images: the settings of the image part.
        whole: the name of the processor's class.
    """
    for name, key in ((PROCESSOR, "video_processor"), (VIDEO_PROCESSOR, "")):
        if (source / name).is_file():
            stored = json.loads((source / name).read_text(encoding="utf-8"))
            if its := stored.get(key) if key else stored:
                return its
    # Named after the image part or, as with InternVL, after the whole. transformers' own table is empty without
    # torchvision.
    names = (images["image_processor_type"].replace("Image", "Video"), whole.replace("Processor", "VideoProcessor"))
    shared = {name: value for name, value in images.items() if name != "image_processor_type"}
    return shared | {"video_processor_type": next(name for name in names if hasattr(transformers, name))}


def load_native_processor(directory: Path) -> ProcessorMixin:
    """The processor of a model in transformers' own format."""
    saved = directory / PROCESSOR
    name = json.loads(saved.read_text(encoding="utf-8")).get("processor_class") if saved.is_file() else None
    if name:  # an adapter's folder has no configuration of the model
        processor_class = processor_class_from_name(name)
    else:
        processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(directory, trust_remote_code=False))]
    return image_only(processor_class).from_pretrained(directory, local_files_only=True)
