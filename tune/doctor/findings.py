"""A line of the doctor's table, and the lines of each node: what it has against what the study needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from train_fn.execution import OUT_OF_MEMORY_ADVICE
from tune.doctor.duration import Speed, Times
from tune.doctor.fit import Worker, fit, words
from tune.lanes.layout import Layout

Facts = dict[str, Any]
"""A node as `node_facts` describes it."""

FULL_DISK = 0.95  # above this Ray spills no more objects (its local_fs_capacity_threshold)


@dataclass(frozen=True)
class Finding:
    """A line of the table. `fix` says what is wrong and what to do about it; "" if nothing is wrong."""

    check: str
    where: str
    found: str
    fix: str = ""
    warning: bool = False

    @property
    def status(self) -> str:
        """ok, warning or FAIL."""
        return "ok" if not self.fix else "warning" if self.warning else "FAIL"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the study needs of a node."""

    layout: Layout | None = None
    torch_compile: bool | None = None
    """As the settings say."""
    worker: Worker | None = None
    """Of the study's largest trial; None if the model cannot be built."""
    times: Callable[[Speed, float, bool], Times] | None = None
    """Estimate from a device's speed, the memory of one worker, and whether layers are compiled by default."""
    disk: float = 0.0
    """Of the results, in GiB."""


def check_nodes(facts: dict[str, Facts], need: Need) -> list[Finding]:
    """The lines of all nodes. facts: as `ask_nodes` returns them; the driver's own are the reference."""
    findings: list[Finding] = []
    for where, node in facts.items():
        if where == "driver":
            continue
        if "error" in node:
            fix = f"{where} must be able to work for the study, but {node['error']}: repair or remove the node"
            findings.append(Finding("node", where, "cannot be examined", fix))
            continue
        rows = [*check_node(node, facts["driver"], need), *check_device(node, need)]
        findings += [
            Finding(check, where, text, f"{where}: {fix}" if fix else "", any(warning))
            for check, text, fix, *warning in rows
        ]
    if need.worker and not any(finding.check in ("memory", "GPU") for finding in findings):
        least, most = (sum(fit(need.worker, gib, need.worker.on_gpu).parts.values()) for gib in (0.0, math.inf))
        text = f"no node for workers yet: one needs {least:.1f} GiB at least and {most:.1f} GiB for the fastest way"
        findings.append(Finding("memory", "cluster", text))
    return findings


