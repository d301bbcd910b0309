"""Random faults on real studies: nothing may be lost, nothing done twice, and no number may change.

    unshare --pid --fork --mount-proc --mount python benchmarks/faults.py [--faults 50] [--seed 0]

Needs root and a namespace of its own, as above: it fills the small disk of the results for a while, and looks for
Ray's processes by name. An undisturbed study of fixed settings comes first. Then studies of the same settings run, each
disturbed every few seconds, until all faults are spent; a driver that ends is started again with --resume. After each
study every trial must be COMPLETE, once, in study.json, Optuna and MLflow, with the undisturbed study's numbers.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import psutil
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 8
SPACE = """GUIDE = {}
def space(trial):
    return {"lora_r": 4 * (1 + trial.number % 4), "lora_alpha": 8, "learning_rate": 1e-3 * (1 + trial.number % 2),
            "num_train_epochs": 8}
"""
OPTIONS = ["--trials", str(TRIALS), "--scheduler", "none", "--num-phantoms", "120", "--save-steps", "3"]
OPTIONS += ["--hang-timeout", "6", "--save-state-every", "0"]
PATIENCE = 300.0  # seconds without an event in the journal after which the study is taken for stuck
PROCESSES = {
    "worker killed": ("ray::RayTrainWorker",),
    "rank frozen": ("ray::RayTrainWorker",),
    "controller killed": ("ray::TrainController",),
    "Tune's trial killed": ("ray::QueuedTrial", "ray::ResourceTrainable"),  # Ray uses either name
    "dispatcher killed": ("ray::Dispatcher",),
    "raylet killed": ("raylet/raylet",),
}
# What is found damaged when the study goes on: the driver is killed, then a file is changed.
DAMAGES = ["journal torn", "journal line lost", "state damaged", "optuna.db damaged", "tracking.json damaged"]
KINDS = [*PROCESSES, *DAMAGES, "driver killed", "driver terminated", "disk full", "disk nearly full", "store refuses",
         "store locked", "two drivers"]  # fmt: skip


def start(folder: Path, layout: list[str], again: bool) -> subprocess.Popen:
    """A study's driver; its output is appended to a log."""
    named = ["--resume", "s"] if again else ["--name", "s", "--space", "space.py"]
    command = [sys.executable, str(ROOT / "tune" / "run.py"), *named, *([] if again else OPTIONS), *layout]
    log = open(folder / "driver.log", "a")  # noqa: SIM115  # the process's own from here on
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def records(folder: Path) -> int:
    """Events in the journal: how it grows is how the study goes on."""
    path = folder / "results" / "s" / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturb(kind: str, driver: subprocess.Popen, folder: Path, rng: random.Random) -> bool:
    """Do one fault; False when there is nothing to do it to at this moment."""
    results = folder / "results"
    if kind in DAMAGES:
        return damage(kind, driver, results / "s", rng)
    if kind == "two drivers":
        second = start(folder, [], again=True)
        assert second.wait(60) == 2, f"a second driver ended with {second.returncode}"
        return True
    if kind.startswith("store"):
        return disturb_store(kind, folder / "mlflow.db", rng)
    if kind.startswith("driver"):
        if kind == "driver terminated":  # as init systems do: asked first, ended when it does not
            driver.send_signal(signal.SIGTERM)
            try:
                driver.wait(60)
            except subprocess.TimeoutExpired:
                driver.kill()
        else:
            driver.kill()
        return True
    if kind.startswith("disk"):
        filler = results / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], stderr=subprocess.DEVNULL)  # to the last byte
        if kind == "disk nearly full":  # a write is taken in part, without an error
            os.truncate(filler, max(0, filler.stat().st_size - rng.randrange(1, 20) * 4096))
        time.sleep(rng.uniform(1, 4))
        filler.unlink()
        return True
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any(title in " ".join(process.cmdline()) for title in PROCESSES[kind]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    if not found:
        return False
    rng.choice(found).send_signal(signal.SIGSTOP if kind == "rank frozen" else signal.SIGKILL)
    return True


def damage(kind: str, driver: subprocess.Popen, study: Path, rng: random.Random) -> bool:
    """Kill the driver and change a file of its study; False, and no kill, when that file is not there."""
    names = {"state damaged": "trials/*/state/*.state", "optuna.db damaged": "optuna.db", "tracking.json damaged":
             "tracking.json"}  # fmt: skip
    files = sorted(study.glob(names.get(kind, "journal.jsonl")))
    if not files or (kind == "journal line lost" and records(study.parents[1]) < 6):
        return False
    driver.kill()
    driver.wait()
    path = max((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, default=None)
    if path is None:
        return True
    content = path.read_bytes()
    if kind == "journal torn":
        content = content[: -rng.randrange(1, 200)]
    elif kind == "journal line lost":
        lines = content.split(b"\n")
        # Not a session's begin: how long the study has run is not asked here.
        del lines[rng.choice([n for n, line in enumerate(lines[:-1]) if b'"event": "session"' not in line[:30]])]
        content = b"\n".join(lines)
    else:
        place = rng.randrange(len(content))
        content = content[:place] + rng.choice([b"", bytes(4096)]) + content[place + 4096 :]
    path.write_bytes(content)
    return True


def disturb_store(kind: str, database: Path, rng: random.Random) -> bool:
    """Let MLflow's store refuse everything for a while (its experiment was deleted), or not answer (it is locked)."""
    if not database.exists():
        return False
    if kind == "store locked":
        other = sqlite3.connect(database, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(rng.uniform(2, 8))
        other.execute("COMMIT")
        other.close()
        return True
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("vlm-tune")
    if experiment is None:
        return False
    client.delete_experiment(experiment.experiment_id)
    time.sleep(rng.uniform(2, 8))
    client.restore_experiment(experiment.experiment_id)
    return True


def sync(folder: Path) -> None:
    """Deliver what a store did not take, as the study's last lines say."""
    command = [sys.executable, "-m", "tune.tracking", "sync", "results/s"]
    told = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert told.returncode == 0, told.stdout + told.stderr


def check(folder: Path, expected: dict[int, list] | None) -> dict[int, list]:
    """The epochs of each trial; all must be there once, everywhere, and equal to the expected ones."""
    sync(folder)
    trials = json.loads((folder / "results" / "s" / "study.json").read_text())["trials"]
    states = [(trial["number"], trial["state"], trial["error"][:200]) for trial in trials]
    assert states == [(number, "COMPLETE", "") for number in range(TRIALS)], states
    found = {trial["number"]: trial["epochs"] for trial in trials}
    stored = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/results/s/optuna.db").trials
    assert [t.state.name for t in stored] == ["COMPLETE"] * TRIALS
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted(r.data.tags.get("trial", "study") for r in runs) == [*map(str, range(TRIALS)), "study"]
    assert {run.info.status for run in runs} == {"FINISHED"}, [(r.info.run_name, r.info.status) for r in runs]
    for run in runs:
        if number := run.data.tags.get("trial"):
            history = client.get_metric_history(run.info.run_id, "auroc")
            assert [m.value for m in history] == [epoch["auroc"] for epoch in found[int(number)]]
    other = [number for number in found if expected is not None and found[number] != expected[number]]
    assert not other, f"trials {other} differ from the undisturbed study"
    return found


def run_study(folder: Path, layout: list[str], faults: list[str], rng: random.Random) -> list[tuple[str, str, float]]:
    """One study with faults until they are spent or it ends. Each fault with its outcome and the seconds until the
    journal had grown by two events."""
    (folder / "results").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder / "results")], check=True)
    (folder / "space.py").write_text(SPACE)
    driver, told, fault = start(folder, layout, again=False), [], ""
    try:
        while True:
            seen, began, outcome = records(folder), time.monotonic(), "went on"
            # One event may have been on its way already; with the second, the study goes on.
            while records(folder) < max(seen + 2, 4) and driver.poll() != 0:
                if driver.poll() is not None:  # killed in its first seconds, it has left no study to go on with
                    outcome = "resumed"
                    driver = start(folder, layout, again=(folder / "results" / "s" / "plan.json").exists())
                assert time.monotonic() < began + PATIENCE, f"nothing for {PATIENCE} s after {fault or told[-1:]}"
                time.sleep(0.1)
            if fault:
                told.append((fault, outcome, time.monotonic() - began))
            elif outcome == "resumed":  # the last fault's late effect
                told[-1] = (told[-1][0], outcome, told[-1][2] + time.monotonic() - began)
            if driver.poll() == 0:
                return told
            time.sleep(rng.uniform(0, 3))
            hit = driver.poll() is None and faults and disturb(faults[-1], driver, folder, rng)
            fault = faults.pop() if hit else ""
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()


