"""A process group that no other machine can reach, for a Ray of one machine. torch's usual rendezvous, a TCPStore,
listens on every interface."""

from __future__ import annotations

import os
import uuid
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # of the workers' environment


def torch_config(timeout_s: int) -> TorchConfig:
    """How the workers of a trainer meet: as Ray has it in a cluster that was joined, else out of reach for others."""
    return (TorchConfig if os.environ.get("RAY_ADDRESS") else LoopbackConfig)(timeout_s=timeout_s)


class LoopbackConfig(TorchConfig):
    """TorchConfig whose workers meet in a file."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Ray's own, but for the rendezvous."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        session = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
        options = {
            "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo",
            "world_size": len(worker_group),
            "init_method": f"file://{session}/rendezvous-{uuid.uuid4().hex}",
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **options)
                for rank in range(len(worker_group))
            ]
        )
