"""Recognising errors of every library that mean: out of memory."""

from __future__ import annotations

import re

GIB = 2**30
# Messages of CUDA's libraries when they cannot allocate memory. When cuBLAS's handle did not fit, every later call
# reports NOT_INITIALIZED.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|ncclSystemError.*alloc"
    r"|CU(BLAS|SOLVER|SPARSE|DNN|FFT)_(STATUS_)?\w*(ALLOC|INSUFFICIENT_RESOURCES)\w*"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA, cuBLAS, cuDNN, NCCL, Triton or the CPU's allocator means that memory ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))
    )
