"""`python tune/run.py --doctor`: whether a study with these settings could run here, told without starting one.

Every node is asked by a task of its own.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.files import file_hash
from train_fn.memory import GIB, measure, memory_needed
from train_fn.settings import TrialSettings
from train_fn.storage import Storage
from train_fn.text import plain
from train_fn.worker import versions
from tune.prepare import Study, model_directory, prepare
from tune.provenance import ROOT
from tune.settings import Settings, SettingsError
from tune.space_check import corners
from tune.store_check import check_store
from tune.study import Layout, plan_layout, session_logs, start_ray
from tune.uris import tracking_uri

FULL_DISK = 0.95  # above this Ray spills no more objects (its local_fs_capacity_threshold)
MESSAGES_MIB = (1, 16, 64)
ANSWER_S = 120  # a node that takes longer cannot be used
SMALLER = "in this order: --use-qlora; --gradient-checkpointing; a lower --lora-r; on CPUs fewer --lanes"


@dataclass(frozen=True)
class Finding:
    """A line of the table; `fix` says what is wrong and what to do about it, if anything is."""

    check: str
    where: str
    found: str
    fix: str = ""
    warning: bool = False

    @property
    def verdict(self) -> str:
        """ok, warning or FAIL."""
        return "ok" if not self.fix else "warning" if self.warning else "FAIL"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the study asks of a node: its lanes, a C compiler, GiB of one worker by what takes them, at a micro-batch of
    one image and at larger ones than asked for, GiB of results."""

    layout: Layout | None = None
    compiler: bool = False
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    least: float = 0.0
    larger: dict[int, float] = dataclasses.field(default_factory=dict)
    disk: float = 0.0


def examine(settings: Settings, say: Callable[[str], None]) -> int:
    """Check data, machines, memory, storage and records for these settings, and print one table.

    Leaves nothing but the results folder, and the phantoms in it. Returns the exit code: 0 nothing fails, 1 something
    does.
    """
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        study = read_data(settings, say, findings)
        storage = probe_folder(settings, stack, findings)
        say("Asking the nodes")
        resources = start_ray(settings)
        import ray  # after what `start_ray` sets for it

        stack.callback(ray.shutdown)
        layout = lay_out(settings, resources, findings)
        facts = ask_nodes(settings, study, storage)
        need = Need(layout=layout, compiler=settings.trial.torch_compile)
        if study:
            say("Reckoning memory from the model's shapes")
            need = reckon(study, need, facts, findings)
        findings += verdicts(facts, need)
        findings += measure_collectives(layout, facts, storage, say)
        findings += [*check_records(settings), *check_access(facts)]
    print_table(findings)
    return int(any(finding.verdict == "FAIL" for finding in findings))


def read_data(settings: Settings, say: Callable[[str], None], findings: list[Finding]) -> Study | None:
    """The data as a study would have it: `prepare` in a folder that is thrown away."""
    study, data = settings.study, settings.data
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if data.data == "phantoms":
                from train_fn.phantoms import generate

                folder = Path(study.results) / f"phantoms-{data.num_phantoms}-{data.split_seed}"
                data = dataclasses.replace(data, data=str(generate(folder, data.num_phantoms, data.split_seed)))
            aside = dataclasses.replace(study, results=scratch, report_to=())  # `check_records` asks the stores
            prepared = prepare(dataclasses.replace(settings, study=aside, data=data), say)
        except (SettingsError, OSError) as error:
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            findings += [Finding("data", "driver", "cannot be used", problem) for problem in problems]
            return None
    taken = bool(study.name) and (Path(study.results) / study.name / "plan.json").exists()
    fix = f"`--name` must be new, but {study.name} is a study: choose another, or go on with --resume" if taken else ""
    counts = ", ".join(f"{part} {len(getattr(prepared.splits, part))}" for part in ("train", "validation", "test"))
    findings += [Finding("data", "driver", f"images: {counts}"), Finding("name", "driver", study.name or "new", fix)]
    return prepared


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


