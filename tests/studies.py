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
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient

if TYPE_CHECKING:
    from tune.records.journal import Journal

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


# What a study writes, for tests without Ray.
LAYOUT = {"lanes": 2, "workers_per_trial": 1, "use_gpu": False, "num_threads": 1, "lanes_per_gpu": 1}


def report_event(number: int, auroc: float, **metrics: float) -> dict[str, Any]:
    scores = {"auroc": auroc, "macro_f1": 0.5, "sensitivity": 0.5, "loss": 1.0 - auroc, **metrics}
    facts = {"epoch": 1, "step": 3, "metrics": scores, "log": [], "applied": {"trainable_params": 10}, "device": "cpu"}
    facts |= {"seconds": {"train": 1.0, "evaluation": 0.5}, "finished": True, "lane": 0, "turn": number, "notes": []}
    facts |= {"num_threads": 1, "base_gib": 0.0, "base_16_bit_gib": 0.0, "system": {}}
    return {"number": number, "wall_s": 2.0, "waited_s": 0.1, "device_s": 1.5, **facts}


def write_trial(journal: Journal, number: int, state: str = "COMPLETE", auroc: float = 0.5, **more: Any) -> None:
    """A trial's events and, if it is complete, its adapter."""
    searched = {"learning_rate": 1e-3 * (1 + number), **more.pop("searched", {})}
    settings = {"class_balanced_loss": True, "seed": 0}
    journal.write("started", number=number, searched=searched, settings=settings, params=searched)
    if state == "COMPLETE":
        journal.write("report", **report_event(number, auroc, **more))
    if state != "RUNNING":
        error = "it broke" if state == "FAILED" else ""
        step = 3 if state == "COMPLETE" else 0
        facts = {
            "best": None,
            "num_ended": number,
            "step": step,
            "seconds": {},
            "applied": {},
            "lane": 0,
            "device": "cpu",
        }
        journal.write("ended", number=number, state=state, error=error, device_s=1.5, notes=[], **facts)
    if state == "COMPLETE":
        write_adapter(journal.path.parent / "trials" / f"{number:04d}" / "final_model", str(number))


def write_adapter(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(content)


def write_plan(directory: Path, study: dict, **others: object) -> None:
    """A study's plan.json, of what the tests need in it."""
    from tune.records.plan import save_plan

    hashes = {f"{name}_hash": "" for name in ("data", "base", "space", "splits")}
    settings = {"study": study, "model": {}, "data": {}, "trial": {}, "pinned": []}
    plan = {"study_id": "1", "settings": settings, "tracking_uri": "", "data_report": {}, "goals": [["auroc", "max"]],
            "candidates": [], "positive_label": ""}  # fmt: skip
    save_plan(directory, plan | hashes | others)
