"""How the workers of a lane meet in a cluster: in Ray's way, with errors that name the hosts."""

from __future__ import annotations

import os
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from tune.lanes.rendezvous import SHUTDOWN_S, SHUTDOWN_VARIABLE, RendezvousFailed, host


class ClusterConfig(TorchConfig):
    """TorchConfig whose errors name the hosts, and whose shutdown after the loss of a rank is short."""

    @property
    def backend_cls(self) -> type[Backend]:
        parent: Any = super().backend_cls

        class ClusterBackend(parent):  # of the class that Ray gives to a TorchConfig
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                os.environ.setdefault(SHUTDOWN_VARIABLE, str(SHUTDOWN_S))  # of this controller, which reads it later
                hosts = ", ".join(dict.fromkeys(worker_group.execute(host)))
                try:
                    super().on_start(worker_group, backend_config)
                except RuntimeError as error:
                    raise RendezvousFailed.of(error, backend_config.timeout_s, hosts) from error

        return ClusterBackend
