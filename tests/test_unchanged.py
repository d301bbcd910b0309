"""Images and base files are compared with those that the driver saw, and a message names the file that differs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train_fn.data.samples import Sample, Splits
from train_fn.model.batches import BatchFailed, collate
from train_fn.model.checkpoint import base_hash
from train_fn.model.unchanged import Inputs, data_hash
from train_fn.nano import CHECKPOINT
from train_fn.settings import ModelSettings
from train_fn.support.storage import Storage
from train_fn.worker import LaneConfig, check_node

REMEDY = "must stay as the study was begun with, but has changed: put it back"


@pytest.fixture
def study(tmp_path: Path, splits) -> tuple[Path, Splits, Inputs]:
    """A base and six images, with their state on the driver."""
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    samples = []
    for number, sample in enumerate(splits.train[:6]):
        image = tmp_path / f"{number}.png"
        shutil.copyfile(sample.image, image)
        os.utime(image, ns=(10**18, 10**18))
        samples.append(replace(sample, images=(str(image),)))
    own = Splits(tuple(samples[:2]), tuple(samples[2:4]), tuple(samples[4:]), splits.tasks)
    return model, own, Inputs.seen(own, model, data_hash(own), base_hash(model))


def test_nothing_has_changed(study, monkeypatch) -> None:
    model, own, inputs = study
    monkeypatch.setattr("train_fn.model.unchanged.data_hash", lambda _: pytest.fail("sizes and times say enough"))
    assert inputs.changed_base(model) == "" and inputs.changed_images(own) == ""


@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize("damage", ["replaced", "replaced at equal size", "gone", "empty"])
def test_a_changed_image_is_named(study, number, damage) -> None:
    _, own, inputs = study
    image = Path((*own.train, *own.validation, *own.test)[number].image)
    content = image.read_bytes()
    if damage == "gone":
        image.unlink()
    elif damage == "empty":
        image.write_bytes(b"")
    else:
        image.write_bytes(content[:-1] + b"x" + (b"y" if damage == "replaced" else b""))
    assert inputs.changed_images(own).startswith(f"{image} {REMEDY}")


def test_an_image_that_was_only_touched_or_copied_has_not_changed(study, monkeypatch) -> None:
    _, own, inputs = study
    os.utime(own.train[0].image)
    aside = Path(own.test[0].image).with_suffix(".copy")
    shutil.copyfile(own.test[0].image, aside)
    aside.replace(own.test[0].image)
    assert inputs.changed_images(own) == ""
    monkeypatch.setattr("train_fn.model.unchanged.data_hash", lambda _: pytest.fail("that was compared before"))
    assert inputs.changed_images(own) == ""


def test_several_images_are_counted(study) -> None:
    _, own, inputs = study
    for sample in own.train:
        Path(sample.image).write_bytes(b"other")
    assert f"{own.train[0].image} (and 1 more images) {REMEDY}" in inputs.changed_images(own)


def change_config(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    return "config.json"


def change_weights(model: Path) -> str:
    path = next(model.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


def change_template(model: Path) -> str:
    path = model / "chat_template.jinja"
    path.write_text("{{ messages }}")
    return path.name


def remove_a_file(model: Path) -> str:
    (model / "preprocessor_config.json").unlink(missing_ok=True)
    path = sorted(model.glob("*.json"))[-1]
    path.unlink()
    return path.name if path.exists() else ""


@pytest.mark.parametrize("change", [change_config, change_weights, change_template, remove_a_file])
def test_a_changed_base_is_named_before_it_is_loaded(study, tmp_path, change) -> None:
    model, own, inputs = study
    job = LaneConfig(lane=0, dispatcher=None, model=ModelSettings(model=str(model)), splits=own,
                  storage=Storage(tmp_path), num_threads=1, inputs=inputs)  # fmt: skip
    check_node(job)
    name = change(model)
    with pytest.raises(RuntimeError) as refused:
        check_node(job)
    assert REMEDY in str(refused.value) and f"{model}/{name}" in str(refused.value)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("Image features and image tokens do not match"), BatchFailed),
        (TypeError("no grey images"), BatchFailed),
        (FileNotFoundError("no such file"), BatchFailed),
        (RuntimeError("stack expects each tensor to be equal size"), BatchFailed),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure", 719), torch.AcceleratorError),
        (MemoryError(), MemoryError),
    ],
)
def test_a_batch_that_cannot_be_made_is_no_fault_of_the_trial(base, splits, monkeypatch, error, raised) -> None:
    def refuse(*_) -> None:
        raise error

    monkeypatch.setattr("train_fn.model.batches.make_batch", refuse)
    with pytest.raises(raised) as caught:
        collate(base, splits.train[:3], with_answers=True)
    if raised is BatchFailed:
        assert splits.train[0].image in str(caught.value) and str(error) in str(caught.value)


def test_an_image_that_is_gone_is_named(base, splits) -> None:
    with pytest.raises(BatchFailed, match=r"not/there\.png"):
        collate(base, [Sample(("not/there.png",), "?", splits.candidates[0], 0)], with_answers=True)
