"""What MLflow receives, on a real server that may become unavailable, hang, or receive records again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from servers import proxied
from studies import ROOT, write_plan

from train_fn.jobs import EpochReport
from train_fn.settings import TrialSettings
from train_fn.support.storage import Storage
from tune.config.settings import StudySettings
from tune.config.uris import strip_credentials
from tune.records.journal import Event, Journal, read_events
from tune.tracking.delivery import Tracking
from tune.tracking.target import target_of

LONG = "x" * 2000


class Server:
    """`mlflow server` on loopback as a process of its own, that can be killed and started again on its store."""

    def __init__(self, folder: Path, backend: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.backend = backend or f"sqlite:///{folder / 'mlflow.db'}"

    def start(self) -> None:
        options = ["--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port), *options]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.signal(signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ a study


class Silent:
    def notify(self) -> None:
        pass


def report(epoch: int, seed: int, last: int = 3) -> dict[str, Any]:
    """What a lane reports, as the journal takes it."""
    draw = random.Random(f"{seed} {epoch}")
    log = [{"step": 3 * epoch - 3 + i, "loss": draw.random(), "learning_rate": 1e-4 * i} for i in (1, 2, 3)]
    return {
        "epoch": epoch,
        "step": 3 * epoch,
        "metrics": {"loss": draw.random(), "auroc": draw.random(), "specificity": math.nan if seed == 4 else 0.5},
        "log": [*log, {"step": 3 * epoch, "eval_loss": 0.1}],
        "applied": {"lora_r": 8, "trainable_params": 1000 * seed + 1000},
        "seconds": {"setup": 0.1, "train": 1.0 * epoch, "evaluation": 0.5 * epoch},
        "finished": epoch == last,
        "lane": seed % 2,
        "turn": seed // 2,
        "device": "cpu",
        "num_threads": 1,
        "notes": ["out of memory: micro-batch 2 -> 1, same global batch"] if seed == 4 else [],
        "base_gib": 0.1,
        "base_16_bit_gib": 0.05,
        "wall_s": 1.8 * epoch,
        "waited_s": 0.01,
        "device_s": 1.8 * epoch,
        "system": {"memory_gib": 0.7, "cpu_s": 3.0 * epoch},
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study's folder: six trials that end in every way, two of them begun again by a second session."""
    from tune.search.callback import StudyLog
    from tune.search.point import Point

    directory = tmp_path_factory.mktemp("study") / "s"
    adapter = directory / "best_adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "task.json").write_text('{"model": {}, "question": "?", "candidates": ["Benign", "Malignant"]}')
    settings = SimpleNamespace(study=StudySettings(trials=6, scheduler="none"))
    journal = Journal(directory / "journal.jsonl")
    parts = {"name": "s", "journal": journal, "directory": directory, "storage": Storage(directory, "")}
    made: Any = SimpleNamespace(goals=(("auroc", "max"),), settings=settings, plan={}, **parts)
    stopped: list[int] = []
    dispatcher = SimpleNamespace(stop=SimpleNamespace(remote=lambda number, for_good=False: stopped.append(number)))

    def session() -> StudyLog:
        tags = {"metric": "auroc", "version_ray": "2.60.0"}
        journal.write("session", params={"trials": 6, "notes": LONG, "seed": 0}, tags=tags)
        return StudyLog(made, dispatcher, Silent(), lambda text: None)  # type: ignore[arg-type]

    def begin(log: StudyLog, number: int) -> Any:
        names = (LONG[:600],) if number == 5 else ("q",)
        settings = TrialSettings(learning_rate=1e-3 * (number + 1), lora_target_modules=names)
        config = {"number": number, "point": Point({}, {}, settings, ("learning_rate", "lora_target_modules"))}
        trial = SimpleNamespace(config=config)
        log.on_trial_start(0, [], trial)
        return trial

    def end(state: str, adapter: Path | None) -> None:
        scores, found = {"best_auroc": 0.9, "wall_s": 10.0}, {"state": state, "register": "", "adapter": adapter}
        tags, files = {"winner": 0, "ended_by": ""}, ["report.html", "pictures/one.png"]
        journal.write(
            "study_ended", tags=tags, metrics=scores, num_trials=6, artifacts=files, model_tags={"study": "s"}, **found
        )

    def run(log: StudyLog, trial: Any, epochs: list[int]) -> None:
        for epoch in epochs:
            message = EpochReport(**report(epoch, trial.config["number"]))
            log("", {"number": trial.config["number"], "epoch": epoch, "report": message})

    (directory / "pictures").mkdir()
    (directory / "report.html").write_text("<h1>s</h1>")
    (directory / "pictures" / "one.png").write_bytes(b"png")
    first = session()
    for number, epochs in {0: [1, 2, 3], 1: [1], 2: [1, 2], 3: [1]}.items():
        run(first, begin(first, number), epochs)
        if number < 2:
            first.end(number, "STOPPED" if number else "COMPLETE")
    first.end(2, "FAILED", "TrialFailed: the loss is not finite\n\nTraceback ...", 2.0)
    first.close()
    end("INTERRUPTED", None)
    second = session()
    for number, epochs in {3: [2, 3], 4: [1, 2, 3], 5: [1]}.items():
        run(second, begin(second, number), epochs)
        if number < 5:
            second.end(number, "COMPLETE")
    second.close()
    assert stopped == [3, 5]  # what still ran when a session ended is stopped on its lane
    taken = {"file": "1.json", "refused": "", "done": "the study ends after 6 trials", "trials": 6}
    journal.write("control", action="trials", value=6, **taken)
    for run_number in (1, 2):
        journal.write("confirmed", number=0, run=run_number, value=0.8 + run_number / 100)
    score = {"auroc": {"value": 0.8, "interval": [0.7, 0.9]}}
    tests = {"winner": score, "winner, clean part": score}
    journal.write("tested", tests=tests, predictions={}, adapters={"winner": "a"}, num_trials=6)
    end("COMPLETE", Path("best_adapter"))
    return directory


