"""Putting an adapter on the frozen base, taking it off again without a trace, and writing it to disk."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from transformers.modeling_layers import GradientCheckpointingLayer

from train_fn.adapters import TENSOR, WEIGHTS, BadAdapter, check_files, read_config, read_shapes
from train_fn.files import write_file
from train_fn.hulumed import native_name, original_name
from train_fn.model import Base, adapter_pattern, target_problems
from train_fn.settings import TrialSettings


class Snapshot(NamedTuple):
    """What a base consisted of at one moment. Holds no copies of weights."""

    modules: dict[str, tuple[torch.nn.Module, dict[str, Any]]]
    """By full name: the module and its attributes."""
    weights: dict[str, tuple]
    """`weight_facts` of the model."""
    autocasts: bool


class BaseChanged(RuntimeError):
    """The base is not as it was loaded: an earlier trial has left something on it. The worker must load it anew."""


def snapshot(base: Base) -> Snapshot:
    """What the base consists of now: modules, parameters, buffers, hooks and flags. Copies no weights."""
    modules = {
        name: (module, {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()})
        for name, module in base.model.named_modules()
    }
    return Snapshot(modules, weight_facts(base.model), base.autocasts)


def pristine(base: Base) -> Snapshot:
    """The base as it was when the first adapter was attached."""
    base.as_loaded = base.as_loaded or snapshot(base)
    return base.as_loaded


def weight_facts(model: torch.nn.Module) -> dict[str, tuple]:
    """By parameter name: where its values lie, their format and shape, and whether it is trained."""
    return {
        name: (p.data_ptr(), p.dtype, p.shape, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    }


def restore(base: Base, before: Snapshot) -> None:
    """Undo every change to the base's modules, parameters, buffers, hooks and flags since the snapshot."""
    base.autocasts = before.autocasts
    for module, attributes in before.modules.values():
        now = vars(module)
        for name in now.keys() - attributes.keys():
            del now[name]
        for name, value in attributes.items():
            if isinstance(value, dict) and name in now:  # a handle that removes a hook refers to this very dictionary
                now[name].clear()
                now[name].update(value)
            else:
                now[name] = copy.copy(value) if isinstance(value, dict) else value
    base.model.requires_grad_(False)


def changes(base: Base, before: Snapshot) -> list[str]:
    """The full names of modules and parameters that are not as they were: an adapter layer, a hook, another format."""
    now = snapshot(base)
    found = {name for name, (module, _) in now.modules.items() if before.modules.get(name, (None,))[0] is not module}
    # What every module has: parameters, children, hooks. A forward pass may replace buffers.
    compared = [key for key, value in vars(torch.nn.Module()).items() if isinstance(value, dict) and key != "_buffers"]
    for name, (module, then) in before.modules.items():
        if any(identities(then[key]) != identities(vars(module)[key]) for key in compared):
            found.add(name)
    found |= {name for name, facts in now.weights.items() if before.weights.get(name) != facts}
    return sorted(found) + ["autocast"] * (now.autocasts != before.autocasts)


def identities(held: dict[Any, Any]) -> dict[Any, int]:
    """Which objects a dictionary holds, without the hooks that transformers adds at the first forward pass."""
    return {
        key: id(value)
        for key, value in held.items()
        if isinstance(value, torch.nn.Module | torch.Tensor)
        or not getattr(value, "__module__", "").startswith("transformers.")
    }


@contextlib.contextmanager
def attached(base: Base, config: LoraConfig) -> Iterator[PeftModel]:
    """The base with an adapter of this configuration; afterwards the base as it was loaded, projector included, also
    when attaching fails.

    Raises BaseChanged when an earlier trial has left something on the base.
    """
    before = pristine(base)
    if found := changes(base, before):
        raise BaseChanged(f"the base must be as it was loaded, but differs in {', '.join(found[:5])}")
    try:
        base.autocasts = base.autocasts and not config.use_dora  # whose norms need float32
        # The adapter is float32 also on a bfloat16 base: 2e-4 of a weight is less than bfloat16's spacing.
        model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
        for layer in adapter_layers(model).values():
            layer.cast_input_dtype_enabled = not base.autocasts
        yield model
    finally:
        restore(base, before)


def replace_projector(base: Base, weights: dict[str, torch.Tensor]) -> None:
    """Put other weights in the projector's place; `attached` puts back those that it found."""
    projector = base.model.get_submodule(base.projector)
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        projector.get_submodule(module)._parameters[last] = torch.nn.Parameter(weight.to(base.device))


