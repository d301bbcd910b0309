"""Stores that refuse, lose or cannot take a study's records.

One refused call costs that call only, and nothing counts as delivered that a store does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from servers import reply, served
from studies import write_plan

from train_fn.support.files import DamagedFile
from train_fn.support.storage import Storage
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.uris import default_uri, is_own, scrub, strip_credentials, tracking_uri
from tune.records.journal import encode
from tune.tracking.__main__ import main
from tune.tracking.calls import prepare_mlflow
from tune.tracking.delivery import Tracking, read_deliveries
from tune.tracking.store_check import check_store
from tune.tracking.target import target_of

# ------------------------------------------------------------------------------------------------ a study


def report(number: int, epoch: int, **metrics: float) -> dict[str, Any]:
    log = [{"step": epoch, "loss": 0.5, "learning_rate": 1e-4}]
    return {
        "event": "report", "number": number, "epoch": epoch, "step": epoch, "log": log,
        "metrics": {"auroc": 0.5 + epoch / 10, "loss": 0.4, **metrics}, "system": {"memory_gib": 1.0},
        "seconds": {"train": 1.0}, "wall_s": 1.5, "waited_s": 0.1, "device_s": 1.5,
    }  # fmt: skip


def ended(number: int, state: str) -> dict[str, Any]:
    return {
        "event": "ended", "number": number, "state": state, "error": "", "best": 0.7, "num_ended": number + 1,
        "step": 2,
        "seconds": {"wall": 3.0, "train": 2.0, "evaluation": 0.5}, "applied": {"trainable_params": 10}, "lane": 0,
        "device": "cpu", "notes": [], "device_s": 3.0,
    }  # fmt: skip


def events() -> list[dict[str, Any]]:
    """Two trials, one completed and one stopped."""
    begun = [{"event": "started", "number": n, "searched": {}, "settings": {"lora_r": 8}, "params": {"lora_r": 8}}
             for n in (0, 1)]  # fmt: skip
    written = [
        {"event": "session", "params": {"trials": 2}, "tags": {"metric": "auroc"}},
        begun[0], report(0, 1), report(0, 2), ended(0, "COMPLETE"), begun[1], report(1, 1), ended(1, "STOPPED"),
        {"event": "study_ended", "state": "COMPLETE", "tags": {"winner": 0}, "metrics": {"best_auroc": 0.7},
         "num_trials": 2, "artifacts": ["report.html"], "adapter": None, "register": "", "model_tags": {}},
    ]  # fmt: skip
    return [event | {"time": 1e9 + index, "seq": index} for index, event in enumerate(written)]


def make_study(
    folder: Path, uri: str, content: list[Any] | None = None, report_to: tuple[str, ...] = ("mlflow",)
) -> Path:
    directory = folder / "results" / "s"
    directory.mkdir(parents=True)
    (directory / "report.html").write_text("<h1>s</h1>")
    study = {"experiment": "e", "report_to": report_to, "storage": ""}
    write_plan(directory, study, study_id=folder.name, tracking_uri=uri)
    lines = [
        encode(event) if isinstance(event, dict) and "seq" in event else json.dumps(event).encode()
        for event in (events() if content is None else content)
    ]
    (directory / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return directory


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow database as MLflow makes it, which takes it two seconds."""
    prepare_mlflow()
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_store, tmp_path, monkeypatch) -> str:
    """The store of a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return default_uri()


def states(uri: str, experiment: str = "e") -> dict[str, str]:
    """Status of the study's runs by their keys."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.data.tags["vlm_tune.key"] for run in found}) == len(found), "a run is there twice"
    return {run.data.tags["vlm_tune.key"].rpartition("/")[2]: run.info.status for run in found}


def run_of(uri: str, key: str, experiment: str = "e") -> Any:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return next(run for run in found if run.data.tags["vlm_tune.key"].endswith(f"/{key}"))


def artifacts(uri: str, key: str, experiment: str = "e") -> set[str]:
    return {file.path for file in MlflowClient(uri).list_artifacts(run_of(uri, key, experiment).info.run_id)}


def sync(capsys, directory: Path, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["sync", str(directory), *words])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return code, printed.out, printed.err


ALL = {"study": "FINISHED", "0": "FINISHED", "1": "KILLED"}


def test_a_store_receives_all_records_and_has_its_own_cursor(uri, tmp_path, capsys) -> None:
    directory = make_study(tmp_path, uri)
    assert sync(capsys, directory) == (0, "mlflow: all records delivered\n", "")
    assert states(uri) == ALL and artifacts(uri, "study") == {"report.html"}
    stored = json.loads((directory / "tracking.json").read_text())
    entry = {"next": 9, "again": [], "refused": [], "experiment_id": "1"}
    assert stored["format"] == 2 and stored["stores"] == {uri: entry}


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_deleted_experiment_keeps_all_records_waiting_until_it_is_restored(uri, tmp_path, capsys) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("e")
    client.delete_experiment(experiment)
    directory = make_study(tmp_path, uri)
    code, out, _ = sync(capsys, directory)
    assert code == 1 and "mlflow: 9 records wait" in out and f"--experiment-id {experiment}" in out
    client.restore_experiment(experiment)
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL


