"""Studies that are killed and go on: the same trials, none twice, none lost, and the same numbers."""

from __future__ import annotations

import ipaddress
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState
from studies import finish, start, wait_for

# Trials by number, so that what is killed and what is not train the same.
SPACE = """
GUIDE = {"learning_rate": 1e-3}
def space(trial):
    trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return {"lora_r": 4 * (1 + trial.number % 3), "lora_alpha": 8, "learning_rate": 1e-3 * (1 + trial.number % 2),
            "num_train_epochs": 3}
"""
OPTIONS = ["--trials", "6", "--lanes", "1", "--scheduler", "none", "--num-phantoms", "60", "--save-steps", "2"]


def processes(driver: subprocess.Popen, *names: str) -> list[psutil.Process]:
    """The driver's descendants with one of these names."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if not names or any(name in " ".join(process.cmdline()) for name in names):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def random_moment() -> float:
    """Some seconds, no two runs the same; told when a test fails."""
    moment = random.SystemRandom().uniform(0, 4)
    print(f"waiting {moment:.2f} s")
    time.sleep(moment)
    return moment


def check_whole(folder: Path, base, num_trials: int = 6) -> None:
    """Every trial once, complete everywhere, with the numbers of an undisturbed run."""
    from train_fn.data.splitting import load_splits
    from train_fn.jobs import EpochReport
    from train_fn.settings import TrialSettings
    from train_fn.trial.loop import run_trial

    study = json.loads((folder / "results" / "s" / "study.json").read_text())
    trials = study["trials"]
    assert [(trial["number"], trial["state"]) for trial in trials] == [(n, "COMPLETE") for n in range(num_trials)]
    stored = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'results' / 's' / 'optuna.db'}").trials
    assert [trial.state for trial in stored] == [TrialState.COMPLETE] * num_trials
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vlm-tune"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags.get("trial", "parent") for run in runs) == [*map(str, range(num_trials)), "parent"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    splits = load_splits(folder / "results" / "s" / "splits.json")
    known: dict[str, list] = {}
    for trial, frozen in zip(trials, stored, strict=True):
        key = json.dumps(trial["settings"], sort_keys=True)
        if key not in known:
            reports: list[EpochReport] = []
            run_trial(base, splits, TrialSettings.from_dict(trial["settings"]),
                      lambda report, told=reports: told.append(report) or False, positive="Malignant")  # fmt: skip
            known[key] = [report.metrics for report in reports]
        assert trial["epochs"] == known[key], trial["number"]
        assert frozen.value == pytest.approx(trial["epochs"][-1]["auroc"])
        (run,) = [run for run in runs if run.data.tags.get("trial") == str(trial["number"])]
        history = client.get_metric_history(run.info.run_id, "auroc")
        assert [metric.value for metric in history] == [epoch["auroc"] for epoch in trial["epochs"]]
        assert len({metric.step for metric in history}) == 3


def test_worker_driver_and_dispatcher_killed(tmp_path, base) -> None:
    (tmp_path / "space.py").write_text(SPACE)
    process = start(tmp_path, "--space", "space.py", *OPTIONS)
    wait_for(process, "[1/6]")
    listening = {
        (p.name(), c.laddr.ip)
        for p in processes(process)
        for c in p.net_connections()
        if c.status == psutil.CONN_LISTEN and not ipaddress.ip_address(c.laddr.ip.removeprefix("::ffff:")).is_loopback
    }
    assert not listening  # nothing of a study can be reached from another machine
    random_moment()
    (worker,) = processes(process, "ray::RayTrainWorker")
    worker.send_signal(signal.SIGKILL)
    wait_for(process, "[3/6]")
    random_moment()
    # Ray's processes end with their driver; its two agents look for their parent once in a while only.
    family = [p for p in processes(process) if "Agent" not in p.cmdline()[0]]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [p.cmdline() for p in alive]

    process = start(tmp_path, "--resume", "s", name="")
    wait_for(process, "[5/6]")
    (dispatcher,) = processes(process, "ray::Dispatcher")
    dispatcher.send_signal(signal.SIGKILL)
    broken = finish(process, tmp_path)
    if broken.code:  # else the last trial was faster
        assert broken.code == 130 and "--resume s" in broken.out, broken.out + broken.err
        finished = finish(start(tmp_path, "--resume", "s", name=""), tmp_path)
        assert finished.code == 0, finished.out + finished.err
    check_whole(tmp_path, base)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A study that SIGTERM has ended after its first trial."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "space.py").write_text(SPACE)
    process = start(folder, "--space", "space.py", *OPTIONS)
    wait_for(process, "[1/6]")
    process.send_signal(signal.SIGTERM)
    finished = finish(process, folder)
    assert finished.code == 130 and "Traceback" not in finished.err, finished.out + finished.err
    assert {run.info.status for run in finished.runs()} == {"FINISHED", "KILLED"}
    assert finished.study["state"] == "INTERRUPTED" and "--resume s" in finished.out
    return folder


def copy_of(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "copy", symlinks=True))


def test_what_was_changed_is_refused_with_both_values(ended, tmp_path) -> None:
    folder = copy_of(ended, tmp_path)
    options = ["--resume", "s", "--trials", "4", "--learning-rate", "0.1", "--metric", "loss"]
    refused = finish(start(folder, *options, name=""), folder)
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "`--trials` must not fall" in refused.err and "6 became 4" in refused.err
    assert "'0.0002', but got '0.1'" in refused.err and "'loss'" in refused.err
    (folder / "space.py").write_text(SPACE + "\n# changed\n")
    splits = json.loads((folder / "results" / "s" / "splits.json").read_text())
    image = Path(splits["train"][0]["image"])
    kept = image.read_bytes()
    try:
        shutil.copy(splits["train"][1]["image"], image)
        refused = finish(start(folder, "--resume", "s", name=""), folder)
    finally:
        image.write_bytes(kept)
    assert refused.code == 2 and "the images, questions and answers must stay" in refused.err


def test_a_study_that_is_not_there(tmp_path) -> None:
    refused = finish(start(tmp_path, "--resume", "nowhere", name=""), tmp_path)
    assert refused.code == 2 and "'nowhere'" in refused.err and "plan.json" in refused.err


def test_show_reads_a_study_without_running_it(ended) -> None:
    shown = finish(start(ended, "--show", "s", name=""), ended)
    assert shown.code == 0 and "1 complete" in shown.out and "--resume s" in shown.out, shown.out + shown.err


def test_resume_with_a_budget_and_replay(ended, base) -> None:
    options = ["--resume", "s", "--stop-when", "auroc>=0.01"]
    finished = finish(start(ended, *options, name=""), ended)  # trial 0 has reached that
    assert finished.code == 0, finished.out + finished.err
    study = finished.study
    assert "trial 0 has reached auroc>=0.01" in study["ended_by"] and study["winner"] == 0
    assert "Ended because trial 0" in finished.out
    running = [trial for trial in study["trials"] if trial["state"] == "INTERRUPTED"]
    again = finish(start(ended, "--replay", "s", "--trial", "0", name=""), ended)
    assert again.code == 0 and "Identical." in again.out, again.out + again.err
    finished = finish(start(ended, "--resume", "s", "--stop-when", "", name=""), ended)
    assert finished.code == 0, finished.out + finished.err
    assert all(finished.study["trials"][trial["number"]]["state"] == "COMPLETE" for trial in running)
    assert finished.study["ended_by"] == ""
    check_whole(ended, base)


def test_one_process_at_a_time(ended) -> None:
    from tune.records.journal import StudyLock

    lock = StudyLock(ended / "results" / "s")
    assert lock.acquire()
    refused = finish(start(ended, "--resume", "s", name=""), ended)
    assert refused.code == 2 and "one process runs a study" in refused.err


def test_a_journal_cut_in_its_last_line_is_read_up_to_it(tmp_path) -> None:
    from tune.records.journal import Journal, read_events

    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("session", tags={})
    journal.write("report", number=1, metrics={"loss": float("nan")})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "rep')
    assert [event["event"] for event in read_events(path)] == ["session", "report"]
    again = Journal(path)
    again.write("ended", number=1)
    assert [event["event"] for event in read_events(path)] == ["session", "report", "ended"]
