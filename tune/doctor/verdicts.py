"""What the doctor finds: facts against needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train_fn.model.memory import GIB
from train_fn.settings import TrialSettings
from train_fn.trial.memory import measure, memory_needed
from tune.config.settings import Settings
from tune.config.space_check import corners
from tune.lanes.layout import Layout
from tune.plan.prepare import Study

FULL_DISK = 0.95  # above this Ray spills no more objects (its local_fs_capacity_threshold)
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


ANSWER_S = 120  # a node that takes longer cannot be used
