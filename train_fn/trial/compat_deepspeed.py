"""What DeepSpeed offers no public way for."""

from __future__ import annotations

import deepspeed.ops


def without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce.

    On a CPU it would compile one at the first start: a minute, and a compiler that a user's machine need not have. It
    serves inference only; gloo runs the collectives of training either way. DeepSpeed takes no setting for this: it
    looks the op up in this table, which it fills when it is first read.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