def test_an_experiment_deleted_while_the_study_runs(uri, tmp_path, capsys) -> None:
    directory = make_study(tmp_path, uri)
    written = events()
    so_far = written[:4]
    running = Tracking(target_of(directory, json.loads((directory / "plan.json").read_text())), so_far, 0.1)
    wait_for(lambda: position(directory) == 4)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    client.delete_experiment(experiment)
    so_far += written[4:]
    running.notify()
    assert running.close() == {"mlflow": 5} and running.errors
    code, out, _ = sync(capsys, directory)
    assert code == 1 and "records wait" in out and "was deleted" in out
    client.restore_experiment(experiment)
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL


def wait_for(done: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def position(directory: Path) -> int:
    path = directory / "tracking.json"
    return max((s["next"] for s in json.loads(path.read_text())["stores"].values()), default=0) if path.exists() else 0


def test_a_plain_folder_is_refused_with_mlflows_reason(uri, tmp_path, capsys) -> None:
    directory = make_study(tmp_path, uri)
    code, out, _ = sync(capsys, directory, "--mlflow-uri", "./mlruns")
    assert code == 1 and "9 records wait" in out and "MLFLOW_ALLOW_FILE_STORE" in out
    assert position(directory) == 0 and not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("place", ["file", "s3"])
def test_artifacts_that_cannot_be_stored_cost_no_end_state(uri, tmp_path, capsys, monkeypatch, place) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "art").touch()
    location = {"file": str(tmp_path / "art"), "s3": "s3://no-such-bucket-xyz/a"}[place]
    MlflowClient(uri).create_experiment("e", artifact_location=location)
    directory = make_study(tmp_path, uri)
    code, out, _ = sync(capsys, directory)
    assert code == 1 and "5 records wait, refused: settings.json" in out
    assert ("Not a directory" in out) if place == "file" else ("Unable to locate credentials" in out)
    assert states(uri) == ALL and run_of(uri, "0").data.metrics["auroc"] == 0.7
    assert sync(capsys, directory)[0] == 1  # as long as it is missing
    if place == "file":
        (tmp_path / "art").unlink()
        assert sync(capsys, directory)[:2] == (0, "mlflow: all records delivered\n")
        assert artifacts(uri, "study") == {"report.html"} and artifacts(uri, "0") == {"settings.json", "applied.json"}
        assert states(uri) == ALL


