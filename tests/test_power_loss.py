"""After a power loss: what the journal vouches for is on the disk.

A file system in a file, mounted: copying that file while it is mounted gives the disk as it would be if the power went
now, without what was written after the last fsync. Needs root and loop devices; skipped without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from train_fn.jobs import EpochReport
from train_fn.support.files import copy_folder, write_json
from tune.records.journal import Journal, read_events
from tune.records.plan import read_plan, save_plan


def mount(image: Path, folder: Path) -> bool:
    """Whether the image could be mounted. Nothing is written back by itself for five minutes."""
    folder.mkdir(exist_ok=True)
    options = "loop,commit=300,data=writeback"
    return subprocess.run(["mount", "-o", options, image, folder], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """A folder on a disk of its own, and a context in which that disk is seen as after a power loss at this moment."""
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    image, folder = tmp_path / "image", tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if not mount(image, folder):
        pytest.skip("loop devices cannot be mounted here")

    @contextmanager
    def after_power_loss() -> Iterator[Path]:
        copy, seen = tmp_path / "copy", tmp_path / "seen"
        shutil.copyfile(image, copy)
        assert mount(copy, seen)
        try:
            yield seen / "study"
        finally:
            subprocess.run(["umount", seen], check=True)

    (folder / "study").mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    yield folder / "study", after_power_loss
    subprocess.run(["umount", folder], check=True)


def test_the_disk_forgets_what_was_not_flushed(disk: Any) -> None:
    """That the other tests here can fail."""
    folder, after_power_loss = disk
    (folder / "a").write_text("lost")
    (folder / "b").write_text("kept")
    with open(folder / "b", "rb+") as file:
        os.fsync(file.fileno())
    with after_power_loss() as seen:
        assert [path.name for path in seen.iterdir() if path.stat().st_size] == ["b"]


def test_plan_journal_and_adapter_survive(disk: Any) -> None:
    from test_plan import PLAN

    folder, after_power_loss = disk
    save_plan(folder, PLAN)
    journal = Journal(folder / "journal.jsonl")
    for run in range(3):
        journal.write("confirmed", number=0, run=run, value=0.5)
        with after_power_loss() as seen:
            assert read_plan(seen)["study_id"] == "1" and len(read_events(seen / "journal.jsonl")) == run + 1
    (folder / "final_model").mkdir()
    (folder / "final_model" / "adapter_model.safetensors").write_bytes(b"w" * 100_000)
    for content in ("old", "new"):
        write_json(folder / "final_model" / "task.json", {"content": content})
        copy_folder(folder / "final_model", folder / "best_adapter")
        with after_power_loss() as seen:
            assert (seen / "best_adapter" / "adapter_model.safetensors").read_bytes() == b"w" * 100_000
            assert content in (seen / "best_adapter" / "task.json").read_text()


def test_what_a_trial_has_reported_survives(disk: Any, base: Any, splits: Any) -> None:
    from safetensors.torch import load_file

    from train_fn.settings import TrialSettings
    from train_fn.support.storage import Storage
    from train_fn.trial.loop import run_trial
    from train_fn.trial.resume_state import ResumeState

    folder, after_power_loss = disk
    settings = TrialSettings(num_train_epochs=2, lora_r=4, lora_alpha=8, save_steps=0)
    reported: list[int] = []

    def report(message: EpochReport) -> bool:
        reported.append(message.epoch)
        with after_power_loss() as seen:
            output = seen / "trials" / "0001"
            if message.finished:  # the state after the epoch before, which was written beside its training
                state = ResumeState(output, Storage(seen), settings).load()
                assert state and len(state["reports"]) == message.epoch - 1
                assert load_file(output / "final_model" / "adapter_model.safetensors")
                assert all(path.stat().st_size for path in (output / "final_model").iterdir())
                assert (output / "trainer_state.json").stat().st_size
        return False

    run_trial(base, splits, settings, report, output=folder / "trials" / "0001", save_state_every=0)
    assert reported == [1, 2]
