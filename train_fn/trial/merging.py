"""An adapter merged into its base: a full checkpoint in the base's own layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from train_fn.model.base import choose_dtype, load_base
from train_fn.model.hulumed import original_name
from train_fn.settings import DTYPES, ModelSettings
from train_fn.trial.adapter_files import merged_adapter


def write_merged(settings: ModelSettings, source: Path, adapter: Path, directory: Path) -> None:
    """Write base and adapter as one checkpoint, as `train_fn.predict.merge` describes it.

    Args:
        source: the base's folder.
        directory: an empty folder.

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
    for file in source.iterdir():  # tokenizer, processor, configuration: everything but the weights
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copyfile(file, directory / file.name)
    model = base.model.to(dtype)  # type: ignore[arg-type]
    if base.hulumed:
        tensors = {original_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(directory)
