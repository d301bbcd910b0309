"""Divides the machines among lanes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tune.config.paths import SettingsError
from tune.config.settings import Settings


@dataclass(frozen=True)
class Layout:
    """How many lanes a study has, and what each of them gets."""

    lanes: int
    workers_per_trial: int
    use_gpu: bool
    num_threads: int
    """torch threads of each CPU worker, at most OMP_NUM_THREADS; 0 for GPUs: torch's default."""
    lanes_per_gpu: int = 1

    @property
    def devices_per_trial(self) -> float:
        """GPUs or CPU workers that a trial holds."""
        return self.workers_per_trial / (self.lanes_per_gpu if self.use_gpu else 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """Ray resources of each worker."""
        return {"CPU": 1} | ({"GPU": 1 / self.lanes_per_gpu} if self.use_gpu else {})


def plan_layout(settings: Settings, resources: dict[str, float]) -> Layout:
    """Divide the cluster's resources among lanes. Raises SettingsError when it can never hold one lane.

    There are as many lanes as fit, because independent trials scale better than one trial over several workers.
    """
    study = settings.study
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    use_gpu = study.device == "gpu" or (study.device == "auto" and gpus > 0)
    slots, what = cores, "CPU cores"
    if use_gpu:
        slots, what = gpus * study.lanes_per_gpu, "GPUs" if study.lanes_per_gpu == 1 else "shares of GPUs"
    most = slots // study.workers_per_trial
    # An autoscaler adds GPUs on request, so they may be missing now. It needs --lanes to know how many.
    awaited = study.device == "gpu" and study.lanes > 0 and joins_cluster()
    if most < max(1, study.lanes) and not awaited:
        raise SettingsError(
            [
                f"`--lanes` x `--workers-per-trial` must fit the {slots} {what} of the cluster, but got "
                f"{max(1, study.lanes)} x {study.workers_per_trial}: lower one (on an autoscaling cluster say "
                f"--device gpu and --lanes)"
            ]
        )
    lanes = min(study.lanes or most, study.trials)
    threads = 0 if use_gpu else max(1, cores // (lanes * study.workers_per_trial))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal():
        threads = min(threads, max(1, int(asked)))
    return Layout(lanes, study.workers_per_trial, use_gpu, threads, study.lanes_per_gpu)


def joins_cluster() -> bool:
    """Whether the study joins a running cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def placement_strategy(layout: Layout, nodes: Sequence[dict[str, float]]) -> str:
    """How Ray places the workers of a lane: "STRICT_PACK", all on one node, if every lane finds such a node; else
    "PACK", on as few nodes as possible. So it is where some nodes are not there yet.

    Args:
        nodes: resources of each node that is there.
    """
    needed = layout.worker_resources.items()
    fitting = [int(min(node.get(name, 0) / amount for name, amount in needed) + 1e-6) for node in nodes]
    room = sum(workers // layout.workers_per_trial for workers in fitting)
    return "STRICT_PACK" if room >= layout.lanes else "PACK"


def compile_threads(layout: Layout, nodes: Sequence[dict[str, float]]) -> int:
    """Cores for each GPU worker to compile with, on the node with the fewest; at most 32, torch's own limit. 0: no node
    has a GPU yet.

    Args:
        nodes: resources of each node that is there.
    """
    shares = []
    for node in nodes:
        room = int(node.get("GPU", 0)) * layout.lanes_per_gpu
        if room:
            shares.append(node.get("CPU", 1) / min(room, layout.lanes * layout.workers_per_trial))
    return min(32, max(1, int(min(shares)))) if shares else 0