def main() -> None:
    """Run the campaign and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    assert os.getpid() < 1000 and os.geteuid() == 0, "run it as root in a pid namespace of its own, as told above"
    os.environ["OMP_NUM_THREADS"] = "1"  # numbers are compared to the last bit
    if os.getpid() == 1 and (campaign := os.fork()):  # the namespace's first process: somebody must bury the dead
        while (ended := os.wait())[0] != campaign:
            pass
        sys.exit(os.waitstatus_to_exitcode(ended[1]))
    rng = random.Random(options.seed)
    faults = [KINDS[number % len(KINDS)] for number in range(options.faults)]
    rng.shuffle(faults)
    table: list[tuple[str, str, float]] = []
    with tempfile.TemporaryDirectory(prefix="f", ignore_cleanup_errors=True) as name:
        expected: dict[str, dict[int, list]] = {}
        studies = 0
        layouts = [["--lanes", "1"], ["--lanes", "1", "--workers-per-trial", "2"]]
        for number, layout in enumerate(layouts):
            run_study(Path(name) / f"calm{number}", layout, [], rng)
            expected[" ".join(layout)] = check(Path(name) / f"calm{number}", None)
        while faults:
            layout = layouts[studies % len(layouts)]
            folder = Path(name) / f"study{studies}"
            some = [faults.pop() for _ in range(min(10, len(faults)))]
            given = len(some)
            table += run_study(folder, layout, some, rng)
            faults += some  # the study was over before they came
            check(folder, expected[" ".join(layout)])
            studies += 1
            print(f"study {studies} ({' '.join(layout)}): {given - len(some)} faults, all {TRIALS} trials whole")
            show(table, studies)  # so far: an interrupted campaign has shown something, too


def show(table: list[tuple[str, str, float]], studies: int) -> None:
    """Print the faults with their outcomes, of studies that were found whole."""
    print(f"\n{'fault':24}{'times':>8}{'went on':>10}{'resumed':>10}{'median s to go on':>20}{'most':>8}")
    for kind in KINDS:
        rows = [row for row in table if row[0] == kind]
        ends = collections.Counter(row[1] for row in rows)
        waits = sorted(row[2] for row in rows) or [0.0]
        middle, most = waits[len(waits) // 2], waits[-1]
        print(f"{kind:24}{len(rows):8}{ends['went on']:10}{ends['resumed']:10}{middle:20.1f}{most:8.1f}")
    print(
        f"{len(table)} faults over {studies} studies: no trial lost, none doubled, all numbers as undisturbed",
        flush=True,
    )


if __name__ == "__main__":
    main()
