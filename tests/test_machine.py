"""Before Ray starts: a cluster that does not answer, cores that are not ours, a folder that is not private."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from studies import ROOT

from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.lanes import machine
from tune.lanes.machine import LONGEST_FOLDER, allowed_cores, cgroup_limits, cluster_problem, private_folder
from tune.lanes.ray_start import check_address, start_ray, watch_control_service
from tune.study import discard

# ------------------------------------------------------------------------------------------------ RAY_ADDRESS


@contextlib.contextmanager
def server(answer: bytes | None, family: socket.AddressFamily = socket.AF_INET):
    """A port that reads a greeting and answers with these bytes. None: it accepts and stays silent."""
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    if answer is None:
                        connection.recv(100)  # until the other side gives up
                    else:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
    thread.join(5)


GRPC = bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + bytes(6)  # an HTTP/2 server's settings


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_only_a_cluster_that_answers_is_accepted(form) -> None:
    with server(GRPC) as port:
        assert cluster_problem(form.format(port)) == ""
    problem = cluster_problem(form.format(free_port()))
    assert problem.startswith("`RAY_ADDRESS` must be a running cluster, but ") and "ray start" in problem


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"abc", None])
def test_a_port_of_another_service_is_refused(monkeypatch, answer) -> None:
    monkeypatch.setattr(machine, "ANSWER_S", 0.2)
    with server(answer) as port:
        assert "`RAY_ADDRESS` must be a running cluster, but" in cluster_problem(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "address",
    ["host", "10.0.0.1", ":6379", "host:", "host:port", "host:0", "host:99999", "host:-1", "http://", "ray://", "a:²"],
)
def test_a_malformed_address_is_refused(address) -> None:
    assert "must be host:port of a running cluster, or auto, but got" in cluster_problem(address)


@pytest.mark.parametrize("address", ["no such host.invalid:6379", "a..b:6379", "\udcff:6379"])
def test_a_host_that_does_not_exist_is_refused(address) -> None:
    assert "does not answer" in cluster_problem(address)


def test_auto_without_a_cluster_is_refused(monkeypatch) -> None:
    def nothing(*_) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", nothing)
    with pytest.raises(SettingsError) as refused:
        check_address("auto")
    assert refused.value.problems[0].startswith("`RAY_ADDRESS` auto must find a cluster on this machine, but")
    stale = f"127.0.0.1:{free_port()}"  # of a cluster that has ended
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda *_: stale)
    with pytest.raises(SettingsError):
        check_address("auto")


def test_a_dead_cluster_is_reported_at_once_and_leaves_no_study(tmp_path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, str(ROOT / "tune" / "run.py"), "--name", "s", "--num-phantoms", "40", "--trials", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "The study cannot start:" in done.stderr and "`RAY_ADDRESS` must be a running cluster" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "results" / "s").exists()


def test_a_node_that_does_not_start_in_time_is_told_in_a_sentence(monkeypatch) -> None:
    """Ray raises a plain Exception then."""
    monkeypatch.setattr("ray.init", lambda **options: (_ for _ in ()).throw(Exception("The node did not start.")))
    said = r"Ray must start, but Exception: The node did not start\.: look at RAY_TMPDIR"
    with mock.patch.dict(os.environ), pytest.raises(SettingsError, match=said):  # start_ray sets variables
        os.environ.pop("RAY_ADDRESS", None)
        start_ray(parse([]))


@pytest.mark.parametrize("kept", ["", "plan.json", "mine.txt", "event"])
def test_only_an_empty_study_folder_is_removed(tmp_path, kept) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("journal.jsonl", "lock", *([kept] if "." in kept else [])):
        (folder / name).write_text("")
    journal = SimpleNamespace(events=[1] if kept == "event" else [])
    discard(SimpleNamespace(directory=folder, journal=journal, then=None))  # type: ignore[arg-type]
    left = {path.name for path in folder.glob("*")}
    everything = {"journal.jsonl", "lock"}
    assert (
        left
        == {"": set(), "plan.json": {*everything, "plan.json"}, "mine.txt": {"mine.txt"}, "event": everything}[kept]
    )
    assert folder.exists() is bool(kept)


# ------------------------------------------------------------------------------------------------ cores


def limits(tmp_path: Path, own: str, **files: str) -> list[float]:
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    return cgroup_limits(tmp_path, tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu_max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu_max": "max 100000\n"}, []),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000", "a__cpu_max": "200000 100000"}, [2.0]),
        ("0::/a/b\n", {"a__b__cpu_max": "400000 100000", "a__cpu_max": "200000 100000"}, [4.0, 2.0]),
        ("4:cpu,cpuacct:/d\n3:memory:/x\n", {"cpu,cpuacct__d__cfs_quota_us": "300000",
                                            "cpu,cpuacct__d__cfs_period_us": "100000"}, [3.0]),
        ("4:cpu:/d\n", {"cpu__cfs_quota_us": "50000", "cpu__cfs_period_us": "100000"}, [0.5]),
        ("4:cpu:/d\n", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, []),
        ("0::/\n", {"cpu_max": "nonsense"}, []),
        ("", {}, []),
    ],
)  # fmt: skip
def test_limits_of_cgroups(tmp_path, own, files, expected) -> None:
    assert limits(tmp_path, own, **files) == expected


def test_cores_are_limited_by_affinity_and_cgroups(monkeypatch) -> None:
    for affinity, limit, cores in (({0, 1, 2}, [], 3), ({0, 1, 2}, [1.5], 1), ({5}, [8.0], 1), ({0, 1}, [0.2], 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, affinity=affinity: affinity)
        monkeypatch.setattr(machine, "cgroup_limits", lambda *_, limit=limit: limit)
        assert allowed_cores() == cores


# ------------------------------------------------------------------------------------------------ the private folder


def test_the_folder_is_private_and_short(monkeypatch, tmp_path) -> None:
    short = Path(f"/tmp/t{os.getpid()}")
    short.mkdir()
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        for _ in range(2):
            folder = private_folder()
            assert folder.parent == short and stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
        folder.rmdir()
        folder.symlink_to(tmp_path)  # planted by somebody else
        other = private_folder()
        assert other != folder and not other.is_symlink() and stat.S_IMODE(other.stat().st_mode) == 0o700
        other.rmdir()
        folder.unlink()
    finally:
        short.rmdir()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("place", ["long", "ümläut", "missing"])
def test_a_folder_that_cannot_be_used_is_replaced(monkeypatch, tmp_path, name, place) -> None:
    given = tmp_path / {"long": "x" * 100, "ümläut": "ü" * 60, "missing": "not/there"}[place]
    if place != "missing":
        given.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(given))
    folder = private_folder()
    assert folder.parent == Path("/tmp") and len(os.fsencode(folder)) <= LONGEST_FOLDER


def test_a_study_ends_with_one_sentence_when_the_control_service_has_died(monkeypatch, tmp_path: Path) -> None:
    import ray

    lines: list[str] = []
    codes: list[int] = []
    ended = threading.Event()
    monkeypatch.setattr(ray, "is_initialized", lambda: not codes)
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), ended.set()))
    with socket.create_server(("127.0.0.1", 0)) as service:
        address = f"127.0.0.1:{service.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        watch_control_service(tmp_path / "my study", lines.append)
        assert not ended.wait(0.5)
        needed = watch_control_service(tmp_path / "my study", lines.append)
        needed.clear()  # a study that no longer needs Ray is not watched
    assert ended.wait(10) and codes == [130]
    assert len(lines) == 1 and lines[0].endswith(f"--results {tmp_path} --resume 'my study'")
