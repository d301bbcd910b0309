"""Shared fixtures: phantoms on disk, their splits, the nano base held in this process, and two real studies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from studies import Finished

os.environ["OMP_NUM_THREADS"] = "1"  # sums keep their order, and tests do not wait for a busy core
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist gives its workers 80 columns; a file has a width of its own


LONGEST = (
    "test_study.py",
    "test_resume.py",
    "test_tracking.py",
    "test_registry.py",
)  # they wait for Ray and for servers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, which hands out whole files, begin with those that take the longest."""
    if hasattr(config, "workerinput"):
        longest = {item.path for item in items if item.get_closest_marker("ray") or item.path.name in LONGEST}
        items.sort(key=lambda item: item.path not in longest)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept between studies goes to a folder of these tests, their subprocesses included."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 60 phantoms."""
    from train_fn.data.phantoms import generate

    return generate(tmp_path_factory.mktemp("data") / "phantoms", 60, 0)


@pytest.fixture(scope="session")
def splits(phantoms: Path):
    """Train, validation and test of the phantoms."""
    from train_fn.data.manifest import read_manifest
    from train_fn.data.splitting import SplitRules, make_splits

    reading = read_manifest(phantoms, phantoms.parent)
    assert not reading.problems
    made, _, problems = make_splits(
        reading.samples, None, None, SplitRules(val_fraction=0.25, test_fraction=0.25, seed=0)
    )
    assert not problems
    return made


@pytest.fixture(scope="session")
def base():
    """The nano base in float32 on the CPU, in a process group of one: DeepSpeed wants a group."""
    import torch
    import torch.distributed as dist

    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings

    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return load_base(ModelSettings(), torch.device("cpu"))


@pytest.fixture(scope="session")
def busi() -> tuple[Path, Path]:
    """Manifest and image root of the real BUSI images, where BUSI_ROOT names them."""
    root = os.environ.get("BUSI_ROOT")
    if not root:
        pytest.skip("BUSI_ROOT does not name the BUSI images")
    return Path(root) / "train_busi_breast_cancer.json", Path(root)


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """RAY_TMPDIR of the study `mixed`: short, for the paths of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Finished:
    """A finished study of eight trials; see `run_mixed`. Not to be changed."""
    from studies import run_mixed

    return run_mixed(tmp_path_factory.mktemp("mixed"), ray_folder)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A study with trials that were stopped early, ended by its space; see `run_uneven`. Not to be changed."""
    from studies import run_uneven

    return run_uneven(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://studies of a moto server on loopback, with the environment that reaches it."""
    pytest.importorskip("moto")
    fs = pytest.importorskip("pyarrow.fs")
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
