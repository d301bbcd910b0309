"""Ctrl-C, SIGTERM and a closed terminal: the first one stops a study in any phase, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from train_fn.support.storage import retry_on_os_error
from tune.records.journal import Journal
from tune.results.terminal import give_back_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.05  # a signal that comes while an event is written is raised again after so long


class StopSignals:
    """The handlers of a study's signals, within a `with` in the main thread. `count` is how many have come.

    A signal raises KeyboardInterrupt. While Ray Tune's loop runs (`searching`) the first signal ends that loop between
    two steps instead, so that Optuna, Tune and the journal agree. Under nohup, which ignores SIGHUP, a study goes on
    when its terminal is closed.
    """

    def __init__(self) -> None:
        self.count = 0
        self._searching = False
        self._before: dict[signal.Signals, Any] = {}
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        if self.count:
            give_back_terminal(self._terminals)

    def install(self) -> None:
        """Set the handlers, again after a library has set its own."""
        for number in SIGNALS:
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Let the first signal end Ray Tune's loop between two steps."""
        before = signal.getsignal(signal.SIGUSR1)
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # its handler would stay after its loop
        self._searching = True
        try:
            yield
        finally:
            self._searching = False
            signal.signal(signal.SIGUSR1, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if writes_event(frame):
            # An event must not be in the file and unknown to the process.
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        self.count += 1
        if number == signal.SIGHUP:
            give_back_terminal(self._terminals)
        end_loop = signal.getsignal(signal.SIGUSR1)  # Tune sets it when its loop begins
        if self.count == 1 and self._searching and callable(end_loop):
            end_loop(number, frame)
        else:
            raise KeyboardInterrupt


def writes_event(frame: FrameType | None) -> bool:
    """Whether a frame is within `Journal.write`, but does not wait there for a disk that fails."""
    if frame is None or frame.f_code is retry_on_os_error.__code__:
        return False
    while frame is not None:
        if frame.f_code is Journal.write.__code__:
            return True
        frame = frame.f_back
    return False