def test_one_file_that_is_refused_costs_no_other_file(uri, tmp_path, capsys, monkeypatch) -> None:
    directory = make_study(
        tmp_path, uri, with_changes(study_ended={"artifacts": ["study.json", "report.html", "gone"]})
    )
    (directory / "study.json").write_text("{}")
    log_artifact = MlflowClient.log_artifact

    def refuse(self: Any, run: str, path: str, folder: str | None = None) -> None:
        if path.endswith("study.json"):
            raise OSError("413: too large")
        log_artifact(self, run, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    code, out, err = sync(capsys, directory)
    assert code == 1 and "1 records wait, refused: study.json: 413" in out and "was not sent gone" in err
    assert artifacts(uri, "study") == {"report.html"}


def test_files_that_are_refused_slowly_are_given_up_for_a_while(uri, tmp_path, capsys, monkeypatch) -> None:
    calls: list[str] = []

    def wait(self: Any, run: str, *args: Any) -> None:
        calls.append(run)
        time.sleep(0.03)
        raise OSError("no credentials found on the network")

    monkeypatch.setattr("tune.tracking.mlflow_sink.SLOW_S", 0.02)
    monkeypatch.setattr(MlflowClient, "log_dict", wait)
    monkeypatch.setattr(MlflowClient, "log_artifact", wait)
    code, out, _ = sync(capsys, make_study(tmp_path, uri))
    assert code == 1 and "5 records wait, refused: settings.json: no credentials" in out and states(uri) == ALL
    assert len(calls) == 4  # two files, each tried twice


def with_changes(**changes: Any) -> list[dict[str, Any]]:
    """The events; a keyword such as started={"params": ...} changes the first event of that kind."""
    written = events()
    for kind, fields in changes.items():
        event = next(event for event in written if event["event"] == kind)
        event |= {name: (event[name] | value if isinstance(value, dict) else value) for name, value in fields.items()}
    return written


@pytest.mark.parametrize(
    ("changes", "call", "kept"),
    [
        ({"started": {"params": {"rate (log)!": 1, "alpha": 4}}}, "param rate (log)!", ("0", "params", "alpha")),
        ({"session": {"params": {"../up": 1, "folds": 3}}}, "param ../up", ("study", "params", "folds")),
        ({"report": {"metrics": {"f1,macro": 1.0, "f1": 0.5}}}, "metric f1,macro", ("0", "metrics", "f1")),
        ({"report": {"metrics": {"text": "good", "f1": 0.5}}}, "metric text", ("0", "metrics", "f1")),
        ({"session": {"tags": {"t" * 251: 1, "model": "nano"}}}, "tag ttt", ("study", "tags", "model")),
        ({"study_ended": {"metrics": {"a//b": 1.0, "wall_s": 1.0}}}, "metric a//b", ("study", "metrics", "wall_s")),
    ],
)  # fmt: skip
def test_one_refused_name_costs_that_name_only(uri, tmp_path, capsys, changes, call, kept) -> None:
    directory = make_study(tmp_path, uri, with_changes(**changes))
    for _ in (1, 2):  # it is tried again, and stays on record
        code, out, _ = sync(capsys, directory)
        assert code == 1 and f"1 records wait, refused: {call}" in out
        assert states(uri) == ALL and artifacts(uri, "study") == {"report.html"}
        key, part, name = kept
        assert name in getattr(run_of(uri, key).data, part)
    (entry,) = json.loads((directory / "tracking.json").read_text())["stores"][uri]["refused"]
    assert entry["call"].startswith(call) and entry["reason"]


def test_what_is_not_a_number_or_too_long_is_stored(uri, tmp_path, capsys) -> None:
    changes = {
        "report": {"metrics": {"f1": float("nan"), "far": float("inf")}},
        "session": {"tags": {"model": "m" * 9000}},
    }
    directory = make_study(tmp_path, uri, with_changes(**changes))
    assert sync(capsys, directory)[0] == 0
    assert repr(run_of(uri, "0").data.metrics["f1"]) == "nan" and len(run_of(uri, "study").data.tags["model"]) == 5000


@pytest.mark.parametrize("error", [MlflowException("a fault of the client"), ValueError("ours"), KeyError("x")])
def test_a_fault_of_the_client_blocks_nothing(uri, tmp_path, capsys, monkeypatch, error) -> None:
    directory = make_study(tmp_path, uri)
    set_terminated, calls = MlflowClient.set_terminated, []

    def fail(self: Any, run: str, *args: Any) -> None:
        calls.append(run)
        if len({*calls}) == 1:  # the first trial's, again and again
            raise error
        set_terminated(self, run, *args)

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "set_terminated", fail)
        code, out, _ = sync(capsys, directory)
    assert code == 1 and "1 records wait, refused: state: " in out and len(calls) <= 4
    assert states(uri) == {**ALL, "0": "RUNNING"}
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL


def test_events_without_their_fields_are_refused_one_by_one(uri, tmp_path, capsys) -> None:
    written: list[Any] = events()
    written[2] = {"event": "report", "time": 1.0, "seq": 2}
    written[6] = {"event": "report", "number": [], "time": None, "seq": 6}
    written[7] = written[7] | {"state": "DREAMING"}
    written += [[], 7, None, {"time": 1.0}]
    written.append({"event": "__init__", "time": 1.0, "seq": 9})
    written.append({"event": "a kind of a later version", "time": 1.0, "seq": 10})
    directory = make_study(tmp_path, uri, written)
    code, out, _ = sync(capsys, directory)
    assert code == 1 and "3 records wait" in out and "DREAMING" in out  # the journal leaves out what is no event
    assert states(uri) == {**ALL, "1": "RUNNING"}


# ------------------------------------------------------------------------------------------------ what is lost


