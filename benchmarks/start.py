"""What happens between `python tune/run.py` and the first optimizer step: each process, its CPU seconds, its imports.

    python benchmarks/start.py [--repeats 5] [--code . --code ../before] [--output start.json] [-- STUDY OPTIONS]

Each run starts a study of the default data and base in an empty folder and interrupts it at its first report. Several
`--code` (folders with this project) take turns. The tables give medians: when a process was started, and its CPU
seconds until the first step begins. Wall times depend on whatever else runs on the machine; CPU seconds hardly do. A
thread in each Python process writes down which of the large libraries it has imported.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

SAMPLE_S = 0.05
LIBRARIES = (
    "ray", "ray.tune", "ray.train", "torch", "torch._dynamo", "torch._inductor", "transformers", "deepspeed", "peft",
    "bitsandbytes", "accelerate", "mlflow", "optuna", "pandas", "pyarrow", "scipy", "sympy", "sqlalchemy", "networkx",
    "numpy", "PIL", "rich",
)  # fmt: skip
# Python imports this module at its start if it finds it in PYTHONPATH.
WATCHER = """
import os, sys, threading, time

def watch():
    seen = set()
    while True:
        time.sleep(0.1)
        if new := [name for name in {libraries!r} if sys.modules.get(name) and name not in seen]:
            seen.update(new)
            with open({folder!r} + "/" + str(os.getpid()), "a") as file:
                file.writelines(f"{{time.time()}} {{name}}\\n" for name in new)

