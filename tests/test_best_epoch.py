"""The epoch that counts: its adapter and predictions are those that a trial keeps, wherever the trial is killed."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport
from train_fn.settings import TrialSettings
from train_fn.support.background import BackgroundWriter
from train_fn.support.files import check_sums
from train_fn.support.storage import Storage
from train_fn.trial import loop
from train_fn.trial.loop import run_trial

SETTINGS = TrialSettings(num_train_epochs=3, lora_r=4, lora_alpha=8, learning_rate=1e-2, per_device_train_batch_size=8,
                         gradient_accumulation_steps=1)  # fmt: skip
NAN = math.nan
NAMES = ("adapter_model.safetensors", "adapter_config.json", "task.json", "SHA256SUMS")


@pytest.fixture(scope="module")
def splits(splits) -> Splits:
    return replace(splits, train=splits.train[:8], validation=splits.validation[:4])


def train(
    base, splits, output: Path, best_by: tuple[str, str] | None, report: Any = None, uri: str = ""
) -> list[EpochReport]:
    reports: list[EpochReport] = []
    run_trial(base, splits, SETTINGS, report or (lambda message: reports.append(message) or False), output=output,
              best_by=best_by, storage=Storage(output, uri), save_state_every=0)  # fmt: skip
    return reports


@pytest.fixture(scope="module")
def each_epoch(base, splits, tmp_path_factory) -> list[SimpleNamespace]:
    """Of each epoch of one trial: its validation loss, its adapter's tensors and its predictions, as files would hold
    them."""
    epochs: list[SimpleNamespace] = []
    folder = tmp_path_factory.mktemp("each")
    with pytest.MonkeyPatch.context() as patch:

        def judge_all(run: Any, metrics: dict[str, float]) -> bool:
            run.best_epoch = run.epoch
            return True

        patch.setattr(loop.Run, "is_best", judge_all)
        patch.setattr(loop.ResumeState, "keep_epochs", lambda *args: None)
        patch.setattr(loop.ResumeState, "remove", lambda *args: None)
        reports = train(base, splits, folder, ("loss", "min"))
    for report in reports:
        its = folder if report.finished else folder / "state" / f"epoch-{report.epoch}"
        lines = (its / "validation_predictions.jsonl").read_text()
        tensors = load_file(its / "final_model" / "adapter_model.safetensors")
        epochs.append(SimpleNamespace(loss=report.metrics["loss"], tensors=tensors, lines=lines))
    assert len({epoch.loss for epoch in epochs}) == len({epoch.lines for epoch in epochs}) == 3
    return epochs


@pytest.fixture
def scored(monkeypatch, each_epoch) -> Callable[..., None]:
    """Sets the metric "score" of each epoch. An epoch is recognised by its loss, which never changes by a bit."""

    def give(*scores: float) -> None:
        evaluate = loop.evaluate

        def scored(*args: Any) -> Any:
            evaluation = evaluate(*args)
            epoch = [epoch.loss for epoch in each_epoch].index(evaluation.metrics["loss"])
            return replace(evaluation, metrics=evaluation.metrics | {"score": scores[epoch]})

        monkeypatch.setattr(loop, "evaluate", scored)

    return give


def check_kept(output: Path, epoch: SimpleNamespace) -> None:
    """The trial's folder holds the adapter and predictions of an epoch, undamaged, and nothing of another."""
    tensors = load_file(output / "final_model" / "adapter_model.safetensors")
    assert tensors.keys() == epoch.tensors.keys()
    assert all(torch.equal(tensors[name], epoch.tensors[name]) for name in tensors)
    assert (output / "validation_predictions.jsonl").read_text() == epoch.lines
    check_sums(output / "final_model")
    assert set(NAMES) <= {path.name for path in (output / "final_model").iterdir()}
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3
    assert not (output / "state").exists() and [path for path in output.rglob(".*")] == []


@pytest.mark.parametrize(
    ("mode", "scores", "counted", "best_so_far"),
    [
        ("max", (0.5, 0.9, 0.9), 2, [1, 2, 2]),  # the earlier of equals
        ("min", (0.5, 0.9, 0.4), 3, [1, 1, 3]),
        ("max", (NAN, 0.1, NAN), 2, [0, 2, 2]),  # NaN is never the best
        ("max", (NAN, NAN, NAN), 3, [0, 0, 0]),  # without a score, the last
        ("min", (math.inf, 2.0, 2.0), 2, [0, 2, 2]),
    ],
)
def test_the_best_epoch_is_kept(base, splits, tmp_path, each_epoch, scored, mode, scores, counted, best_so_far) -> None:
    scored(*scores)
    reports = train(base, splits, tmp_path, ("score", mode))
    assert [report.best_epoch for report in reports] == best_so_far
    assert [report.metrics["loss"] for report in reports] == [epoch.loss for epoch in each_epoch]
    check_kept(tmp_path, each_epoch[counted - 1])