def lose_everything(uri: str, empty: Path) -> None:
    """Put an empty database in place, which this process's MLflow sees, too."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs", "experiments"):
            database.execute(f"DELETE FROM {table}")


def lose_a_run(uri: str, empty: Path) -> None:
    MlflowClient(uri).delete_run(run_of(uri, "0").info.run_id)


def lose_the_parent(uri: str, empty: Path) -> None:
    MlflowClient(uri).delete_run(run_of(uri, "study").info.run_id)


def lose_an_epoch(uri: str, empty: Path) -> None:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM metrics WHERE key IN ('epoch', 'auroc') AND step = 1")


def lose_a_state(uri: str, empty: Path) -> None:
    MlflowClient(uri).update_run(run_of(uri, "1").info.run_id, status="RUNNING")


def lose_parameters(uri: str, empty: Path) -> None:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM params")


@pytest.mark.parametrize(
    "lose", [lose_everything, lose_a_run, lose_the_parent, lose_an_epoch, lose_a_state, lose_parameters]
)
def test_what_a_store_has_lost_is_delivered_again(uri, tmp_path, capsys, empty_store, lose) -> None:
    directory = make_study(tmp_path, uri)
    assert sync(capsys, directory)[0] == 0
    lose(uri, empty_store)
    assert sync(capsys, directory)[:2] == (0, "mlflow: all records delivered\n")
    assert states(uri) == ALL
    run = run_of(uri, "0")
    steps = [metric.step for metric in MlflowClient(uri).get_metric_history(run.info.run_id, "auroc")]
    assert steps == [1, 2] and run.data.params == {"lora_r": "8"} and run.data.metrics["auroc"] == 0.7
    assert run.data.tags["mlflow.parentRunId"] == run_of(uri, "study").info.run_id


def test_a_database_removed_while_the_study_runs_is_noticed(uri, tmp_path, capsys, empty_store) -> None:
    directory = make_study(tmp_path, uri)
    written = events()
    so_far = written[:4]
    running = Tracking(target_of(directory, json.loads((directory / "plan.json").read_text())), so_far, 0.1)
    wait_for(lambda: position(directory) == 4)
    (tmp_path / "mlflow.db").unlink()
    so_far += written[4:]
    running.notify()
    (note,) = running.notes()
    assert "mlflow: 9 records wait, its records are gone" in note and "sync" in note and "60 s at most" in note
    other = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'new.db')}"  # this process's MLflow keeps the removed file
    assert sync(capsys, directory, "--mlflow-uri", other)[0] == 0 and states(other) == ALL


def test_a_renamed_experiment_is_found_again(uri, tmp_path, capsys) -> None:
    written = events()
    directory = make_study(tmp_path, uri, written[:5])
    assert sync(capsys, directory)[0] == 0
    client = MlflowClient(uri)
    client.rename_experiment(client.get_experiment_by_name("e").experiment_id, "another name")
    with open(directory / "journal.jsonl", "ab") as journal:
        journal.writelines(encode(event) + b"\n" for event in written[5:])
    assert sync(capsys, directory)[0] == 0
    assert client.get_experiment_by_name("e") is None and states(uri, "another name") == ALL


# ------------------------------------------------------------------------------------------------ the cursor


def test_another_store_has_a_cursor_of_its_own(uri, tmp_path, capsys, empty_store) -> None:
    written = events()
    directory = make_study(tmp_path, uri, written[:5])
    assert sync(capsys, directory)[0] == 0
    with open(directory / "journal.jsonl", "ab") as journal:
        journal.writelines(encode(event) + b"\n" for event in written[5:])
    other = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
    assert sync(capsys, directory, "--mlflow-uri", other)[0] == 0 and states(other) == ALL
    assert set(states(uri)) == {"study", "0"}
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL


def test_the_first_versions_cursor_is_understood(uri, tmp_path, capsys) -> None:
    directory = make_study(tmp_path, uri)
    assert sync(capsys, directory)[0] == 0
    before = {key: run_of(uri, key).info.run_id for key in ALL}
    (directory / "tracking.json").write_text('{"mlflow": 9, "tensorboard": 3}')
    assert sync(capsys, directory) == (0, "mlflow: all records delivered\n", "")
    (directory / "tracking.json").write_text('{"mlflow": 4}')
    assert sync(capsys, directory)[0] == 0 and {key: run_of(uri, key).info.run_id for key in ALL} == before


def stores_of(store: str) -> str:
    return f'{{"format": 2, "study_id": "ID", "stores": {{"URI": {store}}}}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        ("[]", "must hold a JSON dict"),
        ('{"mlflow": "many"}', "must hold counts"),
        ('{"format": 3}', "format 2"),
        ('{"format": 2, "study_id": "another", "stores": {}}', "of this study"),
        (stores_of('{"next": -1, "again": [], "refused": []}'), "must hold next"),
        (stores_of('{"next": 1, "again": ["x"], "refused": []}'), "must hold next"),
        (stores_of('{"next": 1, "again": [], "refused": ["x"]}'), "must hold next"),
        (stores_of('{"next": 1, "again": [], "refused": [{"seq": 0, "call": "x", "reason": 1}]}'), "must hold next"),
        ('{"format": 2, "study_id": "ID", "stores": []}', "must hold next"),
        ("\0" * 64, "must be JSON"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_cursor_is_named(tmp_path, content, message) -> None:
    directory = make_study(tmp_path, "URI")
    (directory / "tracking.json").write_text(content.replace("ID", tmp_path.name))
    target = target_of(directory, json.loads((directory / "plan.json").read_text()))
    with pytest.raises(DamagedFile, match=message):
        read_deliveries(directory / "tracking.json", target)


@pytest.mark.parametrize("content", ["", '{"mlflow": true}', '{"mlflow": 99}'])
def test_a_damaged_or_foreign_cursor_costs_no_record(uri, tmp_path, capsys, content) -> None:
    directory = make_study(tmp_path, uri)
    (directory / "tracking.json").write_text(content)
    code, out, err = sync(capsys, directory)
    assert (code, out) == (0, "mlflow: all records delivered\n") and "delivered again" in err and states(uri) == ALL


def test_events_missing_from_the_journal_do_not_move_the_cursor(uri, tmp_path, capsys) -> None:
    written = events()
    directory = make_study(tmp_path, uri, [written[0], written[1], written[3], written[4]])  # line 2 was damaged
    assert sync(capsys, directory)[0] == 0 and position(directory) == 5
    lines = [
        json.dumps(event) + "\n" for event in (written[0], written[1], written[4], *written[5:])
    ]  # and now line 3, too
    (directory / "journal.jsonl").write_text("".join(lines))
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL


def test_an_epoch_that_is_trained_again_is_recorded_once(uri, tmp_path, capsys) -> None:
    written = events()
    directory = make_study(tmp_path, uri, written)
    assert sync(capsys, directory)[0] == 0
    again = [
        written[0],
        written[1],
        written[2],
        report(0, 2) | {"time": 2e9, "seq": 20},
        written[4] | {"time": 2e9, "seq": 21},
    ]
    lines = [encode(event) + b"\n" for event in (*again, *(written[5:9]))]
    (directory / "journal.jsonl").write_bytes(b"".join(sorted(lines, key=lambda line: json.loads(line)["seq"])))
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id], "tags.trial = '0'")
    history = client.get_metric_history(run.info.run_id, "auroc")
    assert sorted(metric.step for metric in history) == [1, 2]


def test_events_without_numbers_are_counted(uri, tmp_path, capsys) -> None:
    written = [{name: value for name, value in event.items() if name != "seq"} for event in events()]
    directory = make_study(tmp_path, uri, written[:4])
    assert sync(capsys, directory)[0] == 0 and position(directory) == 4
    (directory / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in written))
    assert sync(capsys, directory)[0] == 0 and states(uri) == ALL and position(directory) == 9


# ------------------------------------------------------------------------------------------------ other stores


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_folder_that_cannot_be_written_is_found_first_and_costs_no_other_store(
    uri, tmp_path, capsys, monkeypatch, kind
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = make_study(tmp_path, uri, report_to=("mlflow", kind))
    folder = {"tensorboard": "trials", "wandb": "wandb"}[kind]
    (directory / folder).touch()
    (problem,) = check_store(parse(["--report-to", kind]), directory, uri, print)
    assert f"`--report-to` {kind} writes to {directory / folder}, but" in problem
    code, out, _ = sync(capsys, directory)
    assert (
        code == 1 and "mlflow: all records delivered" in out and f"{kind}: " in out and "records wait, refused" in out
    )
    if kind == "tensorboard":
        (directory / folder).unlink()
        assert sync(capsys, directory)[0] == 0
        assert len(list(directory.glob("trials/*/runs/events*"))) >= 2


def test_other_stores_receive_all_trials(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = make_study(tmp_path, "sqlite:///unused", report_to=("tensorboard", "wandb"))
    assert sync(capsys, directory)[:2] == (0, "tensorboard: all records delivered\nwandb: all records delivered\n")
    assert len(list(directory.glob("trials/*/runs/events*"))) == 2
    assert len(list(directory.glob("wandb/offline-run-*"))) == 2


# ------------------------------------------------------------------------------------------------ strangers' folders


def test_files_outside_the_study_are_not_sent(uri, tmp_path, capsys) -> None:
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    names = ["../../id_rsa", str(tmp_path / "id_rsa"), "link.html", "report.html", "folder/id_rsa", None, 7]
    directory = make_study(tmp_path, uri, with_changes(study_ended={"artifacts": names, "adapter": "best_adapter"}))
    (directory / "link.html").symlink_to(tmp_path / "id_rsa")
    (directory / "study.json").symlink_to(tmp_path / "id_rsa")
    (directory / "folder").symlink_to(tmp_path)
    (directory / "best_adapter").mkdir()
    (directory / "best_adapter" / "adapter_model.safetensors").symlink_to(tmp_path / "id_rsa")
    code, out, _ = sync(capsys, directory)
    assert code == 1 and "1 records wait" in out and "must lie inside the study's folder" in out
    assert states(uri) == ALL and artifacts(uri, "study") == {"report.html"}
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]


def test_a_strangers_server_must_be_named_by_the_user(uri, tmp_path, capsys, monkeypatch) -> None:
    with served(lambda handler: reply(handler, 404)) as (address, asked):
        directory = make_study(tmp_path, address)
        code, out, err = sync(capsys, directory)
        assert code == 2 and not out and not asked and f"--mlflow-uri {address}" in err
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # one's own is another one
        assert sync(capsys, directory)[0] == 2 and not asked
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("://", "://me:SECRET@"))
        code, out, err = sync(capsys, directory)
        assert code == 1 and asked and "SECRET" not in out + err
        count = len(asked)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert sync(capsys, directory, "--mlflow-uri", address)[0] == 1 and len(asked) > count


def test_which_stores_are_the_users_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:SECRET@own.example/mlflow")
    directory = tmp_path / "results" / "s"
    own = [
        "https://own.example/mlflow",
        default_uri(),
        f"sqlite:///{tmp_path}/results/x.db",
        f"{tmp_path}/results/mlruns",
    ]
    foreign = ["https://own.example", "http://127.0.0.1:5000", f"sqlite:///{tmp_path}/results/../x.db", "/etc/mlruns",
               "postgresql://own.example/mlflow", "databricks", "file:///etc", "s3://bucket"]  # fmt: skip
    assert [is_own(uri, directory) for uri in own] == [True] * len(own)
    assert [uri for uri in foreign if is_own(uri, directory)] == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(uri, tmp_path, capsys, monkeypatch, status) -> None:
    with served(lambda handler: reply(handler, 404)) as (elsewhere, asked):
        to = lambda handler: reply(handler, status, b"<a>moved</a>", Location=elsewhere + handler.path)  # noqa: E731
        with served(to) as (address, first):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("://", "://me:SECRET@"))
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRET")
            directory = make_study(tmp_path, address)
            code, out, err = sync(capsys, directory)
            problems = check_store(parse([]), directory, address, print)
    assert code == 1 and "9 records wait" in out and first and not asked and "SECRET" not in out + err
    assert "redirects" in problems[0] and len(problems) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: [],
        lambda plan: {},
        lambda plan: plan | {"settings": []},
        lambda plan: plan | {"goals": []},
        lambda plan: plan | {"goals": 3},
        lambda plan: plan | {"tracking_uri": 7},
        lambda plan: plan | {"study_id": None},
        lambda plan: plan | {"settings": {"study": {"experiment": "e", "report_to": 5, "storage": ""}}},
        lambda plan: plan | {"settings": {"study": {"experiment": "e", "report_to": ["mars"], "storage": ""}}},
        lambda plan: plan | {"settings": {"study": {"experiment": {}, "report_to": ["mlflow"], "storage": ""}}},
    ],
)
def test_a_plan_with_wrong_types_is_refused_in_one_sentence(uri, tmp_path, capsys, change) -> None:
    directory = make_study(tmp_path, uri)
    plan = json.loads((directory / "plan.json").read_text())
    del plan["format"], plan["checksum"]  # as the first version wrote it
    (directory / "plan.json").write_text(json.dumps(change(plan)))
    code, out, err = sync(capsys, directory)
    assert code == 2 and not out and "plan.json must" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ servers that hang


def trickle(handler: Any) -> None:
    """One byte now and then, for ever: requests' timeout never passes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.05)


