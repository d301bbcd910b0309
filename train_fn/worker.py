"""A lane's worker: holds the base model and runs the jobs that the dispatcher assigns. The only module of `train_fn`
that imports Ray.

Every rank asks the dispatcher itself. So idle ranks wait in no collective, whose time-out would end them.
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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from train_fn.data.samples import Splits
from train_fn.execution import smaller
from train_fn.jobs import EpochReport, Job, ScoreJob, ScoreReport, TrainJob, Verdict
from train_fn.model.hub import fetch_apart
from train_fn.model.hub_ids import is_hub_model
from train_fn.model.unchanged import Inputs
from train_fn.settings import SAVE_STATE_EVERY_S, ModelSettings
from train_fn.support.imports import no_garbage_collection, not_imported
from train_fn.support.storage import Storage

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "optuna", "pillow", "mlflow")
DOWNLOAD_TIMEOUT_S = 6 * 3600  # for a node to download a base; the dispatcher waits less, and can report the reason
PREEMPTED = Path("/tmp/vlm-tune-leave")  # the node's watcher for spot notices makes this file: see cluster.yaml


def is_preempted() -> bool:
    """Whether this node's user, or root, has announced that the node will be taken away."""
    try:
        return PREEMPTED.stat().st_uid in (0, os.getuid())
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class LaneConfig:
    """What all jobs of a lane share."""

    lane: int
    dispatcher: Any
    """Handle of the study's `tune.lanes.dispatcher.Dispatcher` actor."""
    model: ModelSettings
    splits: Splits
    storage: Storage
    num_threads: int
    """torch threads of each worker; 0 leaves torch's default (GPU workers)."""
    best_by: tuple[str, str] | None = None
    """Metric and direction by which a trial's best epoch is chosen. None: the last epoch counts."""
    save_state_every: float = SAVE_STATE_EVERY_S
    """Seconds between two writes of a trial's state."""
    profile: bool = False
    trace: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    """The driver's versions, which every worker must have."""
    inputs: Inputs | None = None
    """Images and base as the driver saw them; every worker must see the same."""
    gpu_share: float = 1.0
    """Share of a GPU's memory that each worker may allocate."""
    collective_timeout_s: int = 1800
    """After this a collective ends its process. Longer than the dispatcher waits, so that the dispatcher can report the
    reason."""


def versions() -> dict[str, str]:
    """Versions that must be the same on every node."""
    return {f"version_{name}": importlib.metadata.version(name) for name in PACKAGES} | {
        "version_python": platform.python_version()
    }


def check_node(config: LaneConfig) -> None:
    """Check that this machine sees what the driver sees. Raises RuntimeError with all differences."""
    ours = versions()
    problems = [f"{name[8:]} is {ours[name]}, the driver's {value}" for name, value in config.versions.items()
                if ours[name] != value]  # fmt: skip
    missing = [image for image in config.splits.images if not os.access(image, os.R_OK)]
    problems += [f"{len(missing)} images cannot be read, {missing[0]} among them"] if missing else []
    if config.inputs and not missing:
        base = config.inputs.changed_base(config.model.model)
        problems += filter(None, (base, config.inputs.changed_images(config.splits)))
    if not config.storage.uri and not os.access(config.storage.directory, os.W_OK):
        problems.append(
            f"{config.storage.directory} cannot be written: it must be one folder for all nodes, or give --storage"
        )
    if problems:
        raise RuntimeError("; ".join(problems))


