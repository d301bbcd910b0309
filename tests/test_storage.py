"""A study on object storage: a moto server on loopback stands for S3."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from studies import finish, start, wait_for
from test_resume import OPTIONS, SPACE, check_whole

from train_fn.settings import TrialSettings
from train_fn.support.storage import Storage
from train_fn.trial.resume_state import ResumeState

pytest.importorskip("moto")
fs = pytest.importorskip("pyarrow.fs")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """s3://studies, with the environment that reaches it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        remote, _ = fs.FileSystem.from_uri("s3://studies?allow_bucket_creation=true")
        remote.create_dir("studies")
        yield "s3://studies"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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


def test_a_study_killed_goes_on_from_the_bucket_alone(bucket, tmp_path, base) -> None:
    (tmp_path / "space.py").write_text(SPACE)
    process = start(tmp_path, "--space", "space.py", "--storage", f"{bucket}/results", *OPTIONS)
    wait_for(process, "[3/6]")
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    data = Path(tmp_path / "results" / "phantoms-60-0")
    kept = shutil.move(data, tmp_path / "kept")  # the images are the user's, and stay
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "results").mkdir()
    shutil.move(kept, data)
    finished = finish(start(tmp_path, "--resume", f"{bucket}/results/s", name=""), tmp_path)
    assert finished.code == 0, finished.out + finished.err
    assert "[3/6]" not in finished.out  # what had ended did not run again
    check_whole(tmp_path, base)
    remote, root = fs.FileSystem.from_uri(f"{bucket}/results/s")
    names = {info.path.removeprefix(f"{root}/") for info in remote.get_file_info(fs.FileSelector(root, recursive=True))}
    assert {"study.json", "best_adapter/adapter_model.safetensors", "trials/0005/final_model/task.json"} <= names
    assert not any("/state/" in name for name in names)
