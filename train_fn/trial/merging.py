"""An adapter merged into its base: a full checkpoint in the base's own layout or in transformers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from train_fn.model.base import choose_dtype, load_base
from train_fn.model.hulumed import original_name
from train_fn.model.processors import PROCESSOR, VIDEO_PROCESSOR
from train_fn.settings import DTYPES, ModelSettings
from train_fn.trial.adapter_files import merged_adapter, processor_files

IMAGE_FILES = ("preprocessor_config.json", VIDEO_PROCESSOR)  # older forms of what processor_config.json holds


def write_merged(settings: ModelSettings, source: Path, adapter: Path, directory: Path, layout: str = "base") -> None:
    """Write base and adapter as one checkpoint, as `train_fn.predict.merge` describes it.

    Args:
        source: the base's folder.
        directory: an empty folder.
        layout: "base", or "transformers". Only with Hulu-Med are these two layouts.

    Raises:
        ValueError: the base does not load, or has a number format that is not supported.
        BadAdapter: the adapter is damaged or does not fit.
    """
    plain = replace(settings, use_qlora=False, dtype="float32", bf16=False, fp16=False)
    base = load_base(plain, torch.device("cpu"))
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    if own not in DTYPES:
        raise ValueError(f"`dtype` in {source / 'config.json'} must be one of {', '.join(DTYPES)}, but is {own!r}")
    dtype = choose_dtype(own if settings.base_dtype == "auto" else settings.base_dtype, torch.device("cpu"))
    merged_adapter(base, adapter)
    model = base.model.to(dtype)  # type: ignore[arg-type]
    if base.hulumed and layout == "base":
        copy_files(source, directory)
        limit_hulumeds_images(directory / "preprocessor_config.json", settings.max_image_tokens)
        tensors = {original_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    processor = processor_files(base)  # with the image size of the training
    if not base.hulumed:  # the base's own tokenizer stays; its chat template may have stood in processor_config.json
        copy_files(source, directory, but=IMAGE_FILES)
        processor = {name: processor[name] for name in processor if name == PROCESSOR or "chat_template" in name}
    # A checkpoint that was renamed on loading would otherwise get its old names back.
    model.save_pretrained(directory, save_original_format=not base.hulumed)
    for name, content in processor.items():
        (directory / name).write_bytes(content)


def limit_hulumeds_images(path: Path, most: int) -> None:
    """Write the most tokens of an image in training, if they were limited, to a Hulu-Med's configuration."""
    if most:
        stored = json.loads(path.read_text(encoding="utf-8"))
        limits = {"min_tokens": min(stored.get("min_tokens", 16), most), "max_tokens": most}
        path.write_text(json.dumps(stored | limits, indent=2), encoding="utf-8")


def copy_files(source: Path, directory: Path, but: Collection[str] = ()) -> None:
    """Copy tokenizer, processor and configuration: everything but the weights.

    Args:
        but: names of files that are left out.
    """
    for file in source.iterdir():
        is_weights = ".safetensors" in file.name or file.suffix in (".bin", ".pt", ".pth")
        if file.is_file() and not is_weights and file.name not in but:
            shutil.copyfile(file, directory / file.name)
