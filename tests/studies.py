"""`tune/run.py` as a process of its own, for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
    raw: str = ""  # of a terminal: `out` with its control sequences

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


def command_of(name: str, *argv: str) -> list[str]:
    """`tune/run.py` with these arguments; `name` empty for a study that goes on."""
    return [sys.executable, str(ROOT / "tune" / "run.py"), *(["--name", name] if name else []), *argv]


def start(folder: Path, *argv: str, name: str = "s", **variables: str) -> subprocess.Popen:
    """Start a study; `variables` are added to its environment."""
    env = environment(folder) | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command_of(name, *argv), cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen, folder: Path) -> Finished:
    """Wait for the end of a study."""
    out, err = process.communicate(timeout=400)
    return Finished(process.returncode, out, err, folder)


def run_on_terminal(folder: Path, *argv: str, **variables: str) -> Finished:
    """Run a study under a pseudo-terminal."""
    reader, writer = os.openpty()
    env = environment(folder) | {"TERM": "xterm", "COLUMNS": "300"} | variables
    process = subprocess.Popen(command_of("s", *argv), cwd=folder, env=env, stdin=writer, stdout=writer, stderr=writer)
    os.close(writer)
    raw = read_to_end(reader)
    return Finished(process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw), "", folder, raw)


def read_to_end(reader: int) -> str:
    """Read a pseudo-terminal until nobody has its other side open."""
    read = b""
    with os.fdopen(reader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # Linux reports the end so
        while part := terminal.read(65536):
            read += part
    return read.decode()


# ------------------------------------------------------------------------------------------------ shared studies
# conftest.py runs each once for all the tests that read it.

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-planted-0",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-1",
    "AWS_SESSION_TOKEN": "planted-token-2",
    "WANDB_API_KEY": "planted-wandb-3",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-4",
    "HF_TOKEN": "planted-hf-5",
}

# Trials by number: two configurations in turn, then one that no module matches. Test material, not a product's space.
# No gradient reaches the norms at which it would be clipped: they only make each trial a point of its own, since a
# study tries no point twice.
MIXED = """
GUIDE = {"learning_rate": 1e-3}
ONE = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}
TWO = {"lora_r": 16, "lora_alpha": 8, "learning_rate": 4e-3, "train_projector": True, "projector_learning_rate": 2e-3}

def space(trial):
    trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return [ONE, TWO, ONE, TWO, ONE, ONE | {"lora_target_modules": ["nowhere"]}, TWO, ONE][trial.number] | {
        "max_grad_norm": 1e6 + trial.number
    }
"""


def run_mixed(folder: Path, ray_folder: Path) -> Finished:
    """Run eight trials on one lane, the sixth of which fails: on a terminal, with every store, a profile, a confirmed
    winner, and secrets in the environment."""
    (folder / "space.py").write_text(MIXED)
    options = ["--trials", "8", "--lanes", "1", "--space", "space.py", "--confirm", "1", "--confirm-seeds", "2", *SMALL]
    options += ["--report-to", "mlflow,tensorboard,wandb", "--logging-steps", "1", "--profile"]
    finished = run_on_terminal(folder, *options, RAY_TMPDIR=str(ray_folder), **SECRETS)
    assert finished.code == 0, finished.out
    return finished


# Trials by number, two epochs each: the guide's, which cannot learn but is spared, one that can, and two that cannot.
# The space fails at the fifth.
UNEVEN = """
import os
GUIDE = {"learning_rate": 1e-9}
def space(trial):
    trial.suggest_float("learning_rate", 1e-9, 1e-2, log=True)
    if os.path.exists("results/s/plan.json") and trial.number == 4: raise SystemExit(0)
    rate = [1e-9, 2e-3, 1e-9, 1e-9][trial.number % 4]
    return {"lora_r": 8, "lora_alpha": 16, "learning_rate": rate, "num_train_epochs": 2}
"""


def run_uneven(folder: Path) -> Finished:
    """Run four trials on one lane, the last two of which are stopped within their first epoch, until the space raises
    SystemExit."""
    (folder / "space.py").write_text(UNEVEN)
    options = ["--trials", "6", "--lanes", "1", "--space", "space.py", "--num-phantoms", "60", "--metric", "loss"]
    options += ["--grace-period", "0.5"]
    return finish(start(folder, *options), folder)


def wait_for(process: subprocess.Popen, text: str, timeout_s: float = 300) -> list[str]:
    """Read the process's output up to a line with `text`."""
    seen: list[str] = []
    assert process.stdout
    deadline = time.monotonic() + timeout_s
    while text not in "".join(seen[-1:]):
        line = process.stdout.readline()
        error = "" if line else process.communicate()[1]
        assert line and time.monotonic() < deadline, f"{text!r} did not come: {''.join(seen)}{error}"
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
