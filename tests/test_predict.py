"""After training: predictions and merging, against the trial's own scores."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from train_fn.data.decision import softmax
from train_fn.data.samples import units_of
from train_fn.data.splits_file import save_splits
from train_fn.model.adapters import read_task
from train_fn.model.base import load_base
from train_fn.predict import InputError, main
from train_fn.predictor import Predictor
from train_fn.scoring.conformal import answer_set
from train_fn.scoring.fitting import fit_decision
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.loop import run_trial
from train_fn.trial.scoring import score_adapter

ROOT = Path(__file__).parents[1]
TRIAL = TrialSettings(
    num_train_epochs=1, lora_r=8, lora_alpha=8, learning_rate=1e-3, train_projector=True, projector_learning_rate=1e-3
)
FIXTURES = os.environ.get("HULUMED_FIXTURES", "")
BASES = ["nano", pytest.param("hulumed", marks=pytest.mark.skipif(not FIXTURES, reason="no HULUMED_FIXTURES"))]


def run(*argv: object) -> SimpleNamespace:
    """`train_fn.predict` in this process: as in one of its own, which `test_predictions_in_a_fresh_process` starts."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, argv)])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module", params=BASES)
def trained(request, base, splits, tmp_path_factory):
    """A base, its trained adapter on disk, and the scores of the test images with it."""
    output = tmp_path_factory.mktemp("trained")
    if request.param != "nano":
        base = load_base(ModelSettings(model=f"{FIXTURES}/checkpoint"), torch.device("cpu"))
    reports: list = []
    run_trial(base, splits, TRIAL, lambda report: reports.append(report) or False, output=output)
    adapter = output / "final_model"
    return request.param, base, adapter, score_adapter(base, splits, "test", 16, adapter)["scores"]


@pytest.mark.parametrize("trained", ["nano"], indirect=True)
def test_predictions_in_a_fresh_process(trained, splits) -> None:
    _, _, adapter, _ = trained
    argv = ["--adapter", str(adapter), splits.test[0].image]
    found = subprocess.run([sys.executable, "-m", "train_fn.predict", *argv], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout == run(*argv).stdout, found.stderr


def test_predictions_are_the_trials_scores(trained, splits, tmp_path) -> None:
    _, _, adapter, scores = trained
    found = run("--adapter", adapter, *[sample.image for sample in splits.test])
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["image"] for line in lines] == [sample.image for sample in splits.test]
    ours = np.array([list(line["probabilities"].values()) for line in lines])
    assert list(lines[0]["probabilities"]) == list(splits.candidates)
    assert np.allclose(ours, softmax(scores), atol=1e-6)
    assert all(line["label"] == splits.candidates[row.argmax()] for line, row in zip(lines, ours, strict=True))
    assert all(isinstance(line["generated"], str) for line in lines)