def lane_loop(options: dict[str, Any]) -> None:
    """The train loop of a lane's TorchTrainer: job after job on one loaded base, until the dispatcher has no more.

    An exception that not every rank is sure to share ends the worker group, and Ray Train starts a new one. The
    dispatcher learns of the loss when the new group registers.

    Args:
        options: {"config": LaneConfig}.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import ray
    import ray.train
    import torch

    config: LaneConfig = options["config"]
    dispatcher = config.dispatcher
    if is_preempted():
        time.sleep(10)  # Ray may put the next group on another node
        raise RuntimeError("this node is preempted")
    placement_group: Any = ray.util.get_current_placement_group()
    group = placement_group.id.hex()  # Ray Train makes a new one for each start of the workers
    if not ray.get(dispatcher.register.remote(config.lane, group, placement_group)):
        return
    rank = ray.train.get_context().get_world_rank()
    heartbeats = Heartbeats(config, group, rank)
    heartbeats.start()
    try:
        base, facts = load(config)
    except Exception as error:
        where = f"a worker on {ray.util.get_node_ip_address()} could not begin"
        ray.get(dispatcher.start_failed.remote(config.lane, group, f"{where}: {error_text(error)}"))
        raise
    idle_since = time.perf_counter()
    for index in range(10**9):
        job = ray.get(dispatcher.next_assignment.remote(config.lane, group, index))
        if job is None:
            return
        waited_s = time.perf_counter() - idle_since
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        of_this_job = facts | {"turn": index, "waited_s": waited_s}
        try:
            job = with_execution(config, base, job, facts["free_gib"])
            report = reporter(config, job, group, rank, of_this_job, idle_since)
            run_job(config, base, job, group, rank, report, heartbeats)
        except Exception as error:
            if not report_error(config, error, base, job, group):
                raise
        # Not after an error that ends these workers: on a broken device it would raise again and hide the first error.
        idle_since = time.perf_counter()
        release_memory()


def release_memory() -> None:
    """Free what a trial has left, also after an error.

    DeepSpeed's engine is a cycle and holds its trial's memory. After an error, one collection is not enough: the first
    one frees the frames that the error holds, and with them the autograd graph, a C++ object through which the
    collector does not see. Only then it finds that nothing else holds the trained weights.
    """
    import torch

    for _ in range(2):
        gc.collect()
    torch.cuda.empty_cache()


def load(config: LaneConfig) -> tuple[Any, dict[str, Any]]:
    """Check the machine and the lane's other workers, and load the base.

    Returns: the base, and the fields of every `EpochReport` that only the worker knows.
    """
    import ray
    import ray.train.torch
    import torch

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = ray.train.torch.get_device()
    name = "cpu"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else collectives of several workers on a node would all use its first GPU
        if config.gpu_share < 1:
            torch.cuda.set_per_process_memory_fraction(config.gpu_share, device)
        name = torch.cuda.get_device_name(device)
    else:
        # With several threads the order of a sum may otherwise depend on their timing.
        # The same as `torch.use_deterministic_algorithms`, which also imports torch's compiler: 1 to 2 s a worker. The
        # compiler reads the variable when it is imported.
        torch.set_deterministic_debug_mode("warn")
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if is_hub_model(config.model.model):
        check_collectives(DOWNLOAD_TIMEOUT_S)  # the lane's other workers may have to wait for this node's download
        fetch_apart(config.model.model)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of huggingface_hub, which reads it once

    unused = ["mlflow", *([] if config.model.use_qlora else ["bitsandbytes"])]
    with no_garbage_collection(), not_imported(*unused):
        from peft.import_utils import is_bnb_available

        from train_fn.model.base import base_gib, load_base
        from train_fn.trial.memory import free_memory

        is_bnb_available()  # PEFT keeps the answer; asked at the first trial, it would import bitsandbytes then
        importlib.import_module("train_fn.trial.loop")  # with DeepSpeed: seconds that should count for no trial
    check_collectives(config.collective_timeout_s)
    check_node(config)
    base = load_base(config.model, device)
    held, whole = base_gib(base.model)
    facts = {"lane": config.lane, "device": name, "num_threads": config.num_threads}
    # On a CPU, as much of the memory as of the cores that this process may use.
    share = config.num_threads / len(os.sched_getaffinity(0)) if device.type == "cpu" else config.gpu_share
    free = ray.get(config.dispatcher.agree_memory.remote(name, round(free_memory(device, share), 1)))
    facts |= {"base_gib": held, "base_16_bit_gib": whole, "free_gib": free}
    if config.inputs:
        facts |= {"base_hash": config.inputs.base_hash, "data_hash": config.inputs.data_hash}
    return base, facts


def check_collectives(timeout_s: int) -> None:
    """Check that the workers of a lane reach each other, and set the time-out of later collectives.

    Raises after the time-out of the workers' rendezvous if they do not.
    """
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        dist.barrier()
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timedelta(seconds=timeout_s))


def with_execution(config: LaneConfig, base: Any, job: Job, free_gib: float) -> Job:
    """The job with a decision on how its steps are computed."""
    import torch.distributed as dist

    from train_fn.trial.memory import choose_execution

    if not isinstance(job, TrainJob) or job.execution is not None:
        return job
    train = (job.splits or config.splits).train
    execution, notes = choose_execution(base, train, job.settings, free_gib, dist.get_world_size(), job.too_large)
    return replace(job, execution=execution, notes=(*job.notes, *notes))


def run_job(
    config: LaneConfig, base: Any, job: Job, group: str, rank: int, report: Callable[[EpochReport], Verdict],
    heartbeats: Heartbeats,
) -> None:  # fmt: skip
    """Train a trial, or score adapters on the test images."""
    import ray

    from train_fn.trial.loop import run_trial
    from train_fn.trial.scoring import baselines, try_adapter

    if config.inputs and rank == 0 and (problem := config.inputs.changed_images(config.splits)):
        raise InputsChanged(problem)
    eval_batch_size = config.model.per_device_eval_batch_size
    if isinstance(job, ScoreJob):
        for adapter in job.adapters:
            config.storage.pull(adapter)
        answers = [try_adapter(base, config.splits, "test", eval_batch_size, adapter) for adapter in job.adapters]
        untuned, features = baselines(base, config.splits, eval_batch_size) if job.baselines else ({}, None)
        scores = ScoreReport(predictions=answers, untuned=untuned, features=features) if rank == 0 else None
        ray.get(config.dispatcher.report.remote(job.number, group, 1, scores))
        return

    run_trial(
        base,
        job.splits or config.splits,
        job.settings,
        report,
        execution=job.execution,
        eval_batch_size=eval_batch_size,
        output=job.output,
        storage=config.storage,
        best_by=config.best_by,
        save_state_every=config.save_state_every,
        rungs=job.rungs,
        preempted=lambda: heartbeats.must_stop or heartbeats.unwanted == job.number,
        profile=config.profile,
        trace=config.trace,
        collective_timeout_s=config.collective_timeout_s,
        progress=functools.partial(config.dispatcher.progress.remote, job.number, group),  # not waited for
    )


def reporter(
    config: LaneConfig, job: Job, group: str, rank: int, facts: dict[str, Any], idle_since: float
) -> Callable[[EpochReport], Verdict]:
    """The report function of a trial: sends rank 0's report to the dispatcher and returns its verdict on every rank.

    Args:
        facts: fields of the report that only the worker knows.
        idle_since: `time.perf_counter()` at the end of the job before.
    """
    import ray

    notes = job.notes if isinstance(job, TrainJob) else ()

    def report(message: EpochReport) -> Verdict:
        if rank == 0:
            more = {"notes": [*notes, *message.notes], "wall_s": time.perf_counter() - idle_since}
            message = replace(message, **(facts | more), system=system_metrics())
        sent = message if rank == 0 else None
        return ray.get(config.dispatcher.report.remote(job.number, group, message.progress, sent))

    return report


def system_metrics() -> dict[str, float]:
    """What this worker uses of its machine: memory in GiB, and CPU seconds since its start."""
    import psutil
    import torch

    process = psutil.Process()
    metrics = {"memory_gib": process.memory_info().rss / 2**30, "cpu_s": sum(process.cpu_times()[:2])}
    if torch.cuda.is_available():
        metrics["gpu_memory_gib"] = torch.cuda.memory_allocated() / 2**30
        metrics["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


class InputsChanged(Exception):
    """An image of the study changed while the study ran."""


def error_text(error: Exception) -> str:
    """An exception's type and message."""
    return "".join(traceback.format_exception_only(error)).strip()


