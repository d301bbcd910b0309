"""Running out of memory, as every library says it."""

from __future__ import annotations

import re

GIB = 2**30
# Errors of CUDA's libraries for memory that they could not take. cuBLAS also says NOT_INITIALIZED when its handle does
# not fit, which is all that a later call says of it.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|ncclSystemError.*alloc"
    r"|CU(BLAS|SOLVER|SPARSE|DNN|FFT)_(STATUS_)?\w*(ALLOC|INSUFFICIENT_RESOURCES)\w*"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or that of CUDA, cuBLAS, cuDNN, NCCL, Triton or the
    CPU's allocator."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))
    )
