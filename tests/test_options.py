"""Every option of the fine-tuning guide, and those beyond it, on the nano base with a real engine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport
from train_fn.model.base import base_gib, load_base
from train_fn.scoring.evaluation import generate
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import load_adapter
from train_fn.trial.applied import TrialFailed, check_applied, read_applied
from train_fn.trial.compat_bitsandbytes import recycling
from train_fn.trial.compiled import is_compiled
from train_fn.trial.engine import build_engine
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted
from train_fn.trial.scoring import score_adapter

SHORT = TrialSettings(num_train_epochs=1, lora_r=8, lora_alpha=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def splits(splits) -> Splits:
    """Fewer images, for trials of seconds."""
    return replace(splits, train=splits.train[:16], validation=splits.validation[:8])


def train(base, splits, settings: TrialSettings, output=None) -> EpochReport:
    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: reports.append(report) or False, output=output)
    return reports[-1]


@pytest.mark.parametrize(
    ("options", "applied"),
    [
        ({"optim": "adamw_8bit"}, {"optimizer_class": "AdamW8bit"}),
        ({"optim": "paged_adamw_8bit"}, {"optimizer_class": "PagedAdamW8bit"}),
        ({"use_rslora": True}, {"lora_scaling": 8**0.5}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"loraplus_lr_ratio": 16.0}, {"loraplus_lr_ratio": 16.0}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"zero_stage": 0}, {"zero_stage": 0}),
        ({"zero_stage": 1}, {"zero_stage": 1}),
        ({"offload_optimizer": True}, {"offload_optimizer": True}),
        ({"lora_target_modules": ("q_proj", "v_proj")}, {"num_adapted_modules": 8}),
        ({"lora_exclude_patterns": ("vision", "layers.0.", "layers.1.")}, {"num_adapted_modules": 14}),
        ({"use_lora": False, "train_projector": True}, {"use_lora": False, "train_projector": True}),
        ({"max_grad_norm": 0.5, "weight_decay": 0.1}, {"max_grad_norm": 0.5, "weight_decay": 0.1}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_option_reaches_the_engine_and_the_adapter_comes_back(base, splits, tmp_path, options, applied) -> None:
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    report = train(base, splits, replace(SHORT, **options), tmp_path)
    assert {name: report.applied[name] for name in applied} == pytest.approx(applied)
    predicted = score_adapter(base, splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(report.metrics["loss"], abs=1e-6)
    assert all(torch.equal(before[name], parameter) for name, parameter in base.model.named_parameters())


def test_gradient_checkpointing_does_not_change_the_numbers(base, splits) -> None:
    plain = train(base, splits, replace(SHORT, lora_dropout=0.0))
    saving = train(base, splits, replace(SHORT, lora_dropout=0.0, gradient_checkpointing=True))
    assert saving.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-5)


def test_compiled_layers_train_the_same(base, splits, monkeypatch) -> None:
    """Without the inductor, whose compilation takes half a minute. The vision tower's layers are trained, too, and are
    not compiled."""
    from torch._dynamo.utils import counters

    asked = replace(SHORT, lora_dropout=0.0, train_vision="lora")
    plain = train(base, splits, asked)
    monkeypatch.setattr("train_fn.trial.compiled.BACKEND", "aot_eager")
    monkeypatch.setattr(base, "compiler", None)
    counters.clear()
    compiled = train(base, splits, replace(asked, torch_compile=True, gradient_checkpointing=True))
    assert compiled.applied["torch_compile"] and not plain.applied["torch_compile"]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-4)
    assert not any(map(is_compiled, base.model.modules()))


@pytest.mark.parametrize("qlora", [False, True])
@pytest.mark.parametrize("options", [{}, {"train_projector": True, "gradient_checkpointing": True}, {"use_dora": True}])
def test_a_bfloat16_base_trains_scores_and_generates(base, splits, tmp_path, qlora, options) -> None:
    bf16 = load_base(ModelSettings(dtype="bfloat16", use_qlora=qlora), torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in bf16.model.named_parameters()}
    kept: set[torch.dtype] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (8,):  # the output of an adapter's A
            kept.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        report = train(bf16, splits, replace(SHORT, **options), tmp_path)
    assert report.applied["trainable_dtype"] == "float32" and report.applied["base_dtype"] == "bfloat16"
    assert "gradient_checkpointing" in options or (torch.float32 in kept) == bool(options)
    predicted = score_adapter(bf16, splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(report.metrics["loss"], abs=1e-3)
    with load_adapter(bf16, tmp_path / "final_model"):
        assert generate(bf16, splits.validation[:1], 4) != [""]
    after = dict(bf16.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_paged_memory_of_a_finished_optimizer_is_reused(monkeypatch) -> None:
    """The bookkeeping alone: a CPU has no paged memory."""
    import bitsandbytes.functional
    import bitsandbytes.optim

    def get_paged(*shape, dtype, device):
        buffer = torch.ones(shape, dtype=dtype)
        buffer.is_paged, buffer.page_deviceid = True, 0
        return buffer

    manager = bitsandbytes.functional.GlobalPageManager.get_instance()
    monkeypatch.setattr(manager, "paged_tensors", [])
    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda buffer, value: buffer.fill_(value))
    optimizer_class = recycling(bitsandbytes.optim.PagedAdamW8bit)
    weight = [torch.nn.Parameter(torch.zeros(1))]
    for size, held in ((200_000, 2), (150_000, 2), (200_000, 2), (300_000, 4), (300_000, 4)):
        optimizer = optimizer_class(weight)
        p = torch.empty(size, device="meta")
        states = [optimizer.get_state_buffer(p, torch.uint8) for _ in range(2)]
        assert all(state.shape == (size,) and not state.any() and state.is_paged for state in states)
        states[0].fill_(1)
        assert not states[1].any() and len(manager.paged_tensors) == held


def test_float16_without_zero_is_refused(base, splits) -> None:
    half = load_base(ModelSettings(dtype="float16"), torch.device("cpu"))
    with pytest.raises(TrialFailed, match="--zero-stage"):
        train(half, splits, replace(SHORT, zero_stage=0))


def test_offloading_does_not_change_the_numbers(base, splits) -> None:
    plain = train(base, splits, SHORT)
    offloaded = train(base, splits, replace(SHORT, offload_optimizer=True))
    assert offloaded.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("cosine", [0.5, 1.0, 0.853553, 0.5, 0.146447]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0] * 5),
        ("constant_with_warmup", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("polynomial", [0.5, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules_give_the_expected_rates(base, kind, rates) -> None:
    settings = replace(SHORT, lr_scheduler_type=kind, warmup_ratio=2 / 6, learning_rate=1.0)
    with adapted(base, settings) as model:
        engine = build_engine(base, model, settings, torch.ones(3), 6, 1)
        seen = []
        for _ in rates:
            engine.lr_scheduler.step()
            seen.append(engine.get_lr()[0])
        engine.destroy()
    assert seen == pytest.approx(rates, abs=1e-4)


def test_max_steps_checkpoints_and_history_are_as_asked(base, splits, tmp_path) -> None:
    settings = replace(SHORT, max_steps=5, logging_steps=2, save_steps=1, save_total_limit=2)
    report = train(base, splits, settings, tmp_path)
    assert report.finished and report.step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-4", "checkpoint-5", "final_model", "trainer_state.json", "validation_predictions.jsonl",
    ]  # fmt: skip
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4]
    assert all(entry["learning_rate"] < 1e-3 for entry in state["log_history"] if "loss" in entry)
    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= names
    last = score_adapter(base, splits, "validation", 16, tmp_path / "checkpoint-5")
    assert last["losses"].mean() == pytest.approx(report.metrics["loss"], abs=1e-6)
    train(base, splits, settings, tmp_path)  # a second attempt removes the files of the first
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_wrong_optimizer_fails_the_trial(base) -> None:
    with adapted(base, SHORT) as model:
        engine = build_engine(base, model, SHORT, torch.ones(3), 4, 1)
        applied = read_applied(engine)
        engine.destroy()
    with pytest.raises(TrialFailed, match="optimizer_class should be 'AdamW8bit' but is 'AdamW'"):
        check_applied(applied, replace(SHORT, optim="adamw_8bit"))


# ------------------------------------------------------------------------------------------------ QLoRA


@pytest.fixture(scope="module")
def quantised(base):
    """The nano base in 4 bit. `base` is only needed for its process group."""
    return load_base(ModelSettings(use_qlora=True), torch.device("cpu"))


def test_only_the_language_model_is_in_4_bit(quantised) -> None:
    import bitsandbytes as bnb

    four_bit = {n for n, m in quantised.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(four_bit) == 4 * 7 and all(name.startswith("model.language_model.layers") for name in four_bit)
    state = quantised.model.get_submodule(sorted(four_bit)[0]).weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    held, whole = base_gib(quantised.model)
    linear = 4 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384)
    assert whole == pytest.approx(1_722_368 * 2 / 2**30)
    # Weights in 4 bit take half a byte and the quantisation constants, all others are float32.
    assert held == pytest.approx(((1_722_368 - linear) * 4 + linear / 2) / 2**30, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_qlora_trains_at_every_stage_and_comes_back(quantised, splits, tmp_path, stage) -> None:
    before = {name: parameter.clone() for name, parameter in quantised.model.named_parameters()}
    settings = replace(SHORT, zero_stage=stage, num_train_epochs=2, train_projector=True, gradient_checkpointing=True)
    reports: list[EpochReport] = []
    run_trial(quantised, splits, settings, lambda r: reports.append(r) or False, output=tmp_path)
    assert reports[1].metrics["train_loss"] < reports[0].metrics["train_loss"]
    predicted = score_adapter(quantised, splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(reports[1].metrics["loss"], abs=1e-6)
    assert all(torch.equal(before[name], parameter) for name, parameter in quantised.model.named_parameters())