def copy_of(study: Path, folder: Path, uri: str, experiment: str) -> Path:
    """The study under an id of its own, delivered to an experiment of its own."""
    directory = Path(shutil.copytree(study, folder / "s"))
    study_settings = {"experiment": experiment, "report_to": ["mlflow"], "storage": ""}
    write_plan(directory, study_settings, study_id=experiment, tracking_uri=uri)
    return directory


def begin_tracking(directory: Path, events: list[Event]) -> Tracking:
    plan = json.loads((directory / "plan.json").read_text())
    return Tracking(target_of(directory, plan), events, retry_s=0.3)


def num_delivered(directory: Path) -> int:
    path, plan = directory / "tracking.json", json.loads((directory / "plan.json").read_text())
    content = json.loads(path.read_text()) if path.exists() else {}
    if "mlflow" in content:  # the first version's form
        return content["mlflow"]
    return content.get("stores", {}).get(plan["tracking_uri"], {}).get("next", 0)


def wait_until_delivered(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while num_delivered(directory) < count:
        assert time.monotonic() < deadline, f"{num_delivered(directory)} of {count} events were delivered"
        time.sleep(0.02)


def sync(directory: Path, *options: str, uri: str = "") -> SimpleNamespace:
    """`python -m tune.tracking sync` in this process; `uri`: MLFLOW_TRACKING_URI."""
    from tune.tracking.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("MLFLOW_TRACKING_URI", uri) if uri else patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        code = main(["sync", str(directory), *options])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def stored(uri: str, experiment: str) -> dict[str, Any]:
    """All that a store holds of a study, by run, with nothing in it that differs from one delivery to the next."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    ids = {run.info.run_id: run.data.tags["vlm_tune.key"].removeprefix(experiment) for run in runs}
    assert len(set(ids.values())) == len(runs), "a run is there twice"

    def files(run: str, path: str = "") -> list[str]:
        listed = client.list_artifacts(run, path or None)
        return [name for file in listed for name in (files(run, file.path) if file.is_dir else [file.path])]

    content = {}
    for run in runs:
        run_id = run.info.run_id
        history = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
        tags = {key: ids.get(value, value.removeprefix(experiment)) for key, value in run.data.tags.items()}
        info = run.info
        content[ids[run_id]] = {
            "info": (info.run_name, info.status, info.start_time, info.end_time),
            "params": run.data.params,
            "tags": tags,
            "metrics": {k: [(m.step, repr(m.value), m.timestamp) for m in found] for k, found in history.items()},
            "artifacts": sorted(files(run_id)),
        }
    models = client.search_logged_models([found.experiment_id])
    return content | {"models": [(model.name, str(model.status)) for model in models]}


@pytest.fixture(scope="module")
def undisturbed(server, study, tmp_path_factory) -> dict[str, Any]:
    """What the server holds after a delivery that nothing disturbed."""
    directory = copy_of(study, tmp_path_factory.mktemp("undisturbed"), server.uri, "undisturbed")
    tracking = begin_tracking(directory, read_events(directory / "journal.jsonl"))
    assert tracking.close() == {} and not tracking.errors, tracking.errors
    return stored(server.uri, "undisturbed")


# ------------------------------------------------------------------------------------------------ what is delivered


def test_every_end_has_its_state(undisturbed) -> None:
    states = {key: (run["info"][1], run["tags"]["end_state"]) for key, run in undisturbed.items() if key != "models"}
    assert states == {
        "/study": ("FINISHED", "COMPLETE"),
        "/0": ("FINISHED", "COMPLETE"),
        "/1": ("KILLED", "STOPPED"),
        "/2": ("FAILED", "FAILED"),
        "/3": ("FINISHED", "COMPLETE"),  # interrupted, and taken up by the second session
        "/4": ("FINISHED", "COMPLETE"),
        "/5": ("KILLED", "INTERRUPTED"),
    }
    assert "not finite" in undisturbed["/2"]["tags"]["error"] and "error.txt" in undisturbed["/2"]["artifacts"]
    assert all("error" not in undisturbed[f"/{number}"]["tags"] for number in (0, 1, 3, 4, 5))
    assert all(undisturbed[f"/{number}"]["tags"]["mlflow.parentRunId"] == "/study" for number in range(6))
    assert undisturbed["/0"]["tags"]["versions"] == undisturbed["/study"]["tags"]["versions"] == "ray 2.60.0"


def test_metrics_parameters_and_files_are_whole(undisturbed, study) -> None:
    trial = undisturbed["/3"]
    assert [step for step, _, _ in trial["metrics"]["train/loss"]] == list(range(1, 10))
    assert [step for step, _, _ in trial["metrics"]["auroc"]] == [3, 6, 9]
    assert [value for _, value, _ in undisturbed["/4"]["metrics"]["specificity"]] == ["nan"] * 3
    assert [step for step, _, _ in undisturbed["/0"]["metrics"]["confirmed"]] == [1, 2]
    assert [step for step, _, _ in undisturbed["/study"]["metrics"]["best_so_far"]] == [1, 2, 3, 4, 5]
    assert undisturbed["/study"]["metrics"]["test_winner_auroc"][0][1] == "0.8"
    (control,) = [text for name, text in undisturbed["/study"]["tags"].items() if name.startswith("control_")]
    assert control == "trials 6: the study ends after 6 trials"
    assert {"report.html", "pictures/one.png", "parameters.json"} <= set(undisturbed["/study"]["artifacts"])
    assert len(undisturbed["/study"]["params"]["notes"]) == len(undisturbed["/5"]["params"]["lora_target_modules"])
    assert "parameters.json" in undisturbed["/5"]["artifacts"] and "parameters.json" not in trial["artifacts"]
    assert len(undisturbed["models"]) == 1
    started = next(e for e in read_events(study / "journal.jsonl") if e["event"] == "started")
    assert undisturbed["/0"]["info"][2] == int(started["time"] * 1000)


# ------------------------------------------------------------------------------------------------ unavailable stores


def test_a_server_that_is_killed_and_restarted(server, study, undisturbed, tmp_path) -> None:
    directory = copy_of(study, tmp_path, server.uri, "killed")
    events = read_events(directory / "journal.jsonl")
    count = random.SystemRandom().randrange(3, len(events) - 6)
    print(f"killed after {count} of {len(events)} events")
    so_far = events[:count]
    tracking = begin_tracking(directory, so_far)
    wait_until_delivered(directory, count - 2)  # the last ones are under way
    server.signal(signal.SIGKILL)
    for event in events[count:-3]:
        so_far.append(event)
        tracking.notify()
    time.sleep(1)
    assert num_delivered(directory) <= count
    server.start()
    for event in events[-3:]:
        so_far.append(event)
        tracking.notify()
    wait_until_delivered(directory, len(events))
    assert tracking.close() == {} and not tracking.errors, tracking.errors
    assert stored(server.uri, "killed") == undisturbed


def test_a_server_that_hangs_delays_nothing(server, study, undisturbed, tmp_path) -> None:
    directory = copy_of(study, tmp_path, server.uri, "hung")
    events = read_events(directory / "journal.jsonl")
    journal = Journal(tmp_path / "journal.jsonl")
    tracking = begin_tracking(directory, journal.events)

    def write(event: Event) -> float:
        before = time.perf_counter()
        journal.write(event["event"], **{name: value for name, value in event.items() if name != "event"})
        tracking.notify()
        return time.perf_counter() - before

    for event in events[:5]:
        write(event)
    wait_until_delivered(directory, 5)
    server.signal(signal.SIGSTOP)
    try:
        slowest = max(write(event) for event in events[5:])
        time.sleep(1)
        before = time.perf_counter()
        waiting = tracking.close(timeout_s=1)
        assert time.perf_counter() - before < 2
        print(f"slowest write {1000 * slowest:.1f} ms")
        assert slowest < 1
        assert waiting == {"mlflow": len(events) - num_delivered(directory)} and waiting["mlflow"] > 0
    finally:
        server.signal(signal.SIGCONT)
    wait_until_delivered(directory, len(events))
    assert stored(server.uri, "hung") == undisturbed


def test_sync_delivers_after_a_server_was_unavailable(server, study, undisturbed, tmp_path) -> None:
    directory = copy_of(study, tmp_path, server.uri, "away")
    events = read_events(directory / "journal.jsonl")
    so_far = events[:12]
    tracking = begin_tracking(directory, so_far)
    wait_until_delivered(directory, 12)
    server.signal(signal.SIGTERM)
    so_far += events[12:]
    tracking.notify()
    before = time.perf_counter()
    assert tracking.close(timeout_s=20) == {"mlflow": len(events) - 12}
    assert time.perf_counter() - before < 20
    refused = sync(directory, uri=server.uri)
    assert refused.returncode == 1 and f"{len(events) - 12} records wait" in refused.stdout, refused
    assert num_delivered(directory) == 12
    server.start()
    for back in (0, 0, 3, len(events)):  # delivered; nothing to do; a kill before the cursor was written; all again
        (directory / "tracking.json").write_text(json.dumps({"mlflow": num_delivered(directory) - back}))
        done = sync(directory, "--mlflow-uri", server.uri)
        assert done.returncode == 0 and "mlflow: all records delivered" in done.stdout and not done.stderr, done
        assert stored(server.uri, "away") == undisturbed


def test_a_lost_store_receives_everything_again(study, undisturbed, tmp_path) -> None:
    """As with the head of a cluster and its sqlite file. By the command, in a process of its own."""
    directory = copy_of(study, tmp_path, f"sqlite:///{tmp_path}/mlflow.db", "lost")
    (directory / "tracking.json").write_text(json.dumps({"mlflow": len(read_events(directory / "journal.jsonl"))}))
    command = [sys.executable, "-m", "tune.tracking", "sync", str(directory)]
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "mlflow: all records delivered" in done.stdout and not done.stderr, done
    found = stored(f"sqlite:///{tmp_path}/mlflow.db", "lost")
    assert {key: run["metrics"] for key, run in found.items() if key != "models"} == {
        key: run["metrics"] for key, run in undisturbed.items() if key != "models"
    }


def run_as(user: str) -> Callable[[], None]:
    """What makes a child process another user, for PostgreSQL will not run as root."""
    import pwd

    entry = pwd.getpwnam(user)

    def become() -> None:
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)

    return become


def test_a_postgresql_that_stops_under_the_server(study, undisturbed, tmp_path) -> None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if not initdb or not importlib.util.find_spec("psycopg2"):
        pytest.skip("needs initdb (Debian's postgresql) and psycopg2")
    become = run_as("nobody") if os.getuid() == 0 else None
    tools = Path(initdb).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="pg"))  # pytest's own are closed to other users
        if become:
            shutil.chown(home, "nobody")

        def call(*command: str) -> None:
            subprocess.run(command, check=True, preexec_fn=become, cwd=home, stdout=subprocess.DEVNULL, timeout=60)

        def postgres(*command: str) -> None:
            options = f"-p {port} -h 127.0.0.1 -k {home} -c fsync=off"
            call(str(tools / "pg_ctl"), "-w", "-D", f"{home}/data", "-l", f"{home}/log", "-o", options, *command)

        call(initdb, "-D", f"{home}/data", "-A", "trust", "-U", "tester", "-N")
        postgres("start")
        stack.callback(postgres, "-m", "immediate", "stop")
        server = Server(tmp_path, f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres")
        server.start()
        stack.callback(server.signal, signal.SIGKILL)
        directory = copy_of(study, tmp_path, server.uri, "postgresql")
        events = read_events(directory / "journal.jsonl")
        so_far = events[:14]
        tracking = begin_tracking(directory, so_far)
        wait_until_delivered(directory, 12)
        postgres("-m", "immediate", "stop")
        so_far += events[14:]
        tracking.notify()
        time.sleep(1)
        assert num_delivered(directory) <= 14
        postgres("start")
        wait_until_delivered(directory, len(events))
        assert tracking.close() == {} and not tracking.errors, tracking.errors
        assert stored(server.uri, "postgresql") == undisturbed


# ------------------------------------------------------------------------------------------------ a proxy in the middle


@pytest.mark.parametrize("status", [400, 404])
def test_a_proxy_that_refuses_for_a_while_loses_no_record(server, study, undisturbed, tmp_path, status) -> None:
    count = 0

    def rule(method: str, path: str) -> int:
        nonlocal count
        count += "runs/log-batch" in path
        return status if "runs/log-batch" in path and 6 <= count < 30 else 0

    with proxied(server.uri, rule) as address:
        directory = copy_of(study, tmp_path, address, f"proxy-{status}")
        events = read_events(directory / "journal.jsonl")
        tracking = begin_tracking(directory, events)
        waiting = tracking.close()["mlflow"]
        assert 0 < waiting < len(events) and tracking.errors and num_delivered(directory) == len(events)
        found = stored(server.uri, f"proxy-{status}")
        assert {k: run["info"][1] for k, run in found.items() if k != "models"} == {
            k: run["info"][1] for k, run in undisturbed.items() if k != "models"
        }
        assert begin_tracking(directory, events).close() == {}  # as `--resume` and `sync` do
    assert stored(server.uri, f"proxy-{status}") == undisturbed


@pytest.mark.parametrize("status", [500])
def test_a_server_that_stores_no_artifact_receives_the_rest(server, study, undisturbed, tmp_path, status) -> None:
    broken = True

    def rule(method: str, path: str) -> int:
        return status if broken and method == "PUT" and "mlflow-artifacts" in path else 0

    with proxied(server.uri, rule) as address:
        directory = copy_of(study, tmp_path, address, f"artifacts-{status}")
        events = read_events(directory / "journal.jsonl")
        tracking = begin_tracking(directory, events)
        assert 0 < tracking.close()["mlflow"] < len(events) and num_delivered(directory) == len(events)
        found = stored(server.uri, f"artifacts-{status}")
        for key, run in undisturbed.items():
            if key != "models":
                assert (found[key]["info"], found[key]["metrics"], found[key]["artifacts"]) == (
                    run["info"], run["metrics"], [],
                )  # fmt: skip
        broken = False
        assert begin_tracking(directory, events).close() == {}
    assert stored(server.uri, f"artifacts-{status}") == undisturbed


# ------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:p%40ss@host:5000/path", "http://host:5000/path"),
        ("postgresql://user:pass@host/db", "postgresql://host/db"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
        ("https://host", "https://host"),
    ],
)
def test_a_uri_is_shown_without_its_credentials(uri, shown) -> None:
    assert strip_credentials(uri) == shown


@pytest.mark.parametrize(
    "words", [["--mlflow-uri", "http://somebody:SECRET@host"], ["--storage", "s3://KEY:SECRET@bucket/results"]]
)
def test_a_secret_on_the_command_line_is_refused_and_not_shown(words) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError

    with pytest.raises(SettingsError) as refused:
        parse(words)
    assert "must hold no key or password" in str(refused.value) and "SECRET" not in str(refused.value)


def test_sync_refuses_a_secret_on_its_command_line(study, tmp_path) -> None:
    refused = sync(copy_of(study, tmp_path, "http://host", "secret"), "--mlflow-uri", "http://somebody:SECRET@host")
    assert refused.returncode == 2 and "must hold no key or password" in refused.stderr
    assert "SECRET" not in refused.stdout + refused.stderr


def test_no_secret_is_written_or_sent(server, study, tmp_path, monkeypatch, capfd) -> None:
    from tune.config.cli import parse
    from tune.lanes.layout import Layout
    from tune.plan.prepare import prepare
    from tune.study import study_params, write_plan

    whole = server.uri.replace("://", "://somebody:SECRET-1@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD"):
        monkeypatch.setenv(name, "SECRET-2")
    monkeypatch.chdir(tmp_path)
    made = prepare(parse(["--num-phantoms", "40", "--name", "s", "--experiment", "secret"]), print)
    write_plan(made)
    target = target_of(made.directory, made.plan)
    assert target.uri == whole and made.plan["tracking_uri"] == server.uri
    tags = {"metric": made.metric}
    made.journal.write("session", params=study_params(made, Layout(1, 1, False, 1)), tags=tags)
    for event in read_events(study / "journal.jsonl")[1:-1]:
        made.journal.write(event["event"], **{name: value for name, value in event.items() if name != "event"})
    shutil.copy(study / "report.html", made.directory)
    shutil.copytree(study / "pictures", made.directory / "pictures")
    tracking = Tracking(target, made.journal.events, 0.3)
    assert tracking.close() == {} and not tracking.errors, tracking.errors
    del made
    files = [path for path in (tmp_path / "results" / "s").rglob("*") if path.is_file()]
    assert len(files) >= 4 and not [path for path in files if b"SECRET" in path.read_bytes()]
    printed = capfd.readouterr()
    assert "SECRET" not in repr(stored(server.uri, "secret")) + printed.out + printed.err


def test_a_store_that_refuses_is_named_without_its_credentials(study, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        whole = uri.replace("://", "://somebody:SECRET@")
        refused = sync(copy_of(study, tmp_path, uri, "nobody"), uri=whole)
    assert refused.returncode == 1 and "cannot be reached" in refused.stdout and "127.0.0.1" in refused.stdout
    assert "SECRET" not in refused.stdout + refused.stderr