def hang(handler: Any) -> None:
    time.sleep(20)


@pytest.mark.parametrize("answer", [trickle, hang])
def test_a_server_that_never_answers_delays_no_longer_than_the_limit(
    uri, tmp_path, capsys, monkeypatch, answer
) -> None:
    monkeypatch.setattr("tune.tracking.mlflow_store.CALL_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("tune.tracking.store_check.CHECK_S", 0.5)
    with served(answer) as (address, asked):
        directory = make_study(tmp_path, address)
        code, out, _ = sync(capsys, directory, "--mlflow-uri", address)
        warnings: list[str] = []
        assert check_store(parse([]), directory, address, warnings.append) == []
    assert code == 1 and "9 records wait, it cannot be reached: " in out and asked
    assert "no answer within" in out if answer is trickle else "timeout" in out
    assert len(warnings) == 1 and "cannot be reached" in warnings[0]


def test_a_study_waits_for_all_stores_no_longer_than_the_limit(uri, tmp_path, monkeypatch) -> None:
    with served(hang) as (address, _):
        directory = make_study(tmp_path, address, report_to=("mlflow", "tensorboard"))
        plan = json.loads((directory / "plan.json").read_text())
        running = Tracking(target_of(directory, plan), events(), 0.1)
        (note,) = running.notes(timeout_s=2)
    assert "mlflow: 9 records wait" in note and "(waited 2 s at most)" in note
    assert f"sync {directory} --mlflow-uri {address}" in note
    assert list(directory.glob("trials/0000/runs/events*"))  # the other store was not held up


# ------------------------------------------------------------------------------------------------ before a search


def problems_of(uri: str, tmp_path: Path, *words: str) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return check_store(parse(list(words)), tmp_path / "results" / "s", uri, warnings.append), warnings


def test_a_store_that_does_not_exist_yet_is_accepted_and_not_created(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems_of(default_uri(), tmp_path) == ([], [])
    assert not list(tmp_path.iterdir())


def deleted(uri: str, folder: Path) -> str:
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("vlm-tune"))
    return uri


def broken_artifacts(uri: str, folder: Path) -> str:
    (folder / "art").touch()
    MlflowClient(uri).create_experiment("vlm-tune", artifact_location=(folder / "art").as_uri())
    return uri


def artifacts_in_a_file(uri: str, folder: Path) -> str:
    (folder / "mlruns").touch()
    return uri


def no_database(uri: str, folder: Path) -> str:
    (folder / "mlflow.db").write_text("no database " * 100)
    return uri


def below_a_file(uri: str, folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db/mlflow.db"


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (deleted, "experiments restore"),
        (broken_artifacts, "artifacts"),
        (artifacts_in_a_file, "artifacts"),
        (no_database, "must be an MLflow database"),
        (below_a_file, "must lie in a folder"),
        (lambda uri, folder: f"sqlite:///{folder}", "must be an MLflow database"),
        (lambda uri, folder: str(folder / "mlruns"), "mlflow migrate-filestore"),
        (lambda uri, folder: (folder / "mlruns").as_uri(), "mlflow migrate-filestore"),
        (lambda uri, folder: "mars://host/x", "must be a store that MLflow can use"),
        (lambda uri, folder: "http://host:port", "must be a store that MLflow can use"),
    ],
)
def test_a_store_that_would_refuse_all_records_is_refused_before_the_study(uri, tmp_path, make, rule) -> None:
    problems, warnings = problems_of(make(uri, tmp_path), tmp_path)
    assert len(problems) == 1 and rule in problems[0] and not warnings, (problems, warnings)


