"""Files on object storage: a moto server on loopback stands for S3. A study there: test_resume.py."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

from train_fn.settings import TrialSettings
from train_fn.support.storage import Storage
from train_fn.trial.resume_state import ResumeState


def test_push_pull_remove(bucket, tmp_path) -> None:
    here, other = tmp_path / "here" / "s", tmp_path / "other" / "s"
    (here / "trials" / "0001").mkdir(parents=True)
    (here / "trials" / "0001" / "a.txt").write_text("a")
    (here / "one.txt").write_text("one")
    storage, elsewhere = (Storage(folder, f"{bucket}/unit/s") for folder in (here, other))
    storage.push(here / "trials" / "0001")
    storage.push(here / "one.txt")
    elsewhere.pull(other / "trials" / "0001")
    elsewhere.pull(other / "one.txt")
    elsewhere.pull(other / "nothing")
    assert (other / "trials" / "0001" / "a.txt").read_text() == "a" and (other / "one.txt").read_text() == "one"
    assert sorted(path.name for path in other.iterdir()) == ["one.txt", "trials"]
    storage.remove(here / "trials" / "0001")
    shutil.rmtree(other)
    elsewhere.pull(other / "trials" / "0001")
    assert not (here / "trials" / "0001").exists() and not (other / "trials" / "0001").exists()


def test_several_workers_of_a_node_fetch_the_same_at_once(bucket, tmp_path) -> None:
    here, other = tmp_path / "here" / "s", tmp_path / "other" / "s"
    (here / "adapter").mkdir(parents=True)
    (here / "adapter" / "a.txt").write_text("a")
    Storage(here, f"{bucket}/many/s").push(here / "adapter")
    elsewhere = Storage(other, f"{bucket}/many/s")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(elsewhere.pull, [other / "adapter"] * 8))
    assert [path.name for path in other.iterdir()] == ["adapter"] and (other / "adapter" / "a.txt").read_text() == "a"


def test_a_trial_goes_on_from_the_newest_point_of_the_storage(bucket, tmp_path) -> None:
    """Whatever this node still has: the trial was elsewhere meanwhile."""
    there, here = (Storage(tmp_path / name / "s", f"{bucket}/moved/s") for name in ("there", "here"))
    for storage, names in [
        (there, ["00000002-0", "00000002-1", "00000004-0", "00000004-1", "00000006-0"]),
        (here, ["00000002-0", "00000002-1"]),
    ]:
        folder = storage.directory / "trials" / "0001" / "state"
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.state").write_text("state")
    there.push(there.directory / "trials")
    state = ResumeState(here.directory / "trials" / "0001", here, TrialSettings())
    state.world_size = 2
    assert state.points() == ["00000002", "00000004"]
    assert ResumeState(here.directory / "trials" / "0002", here, TrialSettings()).points() == []


def test_a_shared_folder_copies_nothing(tmp_path) -> None:
    storage = Storage(tmp_path)
    (tmp_path / "a").mkdir()
    storage.push(tmp_path / "a")
    storage.pull(tmp_path / "b")
    storage.remove(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
