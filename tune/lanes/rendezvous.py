"""What both ways of meeting have in common: the error when the workers of a lane do not reach each other, and the time
that leaving may take."""

from __future__ import annotations

import socket

import ray

SHUTDOWN_S = 5  # for the workers of a lane to leave their process group; after the loss of a rank they never do
SHUTDOWN_VARIABLE = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"  # the same for the workers of a cluster; Ray's default: 30


class RendezvousFailed(RuntimeError):
    """The workers of a lane did not meet."""

    @classmethod
    def of(cls, error: Exception, timeout_s: int, hosts: str = "") -> RendezvousFailed:
        """The error with what a user can do about it."""
        last = [type(error).__name__, *str(error).strip().splitlines()][-1]
        return cls(
            f"the workers of a lane must reach each other within {timeout_s} s, but those on {hosts or 'this machine'} "
            f"did not ({last[:300]}): open all TCP ports between the nodes, or name the network interface that "
            f"connects them in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )


def host() -> str:
    """Name and address of a worker's machine."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