def test_an_unreachable_server_is_a_warning_and_a_refused_login_a_problem(uri, tmp_path) -> None:
    problems, warnings = problems_of("http://127.0.0.1:9", tmp_path)
    assert not problems and len(warnings) == 1 and "cannot be reached at http://127.0.0.1:9" in warnings[0]
    with served(lambda handler: reply(handler, 503, b"busy")) as (address, _):
        problems, warnings = problems_of(address, tmp_path)
    assert not problems and len(warnings) == 1
    for status in (401, 403):
        with served(lambda handler, status=status: reply(handler, status, b"no")) as (address, _):
            problems, warnings = problems_of(address, tmp_path)
        assert len(problems) == 1 and "must let you in" in problems[0] and not warnings


def test_preparing_a_study_checks_its_store(uri, tmp_path) -> None:
    from tune.plan.prepare import prepare

    deleted(uri, tmp_path)
    with pytest.raises(SettingsError, match="experiments restore"):
        prepare(parse(["--num-phantoms", "30", "--name", "s"]), lambda text: None)
    assert not (tmp_path / "results" / "s").exists()
    warnings: list[str] = []
    words = ["--num-phantoms", "30", "--name", "s", "--mlflow-uri", "http://127.0.0.1:9"]
    assert prepare(parse(words), warnings.append).plan["tracking_uri"] == "http://127.0.0.1:9"
    assert [text for text in warnings if "cannot be reached" in text]


