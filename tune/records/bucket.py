"""A study on object storage, which several machines can reach: whose copy is newer, and who runs it.

Two copies of a study are compared by their journals, to which lines are only added: one that is the beginning of the
other is the older one. Who runs the study holds a lease, a small object beside the journal that is renewed while the
process lives.
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

FILES = ("splits.json", "journal.jsonl", "plan.json")  # that make a folder a study; the plan comes last
LEASE_S = 180.0  # after its last renewal, another machine may take the study over; clocks may differ by less than that
RENEW_S = 30.0
SETTLE_S = 1.0  # between writing a lease and reading it again: of two that write at once, one sees the other's


def refresh(storage: Storage) -> list[str]:
    """Bring the local copy of a study up to date with the one on object storage. Returns problems.

    A missing local copy is fetched, an older one is replaced, and a newer one stays: it is copied there as the study
    goes on. Raises OSError.
    """
    if not storage.uri:
        return []
    directory = storage.directory
    there = storage.read(directory / "journal.jsonl")
    local = directory / "journal.jsonl"
    here = local.read_bytes() if local.is_file() else None
    if here is not None and there is not None:
        # Both may end in the middle of a line.
        here, there = (content[: content.rfind(b"\n") + 1] for content in (here, there))
        if here.startswith(there):
            return []
        if not there.startswith(here):
            return [
                f"a study must have one history, but {directory} and {storage.uri} have gone on apart: move one of "
                f"them away, and go on with the other"
            ]
    elif there is None:
        return []
    for name in FILES:
        content = storage.read(directory / name)
        if content is None:
            return [f"{storage.uri} must hold a whole study, but has no {name}: it ended before it had begun"]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    # What was made from the older copy; the journal has all that is needed to make it again.
    for name in ("optuna.db", "tracking.json", "best_adapter"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return []


class Lease:
    """Held by the one machine that runs a study on object storage. Without object storage, the folder's lock suffices.

    `lost` is set, and the process interrupted as by Ctrl-C, when another machine has taken the study over.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.path = storage.directory / "lease.json"
        self.token = uuid.uuid4().hex
        self.lost = False
        self._ended = threading.Event()

    def acquire(self) -> str:
        """Take the lease, and renew it from now on. Returns why it cannot be had, or nothing. Raises OSError."""
        if not self.storage.uri:
            return ""
        for _ in range(2):
            held = self._read()
            if held and held["token"] != self.token and not abandoned(held):
                left = max(1, round(held["renewed_at"] + LEASE_S - time.time()))
                return (
                    f"one machine runs a study, but {held['host']} (process {held['pid']}) runs "
                    f"{self.storage.directory.name}: wait for it, or end it there; {left} s after its last sign of "
                    f"life the study is free"
                )
            if not held or held["token"] != self.token:
                self._write()
                time.sleep(SETTLE_S)
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)
        return ""

    def ours(self) -> bool:
        """Whether this process may still write the study's files there. Raises OSError."""
        if not self.storage.uri:
            return True
        held = self._read()
        return held is None or held["token"] == self.token

    def release(self) -> None:
        """Give the lease back. One that cannot be given back runs out by itself."""
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
            except OSError:  # it is tried again; meanwhile the lease may run out, and is seen to be another's
                continue

    def _read(self) -> dict[str, Any] | None:
        """The lease there; None when there is none, or none that can be read."""
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
    """Whether nobody holds a lease any more: it ran out, or its process on this machine has ended."""
    if time.time() > held["renewed_at"] + LEASE_S:
        return True
    return held.get("boot") == boot() and not Path(f"/proc/{held['pid']}").exists()


def boot() -> str:
    """What tells this start of this machine from all others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
