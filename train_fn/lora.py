"""Putting an adapter on the frozen base, taking it off again without a trace, and writing it to disk."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from transformers.modeling_layers import GradientCheckpointingLayer

from train_fn.files import write_file
from train_fn.hulumed import native_name, original_name
from train_fn.model import Base, adapter_pattern
from train_fn.settings import TrialSettings


@contextlib.contextmanager
def attached(base: Base, config: LoraConfig) -> Iterator[PeftModel]:
    """The base with an adapter of this configuration; afterwards the base as it was, projector included."""
    projector, autocasts = base.model.get_submodule(base.projector), base.autocasts
    pristine = [(module, dict(module._parameters)) for module in projector.modules()]
    base.autocasts = autocasts and not config.use_dora  # whose norms need float32
    # The adapter is float32 also on a bfloat16 base: 2e-4 of a weight is less than bfloat16's spacing.
    model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    for layer in adapter_layers(model).values():
        layer.cast_input_dtype_enabled = not base.autocasts
    try:
        yield model
    finally:
        base.autocasts = autocasts
        for module, parameters in pristine:
            module._parameters.update(parameters)  # DeepSpeed may have left hooks on those that were trained
        model.unload()
        base.model.requires_grad_(False).eval()


def replace_projector(base: Base, weights: dict[str, torch.Tensor]) -> None:
    """Put other weights in the projector's place; `attached` puts back those that it found."""
    projector = base.model.get_submodule(base.projector)
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        projector.get_submodule(module)._parameters[last] = torch.nn.Parameter(weight.to(base.device))


@contextlib.contextmanager
def adapted(base: Base, settings: TrialSettings) -> Iterator[PeftModel]:
    """The base with a fresh adapter and, if asked, a trainable float32 projector; afterwards the base as it was.

    Raises ValueError when no module matches `lora_target_modules`.
    """
    torch.manual_seed(settings.seed)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(attached(base, lora_config(base, settings)))
        if not settings.use_lora:  # the adapter stays what it begins as, without effect
            model.requires_grad_(False)
        if settings.train_projector:
            weights = base.model.get_submodule(base.projector).named_parameters()
            replace_projector(base, {name: p.detach().to(torch.float32, copy=True) for name, p in weights})
        if settings.gradient_checkpointing:
            # Re-entrant checkpointing gives no gradient where no input needs one: the frozen embeddings.
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            stack.callback(base.model.gradient_checkpointing_disable)
        if settings.torch_compile:
            stack.enter_context(compiled(base))
        yield model


@contextlib.contextmanager
def compiled(base: Base) -> Iterator[None]:
    """The language model's layers compiled, for training only: an evaluation's cache of keys and values would be
    compiled anew for every layer. All layers are alike and share what is compiled."""
    layers = [layer for layer in base.model.get_submodule(base.language_model).modules()
              if isinstance(layer, GradientCheckpointingLayer)]  # fmt: skip
    for layer in layers:
        # What nn.Module.compile sets, and what nn.Module.__call__ looks for.
        layer._compiled_call_impl = functools.partial(call, layer, torch.compile(layer._call_impl))
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()  # it would keep up to eight ranks, and then give up


def call(layer: torch.nn.Module, as_compiled: Callable, *given: Any, **named: Any) -> Any:
    """A layer's output, compiled where gradients are wanted."""
    return (as_compiled if torch.is_grad_enabled() else layer._call_impl)(*given, **named)


def lora_config(base: Base, settings: TrialSettings) -> LoraConfig:
    """PEFT's configuration of a trial's adapter."""
    return LoraConfig(
        r=settings.lora_r if settings.use_lora else 1,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int, computes with float
        lora_dropout=settings.lora_dropout,
        target_modules=adapter_pattern(base, settings.lora_target_modules, settings.lora_exclude_patterns),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.model.name_or_path),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def adapter_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The modules that carry an adapter, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def parameter_groups(model: torch.nn.Module, settings: TrialSettings) -> list[dict]:
    """AdamW's groups: adapter (its B matrices apart), projector weights, projector biases (not decayed). Named, so that
    they can be read back."""
    projector_rate = settings.projector_learning_rate or settings.learning_rate
    rates = {
        "adapter": settings.learning_rate,
        "adapter_b": settings.learning_rate * settings.loraplus_lr_ratio,
        "projector": projector_rate,
        "projector_bias": projector_rate,
    }
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            groups["adapter_b" if ".lora_B." in name else "adapter"].append(parameter)
        elif parameter.requires_grad:
            groups["projector_bias" if name.endswith("bias") else "projector"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "weight_decay": 0.0 if name.endswith("bias") else settings.weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def save_adapter(base: Base, model: PeftModel, settings: TrialSettings, directory: Path) -> None:
    """Write what PEFT's `PeftModel.from_pretrained` needs, the trained projector included, and the processor.

    PEFT would save a trained projector only if it had wrapped it; here its tensors are written under the names, and
    listed in the configuration as `modules_to_save`, as if it had. For a Hulu-Med base all names are the original
    implementation's, so that the adapter fits that.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    config: Any = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if settings.train_projector:
        # A module counts as one to save when its name ends with the entry, so the last part alone names it.
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
    """The processor's files by name, as `save_pretrained` writes them: alike for all trials, so it is asked once.

    Raises OSError, also where tokenizers raises a plain Exception: when the disk is full.
    """
    if not base.processor_files:
        with tempfile.TemporaryDirectory() as folder:
            try:
                base.processor.save_pretrained(folder)
            except Exception as error:
                if type(error) is Exception:
                    raise OSError(f"the processor could not be saved: {error}") from error
                raise
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            base.processor_files = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return base.processor_files


def renamed(base: Base, name: str) -> str:
    """A tensor's name as it is written to disk."""
    return original_name(name) if base.hulumed else name


def read_adapter(base: Base, directory: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A saved adapter's configuration and its tensors under the base's present names."""
    config = LoraConfig.from_pretrained(str(directory))
    config.modules_to_save = None  # the projector is put in place, not wrapped
    tensors = load_file(directory / "adapter_model.safetensors")
    return config, {native_name(name) if base.hulumed else name: tensor for name, tensor in tensors.items()}


def fill_adapter(base: Base, model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved tensors on an attached adapter and the projector. Raises ValueError when they do not fit."""
    prefix = f"base_model.model.{base.projector}."
    tensors = dict(tensors)
    names = [name for name, _ in base.model.get_submodule(base.projector).named_parameters()]
    replace_projector(base, {name: tensors.pop(prefix + name) for name in names if prefix + name in tensors})
    expected = get_peft_model_state_dict(model).keys()
    if different := sorted(expected ^ tensors.keys()):
        raise ValueError(f"the adapter does not fit the base: {', '.join(different[:5])} on one side only")
    set_peft_model_state_dict(model, tensors)


@contextlib.contextmanager
def load_adapter(base: Base, directory: Path) -> Iterator[PeftModel]:
    """The base with a saved adapter (and projector) on it, for scoring; afterwards the base as it was.

    Raises ValueError when the saved tensors do not fit the base.
    """
    config, tensors = read_adapter(base, directory)
    with attached(base, config) as model:
        fill_adapter(base, model, tensors)
        yield model.eval()


def merged_adapter(base: Base, directory: Path) -> None:
    """Merge a saved adapter (and projector) into the base's weights, for good."""
    config, tensors = read_adapter(base, directory)
    model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    fill_adapter(base, model, tensors)
    model.merge_and_unload()
