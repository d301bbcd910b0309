"""A trial leaves nothing on the base for the next one, also when it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.model import LoraModel

from train_fn.jobs import EpochReport
from train_fn.model.base import load_base
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial import compiled, lora
from train_fn.trial.compiled import is_compiled
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted, attached, lora_config
from train_fn.trial.memory import wanted_execution
from train_fn.trial.pristine import BaseChanged, changes, pristine

SHORT = TrialSettings(max_steps=2, lora_r=4, lora_alpha=8, learning_rate=1e-3)


def metrics(base, splits, settings: TrialSettings = SHORT) -> dict[str, float]:
    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: reports.append(report) or False)
    return reports[-1].metrics


@pytest.fixture(scope="module")
def fresh(base):
    """A base of its own whose adapters autocast. `base` is only needed for its process group."""
    return load_base(ModelSettings(dtype="bfloat16"), torch.device("cpu"))


def no_memory(*_, **__) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS = {
    "the fifth adapter layer": {},
    "the fifth DoRA layer": {"use_dora": True},
    "after the last layer": {},
    "the projector's copy": {"train_projector": True},
    "checkpointing": {"gradient_checkpointing": True, "train_projector": True},
    "compiling": {"torch_compile": True},
}


def break_attaching(monkeypatch, fault: str) -> None:
    attach, made = LoraModel._create_and_replace, []

    def fifth(*given, **named):
        if len(made) == 4:
            no_memory()
        made.append(attach(*given, **named))

    if "fifth" in fault:
        monkeypatch.setattr(LoraModel, "_create_and_replace", fifth)
    if "last" in fault:
        monkeypatch.setattr(LoraModel, "_cast_adapter_dtype", no_memory)
    if "copy" in fault:
        monkeypatch.setattr(lora, "replace_projector", no_memory)
    if "checkpointing" in fault:
        from transformers import PreTrainedModel

        enable = PreTrainedModel.gradient_checkpointing_enable
        monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable",
                            lambda model, **options: no_memory(enable(model, **options)))  # fmt: skip
    if "compiling" in fault:
        prepare = compiled.tensor_scalings
        monkeypatch.setattr(compiled, "tensor_scalings",
                            lambda layer: no_memory() if made else made.append(prepare(layer)))  # fmt: skip


def test_a_trial_that_could_not_attach_leaves_nothing(fresh, splits, monkeypatch) -> None:
    before, modules = metrics(fresh, splits), dict(fresh.model.named_modules())
    for fault, settings in FAULTS.items():
        with monkeypatch.context() as broken:
            break_attaching(broken, fault)
            asked = replace(SHORT, **settings)
            with pytest.raises(torch.OutOfMemoryError), adapted(fresh, asked, wanted_execution(asked, fresh.device)):
                pass
        assert dict(fresh.model.named_modules()) == modules, fault
        assert not changes(fresh, pristine(fresh)), fault
        assert not fresh.model.is_gradient_checkpointing, fault
        assert not any(map(is_compiled, fresh.model.modules())), fault
    assert metrics(fresh, splits) == before
    assert metrics(load_base(fresh.settings, fresh.device), splits) == before


def leave_adapter(base) -> None:
    layer = base.model.get_submodule(base.language_model).layers[1].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)


def leave_hook(base) -> None:
    base.model.get_submodule(base.language_model).layers[0].register_forward_hook(lambda *_: None)


def leave_trained(base) -> None:
    next(base.model.get_submodule(base.projector).parameters()).requires_grad_(True)


def leave_format(base) -> None:
    weight = next(base.model.get_submodule(base.vision_tower).parameters())
    weight.data = weight.data.double()


def leave_other_weights(base) -> None:
    base.model.lm_head.weight = torch.nn.Parameter(base.model.lm_head.weight.detach().clone(), False)


def leave_autocast(base) -> None:
    base.autocasts = not base.autocasts


@pytest.mark.parametrize(
    "leave", [leave_adapter, leave_hook, leave_trained, leave_format, leave_other_weights, leave_autocast]
)
def test_a_base_that_is_not_as_it_was_loaded_is_not_trained(base, leave) -> None:
    own = load_base(ModelSettings(), torch.device("cpu"))
    with attached(own, lora_config(own, SHORT)):
        pass
    leave(own)
    with pytest.raises(BaseChanged, match="must be as it was loaded, but differs in"), adapted(own, SHORT):
        pass


def test_hooks_that_transformers_adds_are_no_trace(base, splits) -> None:
    own = load_base(ModelSettings(), torch.device("cpu"))
    with attached(own, lora_config(own, SHORT)):
        pass
    inner = getattr(own.model, own.model.base_model_prefix)
    inner(**own.processor(text=["a"], return_tensors="pt"), output_hidden_states=True)
    assert any(module._forward_hooks for module in inner.modules())
    with attached(own, lora_config(own, SHORT)):
        pass


def test_hooks_and_flags_of_a_trial_go_with_it(base) -> None:
    with adapted(base, SHORT) as model:
        leave_hook(base)
        leave_trained(base)
        leave_autocast(base)
        model.train()
        base.model.foreign = torch.nn.Linear(2, 2)
    assert not changes(base, pristine(base))
    assert not base.model.training and not hasattr(base.model, "foreign") and not base.autocasts
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
