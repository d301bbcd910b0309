"""A process group that no other machine can reach, for a Ray of one machine. torch's usual rendezvous, a TCPStore,
listens on every interface."""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from tune.lanes.ray_start import session_folder
from tune.lanes.rendezvous import SHUTDOWN_S, RendezvousFailed

INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # of the workers' environment


def torch_config(timeout_s: int) -> Any:
    """How the workers of a lane meet: in Ray's way in a cluster that was joined, else in a file."""
    if os.environ.get("RAY_ADDRESS"):
        from tune.lanes.cluster_backend import ClusterConfig  # a controller on a cluster needs torch for it

        return ClusterConfig(timeout_s=timeout_s)
    return LoopbackConfig(timeout_s=timeout_s)


@dataclass
class LoopbackConfig(BackendConfig):
    """Stands for a TorchConfig; its workers meet in a file.

    Not a subclass: a lane's controller, which receives it, would import torch and never use it.
    """

    timeout_s: int
    backend: str = "gloo"  # TorchTrainer asks for it; LoopbackBackend chooses by the workers' resources

    @property
    def backend_cls(self) -> type[Backend]:
        return LoopbackBackend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context


class LoopbackBackend(Backend):
    """Joins the workers to a process group, and lets them leave it."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        meeting_point = f"file://{session_folder()}/rendezvous-{uuid.uuid4().hex}"
        try:
            worker_group.execute(join, backend, meeting_point, backend_config.timeout_s)
        except RuntimeError as error:
            raise RendezvousFailed.of(error, backend_config.timeout_s) from error

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                ray.get(worker_group.execute_async(leave), timeout=SHUTDOWN_S)


def join(backend: str, meeting_point: str, timeout_s: int) -> None:
    """Join a worker to the process group of its lane, with the variables of torchrun, which DeepSpeed reads."""
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "NODE_RANK": str(context.get_node_rank())}
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size())}
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a collective that times out ends its process
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=meeting_point, rank=rank, world_size=size, timeout=timeout)


def leave() -> None:
    """Let a worker leave its process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