def lay_out(settings: Settings, resources: dict[str, float], findings: list[Finding]) -> Layout | None:
    """The study's lanes on what the cluster has."""
    found = f"{resources.get('CPU', 0):g} CPU cores, {resources.get('GPU', 0):g} GPUs"
    try:
        layout = plan_layout(settings, resources)
    except SettingsError as error:
        findings.append(Finding("lanes", "cluster", found, error.problems[0]))
        return None
    kind, workers = "GPU" if layout.use_gpu else "CPU", layout.workers_per_trial
    awaited = layout.lanes * workers * layout.worker_resources[kind] > resources.get(kind, 0) + 1e-6
    fix = "what is missing must come from the autoscaler: run the doctor again when the nodes are there"
    asked = f"{found}: {layout.lanes} lane(s) of {workers} {kind} worker(s)"
    findings.append(Finding("lanes", "cluster", asked, fix if awaited else "", warning=True))
    return layout


# ------------------------------------------------------------------------------------------------ nodes


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
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    sources = [path for part in ("tune", "train_fn", "search_spaces") for path in sorted((ROOT / part).rglob("*.py"))]
    project = hashlib.sha256("".join(map(file_hash, sources)).encode()).hexdigest()[:12]
    files = {path.name: path.stat().st_size for pattern in ("*.safetensors", "*.json") for path in model.glob(pattern)}
    config, session = model / "config.json", Path(session_logs()).parent
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
        "token": is_token_auth_enabled(),
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


def verdicts(facts: dict[str, dict[str, Any]], need: Need) -> list[Finding]:
    """What the nodes' facts mean. facts: as `ask_nodes` gives them."""
    found = []
    for where, told in facts.items():
        if where == "driver":
            continue
        if "error" in told:
            fix = f"{where} must be able to work for the study, but {told['error']}: mend or remove the node"
            found.append(Finding("node", where, "cannot be examined", fix))
            continue
        for check, text, fix, *warning in [*judge_node(told, facts["driver"], need), *judge_device(told, need)]:
            found.append(Finding(check, where, text, f"{where}: {fix}" if fix else "", bool(warning)))
    return found