threading.Thread(target=watch, daemon=True).start()
"""
TICKS = os.sysconf("SC_CLK_TCK")


KINDS = {
    "gcs_server": "Ray: GCS",
    "raylet": "Ray: raylet",
    "monitor.py": "Ray: autoscaler's monitor",
    "log_monitor": "Ray: log monitor",
    "RuntimeEnvAgent": "Ray: runtime-env agent",
    "runtime_env/agent": "Ray: runtime-env agent",
    "DashboardAgent": "Ray: dashboard agent",
    "dashboard/agent": "Ray: dashboard agent",
    "dashboard": "Ray: dashboard",
    "AutoscalingCoordinator": "Ray Data: coordinator",
    "SynchronizationActor": "Ray Train: synchronization",
    "TrainController": "lane's controller",
    "RayTrainWorker": "lane's worker",
    "Dispatcher": "dispatcher",
    "QueuedTrial": "Tune's trial",
    "ResourceTrainable": "Tune's trial",
    "IDLE": "idle worker",
    "default_worker.py": "idle worker",
    "tune/run.py": "driver",
}  # by a part of the command line; the first that fits


def kind_of(title: str) -> str:
    """What a process is, by its command line."""
    arguments = [argument.rpartition("=")[2] for argument in title.split("\0")[:3]]
    for part, kind in KINDS.items():
        if any(part in argument for argument in arguments):
            return kind
    return "compilers, shells"


def processes(root: int) -> dict[int, tuple[str, float, float]]:
    """Title, start and CPU seconds of the processes of a tree.

    The start is in seconds since the machine's boot. The CPU seconds (user, system) hold those of ended children.
    """
    found, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            title = (entry / "cmdline").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        parents[int(entry.name)] = int(fields[1])
        found[int(entry.name)] = (title, int(fields[19]) / TICKS, sum(map(int, fields[11:15])) / TICKS)

    def inside(number: int) -> bool:
        while number > 1 and number != root:
            number = parents.get(number, 0)
        return number == root

    return {number: what for number, what in found.items() if inside(number)}


def run(code: Path, options: list[str], folder: Path) -> dict[str, Any]:
    """One study until its first report: seconds until its first step, and what each process did until then."""
    imports = folder / "imports"
    imports.mkdir()
    (folder / "sitecustomize.py").write_text(WATCHER.format(libraries=LIBRARIES, folder=str(imports)))
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": f"{code}{os.pathsep}{folder}"}
    command = [sys.executable, str(code / "tune" / "run.py"), "--trials", "20", "--name", "study", *options]
    began, boot = time.time(), time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    study = subprocess.Popen(command, cwd=folder, env=environment, stdout=sys.stderr)
    journal, first, samples = folder / "results" / "study" / "journal.jsonl", 0.0, []
    while not first and study.poll() is None:
        samples.append((time.time(), processes(study.pid)))
        time.sleep(SAMPLE_S)
        for line in journal.read_text().splitlines() if journal.is_file() else ():
            if '"report"' in line and line.endswith("}"):
                event = json.loads(line)
                # The trial's set-up belongs to the start; what follows it does not.
                first = event["time"] - sum(event["seconds"].values()) + event["seconds"]["setup"]
                break
    study.send_signal(signal.SIGINT)
    study.wait()
    if not first:
        raise RuntimeError(f"the study ended with code {study.returncode} before its first report")
    kept: dict[int, tuple[str, float, float]] = {}
    for at, found in samples:
        if at <= first:
            kept |= found
    rows = []
    for number, (title, start, cpu_s) in kept.items():
        seen = (imports / str(number)).read_text().splitlines() if (imports / str(number)).is_file() else []
        names = [name for when, name in (line.split() for line in seen) if float(when) <= first]
        rows.append({"kind": kind_of(title), "at_s": start + boot - began, "cpu_s": cpu_s, "imports": names})
    return {"first_step_s": first - began, "processes": sorted(rows, key=lambda row: row["at_s"])}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Medians over the runs, by kind of process."""
    of_kind: dict[str, list[list[dict[str, Any]]]] = {}
    for one in runs:
        for kind in dict.fromkeys(row["kind"] for row in one["processes"]):
            rows = [row for row in one["processes"] if row["kind"] == kind]
            of_kind.setdefault(kind, []).append(rows)
    lines = [f"| {'process':24} | number | started at, s | CPU of all, s | imports", "| --- | --- | --- | --- | --- |"]
    for kind, many in of_kind.items():
        count, starts = median(map(len, many)), [median(row["at_s"] for row in rows) for rows in many]
        cpu_s = [sum(row["cpu_s"] for row in rows) for rows in many] + [0.0] * (len(runs) - len(many))
        names = [name for name, number in Counter(n for rows in many for row in rows for n in row["imports"]).items()
                 if number * 2 >= sum(map(len, many))]  # fmt: skip
        text = ", ".join(name for name in LIBRARIES if name in names)
        lines.append(f"| {kind:24} | {count:g} | {median(starts):.1f} | {median(cpu_s):.1f} | {text} |")
    total = [sum(row["cpu_s"] for row in one["processes"]) for one in runs]
    walls = sorted(one["first_step_s"] for one in runs)
    lines.append(f"| all | | | {median(total):.1f} ({min(total):.1f} to {max(total):.1f}) | |")
    lines.append(f"first step after {median(walls):.1f} s ({walls[0]:.1f} to {walls[-1]:.1f}), {len(runs)} runs")
    return lines


def main() -> None:
    """Measure, and print a table for each folder of code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--code", type=Path, action="append", help="folder with this project; may be repeated")
    parser.add_argument("--output", type=Path)
    parser.add_argument("options", nargs="*", help="of the study, after --")
    chosen = parser.parse_args()
    codes = [path.resolve() for path in chosen.code or [Path(__file__).parents[1]]]
    found: dict[str, list[dict[str, Any]]] = {str(code): [] for code in codes}
    for repeat in range(chosen.repeats):
        for code in codes[:: 1 if repeat % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(prefix="start-") as folder:
                found[str(code)].append(run(code, chosen.options, Path(folder)))
    for name, runs in found.items():
        print(f"\n{name}\n", *table(runs), sep="\n")
    if chosen.output:
        chosen.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
