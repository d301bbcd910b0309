"""A study on object storage, which several machines can reach: which copy is newer, and which machine runs it.

Lines are only ever added to a journal, so of two copies of a study the older one's journal is the beginning of the
other's. The machine that runs the study holds a lease: a small object beside the journal, which the process renews.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from train_fn.support.storage import Storage
from tune.records.process import boot

FILES = ("splits.json", "journal.jsonl", "plan.json")  # plan.json comes last: it makes a folder a study
LEASE_S = 180.0  # so long after its last renewal a lease is free; the machines' clocks must differ by less
RENEW_S = 30.0
SETTLE_S = 1.0  # between writing a lease and reading it: of two machines that write at once, one reads the other's


def refresh(storage: Storage) -> list[str]:
    """Update a study's folder from its copy on object storage. Returns problems.

    A missing or older folder is replaced. A newer one stays; the study copies it to the storage as it goes on.

    Raises:
        OSError: the storage or the folder cannot be read or written.
    """
    if not storage.uri:
        return []
    directory = storage.directory
    path = directory / "journal.jsonl"
    stored, local = storage.read(path), path.read_bytes() if path.is_file() else None
    if local is not None and stored is not None:
        # Both may end in the middle of a line.
        local, stored = (content[: content.rfind(b"\n") + 1] for content in (local, stored))
        if local.startswith(stored):
            return []
        if not stored.startswith(local):
            return [
                f"a study must have one history, but {directory} and {storage.uri} have gone on apart: move one "
                f"of them away, and go on with the other"
            ]
    elif stored is None:
        return []
    for name in FILES:
        content = storage.read(directory / name)
        if content is None:
            return [f"{storage.uri} must hold a whole study, but has no {name}: it ended before it began"]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    # These were made from the older journal, and are made again from the newer one.
    for name in ("optuna.db", "tracking.json", "best_adapter"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return []


class Lease:
    """The lease of the one machine that runs a study on object storage. Without object storage it does nothing: the
    folder's lock is enough.

    When another machine has taken the study over, `lost` is set and the process interrupts itself as by Ctrl-C.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.path = storage.directory / "lease.json"
        self.token = uuid.uuid4().hex
        self.lost = False
        self._ended = threading.Event()

    def acquire(self) -> str:
        """Take the lease and keep renewing it. Returns why it cannot be taken, or "". Raises OSError."""
        if not self.storage.uri:
            return ""
        for _ in range(2):
            held = self.read()
            if held and held["token"] != self.token and not abandoned(held):
                left = max(1, round(held["renewed_at"] + LEASE_S - time.time()))
                return (
                    f"one machine runs a study, but {held['host']} (process {held['pid']}) runs "
                    f"{self.storage.directory.name}: wait for it, or end it there; without a "
                    f"heartbeat from it, the study is free in {left} s"
                )
            if not held or held["token"] != self.token:
                self._write()
                time.sleep(SETTLE_S)
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)
        return ""

    def ours(self) -> bool:
        """Whether this process may still write the study's files to the storage. Raises OSError."""
        if not self.storage.uri:
            return True
        held = self.read()
        return held is None or held["token"] == self.token

    def release(self) -> None:
        """Release the lease. If the storage fails, it runs out by itself."""
        if self.storage.uri and not self._ended.is_set():
            self._ended.set()
            try:
                if self.ours():
                    self.storage.remove(self.path)
            except OSError:
                return

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if not self.ours():
                    self.lost = True
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                self._write()
            except OSError:  # retried; if the lease runs out until then, the next read shows its new owner
                continue

    def read(self) -> dict[str, Any] | None:
        """The lease on the storage; None when there is none, or when it is damaged."""
        content = self.storage.read(self.path)
        try:
            held = json.loads(content or b"")
            assert isinstance(held["token"], str) and isinstance(held["host"], str) and isinstance(held["pid"], int)
            held["renewed_at"] = float(held["renewed_at"])
            return held
        except (ValueError, TypeError, KeyError, AssertionError):
            return None

    def _write(self) -> None:
        held = {"token": self.token, "host": socket.gethostname(), "boot": boot(), "pid": os.getpid()}
        self.storage.write(self.path, json.dumps(held | {"renewed_at": time.time()}).encode())


def abandoned(held: dict[str, Any]) -> bool:
    """Whether a lease has run out, or its process was on this machine and has ended."""
    if time.time() > held["renewed_at"] + LEASE_S:
        return True
    return held.get("boot") == boot() and not Path(f"/proc/{held['pid']}").exists()
