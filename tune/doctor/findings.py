"""A line of the doctor's table, and the lines of each node: what it has against what the study needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tune.lanes.layout import Layout

Facts = dict[str, Any]
"""A node as `node_facts` describes it."""

FULL_DISK = 0.95  # above this Ray spills no more objects (its local_fs_capacity_threshold)
SMALLER = "in this order: --use-qlora; --gradient-checkpointing; a lower --lora-r; on CPUs fewer --lanes"


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
    """What the study needs of a node. All sizes are in GiB."""

    layout: Layout | None = None
    compiler: bool = False
    memory: dict[str, float] = field(default_factory=dict)
    """Of one worker, by use."""
    least: float = 0.0
    """Memory of one worker at a micro-batch of one image."""
    larger: dict[int, float] = field(default_factory=dict)
    """Memory of one worker at micro-batches larger than the one of the settings."""
    disk: float = 0.0
    """Of the results."""


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
            Finding(check, where, text, f"{where}: {fix}" if fix else "", bool(warning))
            for check, text, fix, *warning in rows
        ]
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
    if need.compiler:
        fix = "`--torch-compile` needs a C compiler on every node: install one (Debian: build-essential python3-dev)"
        yield "compiler", node["compiler"] or "none", "" if node["compiler"] else fix
    if not need.memory:
        return
    workers = 1 if layout.use_gpu else min(slots, layout.lanes * layout.workers_per_trial)
    present = node["ram_gib"] / workers
    if layout.use_gpu:
        present = min((gpu["free_gib"] for gpu in gpus), default=0.0) / layout.lanes_per_gpu
    whole = sum(need.memory.values())
    text = " + ".join(f"{use} {gib:.2f}" for use, gib in need.memory.items())
    text += f" = {whole:.2f} GiB of {present:.2f} GiB " + ("of a GPU" if layout.use_gpu else f"RAM ({workers} workers)")
    if need.least > present:
        yield "memory", text, f"a micro-batch of one image needs {need.least:.2f} GiB: {SMALLER}"
        return
    fitting = [micro_batch for micro_batch, gib in need.larger.items() if gib < 0.95 * present]
    if layout.use_gpu and fitting:
        steps = max(need.larger) // max(fitting) * layout.workers_per_trial
        text += (f"; the same images a step in larger micro-batches also fit, and are faster: "
                 f"--per-device-train-batch-size {max(fitting)} --gradient-accumulation-steps {steps}")  # fmt: skip
    fix = f"trials will run out of memory and halve their micro-batch: {SMALLER}"
    yield "memory", text, fix if whole > present else "", True
