"""The model card of a winner: what PEFT's and the hub's tools read, and the numbers of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_report import HOSTILE, make_study

from train_fn.model.adapters import WEIGHTS
from tune.results.card import write_card
from tune.results.summary import Summary, format_score

TRIED = ["COMPLETE", "STOPPED", "COMPLETE"]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None}
DECISION = {
    "aim": "macro_f1",
    "scale": 2.0,
    "offsets": [0.25, -0.25],
    "rule": [-0.5, 0.5],
    "positive": None,
    "threshold": None,
}


def write_adapter(folder: Path, decision: dict[str, Any] | None = None, **changes: Any) -> None:
    """An adapter of a tiny rank, as far as a card reads it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    name = "model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"base_model.model.{name}.lora_{letter}.weight": torch.zeros(4, 4) for letter in "AB"}
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"target_modules": [name]} | changes))
    answers = ["Normal", "Malignant"]
    task = {"name": "", "kind": "closed", "candidates": answers, "separator": "", "questions": ["?"]}
    content = {"model": {}, "question": "?", "candidates": answers, "tasks": [task | {"decision": decision}]}
    (folder / "task.json").write_text(json.dumps(content))


@pytest.fixture
def study(tmp_path) -> tuple[dict[str, Any], Path]:
    content, directory = make_study(tmp_path, TRIED)
    write_adapter(directory / "best_adapter", DECISION)
    plan = {"base_hash": "b" * 64, "tasks": [{"name": "", "kind": "closed"}]}
    return content | plan, directory


def test_the_card_is_valid_and_has_the_reports_numbers(study) -> None:
    content, directory = study
    card = ModelCard.load(write_card(content, directory))
    matter = card.data.to_dict()
    assert matter["base_model"] == "nano" and matter["library_name"] == "peft"
    assert matter["pipeline_tag"] == "image-text-to-text" and "lora" in matter["tags"]
    summary = Summary(content, directory)
    assert summary.headline in card.text and summary.explanation in card.text and content["test_note"] in card.text
    for who in ("winner", "guide", "difference"):
        assert format_score(content["test"][who]["auroc"]) in card.text
    assert "b" * 64 in card.text and "d" * 64 in card.text
    assert "test: 10 samples (6 Normal, 4 Malignant)" in card.text
    assert "softmax of 2.000 x log-probability, plus Normal +0.250, Malignant -0.250" in card.text
    assert "for macro_f1: the largest log-probability after adding Normal -0.500, Malignant +0.500" in card.text
    assert "vllm serve" in card.text and "--merge-into merged" in card.text
    assert str(directory) not in card.text
    assert 'model = PeftModel.from_pretrained(base, "best_adapter").eval()' in card.text


def test_a_strangers_names_are_text(study) -> None:
    content, directory = study
    content["notes"], content["name"] = [f"a | b {HOSTILE}"], HOSTILE
    card = write_card(content, directory).read_text()
    assert "<img" not in card and "&lt;img src=x" in card and r"a \| b" in card


def test_a_base_of_the_hub_is_named_with_its_revision(study) -> None:
    content, directory = study
    content["settings"]["model"]["model"] = f"lab/base@{'a' * 40}"
    card = ModelCard.load(write_card(content, directory))
    assert card.data.base_model == "lab/base"
    assert f'from_pretrained("lab/base", dtype="float32", revision="{"a" * 40}")' in card.text
    assert "--check-serving" in card.text  # the base is not on this machine


def test_a_threshold_and_no_decision_are_described(study) -> None:
    content, directory = study
    threshold = DECISION | {"aim": "sensitivity>=0.9", "rule": [], "positive": 1, "threshold": 0.25}
    write_adapter(directory / "best_adapter", threshold)
    assert "Malignant from a probability of 0.250 on, else" in write_card(content, directory).read_text()
    write_adapter(directory / "best_adapter")
    assert "The most probable candidate is the answer" in write_card(content, directory).read_text()


def test_a_study_without_a_test_says_so(tmp_path) -> None:
    content, directory = make_study(tmp_path, TRIED, tested=False)
    write_adapter(directory / "best_adapter")
    text = write_card(content | {"base_hash": "b" * 64, "tasks": []}, directory).read_text()
    assert "The test images were not scored" in text and "| test |" not in text
