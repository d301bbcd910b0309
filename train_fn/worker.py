"""A lane's worker: holds the base model and trains the trials that the dispatcher hands it. The only module here that
imports Ray.

Every rank asks the dispatcher by itself, so an idle lane waits in no collective, whose timeout would end it.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from train_fn.data.samples import Splits
from train_fn.model.unchanged import Inputs
from train_fn.nano import CHECKPOINT
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.storage import Storage

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "optuna", "pillow", "mlflow")
LEAVE = Path("/tmp/vlm-tune-leave")  # made by a node's watcher for spot notices: see cluster.yaml


def node_leaves() -> bool:
    """Whether this node has been told to leave, by its own user or root."""
    try:
        return LEAVE.stat().st_uid in (0, os.getuid())
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class LaneJob:
    """What every trial of a study shares, as handed to the workers of a lane."""

    lane: int
    dispatcher: Any
    """Handle of the study's `tune.lanes.dispatcher.Dispatcher` actor."""
    model: ModelSettings
    splits: Splits
    positive: str
    storage: Storage
    num_threads: int
    """torch threads of each worker; 0 leaves torch's default (GPU workers)."""
    profile: bool = False
    trace: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    """The driver's, which every worker must have."""
    inputs: Inputs | None = None
    """What the driver saw of images and base, which every worker must see."""
    collective_timeout_s: int = 1800
    """After this a collective ends its process. Longer than the dispatcher waits, which says why."""


def versions() -> dict[str, str]:
    """Versions of what every node must agree on."""
    return {f"version_{name}": importlib.metadata.version(name) for name in PACKAGES} | {
        "version_python": platform.python_version()
    }


def check_node(job: LaneJob) -> None:
    """Whether this machine sees what the driver sees. Raises RuntimeError with all that it does not."""
    ours = versions()
    found = [f"{name[8:]} is {ours[name]}, the driver's {value}" for name, value in job.versions.items()
             if ours[name] != value]  # fmt: skip
    samples = (*job.splits.train, *job.splits.validation, *job.splits.test)
    missing = [sample.image for sample in samples if not os.access(sample.image, os.R_OK)]
    found += [f"{len(missing)} images cannot be read, {missing[0]} among them"] if missing else []
    if job.inputs and not missing:
        directory = CHECKPOINT if job.model.model == "nano" else Path(job.model.model)
        found += filter(None, (job.inputs.changed_base(directory), job.inputs.changed_images(job.splits)))
    if not job.storage.uri and not os.access(job.storage.directory, os.W_OK):
        found.append(
            f"{job.storage.directory} cannot be written: it must be one folder for all nodes, or give --storage"
        )
    if found:
        raise RuntimeError("; ".join(found))


