"""What libraries import on their own, and how long it takes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def not_imported(*names: str) -> Iterator[None]:
    """Let other libraries find these optional packages missing while they are imported.

    DeepSpeed imports MLflow for its autotuner and PEFT imports bitsandbytes for quantized layers, a second each, wanted
    or not. Afterwards the packages can be imported as usual. What is imported already stays.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python finds no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause Python's garbage collector while libraries are imported.

    It would search thousands of new modules again and again, and they stay: about a sixth of the time of importing
    transformers, PEFT and DeepSpeed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
