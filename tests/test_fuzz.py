"""A small run of `benchmarks/fuzz.py`: no traceback, nothing accepted that must be refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_command_lines(fuzz: ModuleType) -> None:
    tally = fuzz.command_lines(1500, seed=1)
    assert not tally.faults, tally.faults
    assert tally.outcomes["accepted"] > 100 and tally.outcomes["refused"] > 500


def test_manifests(fuzz: ModuleType, tmp_path: Path) -> None:
    tally = fuzz.manifests(150, seed=1, folder=tmp_path)
    assert not tally.faults, tally.faults
    assert tally.outcomes["accepted"] > 5 and tally.outcomes["refused"] > 100


@pytest.mark.campaign
def test_damaged_studies(fuzz: ModuleType, tmp_path: Path) -> None:
    tally = fuzz.studies(60, seed=1, folder=tmp_path, sync_every=15)
    assert not tally.faults, tally.faults
    for outcome in ("--show went on", "--show refused", "--resume went on", "--resume refused", "predict refused"):
        assert tally.outcomes[outcome] > 3, tally.outcomes
