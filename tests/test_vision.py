"""A vision tower and a projector that are trained by adapters: what is trained, and at which rates; no cached features;
an export for plain PEFT, under the original names.

Every family's own layers: tests/test_families.py. The two bases here have features that are cached while the tower is
frozen.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from train_fn.data.images import read_image
from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport
from train_fn.model import hulumed
from train_fn.model.base import Base, load_base
from train_fn.model.batches import answer_losses, collate
from train_fn.model.checkpoint import resolve_model
from train_fn.predict import main as predict_main
from train_fn.scoring.evaluation import score_candidates
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import load_adapter
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted, parameter_groups
from train_fn.trial.memory import measure
from train_fn.trial.pristine import changes, pristine
from train_fn.trial.scoring import score_adapter

FIXTURES = os.environ.get("HULUMED_FIXTURES", "")
NANO = ModelSettings()
HULUMED = ModelSettings(model=f"{FIXTURES}/checkpoint")
BASES = [
    pytest.param(NANO, id="nano"),
    pytest.param(HULUMED, id="hulumed", marks=pytest.mark.skipif(not FIXTURES, reason="no HULUMED_FIXTURES")),
]
CPU = torch.device("cpu")
# Rates at which two steps move the scores by much more than rounding does.
TRIAL = TrialSettings(
    max_steps=2, lora_r=4, lora_alpha=8, learning_rate=1e-3, gradient_accumulation_steps=4, train_vision="lora",
    vision_learning_rate=2e-2, train_projector=True, projector_lora=True, projector_learning_rate=3e-2,
)  # fmt: skip
FROZEN = replace(TRIAL, train_vision="none", vision_learning_rate=None)
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def train(base: Base, splits: Splits, settings: TrialSettings, output: Path | None = None) -> EpochReport:
    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: reports.append(report) or False, output=output)
    return reports[-1]


def vision_layers(base: Base) -> set[str]:
    count = base.model.config.vision_config.num_hidden_layers
    return {f"model.vision_model.encoder.layers.{n}.{name}" for n in range(count) for name in LAYERS}


@dataclass
class Trained:
    """A base, and a trial with an adapter on every part."""

    base: Base
    report: EpochReport
    adapter: Path
    passes: list[bool]
    """For each forward pass of the tower in this trial: whether it kept anything for a backward pass."""
    before: dict[str, Any]
    """Metrics of a trial with a frozen tower, trained before it on the same base."""


@pytest.fixture(scope="module")
def splits(splits: Splits) -> Splits:
    """A few images, for trials of a second."""
    return replace(splits, train=splits.train[:16], validation=splits.validation[:6], test=splits.test[:6])


@pytest.fixture(scope="module", params=BASES)
def trained(request, base, splits, tmp_path_factory) -> Trained:
    own = load_base(request.param, CPU)
    passes: list[bool] = []
    tower = own.model.get_submodule(own.vision_tower)
    tower.register_forward_hook(lambda module, given, output: passes.append(output.last_hidden_state.requires_grad))
    before = train(own, splits, FROZEN).metrics
    passes.clear()
    output = tmp_path_factory.mktemp("trained")
    report = train(own, splits, TRIAL, output)
    return Trained(own, report, output / "final_model", passes[:], before)


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("settings", BASES)
def test_the_trained_names_and_their_rates(settings) -> None:
    own = load_base(settings, CPU)
    asked = replace(TRIAL, loraplus_lr_ratio=4.0)
    with adapted(own, asked) as model:
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = {group["name"]: group for group in parameter_groups(own, model, asked)}
    parts = {
        "vision": vision_layers(own),
        "projector_lora": {"model.projector.readout.0", "model.projector.readout.2"},
        "adapter": {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in names if "language_model" in n},
    }
    assert len(parts["adapter"]) == own.model.config.text_config.num_hidden_layers * 7
    rates = {"adapter": 1e-3, "vision": 2e-2, "projector_lora": 3e-2}
    for group, layers in parts.items():
        for side, its, ratio in (("A", group, 1), ("B", f"{group}_b", 4)):
            wanted = {id(names.pop(f"base_model.model.{layer}.lora_{side}.default.weight")) for layer in layers}
            assert wanted == {id(parameter) for parameter in groups[its]["params"]}
            assert groups[its]["lr"] == pytest.approx(rates[group] * ratio)
    assert not names and len(groups) == 6


@pytest.mark.parametrize("settings", BASES)
def test_only_the_tower(settings) -> None:
    own = load_base(settings, CPU)
    with adapted(own, replace(TRIAL, use_lora=False, train_projector=False, projector_lora=False)) as model:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.{layer}.lora_{s}.default.weight" for layer in vision_layers(own) for s in "AB"}


def test_what_the_engine_applies_is_reported(trained) -> None:
    applied, model = trained.report.applied, trained.base.model.config
    assert (applied["train_vision"], applied["projector_lora"], applied["train_projector"]) == ("lora", True, True)
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 2e-2, "projector_learning_rate": 3e-2}
    assert {name: applied[name] for name in rates} == rates
    assert applied["adapted_parts"] == {
        "language_model": 7 * model.text_config.num_hidden_layers,
        "vision_tower": 6 * model.vision_config.num_hidden_layers,
        "projector": 2,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_vision": "full"}, "`train_vision` must be one of none, lora, but got 'full'"),
        ({"vision_learning_rate": 1e-4}, "`vision_learning_rate` needs a trained vision tower"),
        ({"projector_lora": True}, "`projector_lora` needs a trained projector"),
        ({"use_lora": False}, "`use_lora` leaves nothing to train, but got False: add --train-projector or"),
    ],
)
def test_a_setting_without_effect_is_refused(options, message) -> None:
    (problem,) = TrialSettings(**options).problems()
    assert problem.startswith(message)
    assert TrialSettings(use_lora=False, train_vision="lora", vision_learning_rate=1e-4).problems() == []


# ------------------------------------------------------------------------------------------------ no cached features


def test_the_tower_runs_in_every_forward_pass(trained) -> None:
    assert trained.passes == [True, True, False], "two steps of a micro-batch each, and the evaluation"


def test_a_frozen_tower_afterwards_has_its_own_features(trained, splits) -> None:
    """The trial leaves nothing behind: neither on the base, nor under the key of the frozen tower's features."""
    assert not changes(trained.base, pristine(trained.base))
    assert train(trained.base, splits, FROZEN).metrics == trained.before
    assert train(load_base(trained.base.settings, CPU), splits, FROZEN).metrics == trained.before