@pytest.mark.parametrize("trained", ["nano"], indirect=True)
def test_a_predictor_gives_the_trials_scores_for_paths_and_images_in_memory(trained, splits, tmp_path) -> None:
    _, _, adapter, scores = trained
    predictor = Predictor(adapter)
    paths = [sample.image for sample in splits.test]
    table = predictor(paths)
    assert list(table.columns) == ["image", "answer", *splits.candidates, "question"] and list(table["image"]) == paths
    assert np.allclose(table[list(splits.candidates)], softmax(scores), atol=1e-6)
    assert list(table["answer"]) == [splits.candidates[row.argmax()] for row in scores]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    mixed = predictor([Image.open(paths[0]), broken, Path(paths[1])], "Is there a mass?", generate=True)
    assert list(mixed["image"]) == ["image 0.png", str(broken), paths[1]] and set(mixed["question"]) == {
        "Is there a mass?"
    }
    assert mixed["answer"].isna().tolist() == [False, True, False] and "broken.png" in mixed["error"][1]
    assert all(isinstance(text, str) for text in mixed["generated"][[0, 2]])
    (tmp_path / "few").mkdir()
    copies = [shutil.copy(path, tmp_path / "few") for path in paths[:3]]
    few = predictor(tmp_path / "few")
    assert list(few["image"]) == sorted(copies) and set(few["answer"]) <= set(splits.candidates)
    for images in ([], [np.zeros((4, 4))], "nowhere.png"):
        with pytest.raises(InputError):
            predictor(images)
    for wrong in ({"dtype": "int3"}, {"batch_size": 0}, {"coverage": 2.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Predictor(adapter, **wrong)


def test_answers_are_decided_as_validation_has_taught(base, splits, tmp_path) -> None:
    asked = replace(splits, decide="sensitivity>=0.9", tasks=(replace(splits.tasks[0], positive="Malignant"),))
    output = tmp_path / "trial"
    run_trial(base, asked, TRIAL, lambda report: False, output=output)
    adapter, scores = output / "final_model", {}
    for part in ("validation", "test"):
        scores[part] = score_adapter(base, splits, part, 16, adapter)["scores"]
    labels = np.array([sample.label for sample in splits.validation])
    decision = fit_decision(scores["validation"], labels, asked.decide, 2, units_of(splits.validation))
    assert read_task(adapter).decisions == {"": decision} and decision.threshold and decision.scale != 1
    wanted = decision.probabilities(scores["test"])
    answers = [splits.candidates[index] for index in decision.answers(wanted)]
    assert answers != [splits.candidates[index] for index in scores["test"].argmax(1)]
    images = [sample.image for sample in splits.test]
    lines = [json.loads(line) for line in run("--adapter", adapter, *images).stdout.splitlines()]
    assert [line["answer"] for line in lines] == [line["label"] for line in lines] == answers
    assert np.allclose([[*line["probabilities"].values()] for line in lines], wanted, atol=1e-6)
    raw = [json.loads(line) for line in run("--adapter", adapter, "--raw", *images).stdout.splitlines()]
    assert [line["answer"] for line in raw] == [splits.candidates[index] for index in scores["test"].argmax(1)]
    assert np.allclose([[*line["probabilities"].values()] for line in raw], softmax(scores["test"]), atol=1e-6)
    sets = [json.loads(line) for line in run("--adapter", adapter, "--coverage", "0.8", *images).stdout.splitlines()]
    conformal = read_task(adapter).conformal[""]
    assert [line["answers"] for line in sets] == [
        [splits.candidates[index] for index in answer_set(row, conformal, 0.8)] for row in wanted
    ]
    refused = run("--adapter", adapter, "--raw", "--coverage", "0.8", images[0])
    assert refused.returncode == 2 and "--coverage" in refused.stderr


def test_merged_model_answers_as_base_and_adapter(trained, splits, tmp_path) -> None:
    _, _, adapter, scores = trained
    merged = tmp_path / "merged"
    found = run("--adapter", adapter, "--merge-into", merged, "--dtype", "float32")
    assert found.returncode == 0, found.stderr
    whole = load_base(ModelSettings(model=str(merged)), torch.device("cpu"))
    from train_fn.scoring.evaluation import predict

    ours = predict(whole, splits.test, splits, 16)["scores"]
    assert np.allclose(ours, scores, atol=1e-4)
    again = run("--adapter", adapter, "--merge-into", merged)
    assert again.returncode == 2 and "--merge-into" in again.stderr


def test_hulumed_exports_carry_the_original_names(trained) -> None:
    kind, base, adapter, _ = trained
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    if kind == "nano":
        assert config["modules_to_save"] == ["projector"]
        assert any(name.startswith("base_model.model.model.language_model.layers.0") for name in tensors)
        return
    assert config["modules_to_save"] == ["mm_projector"]
    heads = {name.split(".self_attn")[0].split(".mlp")[0] for name in tensors if ".layers." in name}
    assert heads == {
        f"base_model.model.model.layers.{n}" for n in range(base.model.config.text_config.num_hidden_layers)
    }
    assert sum("base_model.model.model.mm_projector.readout." in name for name in tensors) == 4
    assert not any("language_model" in name or "vision" in name for name in tensors)


def test_qlora_merges_onto_the_unquantised_base(base, splits, tmp_path) -> None:
    quantised = load_base(ModelSettings(use_qlora=True), torch.device("cpu"))
    run_trial(quantised, splits, TRIAL, lambda report: False, output=tmp_path / "trial")
    adapter = tmp_path / "trial" / "final_model"
    scores = score_adapter(quantised, splits, "test", 16, adapter)["scores"]
    found = run("--adapter", adapter, "--merge-into", tmp_path / "merged", "--dtype", "float32")
    assert found.returncode == 0, found.stderr
    from train_fn.scoring.evaluation import predict

    whole = load_base(ModelSettings(model=str(tmp_path / "merged")), torch.device("cpu"))
    merged = predict(whole, splits.test, splits, 16)["scores"]
    plain = score_adapter(base, splits, "test", 16, adapter)["scores"]
    assert np.allclose(merged, plain, atol=1e-4)  # exactly the adapter on the unquantised base,
    assert not np.allclose(merged, scores, atol=1e-4)  # whose weights differ from those of the training
    assert np.abs(softmax(merged) - softmax(scores)).max() < 0.2


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--adapter", "nowhere", "x.png"], "task.json"),
        (["--adapter", "ADAPTER"], "nothing to predict"),
        (["--adapter", "ADAPTER", "nowhere.png"], "nowhere.png"),
        (["--adapter", "ADAPTER", "tests"], "must hold images"),
        (["--adapter", "ADAPTER", "pyproject.toml"], "decodable"),
        (["--adapter", "ADAPTER", "--model", "nowhere", "--merge-into", "nowhere/merged"], "config.json"),
    ],
)
def test_bad_input(trained, argv, word) -> None:
    found = run(*[str(trained[2]) if word == "ADAPTER" else word for word in argv])
    assert found.returncode == 2 and word in found.stderr and "Traceback" not in found.stderr


@pytest.mark.campaign
def test_torchrun_without_ray(splits, tmp_path) -> None:
    save_splits(splits, tmp_path / "splits.json")
    wanted = {
        "splits": str(tmp_path / "splits.json"),
        "output": str(tmp_path / "out"),
        "trial": {"num_train_epochs": 1, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "lora_dropout": 0.0},
    }
    (tmp_path / "trial.json").write_text(json.dumps(wanted))
    losses = []
    for launcher in (["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]):
        command = [sys.executable, *launcher, "train_fn.main", str(tmp_path / "trial.json")]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        (line,) = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
        losses.append(line["loss"])
        assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").is_file()
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
