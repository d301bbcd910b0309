"""Adapters on disk: written after training, loaded for scoring, merged into the base."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from train_fn.model.adapters import TENSOR, WEIGHTS, BadAdapter, check_files, read_config, read_shapes
from train_fn.model.base import Base
from train_fn.model.checkpoint import resolve_model
from train_fn.model.hub_ids import peft_reference
from train_fn.model.hulumed import native_name, original_name
from train_fn.model.processors import saved_processor
from train_fn.settings import TrialSettings
from train_fn.support.files import write_file
from train_fn.trial.lora import PEFT_PREFIX, adapter_layers, attached, replace_projector


def save_adapter(base: Base, model: PeftModel, settings: TrialSettings, directory: Path) -> None:
    """Write the files that PEFT's `PeftModel.from_pretrained` needs, with the weights of a projector that is trained in
    full, and the processor.

    PEFT would save a trained projector only if PEFT itself had wrapped it. So its tensors are written under the names
    that PEFT would use, and the configuration lists it in `modules_to_save`. For a Hulu-Med base all names are those of
    the original implementation, so that the adapter fits it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)  # else PEFT may ask the hub
    config: Any = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    for name, value in peft_reference(base.settings.model, str(base.model.name_or_path)).items():
        setattr(config, name, value)  # PEFT has put the folder of a hub model on this machine there
    # Full names. SGLang refuses the regular expression that PEFT was given, and short names would match modules of the
    # vision tower, too.
    config.target_modules = sorted(renamed(base, name.removeprefix(PEFT_PREFIX)) for name in adapter_layers(model))
    if settings.train_projector and not settings.projector_lora:
        # PEFT saves every module whose name ends with the entry, so the last part of the name is enough.
        config.modules_to_save = [renamed(base, base.projector + ".").rstrip(".").rpartition(".")[2]]
        projector = base.model.get_submodule(base.projector)
        state |= {f"base_model.model.{base.projector}.{name}": p for name, p in projector.named_parameters()}
    config.save_pretrained(str(directory))
    tensors = {renamed(base, name): tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    write_file(directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    for name, content in processor_files(base).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(directory / name, content)


def processor_files(base: Base) -> dict[str, bytes]:
    """The processor's files by name. They are the same for all trials and made once. Raises OSError: the disk is
    full."""
    if not base.processor_files:
        base.processor_files = saved_processor(base.processor, resolve_model(base.settings.model))
    return base.processor_files


def renamed(base: Base, name: str) -> str:
    """A tensor's name as it is written to disk."""
    return original_name(name) if base.hulumed else name


def read_adapter(base: Base, directory: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A saved adapter's configuration, and its tensors under the base's names.

    The configuration is built from checked values, and its target modules come from the names of the tensors: no
    regular expression from a file is run, and PEFT has no reason to download anything.

    Raises:
        BadAdapter: a file is missing, damaged or hostile, or holds a number that is not finite.
    """
    stored = read_config(directory)
    shapes = read_shapes(directory, stored)
    tensors = load_file(directory / WEIGHTS)
    bad = [name for name, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if bad:
        raise BadAdapter(
            f"{directory / WEIGHTS} must hold finite numbers, but {len(bad)} of {len(tensors)} tensors do not, "
            f"{bad[0]} among them: train or fetch the adapter again"
        )
    check_files(directory)
    tensors = {native_name(name) if base.hulumed else name: tensor for name, tensor in tensors.items()}
    targets = sorted({match[1] for name in tensors if (match := TENSOR.fullmatch(name))})
    assert targets, f"read_shapes has seen LoRA matrices in {shapes.keys()}"
    config = LoraConfig(
        r=stored.r,
        lora_alpha=stored.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int, computes with float
        lora_dropout=stored.lora_dropout,
        target_modules="|".join(map(re.escape, targets)),
        task_type="CAUSAL_LM",
        use_rslora=stored.use_rslora,
        use_dora=stored.use_dora,
        inference_mode=True,
    )
    return config, tensors


def check_fit(base: Base, config: LoraConfig, directory: Path) -> None:
    """Raise BadAdapter if the base lacks a module that the adapter adapts."""
    pattern = re.compile(str(config.target_modules))
    present = sum(bool(pattern.fullmatch(name)) for name, _ in base.model.named_modules())
    wanted = str(config.target_modules).count("|") + 1
    if present < wanted:
        raise BadAdapter(
            f"the adapter {directory} must fit the base {base.settings.model}, but adapts {wanted} modules, of which "
            f"the base has {present}: give the base that it was trained on"
        )


def fill_adapter(base: Base, model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved tensors into an attached adapter and the projector. Raises BadAdapter if they do not fit."""
    prefix = f"base_model.model.{base.projector}."
    projector = {prefix + name: p for name, p in base.model.get_submodule(base.projector).named_parameters()}
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    different = sorted(expected.keys() ^ (tensors.keys() - projector.keys()))
    expected |= {name: parameter for name, parameter in projector.items() if name in tensors}
    different += [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if different:
        raise BadAdapter(
            f"the adapter must fit the base {base.settings.model}, but {len(different)} tensors are missing, left over "
            f"or of another shape, {different[0]} among them: give the base that it was trained on"
        )
    trained = {name.removeprefix(prefix): tensors[name] for name in projector if name in tensors}
    replace_projector(base, trained)
    set_peft_model_state_dict(model, {name: tensor for name, tensor in tensors.items() if name not in projector})


@contextlib.contextmanager
def load_adapter(base: Base, directory: Path) -> Iterator[PeftModel]:
    """Put a saved adapter (and projector) on the base, for scoring; restore the base at the end.

    Raises:
        BadAdapter: the saved files are damaged or do not fit the base.
    """
    config, tensors = read_adapter(base, directory)
    check_fit(base, config, directory)
    with attached(base, config) as model:
        fill_adapter(base, model, tensors)
        yield model.eval()


def merged_adapter(base: Base, directory: Path) -> None:
    """Merge a saved adapter (and projector) into the base's weights, for good. Raises BadAdapter."""
    config, tensors = read_adapter(base, directory)
    check_fit(base, config, directory)
    model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    fill_adapter(base, model, tensors)
    model.merge_and_unload()
