"""Studies that are killed and go on: the same trials, none twice, none lost, and the same numbers."""

from __future__ import annotations

import ipaddress
import json
import random
import re
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
from studies import Finished, finish, start, wait_for

pytestmark = pytest.mark.ray
fs = pytest.importorskip("pyarrow.fs")

# Trials by number, so that what is killed and what is not train the same.
SPACE = """
GUIDE = {"learning_rate": 1e-3}
def space(trial):
    trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return {"lora_r": 4 * (1 + trial.number % 3), "lora_alpha": 8, "learning_rate": 1e-3 * (1 + trial.number % 2),
            "num_train_epochs": 2}
"""
OPTIONS = ["--trials", "6", "--lanes", "1", "--scheduler", "none", "--num-phantoms", "60", "--save-steps", "2",
           "--save-state-every", "0"]  # fmt: skip


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
    """A second or two, no two runs the same; told when a test fails."""
    moment = random.SystemRandom().uniform(0, 2)
    print(f"waiting {moment:.2f} s")
    time.sleep(moment)
    return moment


UNDISTURBED: dict[str, list] = {}  # metrics by settings, for all the studies here


def check_whole(folder: Path, base, num_trials: int = 6) -> None:
    """Every trial once, complete everywhere, with the numbers of an undisturbed run."""
    from train_fn.data.splits_file import load_splits
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
    for trial, frozen in zip(trials, stored, strict=True):
        key = json.dumps(trial["settings"], sort_keys=True)
        if key not in UNDISTURBED:
            reports: list[EpochReport] = []
            run_trial(base, splits, TrialSettings.from_dict(trial["settings"]),
                      lambda report, to=reports: to.append(report) or False)  # fmt: skip
            UNDISTURBED[key] = [report.metrics for report in reports]
        assert trial["epochs"] == UNDISTURBED[key], trial["number"]
        assert frozen.value == pytest.approx(trial["epochs"][trial["best_epoch"] - 1]["auroc"])
        (run,) = [run for run in runs if run.data.tags.get("trial") == str(trial["number"])]
        history = client.get_metric_history(run.info.run_id, "auroc")
        assert [metric.value for metric in history] == [epoch["auroc"] for epoch in trial["epochs"]]
        assert len({metric.step for metric in history}) == 2


def kill(driver: subprocess.Popen) -> None:
    """End a driver without warning, and wait until what Ray has started for it is gone."""
    # Ray's processes end with their driver; its two agents look for their parent once in a while only.
    family = [p for p in processes(driver) if "Agent" not in p.cmdline()[0]]
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [p.cmdline() for p in alive]


