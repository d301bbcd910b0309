"""Rungs within an epoch: reports for early stopping alone, which change nothing in the training of a trial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport, Verdict
from train_fn.settings import TrialSettings
from train_fn.trial import loop
from train_fn.trial.loop import Preempted, run_trial, rung_steps

# Four steps an epoch, with dropout, so that a draw more or less would show.
SETTINGS = TrialSettings(num_train_epochs=2, lora_r=4, lora_alpha=8, learning_rate=1e-2, per_device_train_batch_size=2,
                         gradient_accumulation_steps=1, lora_dropout=0.2, save_steps=1)  # fmt: skip
RUNGS = (0.5, 1.5, 4.5)


@pytest.fixture(scope="module")
def splits(splits) -> Splits:
    return replace(splits, train=splits.train[:8], validation=splits.validation[:4])


def train(base, splits, output: Path | None, rungs=RUNGS, stop_at=None, leave_after=99, **changes) -> list[EpochReport]:
    reports: list[EpochReport] = []
    steps = iter(range(1, 99))

    def report(message: EpochReport) -> Verdict:
        reports.append(message)
        return stop_at[1] if stop_at and message.progress == stop_at[0] else Verdict.GO_ON

    run_trial(base, splits, replace(SETTINGS, **changes), report, output=output, rungs=rungs, best_by=("loss", "min"),
              preempted=lambda: next(steps) == leave_after)  # fmt: skip
    return reports


def numbers(reports: list[EpochReport]) -> list[Any]:
    return [(report.progress, report.epoch, report.step, report.metrics, report.best_epoch) for report in reports]


@pytest.fixture(scope="module")
def whole(base, splits, tmp_path_factory) -> tuple[list[EpochReport], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(base, splits, folder), folder


def test_a_report_within_an_epoch_changes_nothing_in_the_training(base, splits, whole, tmp_path) -> None:
    reports, folder = whole
    plain = train(base, splits, tmp_path, rungs=())
    assert [(r.progress, r.epoch, r.step, r.finished) for r in reports] == [
        (0.5, 1, 2, False), (1.0, 1, 4, False), (1.5, 2, 6, False), (2.0, 2, 8, True)]  # fmt: skip
    assert numbers(reports[1::2]) == numbers(plain)
    assert len({report.metrics["loss"] for report in reports}) == 4
    ours, theirs = (load_file(path / "final_model" / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_evaluation_within_an_epoch_may_draw_numbers(base, splits, whole, monkeypatch) -> None:
    """As a dropout would that a model keeps in evaluation."""
    evaluate, calls = loop.evaluate, []

    def draws(*args: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] % 2 == 0:  # at a rung
            torch.rand(7)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", draws)
    assert numbers(train(base, splits, None)) == numbers(whole[0]) and len(calls) == 4


@pytest.mark.parametrize("leave_after", [2, 3, 6])  # at a rung, after it, at the second one
def test_a_trial_that_is_preempted_around_a_rung_gives_the_same_numbers(
    base, splits, whole, tmp_path, leave_after
) -> None:
    with pytest.raises(Preempted):
        train(base, splits, tmp_path, leave_after=leave_after)
    again = train(base, splits, tmp_path)
    assert numbers(again) == numbers(whole[0]) and again[-1].notes == []


@pytest.mark.parametrize("rung", [0.5, 1.5])
def test_a_trial_that_pauses_at_a_rung_goes_on_from_it(base, splits, whole, tmp_path, monkeypatch, rung) -> None:
    train(base, splits, tmp_path, stop_at=(rung, Verdict.PAUSE))
    assert not (tmp_path / "final_model").exists()
    steps = []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: steps.append(args[2]) or step(*args))
    again = train(base, splits, tmp_path)
    assert steps == list(range(int(4 * rung) + 1, 9))
    assert numbers(again) == numbers(whole[0])


def test_a_trial_that_ends_at_a_rung_keeps_no_state(base, splits, tmp_path) -> None:
    reports = train(base, splits, tmp_path, stop_at=(0.5, Verdict.END))
    assert [report.progress for report in reports] == [0.5] and reports[0].best_epoch == 0
    assert not (tmp_path / "state").exists() and not (tmp_path / "final_model").exists()


def test_a_training_shorter_than_an_epoch_has_its_rungs_as_a_whole(base, splits) -> None:
    reports = train(base, splits, None, rungs=(0.5,), max_steps=2)
    assert [(r.progress, r.step, r.finished) for r in reports] == [(0.5, 1, False), (1.0, 2, True)]


@pytest.mark.parametrize(
    ("rungs", "steps_per_epoch", "num_steps", "expected"),
    [
        ((1, 3, 9), 10, 30, {}),  # the epochs' own reports serve
        ((0.5, 1.5, 4.5), 10, 30, {5: 0.5, 15: 1.5}),
        ((0.5, 1.5, 4.5), 7, 21, {4: 0.5, 11: 1.5}),  # the first step by which half an epoch is trained
        ((0.1, 0.1 * 3, 0.9, 2.7), 10, 30, {1: 0.1, 3: 0.1 * 3, 9: 0.9, 27: 2.7}),
        ((0.5, 1.5), 1, 3, {}),  # the first step is an epoch
        ((0.1, 0.3, 0.9), 3, 9, {1: 0.3}),  # two rungs at one step; the third is the epoch's end
        ((0.5, 1.5), 10, 17, {5: 0.5, 15: 1.5}),
        ((0.5, 1.5), 10, 15, {5: 0.5}),  # the training's own end serves
        ((0.5, 1.5), 100, 20, {10: 0.5}),  # shorter than an epoch
        ((), 10, 30, {}),
    ],
)
def test_rungs_lie_after_whole_steps(rungs, steps_per_epoch, num_steps, expected) -> None:
    assert rung_steps(rungs, steps_per_epoch, num_steps) == expected
