"""What each node of the cluster has."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from train_fn.model.memory import GIB
from train_fn.support.files import file_hash
from train_fn.support.storage import Storage
from train_fn.worker import versions
from tune.config.settings import Settings
from tune.doctor.verdicts import ANSWER_S, Finding
from tune.lanes.ray_start import session_folder
from tune.plan.prepare import Study, model_directory
from tune.plan.provenance import ROOT


def probe_folder(settings: Settings, stack: contextlib.ExitStack, findings: list[Finding]) -> Storage | None:
    """A place beside the studies in which nodes try to write; it goes when the doctor does."""
    results = Path(settings.study.results).resolve()
    try:
        results.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=results))
        storage = Storage.under(settings.study.storage, folder)
        stack.callback(storage.remove, folder)
        folder.chmod(0o777)  # nodes may work under another account
        (folder / "driver").write_text("driver")
        storage.push(folder / "driver")
    except OSError as error:
        fix = f"`--results` (and `--storage`) must be a place that can be written, but {results}: {error}"
        findings.append(Finding("storage", "driver", "cannot be written", f"{fix}; choose another"))
        return None
    return storage


def ask_nodes(settings: Settings, study: Study | None, storage: Storage | None) -> dict[str, dict[str, Any]]:
    """`node_facts` of the driver and of every living node, by address; {"error": ...} of a node that gave none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    splits = study.splits if study else None
    samples = [*splits.train, *splits.validation, *splits.test] if splits else []
    images = {sample.image: os.path.getsize(sample.image) for sample in samples}
    asked = (model_directory(settings).resolve(), images, storage)
    facts = {"driver": node_facts(*asked)}
    task: Any = ray.remote(node_facts)
    begun, answers = time.time(), {}
    for node in filter(lambda node: node["Alive"], ray.nodes()):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        where = f"{node['NodeManagerAddress']} ({node['NodeID'][:4]})"
        answers[where] = node, task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(*asked)
    for where, (node, answer) in answers.items():
        try:
            told = ray.get(answer, timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            facts[where] = {"error": last_line(error)}
            continue
        # A clock that goes like ours shows a time between the question and now.
        skew = max(begun - told["time"], told["time"] - time.time(), 0.0)
        facts[where] = told | {"skew_s": skew, "resources": node["Resources"]}
    return facts


def node_facts(model: Path, images: dict[str, int], storage: Storage | None) -> dict[str, Any]:
    """What a study rests on, as this machine sees it. images: bytes by path, as the driver sees them."""
    import psutil
    import torch

    from tune.lanes.compat_ray import needs_token

    sources = [path for part in ("tune", "train_fn", "search_spaces") for path in sorted((ROOT / part).rglob("*.py"))]
    project = hashlib.sha256("".join(map(file_hash, sources)).encode()).hexdigest()[:12]
    files = {path.name: path.stat().st_size for pattern in ("*.safetensors", "*.json") for path in model.glob(pattern)}
    config, session = model / "config.json", session_folder()
    results = storage.directory if storage else ROOT
    place = next(folder for folder in (results, *results.parents) if folder.exists())
    return {
        "time": time.time(),
        "versions": versions() | {"version_project": project},
        # Their content is hashed where a study begins; gigabytes on every node would take minutes.
        "model": files | ({"config": file_hash(config)} if config.is_file() else {}),
        "num_images": len(images),
        "missing": [
            path for path, size in images.items() if not os.access(path, os.R_OK) or os.path.getsize(path) != size
        ],
        "storage": try_storage(storage) if storage else "could not be tried",
        "free_gib": shutil.disk_usage(place).free / GIB,
        "session": str(session),
        "session_full": psutil.disk_usage(str(session)).percent / 100,
        "ram_gib": psutil.virtual_memory().available / GIB,
        "gpus": read_gpus(),
        "cuda": torch.version.cuda,
        "compiler": next(filter(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))), ""),
        "token": needs_token(),
    }


def try_storage(storage: Storage) -> str:
    """Why the storage cannot be used from here; empty: it can."""
    folder, probe = storage.directory, storage.directory / uuid.uuid4().hex
    own = bool(storage.uri) and not folder.exists()  # a node that shares no folder
    try:
        if own:
            folder.mkdir(parents=True)
        storage.pull(folder / "driver")
        if not (folder / "driver").is_file():
            return "does not hold what the driver wrote"
        probe.write_text("node")
        storage.push(probe)
        if storage.uri:
            probe.unlink()
            storage.pull(probe)
        read = probe.read_text()
        storage.remove(probe)
        return "" if read == "node" else "does not give back what was written"
    except OSError as error:
        return f"cannot be written: {error}"
    finally:
        if own:
            shutil.rmtree(folder, ignore_errors=True)


def read_gpus() -> list[dict[str, Any]]:
    """The machine's GPUs, as the driver's own tool tells them: a task that was given none must not touch them."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.free,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return parse_gpus(told.stdout) if told.returncode == 0 else []


def parse_gpus(table: str) -> list[dict[str, Any]]:
    """nvidia-smi's lines of name, free MiB, driver version and compute capability."""
    # bfloat16 in hardware begins with 8.0, as torch.cuda.is_bf16_supported(including_emulation=False) has it.
    return [
        {"name": name, "free_gib": float(mib) / 1024, "driver": driver, "bf16": float(capability) >= 8}
        for name, mib, driver, capability in csv.reader(table.splitlines(), skipinitialspace=True)
    ]


def last_line(error: Exception) -> str:
    """The last line of an error from a worker: the cause, below its trace."""
    return (str(error).strip() or repr(error)).splitlines()[-1]
