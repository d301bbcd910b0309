"""The live engine trains what the search asked for, or the trial fails and says where they differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import get_scheduler

from train_fn.data.augment import label_of, shown_images
from train_fn.data.order import epoch_order
from train_fn.jobs import EpochReport
from train_fn.model.base import load_base
from train_fn.model.memory import is_out_of_memory
from train_fn.settings import LR_SCHEDULER_TYPES, TrialSettings
from train_fn.trial import engine as engine_module
from train_fn.trial import lora
from train_fn.trial.applied import (
    TrialFailed,
    check_applied,
    check_schedule,
    check_shown,
    check_trained,
    read_applied,
    read_shown,
)
from train_fn.trial.applied import read_schedule as read_back
from train_fn.trial.engine import build_engine
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted
from train_fn.trial.memory import wanted_execution

SHORT = TrialSettings(max_steps=2, lora_r=4, lora_alpha=8, learning_rate=1e-3)


# ------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lora_target_modules": ("q_proj", "v_porj")}, r"but got 'v_porj': choose from down_proj, .*, v_proj"),
        ({"lora_target_modules": ("all-linear",)}, "all-linear"),
        ({"lora_target_modules": ("q_proj", "embed_tokens")}, "but got 'embed_tokens'"),
        ({"lora_target_modules": ("lm_head", "q_proj")}, "but got 'lm_head'"),
        ({"lora_target_modules": ("q_proj", "fc1")}, "but got 'fc1'"),  # of the vision tower alone
        ({"lora_target_modules": ("self_attn",)}, "but got 'self_attn'"),
        ({"lora_exclude_patterns": ("q_proj",)}, "q_proj excludes every 'q_proj'"),
        ({"lora_exclude_patterns": ("language",)}, "language excludes every 'q_proj', 'k_proj', .*, 'down_proj'"),
    ],
)
def test_every_target_must_name_a_linear_layer(base, splits, options, names) -> None:
    before = dict(base.model.named_modules())
    with pytest.raises(TrialFailed, match=names):
        run_trial(base, splits, replace(SHORT, **options), lambda report: False)
    assert before == dict(base.model.named_modules())


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"lora_target_modules": ("q_proj",)}, 4),
        ({"lora_target_modules": ("self_attn.q_proj", "mlp.up_proj")}, 8),
        ({"lora_exclude_patterns": ("layers.0.", "layers.1."), "lora_target_modules": ("q_proj", "up_proj")}, 4),
        ({"lora_exclude_patterns": ()}, 28),
    ],
)  # fmt: skip
def test_exactly_the_named_modules_are_adapted(base, options, count) -> None:
    with adapted(base, replace(SHORT, **options)) as model:
        assert len(lora.adapter_layers(model)) == count


def test_a_module_that_peft_leaves_out_fails_the_trial(base, splits, monkeypatch) -> None:
    def forgetful(model, config, **options):
        config.target_modules = config.target_modules.replace("|v_proj", "")
        return get_peft_model(model, config, **options)

    monkeypatch.setattr(lora, "get_peft_model", forgetful)
    with pytest.raises(TrialFailed, match=r"differs in model.language_model.layers.0.self_attn.v_proj"):
        run_trial(base, splits, SHORT, lambda report: False)


# ------------------------------------------------------------------------------------------------ learning rate


def schedule(kind: str, warmup: int, num_steps: int, rate: float = 1e-3) -> SimpleNamespace:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    optimizer.param_groups[0]["lr"] = rate
    return SimpleNamespace(lr_scheduler=get_scheduler(kind, optimizer, warmup, num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 300])
@pytest.mark.parametrize("kind", LR_SCHEDULER_TYPES)
def test_the_schedule_that_was_asked_for_passes(kind, num_steps) -> None:
    for ratio in (0.0, 0.03, 0.5, 0.99):
        settings = replace(SHORT, lr_scheduler_type=kind, warmup_ratio=ratio)
        live = schedule(kind, round(ratio * num_steps), num_steps)
        check_schedule(read_back(live, settings, num_steps), settings, num_steps)


@pytest.mark.parametrize(
    ("kind", "warmup", "num_steps", "rate"),
    [
        ("linear", 10, 100, 1e-3),
        ("polynomial", 10, 100, 1e-3),
        ("constant_with_warmup", 10, 100, 1e-3),
        ("constant", 10, 100, 1e-3),
        ("cosine", 3, 100, 1e-3),
        ("cosine", 11, 100, 1e-3),
        ("cosine", 0, 100, 1e-3),
        ("cosine", 10, 200, 1e-3),
        ("cosine", 10, 99, 1e-3),
        ("cosine", 10, 100, 2e-3),
    ],
)
def test_another_schedule_fails_the_trial(kind, warmup, num_steps, rate) -> None:
    settings = replace(SHORT, lr_scheduler_type="cosine", warmup_ratio=0.1)
    with pytest.raises(TrialFailed, match=r"the learning rate in step \d+ of 100 should be .* but is .*cosine"):
        check_schedule(read_back(schedule(kind, warmup, num_steps, rate), settings, 100), settings, 100)


def test_a_trial_compares_the_live_schedule(base, splits, monkeypatch) -> None:
    reports: list[EpochReport] = []
    run_trial(base, splits, replace(SHORT, max_steps=4), lambda report: reports.append(report) or False)
    rates = reports[-1].applied["learning_rate_at_step"]
    assert rates["0"] == 1e-3 and rates["2"] == pytest.approx(5e-4) and rates["3"] == pytest.approx(1.4645e-4, rel=1e-3)
    asked = engine_module.get_scheduler
    monkeypatch.setattr(engine_module, "get_scheduler", lambda kind, *given: asked("linear", *given))
    with pytest.raises(TrialFailed, match="lr_scheduler_type cosine"):
        run_trial(base, splits, replace(SHORT, max_steps=4), lambda report: False)


def test_steps_and_epochs_are_counted() -> None:
    live = SimpleNamespace(lr_scheduler=SimpleNamespace(last_epoch=6))
    by_epochs = replace(SHORT, max_steps=0, num_train_epochs=3)
    check_trained(live, by_epochs, 30, 3)  # two steps of 16 images an epoch
    check_trained(live, replace(SHORT, max_steps=6), 30, 3)
    check_trained(live, replace(SHORT, max_steps=6), 50, 2)  # four steps an epoch: the second is cut off
    with pytest.raises(TrialFailed, match="optimizer steps should be 9 but are 6"):
        check_trained(live, by_epochs, 40, 3)
    with pytest.raises(TrialFailed, match="epochs should be 3 but are 2"):
        check_trained(live, by_epochs, 30, 2)


# ------------------------------------------------------------------------------------------------ every setting

# Field -> (another value, the check that fails when the engine has the value of ENGINE instead, and its message).
# A space may search every field, so every field needs an entry.
READ_BACK: dict[str, tuple[Any, str]] = {
    "num_train_epochs": (2, "check_trained: optimizer steps should be"),
    "max_steps": (3, "check_trained: optimizer steps should be 3 but are 2"),
    "per_device_train_batch_size": (4, "check_applied: execution should be {'tokens': 0, 'images': 4"),
    "gradient_accumulation_steps": (4, "check_applied: global_batch_size should be 8 but is 16"),
    "learning_rate": (2e-3, "check_applied: learning_rate should be 0.002 but is 0.001"),
    "projector_learning_rate": (1e-2, "check_applied: projector_learning_rate should be 0.01 but is 0.001"),
    "vision_learning_rate": (1e-2, "check_applied: vision_learning_rate should be 0.01 but is 0.001"),
    "lr_scheduler_type": ("constant", "check_schedule: the learning rate in step"),
    "warmup_ratio": (0.5, "check_schedule: the learning rate in step"),
    "weight_decay": (0.5, "check_applied: weight_decay should be 0.5 but is 0.01"),
    "max_grad_norm": (0.5, "check_applied: max_grad_norm should be 0.5 but is 1.0"),
    "optim": ("adamw_8bit", "check_applied: optimizer_class should be 'AdamW8bit' but is 'AdamW'"),
    "gradient_checkpointing": (True, "check_applied: gradient_checkpointing should be True but is False"),
    "torch_compile": (True, "check_applied: torch_compile should be True but is False"),
    "use_lora": (False, "check_applied: use_lora should be False but is True"),
    "lora_r": (8, "check_applied: lora_r should be 8 but is 4"),
    "lora_alpha": (16, "check_applied: lora_alpha should be 16 but is 8"),
    "lora_dropout": (0.2, "check_applied: lora_dropout should be 0.2 but is 0.05"),
    "use_rslora": (True, "check_applied: use_rslora should be True but is False"),
    "use_dora": (True, "check_applied: use_dora should be True but is False"),
    "loraplus_lr_ratio": (4.0, "check_applied: loraplus_lr_ratio should be 4.0 but is 1.0"),
    "lora_target_modules": (("q_proj",), "wanted_modules: the adapter must be on the modules that the settings name"),
    "lora_exclude_patterns": (("layers.0.",), "wanted_modules: the adapter must be on the modules"),
    "train_projector": (False, "check_applied: train_projector should be False but is True"),
    "augment": ("none", "check_shown: images_shown should be {'itself': 32} but is {'itself': 7, 'light 1': "),
    "augment_variants": (8, "check_shown: images_shown should be {'itself': 8, 'light 2': "),
    "projector_lora": (True, "check_applied: projector_lora should be True but is False"),
    "train_vision": ("none", "check_applied: train_vision should be 'none' but is 'lora'"),
    "class_balanced_loss": (False, "check_applied: class_balanced_loss should be False but is True"),
    "zero_stage": (0, "check_applied: zero_stage should be 0 but is 1"),
    "offload_optimizer": (True, "check_applied: offload_optimizer should be True but is False"),
    "seed": (7, "check_applied: seed should be 7 but is 0"),
    # These three reach no engine. The loop itself uses them; test_options.py checks the files and entries.
    "logging_steps": (1, "loop"),
    "save_steps": (1, "loop"),
    "save_total_limit": (1, "loop"),
}
ENGINE = replace(SHORT, train_projector=True, train_vision="lora", augment="light")


def test_every_setting_is_read_back() -> None:
    assert READ_BACK.keys() == {field.name for field in fields(TrialSettings)}
    assert all(getattr(ENGINE, name) != other for name, (other, _) in READ_BACK.items())


@pytest.fixture(scope="module")
def live(base) -> Iterator[Any]:
    """The engine of a trial with the settings `ENGINE`, on a base of its own, with its two steps counted."""
    own = load_base(base.settings, base.device)
    with adapted(own, ENGINE) as model:
        engine = build_engine(own, model, ENGINE, torch.ones(3), 2, 1, wanted_execution(ENGINE, own.device))
        engine.lr_scheduler.last_epoch = 2
        yield engine
        engine.destroy()


@pytest.mark.parametrize("name", READ_BACK)
def test_a_setting_that_the_engine_does_not_have_fails_the_trial(base, live, splits, monkeypatch, name) -> None:
    other, noticed = READ_BACK[name]
    check, _, message = noticed.partition(": ")
    asked = replace(ENGINE, **{name: other} | ({"max_steps": 0} if name == "num_train_epochs" else {}))
    if check == "wanted_modules":
        monkeypatch.setattr(lora, "lora_config", lambda base, settings, config=lora.lora_config: config(base, ENGINE))
        own = load_base(base.settings, base.device)
        with pytest.raises(ValueError, match=message), adapted(own, asked):
            pass
        return
    some, order = replace(splits, train=splits.train[:1] * 32), epoch_order(32, 16, ENGINE.seed, 1)
    fed = read_shown(Counter(label_of(image) for (image,) in shown_images(some, ENGINE, 1)))
    checks = {
        "check_applied": lambda settings: check_applied(
            read_applied(live), settings, wanted_execution(settings, base.device)
        ),
        "check_schedule": lambda settings: check_schedule(read_back(live, settings, 2), settings, 2),
        "check_trained": lambda settings: check_trained(live, settings, 32, 1),
        "check_shown": lambda settings: check_shown(fed, settings, some, order, 1),
        "loop": lambda settings: None,
    }
    checks[check](ENGINE)
    with pytest.raises(TrialFailed, match=re.escape(message)) if message else nullcontext():
        checks[check](asked)


def test_an_adapter_or_projector_that_the_engine_lacks_fails_the_trial(base) -> None:
    lacking: list[tuple[str, Any, str]] = [
        ("train_projector", False, "True but is False"),
        ("use_lora", False, "True but is False"),
        ("train_vision", "none", "'lora' but is 'none'"),
    ]
    for name, value, message in lacking:
        other = replace(ENGINE, **{name: value})
        with adapted(base, other) as model:
            engine = build_engine(base, model, other, torch.ones(3), 2, 1)
            with pytest.raises(TrialFailed, match=f"{name} should be {message}"):
                check_applied(read_applied(engine), ENGINE)
            engine.destroy()


def test_without_a_closed_set_no_image_is_weighted(live) -> None:
    applied = read_applied(live) | {"class_balanced_loss": False}
    way = wanted_execution(ENGINE, torch.device("cpu"))
    check_applied(applied, ENGINE, way, closed_set=False)
    with pytest.raises(TrialFailed, match="class_balanced_loss should be False but is True"):
        check_applied(read_applied(live), ENGINE, way, closed_set=False)


# ------------------------------------------------------------------------------------------------ one layer, one group


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("lora_dropout", lambda layer, engine: setattr(layer.lora_dropout["default"], "p", 0.3)),
        ("lora_scaling", lambda layer, engine: layer.scaling.update(default=7.0)),
        ("weight_decay", lambda layer, engine: engine.optimizer.param_groups[-1].update(weight_decay=0.5)),
        ("max_grad_norm", lambda layer, engine: setattr(engine._config, "gradient_clipping", 9.0)),
        ("use_dora", lambda layer, engine: layer.use_dora.update(default=True)),
    ],
)
def test_one_value_that_differs_fails_the_trial(base, name, damage) -> None:
    with adapted(base, SHORT) as model:
        engine = build_engine(base, model, SHORT, torch.ones(3), 2, 1)
        check_applied(read_applied(engine), SHORT)
        damage(next(iter(lora.adapter_layers(model).values())), engine)
        with pytest.raises(TrialFailed, match=f"{name} should be"):
            check_applied(read_applied(engine), SHORT)
        engine.destroy()


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, NCCL version 2.27.3\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (dist.DistBackendError(NCCL.format("ncclUnhandledCudaError: Call to CUDA function failed.",
                                           "Failed to CUDA calloc async 2432 bytes")), True),
        (dist.DistBackendError(NCCL.format("ncclSystemError: System call (e.g. socket, malloc) or external library "
                                           "call failed or device error.", "Connection closed")), False),
        (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes"
                      " or `num_stages` may help."), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory_is_distinguished_from_other_errors(error, expected) -> None:
    assert is_out_of_memory(error) is expected