def lane_loop(config: dict[str, Any]) -> None:
    """The train loop of a lane's TorchTrainer: trial after trial on one loaded base, until the dispatcher has no more.

    An exception that not every rank is known to share ends the worker group, and Ray Train starts a new one; the
    dispatcher then learns from the new group's first question that the trial was lost.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import ray
    import ray.train
    import ray.train.torch
    import torch

    job: LaneJob = config["job"]
    if node_leaves():
        time.sleep(10)  # Ray may place the next group elsewhere
        raise RuntimeError("this node leaves")
    place: Any = ray.util.get_current_placement_group()
    group = place.id.hex()  # Ray Train makes a new one for each start of the workers
    if not ray.get(job.dispatcher.wants.remote(job.lane, group, place)):
        return
    rank = ray.train.get_context().get_world_rank()
    pulse = Pulse(job, group, rank)
    pulse.start()
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    started = time.perf_counter()
    try:
        from train_fn.model.base import base_gib, load_base

        importlib.import_module("train_fn.trial.loop")  # with DeepSpeed: seconds that belong to no trial
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else collectives of several workers on a node would all take its first GPU
        else:
            # With several threads a sum may otherwise be taken in the order in which they come.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        meet(job.collective_timeout_s)
        check_node(job)
        base = load_base(job.model, device)
    except Exception as error:
        told = "".join(traceback.format_exception_only(error)).strip()
        where = f"a worker on {ray.util.get_node_ip_address()} could not begin"
        ray.get(job.dispatcher.start_failed.remote(job.lane, group, f"{where}: {told}"))
        raise
    startup_s = time.perf_counter() - started
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    held, whole = base_gib(base.model)
    facts = {"lane": job.lane, "device": name, "num_threads": job.num_threads, "startup_s": startup_s}
    facts |= {"base_gib": held, "base_16_bit_gib": whole}
    if job.inputs:
        facts |= {"base_hash": job.inputs.base_hash, "data_hash": job.inputs.data_hash}
    idle_since = time.perf_counter()
    for turn in range(10**9):
        assignment = ray.get(job.dispatcher.next_assignment.remote(job.lane, group, turn))
        if assignment is None:
            return
        times = idle_since, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        extra = facts | {"turn": turn, "notes": assignment.get("notes", [])}
        try:
            work(job, base, assignment, group, rank, extra, times, pulse)
        except Exception as error:
            if not goes_on(job, error, assignment["number"], group):
                raise
        # Not after an error that ends these workers: on a broken device it would raise another one, and hide the first.
        idle_since = time.perf_counter()
        gc.collect()  # DeepSpeed's engine is a cycle, and holds its trial's memory
        torch.cuda.empty_cache()


def meet(collective_timeout_s: int) -> None:
    """See whether the workers of a lane reach each other; raises after the time-out of their rendezvous if they do not.
    Collectives get a time-out of their own."""
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=collective_timeout_s))


def work(
    job: LaneJob, base: Any, assignment: dict[str, Any], group: str, rank: int, extra: dict[str, Any],
    times: tuple[float, float], pulse: Pulse,
) -> None:  # fmt: skip
    """Do one assignment: train a trial, or score adapters on the test images.

    Args:
        extra: facts for the reports.
        times: `time.perf_counter()` at the end of the assignment before, and when this one came.
    """
    import ray

    from train_fn.trial.loop import run_trial
    from train_fn.trial.scoring import try_adapter

    number = assignment["number"]
    if job.inputs and rank == 0 and (problem := job.inputs.changed_images(job.splits)):
        raise InputsChanged(problem)
    if assignment["kind"] == "score":
        for adapter in assignment["adapters"]:
            job.storage.pull(Path(adapter))
        found = [
            try_adapter(base, job.splits, "test", job.model.per_device_eval_batch_size, Path(adapter))
            for adapter in assignment["adapters"]
        ]
        message = extra | {"done": True, "epoch": 1, "predictions": found}
        ray.get(job.dispatcher.report.remote(number, group, 1, message if rank == 0 else None))
        return

    run_trial(
        base,
        assignment.get("splits", job.splits),
        TrialSettings.from_dict(assignment["settings"]),
        reporter(job, number, group, rank, extra, *times),
        eval_batch_size=job.model.per_device_eval_batch_size,
        positive=job.positive,
        output=Path(assignment["output"]),
        storage=job.storage,
        preempted=lambda: pulse.leaving,
        profile=job.profile,
        trace=job.trace,
        progress=functools.partial(job.dispatcher.progress.remote, number, group),  # nobody waits for its answer
    )


class InputsChanged(Exception):
    """An image of the study has changed while it runs."""


def goes_on(job: LaneJob, error: Exception, number: int, group: str) -> bool:
    """Report an error of an assignment to the dispatcher. Returns True if these workers are sound and go on."""
    import ray
    import torch
    import torch.distributed as dist

    from train_fn.model.batches import BatchFailed
    from train_fn.model.memory import is_out_of_memory
    from train_fn.trial.applied import TrialFailed
    from train_fn.trial.engine import MicroBatchTooLarge
    from train_fn.trial.loop import Preempted
    from train_fn.trial.pristine import BaseChanged

    told = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, TrialFailed):
        # Every rank knows it and says so: the one that asks for work first would otherwise have moved the lane on.
        ray.get(job.dispatcher.fail.remote(number, group, str(error), True))
        return True
    if is_out_of_memory(error):
        # Begun again with half the micro-batch. With several ranks the others may wait in a collective for this one,
        # and errors of CUDA's libraries may stay: only a new worker group is sure to be sound.
        in_step = isinstance(error, MicroBatchTooLarge)
        ray.get(job.dispatcher.out_of_memory.remote(number, group, str(error), in_step))
        return isinstance(error.__cause__ if in_step else error, torch.OutOfMemoryError) and dist.get_world_size() == 1
    if isinstance(error, InputsChanged):
        ray.get(job.dispatcher.study_fault.remote(job.lane, group, str(error), True))
    elif isinstance(error, BatchFailed):
        ray.get(job.dispatcher.study_fault.remote(job.lane, group, str(error)))
    elif isinstance(error, (Preempted, OSError, torch.AcceleratorError, BaseChanged)):
        # No fault of the trial's: it goes on from its last checkpoint, on another group.
        free = isinstance(error, Preempted)
        ray.get(job.dispatcher.interrupted.remote(job.lane, group, str(error), free))
    elif not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        # A broken collective only says that another rank is gone; if that one had a fault to tell, it has.
        trace = "".join(traceback.format_exception(error))
        ray.get(job.dispatcher.fail.remote(number, group, f"{told}\n\n{trace}"))
    return False


class Pulse(threading.Thread):
    """Tells the dispatcher every second that this process lives and how far its work has come, and hears from it, or
    from the file that a node's watcher for spot notices makes, whether it must leave."""

    def __init__(self, job: LaneJob, group: str, rank: int) -> None:
        super().__init__(daemon=True)
        import ray

        from train_fn.support import profile  # here, for a thread that imports beside another one may see half a module

        self.profile = profile
        self.dispatcher = job.dispatcher
        self.told = (job.lane, group, rank, ray.get_runtime_context().current_actor)
        self.leaving = False

    def run(self) -> None:
        import ray

        while not self.leaving:
            try:
                self.leaving = (
                    ray.get(self.dispatcher.pulse.remote(*self.told, self.profile.work_count)) or node_leaves()
                )
            except ray.exceptions.RayError:
                return  # the study is gone, and soon this process
            time.sleep(1)


def system_metrics() -> dict[str, float]:
    """What this worker uses of its machine: memory in GiB, and CPU seconds since it was started."""
    import psutil
    import torch

    process = psutil.Process()
    found = {"memory_gib": process.memory_info().rss / 2**30, "cpu_s": sum(process.cpu_times()[:2])}
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = torch.cuda.memory_allocated() / 2**30
        found["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def reporter(
    job: LaneJob, number: int, group: str, rank: int, extra: dict[str, Any], idle_since: float, received: float
) -> Callable[[dict[str, Any]], bool]:
    """The trial's report function: rank 0's message goes to the dispatcher, its answer to every rank."""
    import ray

    def report(message: dict[str, Any]) -> bool:
        # From the end of the trial before: what this trial has cost the lane, waiting for it included.
        times = {"wall_s": time.perf_counter() - idle_since, "waited_s": received - idle_since}
        notes = {"notes": [*extra["notes"], *message["notes"]]}
        told = message | extra | times | notes | {"system": system_metrics()} if rank == 0 else None
        return ray.get(job.dispatcher.report.remote(number, group, message["epoch"], told))

    return report
