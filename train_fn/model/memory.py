"""Recognising errors of every library that mean: out of memory, or a broken device."""

from __future__ import annotations

import re
from collections.abc import Iterator

GIB = 2**30
# Messages of CUDA's libraries when they cannot allocate memory. When the handle of cuBLAS or cuDNN did not fit, every
# later call reports NOT_INITIALIZED. Not among them: Triton's "out of resource: shared memory", which is a kernel that
# is too large for this kind of GPU, and NCCL's ncclSystemError, whose text always mentions malloc and which mostly
# means a broken connection.
NO_MEMORY = re.compile(
    r"out[ _]of[ _]memory|can't allocate memory|cannot allocate memory|cudaErrorMemoryAllocation"
    r"|failed to CUDA (host )?[cm]alloc"
    r"|CU(BLAS|SOLVER|SPARSE|DNN|FFT)_(STATUS_)?\w*(ALLOC|INSUFFICIENT_RESOURCES)\w*"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)
# Messages that no setting of a trial causes. torch raises AcceleratorError for those of the CUDA runtime.
BROKEN_DEVICE = re.compile(
    r"CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)\b"
    r"|CUDA driver error|Triton Error \[CUDA\]|uncorrectable ECC",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA, cuBLAS, cuDNN, NCCL, Triton or the CPU's allocator means that memory ran out."""
    return first_out_of_memory(error) is not None


def first_out_of_memory(error: BaseException) -> BaseException | None:
    """The error that reported that memory ran out: `error`, or the one that a library has wrapped in it, or the one
    that was being handled when `error` was raised. None if there is no such error."""
    import torch

    found = None
    for each in with_causes(error):
        if isinstance(each, torch.OutOfMemoryError | MemoryError) or (
            isinstance(each, RuntimeError) and NO_MEMORY.search(str(each))
        ):
            found = each
    return found


def is_broken_device(error: BaseException) -> bool:
    """Whether an error reports a broken device or driver. Another process may work; this one will not."""
    import torch

    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and bool(BROKEN_DEVICE.search(str(error)))
    )


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