def test_the_same_trial_has_the_same_numbers(trained, splits) -> None:
    assert train(load_base(trained.base.settings, CPU), splits, TRIAL).metrics == trained.report.metrics
    assert trained.report.metrics != trained.before


def test_a_projector_adapter_alone_keeps_the_features(splits) -> None:
    own = load_base(NANO, CPU)
    train(own, splits, FROZEN)
    with adapted(own, FROZEN):
        assert own.takes_features and "vision_features" in collate(own, splits.train[:1], with_answers=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_forward_pass_is_that_of_cached_features(splits, packed) -> None:
    """Before its first step an adapter changes nothing."""
    own = load_base(NANO, CPU)
    samples = splits.train[:3]
    wanted = answer_losses(own, collate(own, samples, with_answers=True))
    with adapted(own, replace(TRIAL, lora_dropout=0.0)):
        batch = collate(own, samples, with_answers=True, packed=packed)
        assert "vision_features" not in batch
        assert torch.allclose(answer_losses(own, batch), wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the export


def original_tree(model: Any) -> torch.nn.Module:
    """The modules of a Hulu-Med model under the names of the original implementation."""
    inner, tree = model.model, torch.nn.Module()
    tree.model = torch.nn.Module()
    tree.model.vision_encoder, tree.model.mm_projector = inner.vision_model, inner.projector
    for name in ("embed_tokens", "layers", "norm"):
        setattr(tree.model, name, getattr(inner.language_model, name))
    tree.lm_head, tree.config = model.lm_head, model.config
    tree.prepare_inputs_for_generation = None  # PEFT keeps it
    return tree


def test_the_saved_adapter_has_the_trials_scores(trained, splits) -> None:
    predicted = score_adapter(trained.base, splits, "validation", 16, trained.adapter)
    assert predicted["losses"].mean() == pytest.approx(trained.report.metrics["loss"], abs=1e-6)
    with load_adapter(trained.base, trained.adapter):
        assert not trained.base.takes_features
    tower_off = {
        n: t * ("vision" not in n) for n, t in load_file(trained.adapter / "adapter_model.safetensors").items()
    }
    assert sum(not tensor.any() for tensor in tower_off.values()) == 2 * len(vision_layers(trained.base))


def test_plain_peft_loads_it_with_the_same_scores(trained, splits) -> None:
    """By the names on disk, which for a Hulu-Med base are those of the original implementation."""
    own, samples = load_base(trained.base.settings, CPU), splits.validation
    untouched = score_candidates(own, samples, splits.candidates)
    tree = original_tree(own.model) if own.hulumed else own.model
    assert own.hulumed == any("vision_encoder" in name for name, _ in tree.named_modules())
    peft = PeftModel.from_pretrained(tree, trained.adapter).eval()
    saved = load_file(trained.adapter / "adapter_model.safetensors")
    loaded = {n.replace(".default.", "."): p for n, p in peft.named_parameters() if ".lora_" in n}
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert json.loads((trained.adapter / "adapter_config.json").read_text())["modules_to_save"] is None
    scores = score_candidates(own, samples, splits.candidates)
    wanted = score_adapter(trained.base, splits, "validation", 16, trained.adapter)["scores"]
    assert np.allclose(scores, wanted, atol=1e-5)
    assert (scores - untouched).abs().max() > 0.01


def test_peft_alone_computes_the_same_losses(base, splits, tmp_path) -> None:
    """With transformers' own model and processor."""
    train(base, splits, TRIAL, tmp_path)
    adapter = tmp_path / "final_model"
    plain = AutoModelForImageTextToText.from_pretrained(resolve_model("nano"), dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    sample = splits.validation[0]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
    prompt = base.processor.apply_chat_template([turn], add_generation_prompt=True)
    text = prompt + sample.answer + "<|im_end|>"
    inputs = base.processor(images=[read_image(sample.image)], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[-3:-1], inputs["input_ids"][0, -2:])
    ours = score_adapter(base, splits, "validation", 16, adapter)["losses"][0]
    assert loss.item() == pytest.approx(ours, abs=1e-4)


def test_predict_and_a_merged_model_use_the_trained_tower(trained, splits, tmp_path, capsys) -> None:
    wanted = score_adapter(trained.base, splits, "test", 16, trained.adapter)["scores"]
    assert predict_main(["--adapter", str(trained.adapter), "--raw", *(sample.image for sample in splits.test)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = np.log([list(line["probabilities"].values()) for line in lines])
    assert np.allclose(found, torch.tensor(wanted).log_softmax(-1), atol=1e-5)
    merged = tmp_path / "merged"
    assert predict_main(["--adapter", str(trained.adapter), "--merge-into", str(merged), "--dtype", "float32"]) == 0
    whole = load_base(ModelSettings(model=str(merged)), CPU)
    assert whole.takes_features and np.allclose(
        score_candidates(whole, splits.test, splits.candidates), wanted, atol=1e-4
    )
    if trained.base.hulumed:
        assert (
            load_file(merged / "model.safetensors").keys()
            == load_file(Path(HULUMED.model) / "model.safetensors").keys()
        )
        assert hulumed.is_hulumed(merged)


# ------------------------------------------------------------------------------------------------ memory and formats


def saved_by_tower(base: Base, splits: Splits, settings: TrialSettings) -> float:
    """Bytes that the tower keeps for the backward pass, beside weights, for each token of the language model."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with adapted(base, settings) as model:
        model.train()
        if settings.gradient_checkpointing:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        inputs = collate(base, splits.train[:2], with_answers=True)["tower_inputs"]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = base.model.get_submodule(base.vision_tower)(**inputs).last_hidden_state
        assert features.requires_grad
    return sum(size for address, size in saved.items() if address not in weights) / len(features)


@pytest.mark.parametrize("settings", BASES)
def test_the_memory_model_counts_the_towers_activations(settings, splits) -> None:
    own = load_base(settings, CPU)
    sizes, frozen = measure(settings, TRIAL, torch.float32), measure(settings, FROZEN, torch.float32)
    real = saved_by_tower(own, splits, TRIAL)
    print(f"the tower keeps {sizes.tower:.0f} bytes a token by its shapes, {real:.0f} really")
    assert real < sizes.tower < 2 * real
    assert (
        saved_by_tower(own, splits, replace(TRIAL, gradient_checkpointing=True))
        < sizes.tower_checkpointed
        < sizes.tower
    )
    assert frozen.tower == 0 and sizes.activations == frozen.activations and sizes.trained > frozen.trained


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_4_bit_language_model_beside_a_trained_tower(base, splits, tmp_path, options) -> None:
    own = load_base(ModelSettings(dtype="bfloat16", use_qlora=True), CPU)
    tower = own.model.get_submodule(own.vision_tower)
    assert {type(module) for module in tower.modules() if hasattr(module, "in_features")} == {torch.nn.Linear}
    report = train(own, splits, replace(TRIAL, **options), tmp_path)
    assert (report.applied["trainable_dtype"], report.applied["base_dtype"]) == ("float32", "bfloat16")
    predicted = score_adapter(own, splits, "validation", 16, tmp_path / "final_model")
    assert predicted["losses"].mean() == pytest.approx(report.metrics["loss"], abs=1e-3)