def test_the_last_epoch_is_kept_where_none_is_chosen(base, splits, tmp_path, each_epoch) -> None:
    reports = train(base, splits, tmp_path, None)
    assert [report.best_epoch for report in reports] == [0, 0, 0]
    check_kept(tmp_path, each_epoch[2])


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the trial die after its write of this number. Returns the list of its writes, filled as it runs."""
    writes: list[str] = []
    write = loop.Run.write

    def dies(run: Any, action: Any) -> None:
        writes.append(getattr(action, "func", action).__name__)
        write(run, action)
        if len(writes) == number:
            raise Killed

    def counted(name: str, action: Any) -> Any:
        def call(*args: Any) -> None:
            action(*args)
            if len(args) > 1:  # not when an attempt begins and removes everything
                writes.append(name)
                if len(writes) == number:
                    raise Killed

        return call

    monkeypatch.setattr(loop.Run, "write", dies)
    for name in ("write", "keep_epochs"):
        monkeypatch.setattr(loop.ResumeState, name, counted(name, getattr(loop.ResumeState, name)))
    monkeypatch.setattr(BackgroundWriter, "start", lambda writer, write: write())  # each kill at its moment
    return writes


WRITES = ["save_final", "save_predictions", "write", "keep_epochs"] * 2
WRITES += ["copy_final", "save_log", "remove"]


@pytest.mark.parametrize("number", range(5, 12))  # from the first write of epoch 2 on, whose adapter is to be kept
def test_a_trial_killed_after_any_write_keeps_the_right_adapter(
    base, splits, tmp_path, monkeypatch, each_epoch, scored, number
) -> None:
    scored(0.5, 0.9, 0.4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        writes = kill_after(patch, number)
        train(base, splits, tmp_path, ("score", "max"))
    assert writes == WRITES[:number]
    reports = train(base, splits, tmp_path, ("score", "max"))
    assert [report.metrics["loss"] for report in reports] == [epoch.loss for epoch in each_epoch]
    assert [report.best_epoch for report in reports] == [1, 2, 2] and reports[-1].notes == []
    check_kept(tmp_path, each_epoch[1])


def stopped_after(base, splits, output: Path, epochs: int) -> None:
    """A trial that early stopping ends: its state stays, because the study may go on with it."""
    train(base, splits, output, ("score", "max"), lambda report: report.epoch == epochs)


def test_a_point_that_is_damaged_still_finds_its_adapter(base, splits, tmp_path, each_epoch, scored) -> None:
    """The newest point means epoch 2, and the one before it epoch 1. Both adapters are there."""
    scored(0.5, 0.9, 0.4)
    stopped_after(base, splits, tmp_path, 2)
    assert not (tmp_path / "final_model").exists()
    *_, newest = sorted((tmp_path / "state").glob("*-0.state"))
    newest.write_bytes(b"")
    assert sorted(path.name for path in (tmp_path / "state").glob("epoch-*")) == ["epoch-1", "epoch-2"]
    reports = train(base, splits, tmp_path, ("score", "max"))
    assert len(reports[-1].notes) == 1 and "saved state at point" in reports[-1].notes[0]
    check_kept(tmp_path, each_epoch[1])


def test_what_counts_no_more_is_removed(base, splits, tmp_path, scored) -> None:
    scored(0.5, 0.9, 0.4)
    stopped_after(base, splits, tmp_path, 3)  # the last two points mean epoch 2
    assert [path.name for path in (tmp_path / "state").glob("epoch-*")] == ["epoch-2"]


@pytest.mark.parametrize("damage", ["gone", "one byte", "no predictions"])
def test_an_adapter_that_is_damaged_is_trained_again(base, splits, tmp_path, each_epoch, scored, damage) -> None:
    scored(0.5, 0.9, 0.4)
    stopped_after(base, splits, tmp_path, 2)
    folder = tmp_path / "state" / "epoch-2"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "no predictions":
        (folder / "validation_predictions.jsonl").unlink()
    else:
        path = folder / "final_model" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    reports = train(base, splits, tmp_path, ("score", "max"))
    assert [report.best_epoch for report in reports] == [1, 2, 2]
    assert "the adapter of epoch 2, the best so far, was missing or damaged" in reports[-1].notes[0]
    check_kept(tmp_path, each_epoch[1])


def test_a_state_of_an_earlier_version_has_no_best_epoch(
    base, splits, tmp_path, monkeypatch, each_epoch, scored
) -> None:
    scored(0.9, 0.5, 0.4)
    serialise = loop.ResumeState.serialise

    def as_before(state: Any, progress: dict[str, Any], engine: Any) -> Any:
        return serialise(state, {name: v for name, v in progress.items() if not name.startswith("best_")}, engine)

    with monkeypatch.context() as patch:
        patch.setattr(loop.ResumeState, "serialise", as_before)
        stopped_after(base, splits, tmp_path, 2)
    reports = train(base, splits, tmp_path, ("score", "max"))
    assert reports[-1].best_epoch == 3
    check_kept(tmp_path, each_epoch[2])


def test_another_node_goes_on_with_the_adapter_from_object_storage(base, splits, tmp_path, each_epoch, scored) -> None:
    scored(0.9, 0.5, 0.4)
    here, there = tmp_path / "one" / "trial", tmp_path / "two" / "trial"
    uri = f"file://{tmp_path}/bucket"
    train(base, splits, here, ("score", "max"), lambda report: report.epoch == 2, uri)
    reports = train(base, splits, there, ("score", "max"), uri=uri)
    assert [report.best_epoch for report in reports] == [1, 1, 1] and reports[-1].notes == []
    check_kept(there, each_epoch[0])
    check_kept(tmp_path / "bucket", each_epoch[0])


def test_a_slow_write_of_an_earlier_point_does_not_remove_the_adapter(base, splits, tmp_path, monkeypatch) -> None:
    """The point of an epoch's last step knows no best epoch yet, and may still be written when the adapter is."""
    keep = loop.ResumeState.keep_epochs

    def slow(state: Any, *epochs: int) -> None:
        time.sleep(1.0 if epochs == (0, 0) else 0.0)
        keep(state, *epochs)

    monkeypatch.setattr(loop.ResumeState, "keep_epochs", slow)
    run_trial(base, splits, replace(SETTINGS, num_train_epochs=2, save_steps=1), lambda report: report.epoch == 1,
              output=tmp_path, best_by=("loss", "min"))  # fmt: skip
    check_sums(tmp_path / "state" / "epoch-1" / "final_model")
    assert (tmp_path / "state" / "epoch-1" / "validation_predictions.jsonl").exists()