@contextlib.contextmanager
def adapted(base: Base, settings: TrialSettings) -> Iterator[PeftModel]:
    """The base with a fresh adapter and, if asked, a trainable float32 projector; afterwards the base as it was loaded.

    Raises ValueError when a name in `lora_target_modules` matches no module, or the adapted modules are not those that
    the settings name; BaseChanged as `attached` does.
    """
    if problems := target_problems(base, settings):
        raise ValueError("; ".join(problems))
    torch.manual_seed(settings.seed)
    wanted = wanted_modules(base, settings) if settings.use_lora else set()
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(attached(base, lora_config(base, settings)))
        adapted_modules = {name.removeprefix("base_model.model.") for name in adapter_layers(model)}
        if settings.use_lora and (other := wanted ^ adapted_modules):
            raise ValueError(f"the adapter must be on the modules that the settings name, but differs in {min(other)}")
        if not settings.use_lora:  # the adapter stays what it begins as, without effect
            model.requires_grad_(False)
        if settings.train_projector:
            weights = base.model.get_submodule(base.projector).named_parameters()
            replace_projector(base, {name: p.detach().to(torch.float32, copy=True) for name, p in weights})
        if settings.gradient_checkpointing:
            # Re-entrant checkpointing gives no gradient where no input needs one: the frozen embeddings.
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.torch_compile:
            stack.enter_context(compiled(base))
        yield model


@contextlib.contextmanager
def compiled(base: Base) -> Iterator[None]:
    """The language model's layers compiled, for training only: an evaluation's cache of keys and values would be
    compiled anew for every layer. All layers are alike and share what is compiled."""
    layers = [layer for layer in base.model.get_submodule(base.language_model).modules()
              if isinstance(layer, GradientCheckpointingLayer)]  # fmt: skip
    try:
        for layer in layers:
            # What nn.Module.compile sets, and what nn.Module.__call__ looks for.
            layer._compiled_call_impl = functools.partial(call, layer, torch.compile(layer._call_impl))
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()  # it would keep up to eight ranks, and then give up


def call(layer: torch.nn.Module, as_compiled: Callable, *given: Any, **named: Any) -> Any:
    """A layer's output, compiled where gradients are wanted."""
    return (as_compiled if torch.is_grad_enabled() else layer._call_impl)(*given, **named)


def wanted_modules(base: Base, settings: TrialSettings) -> set[str]:
    """Full names of the linear layers that the settings name, worked out without PEFT."""
    linear = {name for name, (module, _) in pristine(base).modules.items()
              if isinstance(module, torch.nn.Linear) and name.startswith(base.language_model + ".")}  # fmt: skip
    allowed = {name for name in linear if not any(part in name for part in settings.lora_exclude_patterns)}
    ends = tuple(f".{target}" for target in settings.lora_target_modules)
    return {name for name in allowed if f".{name}".endswith(ends)}


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
    state = get_peft_model_state_dict(model, save_embedding_layers=False)  # else PEFT may ask the hub
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
    """A saved adapter's configuration and its tensors under the base's present names.

    The configuration is made anew from checked values, and its target modules are those that the tensors name: no
    regular expression of a file is run, and PEFT has nothing to ask the hub for.

    Raises BadAdapter when a file is missing, damaged or hostile, or holds a number that is not finite.
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
    targets = sorted({found[1] for name in tensors if (found := TENSOR.fullmatch(name))})
    assert targets, f"read_shapes has found LoRA matrices in {shapes.keys()}"
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
    """Raise BadAdapter when the base has no module of a name that the adapter's tensors carry."""
    pattern = re.compile(str(config.target_modules))
    present = sum(bool(pattern.fullmatch(name)) for name, _ in base.model.named_modules())
    wanted = str(config.target_modules).count("|") + 1
    if present < wanted:
        raise BadAdapter(
            f"the adapter {directory} must fit the base {base.settings.model}, but adapts {wanted} modules of which "
            f"that has {present}: give the base that it was trained on"
        )


def fill_adapter(base: Base, model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved tensors on an attached adapter and the projector. Raises BadAdapter when they do not fit."""
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
    """The base with a saved adapter (and projector) on it, for scoring; afterwards the base as it was.

    Raises BadAdapter when the saved files are damaged or do not fit the base.
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
