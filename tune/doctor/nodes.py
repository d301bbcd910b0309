"""What each node of the cluster has, from a task on each of them."""

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

from train_fn.model.checkpoint import hashed_files, resolve_model
from train_fn.model.hub_ids import is_hub_model
from train_fn.model.memory import GIB
from train_fn.support.files import file_hash
from train_fn.support.storage import Storage
from train_fn.worker import versions
from tune.config.settings import Settings
from tune.doctor.findings import Facts, Finding
from tune.lanes.ray_start import session_folder
from tune.plan.prepare import Study
from tune.plan.provenance import ROOT

ANSWER_S = 120  # a node that takes longer cannot be used


def probe_folder(settings: Settings, stack: contextlib.ExitStack, findings: list[Finding]) -> Storage | None:
    """A folder beside the studies in which the nodes try to write. It is removed when the doctor ends."""
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


def ask_nodes(settings: Settings, study: Study | None, storage: Storage | None) -> dict[str, Facts]:
    """The facts of the driver and of every living node, by address; {"error": ...} for a node that does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    splits = study.splits if study else None
    samples = [*splits.train, *splits.validation, *splits.test] if splits else []
    images = {image: os.path.getsize(image) for sample in samples for image in sample.images}
    model = (study.settings if study else settings).model.model
    arguments = (model if is_hub_model(model) else str(resolve_model(model).resolve()), images, storage)
    facts = {"driver": node_facts(*arguments)}
    task: Any = ray.remote(node_facts)
    asked_at, answers = time.time(), {}
    for node in filter(lambda node: node["Alive"], ray.nodes()):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        where = f"{node['NodeManagerAddress']} ({node['NodeID'][:4]})"
        answers[where] = node, task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(*arguments)
    for where, (node, answer) in answers.items():
        try:
            node_answer = ray.get(answer, timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            facts[where] = {"error": last_line(error)}
            continue
        # A clock like the driver's shows a time between the question and now.
        skew_s = max(asked_at - node_answer["time"], node_answer["time"] - time.time(), 0.0)
        facts[where] = node_answer | {"skew_s": skew_s, "resources": node["Resources"], "id": node["NodeID"]}
    return facts


def node_facts(model: str, images: dict[str, int], storage: Storage | None) -> Facts:
    """What this machine has of what a study needs. images: bytes by path, on the driver."""
    import psutil
    import torch

    from tune.lanes.compat_ray import needs_token

    sources = [path for part in ("tune", "train_fn", "search_spaces") for path in sorted((ROOT / part).rglob("*.py"))]
    project = hashlib.sha256("".join(map(file_hash, sources)).encode()).hexdigest()[:12]
    patterns, directory = ("*.safetensors", "*.json"), resolve_model(model)
    # Of a model of the hub only what a study fetches: see `hashed_files`.
    paths = hashed_files(model) if is_hub_model(model) else (p for pattern in patterns for p in directory.glob(pattern))
    files = {path.name: path.stat().st_size for path in paths}
    config, session = directory / "config.json", session_folder()
    results = storage.directory if storage else ROOT
    existing = next(folder for folder in (results, *results.parents) if folder.exists())
    return {
        "time": time.time(),
        "versions": versions() | {"version_project": project},
        # Sizes only: hashing gigabytes on every node would take minutes. A study hashes them when it begins.
        "model": files | ({"config": file_hash(config)} if config.is_file() else {}),
        "fetches": is_hub_model(model),
        "num_images": len(images),
        "missing": [
            path for path, size in images.items() if not os.access(path, os.R_OK) or os.path.getsize(path) != size
        ],
        "storage": try_storage(storage) if storage else "could not be tried",
        "free_gib": shutil.disk_usage(existing).free / GIB,
        "session": str(session),
        "session_full": psutil.disk_usage(str(session)).percent / 100,
        "ram_gib": psutil.virtual_memory().available / GIB,
        "gpus": read_gpus(),
        "cuda": torch.version.cuda,
        "compiler": next(filter(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))), ""),
        "token": needs_token(),
    }


def try_storage(storage: Storage) -> str:
    """Why the storage cannot be used from this machine, or ""."""
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
        return "" if read == "node" else "does not return what was written"
    except OSError as error:
        return f"cannot be written: {error}"
    finally:
        if own:
            shutil.rmtree(folder, ignore_errors=True)


def read_gpus() -> list[dict[str, Any]]:
    """The machine's GPUs, from nvidia-smi: this task holds no GPU and must not use one through torch."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.free,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    run = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return parse_gpus(run.stdout) if run.returncode == 0 else []


def parse_gpus(table: str) -> list[dict[str, Any]]:
    """GPUs from nvidia-smi's lines of name, free MiB, driver version and compute capability."""
    # bfloat16 in hardware begins with 8.0, as in torch.cuda.is_bf16_supported(including_emulation=False).
    return [
        {"name": name, "free_gib": float(mib) / 1024, "driver": driver, "bf16": float(capability) >= 8}
        for name, mib, driver, capability in csv.reader(table.splitlines(), skipinitialspace=True)
    ]


def last_line(error: Exception) -> str:
    """The last line of an error from a worker: the cause, which follows the trace."""
    return (str(error).strip() or repr(error)).splitlines()[-1]