def report_error(config: LaneConfig, error: Exception, base: Any, job: Job, group: str) -> bool:
    """Report an error of a job to the dispatcher.

    Returns: whether these workers are sound and take the next job. They are after a trial's own error, and after the
    allocator of torch refused memory to a lone worker. After an error of CUDA, cuBLAS, cuDNN or NCCL, every later
    call of the process may fail.
    """
    import ray
    import torch
    import torch.distributed as dist

    from train_fn.model.batches import BatchFailed
    from train_fn.model.memory import first_out_of_memory, is_broken_device, with_causes
    from train_fn.trial.applied import TrialFailed
    from train_fn.trial.engine import MicroBatchTooLarge
    from train_fn.trial.loop import Preempted
    from train_fn.trial.memory import longest_sample
    from train_fn.trial.pristine import BaseChanged

    dispatcher, lane, number = config.dispatcher, config.lane, job.number
    if isinstance(error, Preempted) and ray.get(dispatcher.left.remote(number, group)):
        return True  # the user has stopped the trial
    if isinstance(error, TrialFailed):
        # Every rank reports it: the rank that asks for the next job first would otherwise have moved the lane on.
        ray.get(dispatcher.fail.remote(number, group, str(error), True))
        return True
    if reported := first_out_of_memory(error):
        # The trial runs again in a way that takes less memory. Other ranks may wait in a collective for this one, and
        # errors of CUDA's libraries may persist: then only a new worker group is sure to be sound.
        in_step = any(isinstance(each, MicroBatchTooLarge) for each in with_causes(error))
        used = less = None
        if isinstance(job, TrainJob) and job.execution:
            used, train = job.execution, (job.splits or config.splits).train
            less = smaller(used, longest_sample(base, train))
        ray.get(dispatcher.out_of_memory.remote(number, group, str(error), in_step, used, less))
        return isinstance(reported, torch.OutOfMemoryError) and dist.get_world_size() == 1
    if isinstance(error, InputsChanged):
        ray.get(dispatcher.study_fault.remote(lane, group, str(error), True))
    elif isinstance(error, BatchFailed):
        ray.get(dispatcher.study_fault.remote(lane, group, str(error)))
    elif isinstance(error, (Preempted, OSError, BaseChanged)) or is_broken_device(error):
        # The trial is not to blame: another group continues it from its last checkpoint.
        ray.get(dispatcher.interrupted.remote(lane, group, str(error), isinstance(error, Preempted)))
    elif isinstance(error, dist.DistError) or "gloo" in str(error):
        # Another rank is gone. If it had an error of its own, it has reported it before its connections closed.
        ray.get(dispatcher.interrupted.remote(lane, group, f"a collective failed: {error}", False))
    else:
        trace = "".join(traceback.format_exception(error))
        ray.get(dispatcher.fail.remote(number, group, f"{error_text(error)}\n\n{trace}"))
    return False


class Heartbeats(threading.Thread):
    """Sends the dispatcher a heartbeat every second, with a counter that rises while the worker makes progress.

    `must_stop` becomes True when the dispatcher answers that the study is interrupted, or when this node is preempted.
    `unwanted` is the number of a job that the user has stopped.
    """

    def __init__(self, config: LaneConfig, group: str, rank: int) -> None:
        super().__init__(daemon=True)
        import ray

        from train_fn.support import profile  # here: a thread that imports beside another may see half a module

        self.profile = profile
        self.dispatcher = config.dispatcher
        # As bytes: the dispatcher would import Ray Train for the handle, which it needs only to end a hanging worker.
        handle = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
        self.sender = (config.lane, group, rank, handle)
        self.must_stop = False
        self.unwanted: int | None = None

    def run(self) -> None:
        import ray

        while not self.must_stop:
            try:
                answer = ray.get(self.dispatcher.heartbeat.remote(*self.sender, self.profile.work_count))
            except ray.exceptions.RayError:
                return  # the study is gone, and soon this process
            self.must_stop, self.unwanted = answer[0] or is_preempted(), answer[1]
            time.sleep(1)
