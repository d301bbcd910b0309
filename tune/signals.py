"""Ctrl-C, SIGTERM and a closed terminal: the first signal stops a study in any phase, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from train_fn.support.storage import patiently
from tune.records.journal import Journal
from tune.results.terminal import give_back_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RETRY_S = 0.05  # delay of a signal that comes while an event is written


class StopSignals:
    """The handlers of a study's signals, for a `with` in the main thread. `count` is the number of signals so far.

    A signal raises KeyboardInterrupt. While Ray Tune's loop runs (`searching`), the first signal ends that loop between
    two steps instead, so that Optuna, Tune and the journal agree. nohup makes the process ignore SIGHUP: the study then
    goes on when its terminal is closed.
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
        """Set the handlers; also to be called after a library has set its own."""
        for number in SIGNALS:
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Let the first signal end Ray Tune's loop between two steps."""
        before = signal.getsignal(signal.SIGUSR1)
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's handler would outlive its loop
        self._searching = True
        try:
            yield
        finally:
            self._searching = False
            signal.signal(signal.SIGUSR1, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if writes_event(frame):
            # An event that is in the file must also be in memory.
            threading.Timer(RETRY_S, os.kill, (os.getpid(), number)).start()
            return
        self.count += 1
        if number == signal.SIGHUP:
            give_back_terminal(self._terminals)
        end_loop = signal.getsignal(signal.SIGUSR1)  # Tune's loop sets this handler when it begins
        if self.count == 1 and self._searching and callable(end_loop):
            end_loop(number, frame)
        else:
            raise KeyboardInterrupt


def writes_event(frame: FrameType | None) -> bool:
    """Whether a frame is within `Journal.write`, but does not wait there for a disk that fails."""
    if frame is None or frame.f_code is patiently.__code__:
        return False
    while frame is not None:
        if frame.f_code is Journal.write.__code__:
            return True
        frame = frame.f_back
    return False
