"""Writes that training does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs writes on a thread of its own, one at a time."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None

    def is_idle(self) -> bool:
        """Whether no write is running."""
        return self.running is None or self.running.done()

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write, after the one that is running. Raises what that one raised."""
        self.wait()
        self.running = self.thread.submit(write)

    def wait(self) -> None:
        """Wait for the write that is running. Raises what it raised."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the write that is running, and end the thread. Raises nothing, so that it hides no other error."""
        self.thread.shutdown()
