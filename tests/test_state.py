"""The saved state of an unfinished trial: damage is noticed, the older point is used, nothing in a file is executed.

A disk that is full for a while changes no number.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from train_fn.jobs import EpochReport, Verdict
from train_fn.settings import TrialSettings
from train_fn.support import storage
from train_fn.support.files import write_checked
from train_fn.support.storage import Storage
from train_fn.trial.loop import Preempted, run_trial
from train_fn.trial.resume_state import ResumeState

SETTINGS = TrialSettings(num_train_epochs=2, max_steps=4, lora_r=4, lora_alpha=8, learning_rate=1e-3, save_steps=1)


def train(base, splits, output: Path | None = None, leave_after: int = 99) -> list[EpochReport]:
    """The reports of a trial. With `leave_after` it is preempted after so many steps."""
    reports: list[EpochReport] = []
    steps = iter(range(1, 99))
    run_trial(base, splits, SETTINGS, lambda report: reports.append(report) or False,
              output=output, preempted=lambda: next(steps) == leave_after)  # fmt: skip
    return reports


def numbers(reports: list[EpochReport]) -> list[Any]:
    return [(report.metrics, report.log) for report in reports]


@pytest.fixture(scope="module")
def undisturbed(base, splits) -> list[Any]:
    return numbers(train(base, splits))


class Evil:
    """A pickle that creates a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def damage(path: Path, kind: str, mark: Path) -> None:
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif kind == "one bit":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    elif kind == "a pickle":
        path.write_bytes(pickle.dumps(Evil(mark)))
    elif kind == "a pickle with a checksum":
        write_checked(path, pickle.dumps(Evil(mark)))
    elif kind == "a torch file with a checksum":
        content = io.BytesIO()
        torch.save({"progress": Evil(mark)}, content)
        write_checked(path, content.getbuffer())
    elif kind == "an older point":
        shutil.copy(sorted(path.parent.glob("*-0.state"))[0], path)
    else:
        path.unlink()
        path.mkdir()


KINDS = ["cut", "empty", "zeros", "one bit", "a pickle", "a pickle with a checksum", "a torch file with a checksum",
         "an older point", "a folder"]  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(base, splits, undisturbed, tmp_path_factory) -> Path:
    """The folder of a trial that was preempted after three steps of four. `undisturbed` has filled the feature cache,
    whose filling asks as well whether to leave."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Preempted):
        train(base, splits, folder, leave_after=3)
    return folder


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_point_costs_that_point_only(interrupted, tmp_path, kind) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    *_, older, newest = sorted((tmp_path / "state").glob("*-0.state"))
    damage(newest, kind, tmp_path / "executed")
    state = ResumeState(tmp_path, Storage(tmp_path), SETTINGS)
    found = state.load()
    assert found and found["step"] == 2 and len(state.notes) == 1 and "damaged" in state.notes[0]
    assert not newest.exists() and older.exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_trial_resumes_past_damage_to_the_same_numbers(
    base, splits, interrupted, tmp_path, undisturbed, num_damaged
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for path in sorted((tmp_path / "state").glob("*"))[-num_damaged:]:
        damage(path, "one bit", tmp_path)
    reports = train(base, splits, tmp_path)
    assert numbers(reports) == undisturbed
    assert len(reports[-1].notes) == num_damaged and all("damaged" in note for note in reports[-1].notes)


@pytest.mark.parametrize("limit", [3_000, 300_000])
def test_a_full_disk_costs_time_and_no_number(base, splits, tmp_path, monkeypatch, undisturbed, limit) -> None:
    """The system writes a part of a file and refuses the rest, until the first retry."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused: list[float] = []

    def lift(seconds: float) -> None:
        refused.append(seconds)
        partial = [name for _, _, names in os.walk(tmp_path) for name in names if name == "adapter_config.json"]
        assert not (tmp_path / "final_model").exists() or len(partial) >= 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    from train_fn.trial import run

    write = run.retry_on_os_error

    def with_a_full_disk(action: Any, tell: Any) -> None:
        if not refused:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(action, tell)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(storage.time, "sleep", lift)
    monkeypatch.setattr(run, "retry_on_os_error", with_a_full_disk)
    base.processor_files = {}
    reports = train(base, splits, tmp_path)
    assert numbers(reports) == undisturbed
    assert refused and any("tried again" in note for note in reports[-1].notes)
    names = {path.name for path in (tmp_path / "final_model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "task.json", "tokenizer.json"} <= names
    assert [path for path in tmp_path.rglob(".*")] == []


EPOCHS = TrialSettings(num_train_epochs=3, lora_r=4, lora_alpha=8, learning_rate=1e-3, save_steps=0)


def files_of_each_report(base, splits, output: Path, **options: Any) -> list[int]:
    """How many files of points there are when each epoch is reported."""
    counts: list[int] = []

    def report(message: EpochReport) -> bool:
        counts.append(len(list(output.glob("state/*.state"))))
        return False

    run_trial(base, splits, EPOCHS, report, output=output, **options)
    return counts


def test_a_trial_of_less_than_a_minute_has_no_state(base, splits, tmp_path) -> None:
    assert files_of_each_report(base, splits, tmp_path) == [0, 0, 0]


def test_the_last_report_comes_after_every_write(base, splits, tmp_path, monkeypatch) -> None:
    write = ResumeState.write

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(ResumeState, "write", slow)
    assert files_of_each_report(base, splits, tmp_path, save_state_every=0)[-1] == 2
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("verdict", "num_points"), [(Verdict.PAUSE, 1), (Verdict.END, 0)])
def test_a_paused_trial_keeps_a_state_and_one_that_is_over_none(base, splits, tmp_path, verdict, num_points) -> None:
    run_trial(base, splits, EPOCHS, lambda message: verdict, output=tmp_path)
    assert len(list(tmp_path.glob("state/*.state"))) == num_points


def test_an_error_of_a_write_in_the_background_ends_the_trial(base, splits, tmp_path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResumeState, "write", full)
    monkeypatch.setattr(storage, "MAX_RETRY_S", -1.0)
    with pytest.raises(OSError, match="No space left"):
        files_of_each_report(base, splits, tmp_path, save_state_every=0)


def test_a_trial_killed_between_two_points_repeats_its_epochs(base, splits, tmp_path) -> None:
    """It goes on from the point after the first epoch, and reports the second one again, with the same numbers."""

    class Killed(BaseException):
        pass

    whole: list[EpochReport] = []
    run_trial(base, splits, EPOCHS, lambda message: whole.append(message) or False)
    first: list[EpochReport] = []
    run_trial(base, splits, EPOCHS, lambda message: first.append(message) or Verdict.PAUSE, output=tmp_path)

    def dies(message: EpochReport) -> bool:
        if message.epoch == 3:
            raise Killed
        return False

    with pytest.raises(Killed):
        run_trial(base, splits, EPOCHS, dies, output=tmp_path)
    again: list[EpochReport] = []
    run_trial(base, splits, EPOCHS, lambda message: again.append(message) or False, output=tmp_path)
    assert [message.epoch for message in again] == [1, 2, 3]
    assert numbers(again) == numbers(whole)