def check_node(node: Facts, driver: Facts, need: Need) -> Iterator[tuple]:
    """Check, what was found, and the fix, or "" (and True as a fourth value if that is only a warning)."""
    ours, theirs = driver["versions"], node["versions"]
    other = [f"{key[8:]} {theirs.get(key)}, driver {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    fix = "all nodes must have the driver's versions: pip install -e . there, in the same state of the project"
    yield "versions", "; ".join(other) or f"all {len(ours)} equal", fix if other else ""
    same, absent = node["model"] == driver["model"], node.get("fetches") and "config.json" not in node["model"]
    fix = "the model must lie under the same path with the same files: put it on a shared file system"
    found = f"{len(node['model'])} files" if same else "to be downloaded" if absent else "missing or different"
    yield "model", found, "" if same or absent else fix
    missing = node["missing"]
    fix = f"images must be as the driver sees them, but not {', '.join(missing[:1])}: put them on a shared file system"
    yield "images", f"{node['num_images'] - len(missing)} of {node['num_images']} readable", fix if missing else ""
    problem = node["storage"]
    fix = f"--results must be one folder for all nodes, but {problem}: mount it everywhere, or give --storage"
    yield "storage", problem or "written, read back, shared", fix if problem else ""
    fix = "make room, or give another --results, fewer --trials or a lower --save-total-limit"
    short = node["free_gib"] < need.disk
    if not problem:
        yield "disk of results", f"{node['free_gib']:.1f} GiB free, {need.disk:.2f} needed", fix if short else ""
    fix = f"make room in {node['session']}, or start Ray with another RAY_TMPDIR"
    yield "disk of Ray", f"{node['session_full']:.0%} full", fix if node["session_full"] > FULL_DISK else ""
    fix = "records and logs will not fit together: turn on time synchronisation"
    yield "clock", f"{node['skew_s']:.1f} s off", fix if node["skew_s"] > 5 else "", True


def check_device(node: Facts, need: Need) -> Iterator[tuple]:
    """Whether the node's GPUs, or its RAM, have room for the workers that may run there. Yields as `check_node`."""
    layout, gpus = need.layout, node["gpus"]
    slots = int(node["resources"].get("GPU" if layout and layout.use_gpu else "CPU", 0))
    if not layout or not slots:
        return  # no worker runs there
    if layout.use_gpu:
        names = {f"{gpu['name']}, driver {gpu['driver']}{'' if gpu['bf16'] else ', no bfloat16'}" for gpu in gpus}
        lack = "torch is built without CUDA" if not node["cuda"] else "" if gpus else "nvidia-smi shows no GPU"
        fix = f"GPUs must be usable, but {lack}: install driver and torch for them" if lack else ""
        yield "GPU", f"{slots} x {'; '.join(sorted(names))}", fix
    by_default = need.torch_compile is None and layout.use_gpu and any(gpu["bf16"] for gpu in gpus)
    if need.torch_compile or by_default:
        fix = "compiled layers need a C compiler on every node: install one (Debian: build-essential python3-dev)"
        fix = "" if node["compiler"] else fix if need.torch_compile else f"{fix}; without it trials are slower"
        yield "compiler", node["compiler"] or "none", fix, not need.torch_compile
    if need.worker:
        yield from check_memory(node, need.worker, layout)


def check_memory(node: Facts, worker: Worker, layout: Layout) -> Iterator[tuple]:
    """How the study's largest trial would run in the memory of each kind of device. Yields as `check_node`."""
    for name, present, compiles in devices(node, layout):
        got, given = fit(worker, present, compiles), worker.trial.per_device_train_batch_size
        sum_of = " + ".join(f"{use} {gib:.2f}" for use, gib in got.parts.items())
        text = f"{words(got.execution)}: {sum_of} = {sum(got.parts.values()):.2f} GiB of {present:.2f} GiB {name}"
        if not got.fits:
            advice = OUT_OF_MEMORY_ADVICE[0].lower() + OUT_OF_MEMORY_ADVICE[1:]
            advice += "" if layout.use_gpu else "; fewer --lanes"
            yield "memory", text, f"one sample at a time and gradient checkpointing do not fit, either: {advice}"
            continue
        fix = ""
        if given and got.execution.images < given:
            fix = f"trials will run out of memory and halve their micro-batch of {given}: leave it out (auto)"
        elif given and got.execution.gradient_checkpointing > worker.trial.gradient_checkpointing:
            fix = "trials will run out of memory and turn on gradient checkpointing"
        elif given and layout.use_gpu and (larger := larger_micro_batch(worker, present, compiles)) > given:
            steps = worker.trial.global_batch_size // larger
            text += (f"; larger micro-batches also fit, and are faster: --per-device-train-batch-size {larger} "
                     f"--gradient-accumulation-steps {steps}, or auto")  # fmt: skip
        yield "memory", text, fix, True


def devices(node: Facts, layout: Layout) -> list[tuple[str, float, bool]]:
    """The kinds of devices of a node: name, GiB that one worker may take, whether layers are compiled by default."""
    if not layout.use_gpu:
        slots = int(node["resources"].get("CPU", 0))
        workers = max(1, min(slots, layout.lanes * layout.workers_per_trial))
        return [(f"RAM ({workers} workers)", node["ram_gib"] / workers, False)]
    free: dict[tuple[str, bool], float] = {}
    for gpu in node["gpus"]:
        kind = (gpu["name"], gpu["bf16"] and bool(node["compiler"]))
        free[kind] = min(gpu["free_gib"], free.get(kind, gpu["free_gib"]))
    return [(f"of {name}", gib / layout.lanes_per_gpu, compiles) for (name, compiles), gib in free.items()]


def larger_micro_batch(worker: Worker, present: float, compiles: bool) -> int:
    """The largest micro-batch of the same images a step that fits; 0 if none does."""
    most = worker.trial.global_batch_size // worker.workers
    sizes = [images for images in range(1, most + 1) if most % images == 0]
    fitting = (fit(worker, present, compiles, images).execution.images == images for images in sizes)
    return max((images for images, fits in zip(sizes, fitting, strict=True) if fits), default=0)


def check_times(facts: dict[str, Facts], speeds: dict[str, Speed], need: Need) -> Iterator[Finding]:
    """How long a trial and the study would take on the devices of each node."""
    if not need.times or not need.layout:
        return
    for where, speed in speeds.items():
        _, present, compiles = devices(facts[where], need.layout)[0]
        found = need.times(speed, present, compiles)
        study = " to ".join(dict.fromkeys(map(duration, found.study)))
        text = (
            f"estimate: {found.step:.2f} s a step, {duration(found.trial)} the guide's trial, {study} the study on "
            f"{need.layout.lanes} such lane(s) (matmul {speed.matmul / 1e12:.3g} TFLOP/s, copy "
            f"{speed.copy / 1e9:.3g} GB/s, {speed.launch * 1e6:.1f} us an operation)"
        )
        yield Finding("time", where, text)
    if not speeds:
        yield Finding("time", "cluster", "not estimated: no free device to measure")


def duration(seconds: float) -> str:
    """Seconds for a reader: two digits and a unit."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
