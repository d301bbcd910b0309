"""benchmarks/gpu.py on a CPU: its checks run, an error leaves the others, and a cut-off leaves what was measured."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = list(sys.path)
    for name in ("XDG_CACHE_HOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    from train_fn.trial import compiled

    monkeypatch.setattr(compiled, "BACKEND", compiled.BACKEND)
    yield importlib.import_module("gpu")
    sys.path[:] = path


def test_an_error_and_a_cut_off_leave_the_other_figures(gpu, tmp_path, capsys) -> None:
    import gpu_checks

    def fails(lab):
        """It raises."""
        lab.row("before", step_s=1.0)
        raise RuntimeError("no such kernel")

    def stopped(lab):
        """SIGTERM comes."""
        lab.row("before", step_s=2.0)
        os.kill(os.getpid(), signal.SIGTERM)

    def later(lab):
        """Not begun."""
        raise AssertionError

    output = tmp_path / "gpu.json"
    lab = gpu.open_lab(tmp_path, None, output)
    handler = signal.getsignal(signal.SIGTERM)
    assert not gpu.run_checks(lab, [fails, gpu_checks.evaluation, gpu_checks.out_of_memory, stopped, later])
    assert signal.getsignal(signal.SIGTERM) == handler
    found = json.loads(output.read_text())
    assert found["cut_off"] and found["device"]
    checks = found["checks"]
    results = {name: check["result"] for name, check in checks.items()}
    assert results == {"fails": "FAIL", "evaluation": "PASS", "out_of_memory": "PASS", "stopped": "CUT OFF",
                       "later": "CUT OFF"}  # fmt: skip
    assert checks["fails"]["criterion"] == "RuntimeError: no such kernel"
    assert checks["fails"]["rows"] == {"before": {"step_s": 1.0}}
    assert checks["stopped"]["rows"] == {"before": {"step_s": 2.0}}
    assert checks["out_of_memory"]["rows"]["failure 1"]["then"].startswith("micro-batch 16 -> 8")
    assert "failure 2" in checks["out_of_memory"]["rows"] and "failure 3" not in checks["out_of_memory"]["rows"]
    assert capsys.readouterr().out.splitlines()[-5].startswith("FAIL    fails")


def test_the_time_limit_ends_all(gpu, tmp_path) -> None:
    import time

    def slow(lab):
        """Longer than the limit."""
        lab.row("before", step_s=1.0)
        time.sleep(30)

    lab = gpu.open_lab(tmp_path, None, tmp_path / "gpu.json")
    assert not gpu.run_checks(lab, [slow], limit_s=0.3)
    assert json.loads((tmp_path / "gpu.json").read_text())["checks"]["slow"]["rows"] == {"before": {"step_s": 1.0}}
