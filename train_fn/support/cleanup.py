"""Cleaning up after an error without hiding it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def at_end(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` at the end of this context. On a broken device every call fails, cleaning up, too: when the context
    ends with an error, that error is raised, and an error of `action` becomes a note of it."""
    try:
        yield
    except BaseException as error:
        try:
            action()
        except Exception as later:
            error.add_note(f"Cleaning up failed, too: {type(later).__name__}: {later}")
        raise
    action()
