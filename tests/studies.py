"""`tune/run.py` as a process of its own, for the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

ROOT = Path(__file__).parents[1]
SMALL = ["--num-phantoms", "60", "--num-train-epochs", "1"]


@dataclass
class Finished:
    code: int
    out: str
    err: str
    folder: Path

    @property
    def study(self) -> dict:
        return json.loads((self.folder / "results" / "s" / "study.json").read_text())

    def runs(self) -> list:
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "vlm-tune"]
        return client.search_runs([experiment.experiment_id])


def environment(folder: Path) -> dict[str, str]:
    """A clean one: no compiler on the path, a place where a compiled op would show, no MLflow server."""
    bare = folder / "bin"
    bare.mkdir(exist_ok=True)
    for tool in ("sh", "bash", "uname", "ps", "cat", "ldconfig", "env"):
        if (found := shutil.which(tool)) and not (bare / tool).exists():
            (bare / tool).symlink_to(found)
    dropped = ("RAY_A", "RAY_T", "MLFLOW_", "OMP_", "PYTHONPATH", "HF_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) or k == "RAY_TMPDIR"}
    return kept | {
        "PATH": str(bare),
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",  # numbers are compared to the last bit
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        "COLUMNS": "200",
    }


def start(folder: Path, *argv: str, path: str = "", name: str = "s", address: str = "") -> subprocess.Popen:
    """A study on its way; `name` empty for one that goes on; `address` of a Ray cluster to join."""
    named = ["--name", name] if name else []
    command = [sys.executable, str(ROOT / "tune" / "run.py"), *named, *argv]
    env = environment(folder) | ({"PYTHONPATH": path} if path else {}) | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, folder: Path) -> Finished:
    """What it said and left."""
    out, err = process.communicate(timeout=400)
    return Finished(process.returncode, out, err, folder)


def wait_for(process: subprocess.Popen, text: str, timeout_s: float = 300) -> list[str]:
    """Read the process's output up to a line with `text`."""
    seen: list[str] = []
    assert process.stdout
    deadline = time.monotonic() + timeout_s
    while text not in "".join(seen[-1:]):
        line = process.stdout.readline()
        assert line and time.monotonic() < deadline, f"{text!r} did not come: {''.join(seen)}"
        seen.append(line)
    return seen
