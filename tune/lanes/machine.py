"""Checks before Ray starts: an answering cluster, the cores that this process may use, a folder for Ray's files."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import tempfile
from pathlib import Path

ANSWER_S = 10.0  # time-out of a cluster's answer
# A Unix socket's path has at most 107 bytes, and Ray makes its sockets below its temporary folder.
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1234")
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # a client's preface, with empty settings
SETTINGS = 4  # type of the frame that a server answers with


def cluster_problem(address: str) -> str:
    """Why no Ray cluster answers at this address; empty if one does. Ray itself would try for a quarter of an hour.

    Args:
        address: host:port or ray://host:port.
    """
    fix = "unset RAY_ADDRESS, or start the cluster with ray start"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        return f"`RAY_ADDRESS` must be host:port of a running cluster, or auto, but got {address!r}: {fix}"
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):  # with TLS, the preface would have to be encrypted
                connection.sendall(HTTP2)
                answer = connection.recv(9, socket.MSG_WAITALL)
                if len(answer) < 9 or struct.unpack("!3xB5x", answer)[0] != SETTINGS:
                    return f"`RAY_ADDRESS` must be a running cluster, but what answers at {address} is not Ray: {fix}"
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        return f"`RAY_ADDRESS` must be a running cluster, but {address} does not answer ({error}): {fix}"
    return ""


def allowed_cores() -> int:
    """CPU cores that this process may use, by its affinity and its cgroups."""
    cores = float(len(os.sched_getaffinity(0)))
    return max(1, int(min([cores, *cgroup_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])))


def cgroup_limits(mount: Path, own: Path) -> list[float]:
    """The CPU limits of this process's cgroups, in cores.

    Args:
        mount: where cgroups are mounted.
        own: file that names this process's cgroups.
    """
    with contextlib.suppress(OSError):  # no cgroups
        files = []
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):  # a container sees its own cgroup as the root
                if not controllers:
                    files.append(mount / folder / "cpu.max")
                elif "cpu" in controllers.split(","):
                    files.append(mount / controllers / folder / "cpu.cfs_quota_us")
                    files.append(mount / "cpu" / folder / "cpu.cfs_quota_us")
        return [limit for file in dict.fromkeys(files) if (limit := cpu_limit(file))]
    return []


def cpu_limit(file: Path) -> float:
    """Cores that a cgroup's limit file allows; 0: no limit."""
    try:
        if file.name == "cpu.max":
            quota, period = file.read_text().split()
        else:
            quota, period = file.read_text(), file.with_name("cpu.cfs_period_us").read_text()
        return 0.0 if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):  # missing, or in another format
        return 0.0


def private_folder() -> Path:
    """A folder for Ray's sessions that nobody else can enter: in RAY_TMPDIR, else in TMPDIR, else in /tmp. A path that
    leaves no room for the names of sockets is skipped. Ray itself makes its folders writable by all.

    Raises OSError when none can be used.
    """
    chosen = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    problems = []
    for parent in dict.fromkeys([*chosen[:1], "/tmp"]):
        folder = Path(parent).absolute() / f"vlm-{os.getuid()}"
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            problems.append(f"{parent} is too long for the paths of sockets ({LONGEST_FOLDER} bytes)")
            continue
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # another user made it
                folder = Path(tempfile.mkdtemp(prefix="vlm-", dir=parent))
            folder.chmod(0o700)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} cannot be written")
            return folder
        except OSError as error:
            problems.append(str(error))
    raise OSError("; ".join(problems))
