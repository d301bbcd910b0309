"""Your own machines, as docs/cluster.md has it: its five commands, against real sshd processes.

A machine here is a set of namespaces (network, processes, mounts) with its own address, sshd, home and /tmp. All lie
within one outer set, the user's own machine: when its first process ends, nothing is left of any.
"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILE = "docs/cluster-onprem.yaml"
SHIPPED = (ROOT / FILE).read_text()
CONFIG = yaml.safe_load(SHIPPED)
WORKERS = CONFIG["provider"]["worker_ips"]
MACHINES = [CONFIG["provider"]["head_ip"], *WORKERS]
NAMESPACES = ["--net", "--mount", "--pid"]
PROGRAMS = ["/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync", "ip", "ps", "unshare", "nsenter"]

# All that is replaced in the shipped file: this environment stands in for an installation from the network.
INSTALL = "~/venv/bin/pip install --quiet -e '.[cluster]'"
PRESENT = "(grep -q PYTHONPATH ~/.bashrc || echo export PYTHONPATH=$PWD >> ~/.bashrc)"
# And in the documented commands: a small study on CPUs.
STUDY, SMALL = "--trials 20 --device gpu", "--trials 4 --device cpu --num-phantoms 60 --num-train-epochs 1"

LAN = r"""
set -euo pipefail

own_folders() {  # /tmp and home are empty, but for the paths that Python and the project need
    mount -t tmpfs tmpfs /tmp
    mount -t tmpfs tmpfs /home
    while read -r path; do
        [ -e "$path" ] || { mkdir -p "$path"; mount --rbind "/run/outside$path" "$path"; }
    done <<< "$KEEP"
    cp -r /etc/skel /home/ubuntu
}
machine() {
    own_folders
    ln -s "$PREFIX" /home/ubuntu/venv
    exec /usr/sbin/sshd -D -e -f /dev/null -h "/run/key_$1" -o AuthorizedKeysFile=/run/authorized_keys \
        -o StrictModes=no -o UsePAM=no -o PidFile=none
}
export -f own_folders machine

mount -t tmpfs tmpfs /run
mkdir /run/outside /run/sshd
mount --rbind / /run/outside
mount -t tmpfs tmpfs /mnt
mkdir /mnt/shared
mount -t tmpfs tmpfs /mnt/shared  # all machines see this one
# The user of the file is root by another name: only root may read a Python that lies in root's home.
echo 'ubuntu:*:0:0::/home/ubuntu:/bin/bash' | cat - /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd

own_folders
mkdir -m 700 ~/.ssh
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
cp ~/.ssh/id_ed25519.pub /run/authorized_keys
ip link set lo up
ip link add lan type bridge
ip address add "${1%.*}.1/24" dev lan
ip link set lan up
for address in "$@"; do
    port=v${address##*.}
    ip netns add "$address"
    ip link add "$port" master lan type veth peer name eth0 netns "$address"
    ip link set "$port" up
    ip -n "$address" link set lo up
    ip -n "$address" link set eth0 up
    ip -n "$address" address add "$address/24" dev eth0
    ip -n "$address" route add default via "${1%.*}.1"
    ssh-keygen -q -t ed25519 -N '' -f "/run/key_$address"
    echo "$address $(cat "/run/key_$address.pub")" >> ~/.ssh/known_hosts
    ip netns exec "$address" unshare --mount --pid --fork --mount-proc bash -euc "machine $address" < /dev/null &
done
echo ready
cat > /dev/null  # until the test closes the pipe, or is gone
"""


class Lan:
    """A user's machine and those of the file in one network."""

    def __init__(self) -> None:
        self.env = {
            "HOME": "/home/ubuntu",
            "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        keep = {"KEEP": "\n".join([sys.prefix, sys.base_prefix, str(ROOT)]), "PREFIX": sys.prefix}
        self.process = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--mount-proc", "bash", "-c", LAN, "lan", *MACHINES],
            env=self.env | keep,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        lines = list(iter(self.process.stdout.readline, "ready\n")) if self.process.poll() is None else []
        assert self.process.poll() is None, "".join(lines)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.first = int(children.read_text())
        self.home = Path(f"/proc/{self.first}/root/home/ubuntu")

    def run(self, command: str) -> str:
        """What a command prints on the user's machine, at the top of the project."""
        inside = ["nsenter", f"--target={self.first}", *NAMESPACES, "bash", "-euc", f"cd ~/project\n{command}"]
        done = subprocess.run(
            inside,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def processes(self, machine: str) -> list[str]:
        """What runs on a machine beside its sshd."""
        found = self.run(f"ip netns pids {machine} | xargs ps -ww -o args= -p").splitlines()
        return [line for line in found if not line.startswith(("sshd:", "unshare "))]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture
def lan() -> Iterator[Lan]:
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed (extra `cluster`)")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: openssh-server rsync iproute2)")
    if os.geteuid() != 0:
        pytest.skip("only root may make machines out of namespaces")
    probe = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "lan", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no namespaces or bridges here: {done.stderr.strip()}")
    made = Lan()
    try:
        yield made
    finally:
        made.close()


def documented() -> list[str]:
    """The five commands, each under its comment."""
    section = (ROOT / "docs" / "cluster.md").read_text().split("\n## Your own machines\n")[1]
    block = section.split("```bash\n# 1. ")[1].split("```")[0]
    commands = re.split(r"^# \d\. ", block, flags=re.MULTILINE)
    return [f"# {command}" for command in commands]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_commands(lan: Lan, tmp_path: Path) -> None:
    up, submit, watch, fetch, down = documented()
    assert SHIPPED.count(INSTALL) == submit.count(STUDY) == 1
    project = lan.home / "project"
    excludes = " ".join(f"--exclude='{pattern}'" for pattern in CONFIG["rsync_exclude"])
    project.mkdir()
    lan.run(f"rsync -a {excludes} {ROOT}/ . && (umask 077 && ray get-auth-token --generate > /dev/null)")
    (project / FILE).write_text(SHIPPED.replace(INSTALL, PRESENT))

    lan.run(up)
    until = time.monotonic() + 240
    while f"{len(MACHINES)} local.cluster.node" not in (status := lan.run(f"ray exec {FILE} 'ray status'")):
        assert time.monotonic() < until, status
    assert all(any("raylet" in line for line in lan.processes(machine)) for machine in MACHINES)
    ask = "python -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1:8265/api/jobs/\")' 2>&1 || true"
    assert "HTTP Error 401" in lan.run(f"ip netns exec {MACHINES[0]} {ask}"), "the token is not asked for"

    assert "submitted successfully" in lan.run(submit.replace(STUDY, SMALL))
    log = lan.run(watch)
    assert "Job 'first' succeeded" in log, log
    lan.run(fetch)
    study = json.loads((project / "results" / "first" / "study.json").read_text())
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE"] * 4
    assert study["lanes"] == len(WORKERS)
    assert (project / "results" / "first" / "best_adapter" / "adapter_model.safetensors").stat().st_size > 0
    with sqlite3.connect(shutil.copy(project / "mlflow" / "tracking.db", tmp_path)) as tracking:
        assert tracking.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (5,)
    for worker in WORKERS:  # a lane on each
        assert "ray-train-app-worker" in lan.run(f"ssh ubuntu@{worker} ls /tmp/ray/session_latest/logs/train")

    lan.run(down)
    assert {machine: lan.processes(machine) for machine in MACHINES} == {machine: [] for machine in MACHINES}