@pytest.mark.campaign
def test_worker_driver_and_dispatcher_killed(bucket, tmp_path, base) -> None:
    """A worker, then the driver twice, then the dispatcher. The study goes on from its folder, from its bucket alone,
    and from its folder again."""
    (tmp_path / "space.py").write_text(SPACE)
    process = start(tmp_path, "--space", "space.py", "--storage", f"{bucket}/results", *OPTIONS)
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
    wait_for(process, "[2/6]")
    random_moment()
    kill(process)

    process = start(tmp_path, "--resume", "s", name="")
    wait_for(process, "[3/6]")
    random_moment()
    kill(process)
    data = tmp_path / "results" / "phantoms-60-0"
    kept = shutil.move(data, tmp_path / "kept")  # the images are the user's, and stay
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "results").mkdir()
    shutil.move(kept, data)

    process = start(tmp_path, "--resume", f"{bucket}/results/s", name="")
    seen = wait_for(process, "[5/6]")
    assert not [line for line in seen if re.search(r"\[[1-3]/6\]", line)]  # what had ended did not run again
    (dispatcher,) = processes(process, "ray::Dispatcher")
    dispatcher.send_signal(signal.SIGKILL)
    broken = finish(process, tmp_path)
    if broken.code:  # else the last trial was faster
        assert broken.code == 130 and "--resume s" in broken.out, broken.out + broken.err
        finished = finish(start(tmp_path, "--resume", "s", name=""), tmp_path)
        assert finished.code == 0, finished.out + finished.err
    check_whole(tmp_path, base)
    remote, root = fs.FileSystem.from_uri(f"{bucket}/results/s")
    names = {info.path.removeprefix(f"{root}/") for info in remote.get_file_info(fs.FileSelector(root, recursive=True))}
    assert {"study.json", "best_adapter/adapter_model.safetensors", "trials/0005/final_model/task.json"} <= names
    assert not any("/state/" in name for name in names)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Finished:
    """A study that Ctrl-C has ended after its first trial."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "space.py").write_text(SPACE)
    process = start(folder, "--space", "space.py", *OPTIONS)
    wait_for(process, "[1/6]")
    process.send_signal(signal.SIGINT)
    return finish(process, folder)


@pytest.fixture(scope="module")
def ended(interrupted) -> Path:
    """Its folder."""
    return interrupted.folder


def test_ctrl_c_keeps_what_is_finished(interrupted) -> None:
    assert interrupted.code == 130, interrupted.out + interrupted.err
    assert "Traceback" not in interrupted.err + interrupted.out and "--resume s" in interrupted.out
    study = interrupted.study
    assert study["state"] == "INTERRUPTED" and study["trials"][0]["state"] == "COMPLETE"
    assert Path(study["adapter"]).is_dir() and study["adapter"] in interrupted.out
    assert {run.info.status for run in interrupted.runs()} == {"FINISHED", "KILLED"}


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
    image = Path(splits["train"][0]["images"][0])
    kept = image.read_bytes()
    try:
        shutil.copy(splits["train"][1]["images"][0], image)
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


def test_one_process_at_a_time(ended) -> None:
    from tune.records.journal import StudyLock

    lock = StudyLock(ended / "results" / "s")
    assert lock.acquire()
    refused = finish(start(ended, "--resume", "s", name=""), ended)
    assert refused.code == 2 and "one process runs a study" in refused.err


@pytest.mark.campaign
def test_one_signal_stops_confirmation_and_scoring_on_a_real_ray(ended) -> None:
    """Ray Tune sets handlers of its own in the search that comes before. The search ends at once, for its budget."""
    options = ["--stop-when", "auroc>=0.01", "--confirm", "1", "--confirm-seeds", "2"]  # trial 0 has reached that
    process = start(ended, "--resume", "s", *options, name="")
    wait_for(process, "Confirming trials")
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, ended)
    assert stopped.code == 130 and "Traceback" not in stopped.out + stopped.err, stopped.out + stopped.err
    assert "1 complete" in stopped.out and "--resume s" in stopped.out
    journal = (ended / "results" / "s" / "journal.jsonl").read_text()
    assert '"event": "tested"' not in journal and stopped.study["winner"] is not None
    process = start(ended, "--resume", "s", name="")
    wait_for(process, "Scoring the test images")
    process.send_signal(signal.SIGINT)
    stopped = finish(process, ended)
    assert stopped.code == 130 and "Traceback" not in stopped.out + stopped.err, stopped.out + stopped.err
    assert "Confirmed 2 times" in stopped.out and "Test scores" not in stopped.out
    assert Path(stopped.study["adapter"]).is_dir() and "before the first trial" not in stopped.err
    assert "trial 0 has reached auroc>=0.01" in stopped.study["ended_by"] and stopped.study["winner"] == 0
    assert "Ended because trial 0" in stopped.out


@pytest.mark.campaign
def test_resume_with_another_budget_and_replay(ended, base) -> None:
    study = json.loads((ended / "results" / "s" / "study.json").read_text())
    running = [trial for trial in study["trials"] if trial["state"] == "INTERRUPTED"]
    again = finish(start(ended, "--replay", "s", "--trial", "0", name=""), ended)
    assert again.code == 0 and "Identical." in again.out, again.out + again.err
    finished = finish(start(ended, "--resume", "s", "--stop-when", "", "--confirm", "0", name=""), ended)
    assert finished.code == 0, finished.out + finished.err
    assert all(finished.study["trials"][trial["number"]]["state"] == "COMPLETE" for trial in running)
    assert finished.study["ended_by"] == ""
    check_whole(ended, base)


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
