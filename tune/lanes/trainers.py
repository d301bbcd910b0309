"""Lanes: long-lived TorchTrainers that trials pass through.

A trial that started its own TorchTrainer would pay for processes, imports, process group and base model each time:
17 to 20 s around a second of training. Lanes pay once. They belong to the study, not to a Tune trial: Tune's side of a
trial (`QueuedTrial`) only submits a job to the dispatcher and waits for reports, and any lane takes the next job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train_fn.model.checkpoint import hash_of
from train_fn.model.unchanged import Inputs
from train_fn.worker import LaneConfig, lane_loop, versions
from tune.config.paths import SettingsError
from tune.lanes.dispatcher import Dispatcher
from tune.lanes.rendezvous import RendezvousFailed
from tune.records.goals import epoch_goal

if TYPE_CHECKING:
    from tune.lanes.layout import Layout
    from tune.plan.prepare import Study


RENDEZVOUS_S = 120  # for the workers of a lane to find each other


def start_dispatcher(study: Study, layout: Layout) -> Any:
    """Start the study's dispatcher. It takes no CPU and stays on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Dispatcher)
    return actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(
        layout.lanes, study.settings.study.hang_timeout, layout.devices_per_trial, study.plan.get("free_gib")
    )


class Lanes:
    """The study's lanes. The fit() of each lane's TorchTrainer runs in a thread of the driver.

    Args:
        say: prints a line of the study's output.
    """

    def __init__(
        self, study: Study, layout: Layout, dispatcher: Any, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.dispatcher = dispatcher
        self.say = say
        self.over = False
        make_trainer = trainer_factory(study, layout, dispatcher)
        self.threads = [
            threading.Thread(target=self._run, args=(lane, make_trainer(lane)), daemon=True)
            for lane in range(layout.lanes)
        ]
        self.threads.append(threading.Thread(target=self._print_notices, daemon=True))
        for thread in self.threads:
            thread.start()

    def _print_notices(self) -> None:
        """Print the dispatcher's notices as they come."""
        seen = 0
        with contextlib.suppress(ray.exceptions.RayError):  # the search reports it when the dispatcher is gone
            while notices := ray.get(self.dispatcher.next_notices.remote(seen)):
                seen += len(notices)
                for notice in notices:
                    self.say(f"Lanes: {notice}")

    def _run(self, lane: int, trainer: Any) -> None:
        error, again, unreachable = "", True, False
        while again:
            try:
                trainer.fit()
                error, again = "", False
            except Exception as failure:  # whatever ended the lane, the trials that waited for it report it
                error = f"lane {lane} ended: {failure}"
                # A rendezvous fails in the controller, and Ray puts its whole trace into the message.
                cause = getattr(failure, "controller_failure", None)
                unreachable = isinstance(cause, RendezvousFailed)
                error = str(cause) if unreachable else error
            if self.over or not ray.is_initialized():
                return  # touching Ray after its shutdown would end the whole process
            if error:
                again, placement_group = ray.get(self.dispatcher.controller_failed.remote(lane, error, unreachable))
                # The resources of a lost controller stay reserved as long as the study lives: Ray's own cleaner learns
                # of the loss only through the dashboard, which a single machine does not run.
                if placement_group:
                    ray.util.remove_placement_group(placement_group)
        ray.get(self.dispatcher.lane_ended.remote(lane, error))

    def drain(self, timeout_s: float = 30) -> None:
        """Let the running trials write their state at the next step, and wait for that."""
        ray.get(self.dispatcher.close.remote(drain=True))
        deadline = time.monotonic() + timeout_s
        while ray.get(self.dispatcher.snapshot.remote())["running"] and time.monotonic() < deadline:
            time.sleep(0.2)
        self.over = True

    def close(self, timeout_s: float = 30) -> None:
        """Let the lanes end, and wait for that."""
        self.over = True
        ray.get(self.dispatcher.close.remote())
        for thread in self.threads:
            thread.join(timeout_s)


def trainer_factory(study: Study, layout: Layout, dispatcher: Any) -> Callable[[int], Any]:
    """A function that makes the TorchTrainer of a lane, by its number."""
    # The default of 2 s would delay the lane's end and the restart of a lost group. Ray reads it when imported.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from tune.lanes.compat_ray import lane_trainer
    from tune.lanes.layout import compile_threads, placement_strategy
    from tune.lanes.loopback import INTERFACE, torch_config

    settings = study.settings
    alone = not os.environ.get("RAY_ADDRESS")
    environment = {"OMP_NUM_THREADS": str(layout.num_threads)} if layout.num_threads else {}
    environment |= {name: os.environ.get(name, value) for name, value in INTERFACE.items()} if alone else {}
    timeout_s = round(2 * settings.study.hang_timeout) + 60
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    environment |= gpu_environment(timeout_s, compile_threads(layout, nodes)) if layout.use_gpu else {}
    trainer_class = lane_trainer(alone)
    folder = f"{study.storage.uri or study.directory}/ray/{time.strftime('%Y%m%d-%H%M%S')}"
    config = LaneConfig(
        lane=0,
        dispatcher=dispatcher,
        model=settings.model,
        splits=study.splits,
        storage=study.storage,
        num_threads=layout.num_threads,
        best_by=epoch_goal(study.goals, settings.study.select),
        save_state_every=settings.study.save_state_every,
        profile=settings.study.profile,
        trace=settings.study.trace,
        versions=versions(),
        inputs=inputs_of(study),
        gpu_share=1 / layout.lanes_per_gpu if layout.use_gpu else 1.0,
        collective_timeout_s=timeout_s,
    )

    def make(lane: int) -> Any:
        return trainer_class(
            lane_loop,
            train_loop_config={"config": dataclasses.replace(config, lane=lane)},
            torch_config=torch_config(RENDEZVOUS_S),
            scaling_config=ScalingConfig(
                num_workers=layout.workers_per_trial,
                use_gpu=layout.use_gpu,
                resources_per_worker=layout.worker_resources,
                placement_strategy=placement_strategy(layout, nodes),
            ),
            run_config=RunConfig(
                name=f"lane-{lane}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=-1),
                worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # of Train V2's RunConfig
            ),
        )

    return make


def gpu_environment(collective_timeout_s: int, num_compile_threads: int) -> dict[str, str]:
    """Variables of GPU workers, but for those that the user has set.

    Expandable segments: with lengths that vary, torch's allocator otherwise reserves 1.45 times what it uses. The
    monitor of NCCL's watchdog would abort a process after 480 s, before the dispatcher can report the reason. Each
    worker starts processes that compile: by default one for each core of the node, up to 32.

    Args:
        num_compile_threads: processes that compile for a worker; 0: torch's default.
    """
    variables = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(collective_timeout_s)}
    if num_compile_threads:
        variables["TORCHINDUCTOR_COMPILE_THREADS"] = str(num_compile_threads)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch reads first
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def inputs_of(study: Study) -> Inputs:
    """Images and base as the driver sees them now. Raises SettingsError when the base has changed since plan.json."""
    model = study.settings.model.model
    inputs = Inputs.seen(study.splits, model, study.plan["data_hash"], study.plan["base_hash"])
    if hash_of(inputs.base_files) != inputs.base_hash:
        raise SettingsError([f"the base model {model} must stay as the study was begun with, but has changed since"])
    return inputs
