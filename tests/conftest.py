"""Shared fixtures: phantoms on disk, their splits, and the nano base held in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # sums keep their order, and tests do not wait for a busy core
os.environ["HF_HUB_OFFLINE"] = "1"


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
    from train_fn.data.splitting import make_splits

    entries, problems = read_manifest(phantoms, phantoms.parent)
    assert not problems
    made, _, problems = make_splits(entries, None, None, val_fraction=0.25, test_fraction=0.25, seed=0)
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