def test_the_doctor_reports_what_would_refuse_a_study(uri, tmp_path) -> None:
    from tune.doctor.examine import check_records

    def verdicts(*words: str) -> list[tuple[str, str]]:
        return [(finding.check, finding.status) for finding in check_records(parse(list(words)))]

    assert verdicts() == [("MLflow", "ok")]
    assert verdicts("--mlflow-uri", "http://127.0.0.1:9") == [("MLflow", "warning")]
    assert verdicts("--mlflow-uri", "mars://host") == [("records", "FAIL")]
    assert verdicts("--report-to", "tensorboard") == [("report to", "ok")]
    deleted(uri, tmp_path)
    assert verdicts() == [("records", "FAIL")]


def test_the_command_that_shows_the_trials_can_be_pasted(tmp_path, monkeypatch) -> None:
    import shlex

    from tune.results.summary import mlflow_command

    monkeypatch.chdir(tmp_path)
    assert mlflow_command(default_uri()) == "mlflow ui"
    for uri in ("sqlite+pysqlite:////a b/c%3F/mlflow.db", "http://host:1/a&b", "sqlite:////a;b/$x/mlflow.db"):
        assert shlex.split(mlflow_command(uri))[-1] == uri


# ------------------------------------------------------------------------------------------------ URIs


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:p@ss@host/x", "http://host/x"),
        ("http://user:pa/ss@host/x", "http://host/x"),
        ("http://user:p@s/s@host/x", "http://host/x"),
        ("https://user:pa?s#s@host:5000", "https://host:5000"),
        ("http://SECRET@host", "http://host"),
        ("https://user:SECRET@host:1/p?q=a@b", "https://host:1/p?q=a@b"),
        ("https://user:p@ss?w@host/x", "https://host/x"),
        ("HTTPS://USER:SECRET@HOST/x#y", "HTTPS://HOST/x#y"),
        ("sqlite+pysqlcipher://:SECRET@/file.db?cipher=aes", "sqlite+pysqlcipher:///file.db?cipher=aes"),
        ("postgresql://user:pa/ss@host:5432/db", "postgresql://host:5432/db"),
        ("postgresql+psycopg2://user:12/34@host/db", "postgresql+psycopg2://host/db"),
        ("mysql://user:pa ss@host/db", "mysql://host/db"),
        ("postgresql://host/db?password=SECRET&sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql://host/db?sslmode=require&Password=SECRET", "postgresql://host/db?sslmode=require"),
        ("https://host/x?token=SECRET", "https://host/x"),
        ("https://host/x?sv=2020&sig=SECRET&se=1", "https://host/x?sv=2020&se=1"),
        ("https://host/x?pass%77ord=SECRET#token=SECRET", "https://host/x"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3DSECRET", "mssql+pyodbc:///"),
        ("s3://KEY:SE/CRET@bucket/prefix", "s3://bucket/prefix"),
        ("s3://bucket/p?access_key=A&secret_key=B&region=eu", "s3://bucket/p?region=eu"),
        ("s3://bucket/p?endpoint_override=http://u:SECRET@host", "s3://bucket/p"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("sqlite:////data/a@b:c/mlflow.db", "sqlite:////data/a@b:c/mlflow.db"),
        ("file:///data/a:b@c", "file:///data/a:b@c"),
        ("databricks", "databricks"),
        ("./mlruns", "./mlruns"),
    ],
)
def test_a_uri_without_its_credentials(uri, shown) -> None:
    assert strip_credentials(uri) == shown == strip_credentials(shown)
    if " " not in uri:
        assert scrub(f"cannot reach {uri} now") == f"cannot reach {shown} now"