def judge_node(told: dict[str, Any], driver: dict[str, Any], need: Need) -> Iterator[tuple]:
    """Check, what was found, and the fix if one is needed (and a True behind it when that is only a warning)."""
    ours, theirs = driver["versions"], told["versions"]
    other = [f"{key[8:]} {theirs.get(key)}, driver {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    fix = "all nodes must have the driver's versions: pip install -e . there, in the same state of the project"
    yield "versions", "; ".join(other) or f"all {len(ours)} equal", fix if other else ""
    same = told["model"] == driver["model"]
    fix = "the model must lie under the same path with the same files: put it on a shared file system"
    yield "model", f"{len(told['model'])} files" if same else "missing or different", "" if same else fix
    missing = told["missing"]
    fix = f"images must be as the driver sees them, but not {', '.join(missing[:1])}: put them on a shared file system"
    yield "images", f"{told['num_images'] - len(missing)} of {told['num_images']} readable", fix if missing else ""
    why = told["storage"]
    fix = f"--results must be one folder for all nodes, but {why}: mount it everywhere, or give --storage"
    yield "storage", why or "written, read back, shared", fix if why else ""
    fix = "make room, or give another --results, fewer --trials or a lower --save-total-limit"
    short = told["free_gib"] < need.disk
    if not why:
        yield "disk of results", f"{told['free_gib']:.1f} GiB free, {need.disk:.2f} needed", fix if short else ""
    fix = f"make room in {told['session']}, or start Ray with another RAY_TMPDIR"
    yield "disk of Ray", f"{told['session_full']:.0%} full", fix if told["session_full"] > FULL_DISK else ""
    fix = "records and logs will not fit together: turn on time synchronisation"
    yield "clock", f"{told['skew_s']:.1f} s off", fix if told["skew_s"] > 5 else "", True


def judge_device(told: dict[str, Any], need: Need) -> Iterator[tuple]:
    """Whether the node's GPUs, or its RAM, bear the workers that may come to it; in the form of `judge_node`."""
    layout, gpus = need.layout, told["gpus"]
    slots = int(told["resources"].get("GPU" if layout and layout.use_gpu else "CPU", 0))
    if not layout or not slots:
        return  # no worker comes here
    if layout.use_gpu:
        names = {f"{gpu['name']}, driver {gpu['driver']}{'' if gpu['bf16'] else ', no bfloat16'}" for gpu in gpus}
        lack = "torch is built without CUDA" if not told["cuda"] else "" if gpus else "nvidia-smi shows no GPU"
        fix = f"GPUs must be usable, but {lack}: install driver and torch for them" if lack else ""
        yield "GPU", f"{slots} x {'; '.join(sorted(names))}", fix
    if need.compiler:
        fix = "`--torch-compile` needs a C compiler on every node: install one (Debian: build-essential python3-dev)"
        yield "compiler", told["compiler"] or "none", "" if told["compiler"] else fix
    workers = 1 if layout.use_gpu else min(slots, layout.lanes * layout.workers_per_trial)
    ram = told["ram_gib"] / workers
    share = min((gpu["free_gib"] for gpu in gpus), default=0.0) / layout.lanes_per_gpu
    present = share if layout.use_gpu else ram
    if not need.memory:
        return
    whole = sum(need.memory.values())
    text = " + ".join(f"{part} {gib:.2f}" for part, gib in need.memory.items())
    text += f" = {whole:.2f} GiB of {present:.2f} GiB " + ("of a GPU" if layout.use_gpu else f"RAM ({workers} workers)")
    if need.least > present:
        yield "memory", text, f"a micro-batch of one image needs {need.least:.2f} GiB: {SMALLER}"
    else:
        fix = f"trials will run out of memory and halve their micro-batch: {SMALLER}"
        fitting = [micro_batch for micro_batch, gib in need.larger.items() if gib < 0.95 * present]
        if layout.use_gpu and fitting:
            steps = max(need.larger) // max(fitting) * layout.workers_per_trial
            text += (f"; the same images a step in larger micro-batches also fit, and are faster: "
                     f"--per-device-train-batch-size {max(fitting)} --gradient-accumulation-steps {steps}")  # fmt: skip
        yield "memory", text, fix if whole > present else "", True


# ------------------------------------------------------------------------------------------------ memory and disk


def reckon(study: Study, need: Need, facts: dict[str, dict[str, Any]], findings: list[Finding]) -> Need:
    """The need with memory and disk of the largest trial of the space. facts: as `ask_nodes` gives them."""
    trial, workers = largest_trial(study.settings), study.settings.study.workers_per_trial
    on_gpu = need.layout is not None and need.layout.use_gpu
    samples = [*study.splits.train, *study.splits.validation, *study.splits.test]
    gpus = [gpu for told in facts.values() for gpu in told.get("gpus", ())]
    model = study.settings.model
    if on_gpu and model.base_dtype == "auto" and not all(gpu["bf16"] for gpu in gpus):
        model = dataclasses.replace(model, dtype="float16")  # which keeps more
    try:
        sizes = measure(model, trial, on_gpu, samples, study.splits.candidates)
    except (ValueError, OSError) as error:
        findings.append(Finding("model", "driver", "cannot be built", str(error)))
        return need

    def at(micro_batch: int) -> dict[str, float]:
        resized = dataclasses.replace(trial, per_device_train_batch_size=micro_batch)
        return memory_needed(sizes, resized, workers, on_gpu, 1)  # an evaluation halves its batch by itself

    asked, most = trial.per_device_train_batch_size, trial.global_batch_size // workers
    larger = {m: sum(at(m).values()) for m in range(asked + 1, most + 1) if most % m == 0}
    disk = disk_needed(study, trial, sizes.trained)
    return dataclasses.replace(need, memory=at(asked), least=sum(at(1).values()), larger=larger, disk=disk)


def largest_trial(settings: Settings) -> TrialSettings:
    """Of the space's first point and both ends of its ranges, the one that trains most."""
    trials = corners(settings)
    return max(trials, key=lambda trial: (trial.per_device_train_batch_size, trial.lora_r, trial.train_projector))


def disk_needed(study: Study, trial: TrialSettings, trained: int) -> float:
    """GiB of results if every trial runs to its end: adapters in float32, and the state of those that run."""
    settings = study.settings.study
    steps = trial.max_steps or trial.num_train_epochs * math.ceil(len(study.splits.train) / trial.global_batch_size)
    checkpoints = steps // trial.save_steps if trial.save_steps else 0
    checkpoints = min(checkpoints, trial.save_total_limit or checkpoints)
    again = (settings.confirm + 1) * (settings.folds or settings.confirm_seeds) if settings.confirm else 0
    adapters = (settings.trials + again) * (checkpoints + 1) + 1
    state = 2 * 16 * max(1, settings.lanes)  # at two points: weights, ZeRO's copy, moments
    return trained * (4 * adapters + state) / GIB


# ------------------------------------------------------------------------------------------------ collectives


def measure_collectives(
    layout: Layout | None, facts: dict[str, dict[str, Any]], storage: Storage | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    """All-reduce and a ZeRO-2 step between the workers of a trial, or between two where there are several nodes."""
    if not layout or not storage:
        yield Finding("collectives", "cluster", "skipped: lanes and storage must be in order first")
        return
    kind = "GPU" if layout.use_gpu else "CPU"
    slots = [int(told["resources"].get(kind, 0)) for told in facts.values() if "resources" in told]
    workers = max(layout.workers_per_trial, 2 if sum(map(bool, slots)) > 1 else 1)
    single = workers == 1 and not layout.use_gpu  # a single GPU is tried all the same: its driver must suit torch
    if single or sum(slots) < workers:
        why = "a trial has one worker" if single else f"{workers} {kind}s are not there yet"
        yield Finding("collectives", "cluster", f"skipped: {why}")
        return
    say(f"Measuring collectives between {workers} workers")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    from tune.loopback import torch_config

    trainer = TorchTrainer(
        collectives_loop,
        train_loop_config={"storage": storage},
        torch_config=torch_config(ANSWER_S),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=layout.worker_resources,
            placement_strategy="PACK" if layout.workers_per_trial > 1 else "SPREAD",
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(storage.directory),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
        storage.pull(storage.directory / "collectives.json")
        told = json.loads((storage.directory / "collectives.json").read_text())
    except Exception as error:  # whatever ends these workers would end a trial's
        fix = f"{workers} workers must be able to train together, but {last_line(error)}: look at network and firewall"
        yield Finding("collectives", "cluster", "failed", f"{fix} (NCCL: NCCL_SOCKET_IFNAME)")
        return
    speeds = ", ".join(f"{speed:.2f} GB/s at {mib} MiB" for mib, speed in told["gb_per_s"].items())
    if workers > 1:
        yield Finding("collectives", "cluster", f"{workers} workers, {told['backend']}: all-reduce {speeds}")
    yield Finding("ZeRO-2", "cluster", f"a step over {told['trained']:,} weights takes {told['step_s']:.3f} s")


def collectives_loop(config: dict[str, Any]) -> None:
    """Train loop of the doctor's workers: time all-reduce, and an optimizer step under ZeRO-2."""
    import ray.train.torch
    import torch
    import torch.distributed as dist

    from train_fn.engine import deepspeed, deepspeed_config

    place, size = ray.train.torch.get_device(), dist.get_world_size()
    if place.type == "cuda":
        torch.cuda.set_device(place)

    def timed(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(2):  # the first builds connections
            dist.barrier()
            started = time.perf_counter()
            work()
            if place.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[-1]

    speeds = {}
    for mib in MESSAGES_MIB:
        message = torch.ones(mib * 2**18, device=place)
        # What a link carries (the "bus bandwidth" of NCCL's tests), whatever the number of workers.
        speeds[mib] = 2 * (size - 1) / size * message.nbytes / timed(lambda sent=message: dist.all_reduce(sent)) / 1e9  # type: ignore[misc]
    torch.manual_seed(0)
    toy = torch.nn.Linear(1024, 1024).to(place)
    trained = sum(parameter.numel() for parameter in toy.parameters())
    settings = deepspeed_config(TrialSettings(gradient_accumulation_steps=size), size, trained, place.type == "cuda")
    optimizer = torch.optim.AdamW(toy.parameters())
    engine, *_ = deepspeed.initialize(model=toy, optimizer=optimizer, config=settings, dist_init_required=False)

    def step() -> None:
        engine.backward(engine(torch.randn(2, 1024, device=place)).square().mean())
        engine.step()

    step_s = timed(step)
    weights = [torch.empty_like(toy.weight) for _ in range(size)]
    dist.all_gather(weights, toy.weight.detach())
    if not all(torch.equal(weights[0], other) for other in weights):
        raise RuntimeError("the workers' weights differ after a ZeRO-2 step")
    if dist.get_rank() == 0:
        path = config["storage"].directory / "collectives.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"gb_per_s": speeds, "backend": dist.get_backend(), "step_s": step_s, "trained": trained})
        )
        config["storage"].push(path)


# ------------------------------------------------------------------------------------------------ records and access


def check_records(settings: Settings) -> Iterator[Finding]:
    """The stores of --report-to and their packages, as a study checks them before it begins."""
    study = settings.study
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        fix = "" if importlib.util.find_spec(module) else f"`--report-to` {name} needs {module}: pip install {module}"
        if name in study.report_to:
            yield Finding("report to", "driver", name, fix)
    unreachable: list[str] = []
    uri = tracking_uri(study.mlflow_uri)
    problems = check_store(settings, Path(study.results).resolve() / (study.name or "study"), uri, unreachable.append)
    for problem in problems:
        yield Finding("records", "driver", "would be refused", problem)
    for problem in unreachable:
        yield Finding("MLflow", "driver", "no answer", problem, warning=True)
    if "mlflow" in study.report_to and not problems and not unreachable:
        yield Finding("MLflow", "driver", f"{uri} can take the records")


def check_access(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Whether a cluster that was joined wants a token, and who reaches its dashboard."""
    if not os.environ.get("RAY_ADDRESS"):
        return
    import ray._private.worker

    closed = all(told["token"] for where, told in facts.items() if where != "driver" and "token" in told)
    fix = "who reaches this cluster may run code on it: start Ray with RAY_AUTH_MODE=token, see docs/cluster.md"
    yield Finding("access", "cluster", "with a token" if closed else "open", "" if closed else fix, warning=True)
    url = ray._private.worker.get_dashboard_url() or ""
    fix = "other machines reach the dashboard: leave out --dashboard-host and look through SSH, see docs/cluster.md"
    here = not url or url.startswith(("127.0.0.1", "localhost"))
    yield Finding("dashboard", "cluster", url or "none", "" if here else fix, warning=True)


def last_line(error: Exception) -> str:
    """The last line of an error from a worker: the cause, below its trace."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def print_table(findings: Sequence[Finding]) -> None:
    """The findings, and below them what to do about those that are not ok."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 140
    table = Table("check", "where", "found", "verdict")
    for finding in findings:
        table.add_row(*map(plain, (finding.check, finding.where, finding.found, finding.verdict)))
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"  - {finding.verdict}: {plain(finding.fix)}", soft_wrap=True)
    failed = sum(finding.verdict == "FAIL" for finding in findings)
    console.print(f"A study cannot run: {failed} check(s) fail." if failed else "A study can run.")