@pytest.mark.parametrize(
    "words",
    [
        ["--mlflow-uri", "https://host/x?token=SECRET"],
        ["--mlflow-uri", "postgresql://me:SEC/RET@host/db"],
        ["--mlflow-uri", "postgresql://host/db?password=SECRET"],
        ["--storage", "s3://bucket/x?access_key=KEY&secret_key=SECRET"],
        ["--mlflow-urii=http://me:SECRET@host"],
        ["--resume", "s3://KEY:SECRET@bucket/x"],
    ],
)
def test_no_message_about_a_command_line_holds_its_secrets(words, tmp_path, monkeypatch) -> None:
    def fail(self: Storage, path: Path) -> None:
        raise OSError(f"no access to {self.uri}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Storage, "pull", fail)
    with pytest.raises(SettingsError) as refused:
        parse(words)
    assert (
        "SECRET" not in str(refused.value) and "SEC/RET" not in str(refused.value) and "RET@" not in str(refused.value)
    )


@pytest.mark.parametrize("query", ["?password=SECRET", "?token=SECRET", "?x=1&sig=SECRET"])
def test_a_password_among_the_parameters_reaches_no_file(tmp_path, monkeypatch, query) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:9/{query}")
    shown = tracking_uri()
    assert "SECRET" not in shown
    directory = make_study(tmp_path, shown)
    target = target_of(directory, json.loads((directory / "plan.json").read_text()))
    assert target.uri == f"http://127.0.0.1:9/{query}"  # but the client has it
    running = Tracking(target, events(), 0.1)
    notes = running.notes(timeout_s=30)
    assert len(notes) == 1 and "9 records wait" in notes[0] and "SECRET" not in notes[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


@pytest.mark.parametrize("name", ["which one?", "50%41 off", "a#b", "r&d @home", "?%#"])
def test_the_default_store_of_a_folder_with_an_odd_name(tmp_path, monkeypatch, capsys, empty_store, name) -> None:
    folder = tmp_path / "w" / name
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, folder / "mlflow.db")
    directory = make_study(folder, tracking_uri())
    assert sync(capsys, directory)[0] == 0 and states(tracking_uri()) == ALL
    assert artifacts(tracking_uri(), "study") == {"report.html"} and list(folder.glob("mlruns/*"))
    assert [path.name for path in (tmp_path / "w").iterdir()] == [name]
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (3,)


def test_a_local_store_stays_the_same_from_another_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///x/mlflow.db") == f"sqlite:///{tmp_path}/x/mlflow.db"
    assert tracking_uri("./mlruns") == f"{tmp_path}/mlruns" and tracking_uri("databricks") == "databricks"
    assert tracking_uri("sqlite:////a/b.db") == "sqlite:////a/b.db" and tracking_uri("http://h:1/x") == "http://h:1/x"


def test_a_command_line_error_needs_no_mlflow() -> None:
    import subprocess
    import sys

    code = "import sys\nfrom tune.config.cli import parse\nparse([])\nassert 'mlflow' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
