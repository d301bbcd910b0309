"""`--show`: a study's results so far from its journal, also of one that runs, was killed, or cannot be written to."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import re
import shlex
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from studies import LAYOUT, report_event, write_adapter, write_plan, write_trial

from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.stored import resumed_values, stored_settings
from tune.plan.prepare import take_lock
from tune.records.journal import Journal, StudyLock, encode, is_running
from tune.records.process import this_process
from tune.results.console import print_summary
from tune.results.outcome import Outcome
from tune.show import show

HOSTILE = "[/red]\x1b[2J\udcff\x00<img src=x>"


def make_study(
    folder: Path, *, name: str = "s", trials: int = 20, process: Any = None, **settings: Any
) -> tuple[Path, Journal]:
    """A study's folder with its plan and an open journal. process: the one that its session names."""
    directory = folder / name
    directory.mkdir(parents=True)
    study = {"trials": trials, "require": [], "storage": "", **settings}
    write_plan(directory, study, tracking_uri="sqlite:////somewhere/mlflow.db")
    (directory / "lock").touch()
    journal = Journal(directory / "journal.jsonl")
    journal.write("session", params=LAYOUT, tags={}, startup_s=5.0, **({"process": process} if process else {}))
    return directory, journal


def end(journal: Journal, winner: int | str = "none", **fields: Any) -> None:
    tags = {"winner": winner, "adapter": "best_adapter", "ended_by": fields.pop("ended_by", "")}
    journal.write("study_ended", state="COMPLETE", tags=tags, metrics={}, num_trials=0, **fields)


def summary(outcome: Outcome, capsys: pytest.CaptureFixture) -> str:
    print_summary(outcome)
    return capsys.readouterr().out


def command(out: str, label: str) -> list[str]:
    """The arguments of the command behind a label, as a shell splits them."""
    (line,) = [line for line in out.splitlines() if line.startswith(label)]
    return shlex.split(line.removeprefix(label))[2:]  # without `python tune/run.py`


def test_a_running_study_shows_its_winner_lanes_and_time(tmp_path: Path, capsys) -> None:
    directory, journal = make_study(tmp_path)
    for number, auroc in enumerate((0.6, 0.9, 0.7)):
        write_trial(journal, number, auroc=auroc)
    write_trial(journal, 3, "FAILED")
    write_trial(journal, 4, "RUNNING")
    lock = StudyLock(directory)
    assert lock.acquire()
    outcome = show(directory)
    out = summary(outcome, capsys)
    assert outcome.winner and outcome.winner.number == 1
    assert "Best so far: trial 1, validation auroc 0.900" in out and "1 (best so far)" in out and "(winner)" not in out
    assert outcome.adapter == directory / "trials" / "0001" / "final_model"
    assert "3 complete, 1 failed, 1 running" in out and "on 2 lanes" in out
    assert f"State: running on {socket.gethostname()} (process {os.getpid()}) since 20" in out
    assert "; in the search: 4 of 20 trials have ended, 1 is unfinished." in out
    assert "Trials that run or wait for a lane" in out
    assert outcome.seconds["wall"] >= 5
    # `--resume` is refused while it runs, and there is no study.json.
    assert command(out, "Look again") == ["--results", str(tmp_path), "--show", "s"]
    assert "Extend it" not in out and "Go on" not in out and "study.json" not in out and "No trial completed" not in out
    assert "Reproduce it" not in out  # a replay is refused, too
    assert command(out, "Pause it") == ["tune.control", "--results", str(tmp_path), "s", "pause"]
    assert lock.acquire()  # `show` has left the lock alone


def test_a_killed_study_shows_its_results_and_the_command_that_goes_on(tmp_path: Path, capsys) -> None:
    directory, journal = make_study(tmp_path / "a 'b [/red]")
    write_trial(journal, 0, auroc=0.6)
    write_trial(journal, 1, "RUNNING")
    outcome = show(directory)
    out = summary(outcome, capsys)
    assert "1 complete, 1 interrupted" in out and "State: interrupted" in out and "on 2 lanes" in out
    assert "Unfinished trials" in out and "Trials that run" not in out
    assert command(out, "Go on") == ["--results", str(directory.parent), "--resume", "s"]


OTHER = {"work": "study", "host": "gpu-7", "boot": "another", "pid": 7, "since": 1e9}


def test_a_trial_shows_how_far_it_has_come(tmp_path: Path, capsys) -> None:
    directory, journal = make_study(tmp_path)
    for number, more in ((0, {}), (1, {"max_steps": 9})):
        settings = {"num_train_epochs": 3, "max_steps": 0, **more}
        journal.write("started", number=number, searched={"lora_r": 8}, settings=settings, params={})
    journal.write("report", **report_event(0, 0.75) | {"finished": False, "step": 1})
    out = summary(show(directory), capsys)
    zero, one = (line for line in out.splitlines() if re.match("│ [01] +│", line))
    assert "│ 1 of 3" in zero and "│ 0.750" in zero and "lora_r 8" in zero
    assert re.match("│ 1 +│ 0 +│ - ", one)


@pytest.mark.parametrize(
    ("process", "state"),
    [
        (this_process(), f"interrupted on {socket.gethostname()}: no process runs it"),
        (this_process() | {"boot": "before the restart"}, f"interrupted on {socket.gethostname()}: no process runs it"),
        (None, "interrupted: no process runs it"),  # of an earlier version
        ({"host": 3}, "interrupted: no process runs it"),
        (OTHER, "begun on gpu-7 (process 7) since 2001-09-0"),
    ],
)
def test_a_break_is_told_from_the_process_that_began_the_session(
    tmp_path: Path, capsys, process: dict | None, state: str
) -> None:
    directory, journal = make_study(tmp_path, process=process)
    write_trial(journal, 0, auroc=0.6)
    write_trial(journal, 1, "RUNNING")
    outcome = show(directory)
    out = summary(outcome, capsys)
    assert f"State: {state}" in out and not outcome.running
    elsewhere = process is OTHER
    assert ("this machine cannot see whether it still runs there" in out) == elsewhere
    assert outcome.records[1].state == ("RUNNING" if elsewhere else "INTERRUPTED")
    assert outcome.unfinished and command(out, "Go on") == ["--results", str(tmp_path), "--resume", "s"]


@pytest.mark.parametrize(("age", "runs"), [(5.0, True), (1000.0, False)])
def test_the_lease_shows_whether_a_study_on_object_storage_runs_elsewhere(
    tmp_path: Path, monkeypatch, age: float, runs: bool
) -> None:
    directory, journal = make_study(tmp_path, process=OTHER, storage="s3://bucket/results")
    write_trial(journal, 0, auroc=0.6)
    held = {"token": "t", "host": "gpu-8", "boot": "another", "pid": 8, "renewed_at": time.time() - age}
    monkeypatch.setattr("tune.records.bucket.Lease.read", lambda lease: held)
    assert show(directory).status.startswith("running on gpu-8 (process 8), as its storage" if runs else "begun on gpu")
    monkeypatch.setattr("tune.records.bucket.Lease.read", lambda lease: 1 // 0)
    end(journal, 0)
    assert show(directory).status.startswith("finished at")  # the storage is not asked


def test_each_phase_has_its_words(tmp_path: Path, capsys) -> None:
    directory, journal = make_study(tmp_path, trials=2, process=this_process())
    lock = StudyLock(directory)
    phases = []

    def look() -> None:
        assert lock.acquire()
        running = show(directory)
        assert running.status.startswith("running on") and running.running
        fcntl.flock(lock._file, fcntl.LOCK_UN)
        broken = show(directory)
        assert broken.status.startswith("interrupted") and not broken.running and broken.unfinished
        assert running.status.partition("; ")[2] == broken.status.partition("; ")[2]
        phases.append(broken.status.partition("; ")[2])

    look()
    write_trial(journal, 0, auroc=0.6)
    write_trial(journal, 1, "RUNNING")
    look()
    (directory / "trials" / "0001" / "final_model").mkdir(parents=True)
    journal.write("report", **report_event(1, 0.7))
    facts = {"best": None, "num_ended": 2, "step": 3, "seconds": {}, "applied": {}, "lane": 0, "device": "cpu"}
    journal.write("ended", number=1, state="COMPLETE", error="", device_s=0.0, notes=[], **facts)
    look()
    journal.write("confirmed", number=1, run=1, value=0.6)
    look()
    (directory / "trials" / "0001" / "confirm-1" / "final_model").mkdir(parents=True)
    adapters = {"winner": "trials/0001/confirm-1/final_model"}
    score = {"auroc": {"value": 0.5, "interval": [0.4, 0.6]}}
    journal.write("tested", tests={"winner": score}, predictions={}, adapters=adapters, num_trials=2)
    look()
    ended = "2 of 2 trials have ended"
    assert phases == [
        "in the search: 0 of 2 trials have ended, 0 are unfinished",
        "in the search: 1 of 2 trials have ended, 1 is unfinished",
        f"after the search: {ended}, the test images are not scored yet",
        f"after the search: {ended}, 1 trained again to confirm, the test images are not scored yet",
        f"after the test: {ended}, its results are not written yet",
    ]
    (directory / "report.html").touch()
    (directory / "study.json").touch()
    end(journal, 1)
    out = summary(show(directory), capsys)
    assert "State: finished at 20" in out and "Best so far" not in out and "1 (winner)" in out
    labels = [line[:15].strip() for line in out.splitlines() if str(directory.parent) in line]
    assert labels[:3] == ["Report", "Adapter", "Results"] and labels[-1] == "Extend it"


def test_a_study_that_a_signal_ended_is_no_finished_one(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path, trials=1)
    write_trial(journal, 0, auroc=0.6)
    journal.write("study_ended", state="INTERRUPTED", tags={}, metrics={}, num_trials=1, artifacts=[])
    outcome = show(directory)
    assert outcome.status.startswith("interrupted at 20") and outcome.unfinished


def test_another_command_that_holds_the_study_does_not_run_it(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path, trials=1)
    write_trial(journal, 0, auroc=0.6)
    end(journal, 0)
    lock = StudyLock(directory)
    assert lock.acquire("replay") and not is_running(directory)
    outcome = show(directory)
    assert outcome.status.startswith("finished at") and not outcome.running
    assert any("another command holds the study, on" in note and "replay" in note for note in outcome.notes)
    with pytest.raises(SettingsError, match=rf"process {os.getpid()}\) since .* replays a trial of s: wait for it"):
        take_lock(directory)
    (directory / "lock").write_text("no JSON")  # an earlier version left it empty
    assert is_running(directory) and show(directory).status.startswith("running since 20")


def test_a_folder_that_is_no_study_yet_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def said() -> str:
        with pytest.raises(SettingsError) as refused:
            parse(["--show", "s"])
        (problem,) = refused.value.problems
        return problem

    assert "give its name (and --results)" in said()
    folder = tmp_path / "results" / "s"
    folder.mkdir(parents=True)
    assert "give its name (and --results)" in said()
    (folder / "journal.jsonl").touch()
    lock = StudyLock(folder)
    assert lock.acquire()
    assert f"is being prepared on {socket.gethostname()} (process {os.getpid()})" in said()
    lock._file.close()
    assert "was being prepared when its process ended" in said()
    Journal(folder / "journal.jsonl").write("session", params=LAYOUT, tags={}, startup_s=5.0)
    assert "holds a journal without its plan.json: put that back from a copy" in said()

    def refuse(path: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.path.lexists", refuse)
    assert "cannot be read (Permission denied): change its permissions" in said()


@pytest.mark.parametrize(("asked", "ran"), [(20, 20), (3, 3), (20, 3)])
def test_the_next_command_asks_for_more_trials_than_before(tmp_path: Path, capsys, asked: int, ran: int) -> None:
    directory, journal = make_study(tmp_path, trials=asked)
    for number in range(ran):
        write_trial(journal, number, auroc=0.5 + number / 100)
    end(journal, ran - 1, ended_by="" if asked == ran else "trial 2 has reached auroc>=0.5")
    out = summary(show(directory), capsys)
    argv = command(out, "Extend it")
    assert argv[-2] == "--trials" and int(argv[-1]) > asked
    assert "interrupted" not in out


def test_show_names_the_winners_own_adapter(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path, trials=2)
    write_trial(journal, 0, auroc=0.6)
    write_trial(journal, 1, auroc=0.7)
    write_adapter(directory / "best_adapter", "1")
    end(journal, 1)
    assert show(directory).adapter == directory / "best_adapter"
    journal.write("session", params=LAYOUT, tags={}, startup_s=0.0)
    write_trial(journal, 2, auroc=0.8)
    outcome = show(directory)  # best_adapter is still of trial 1
    assert outcome.winner and outcome.winner.number == 2
    assert outcome.adapter == directory / "trials" / "0002" / "final_model"
    shutil.rmtree(directory / "trials" / "0002")
    assert show(directory).adapter is None


def test_wall_time_leaves_out_the_days_between_sessions(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path, trials=2)
    write_trial(journal, 0, auroc=0.6)
    lines = [dict(event) for event in journal.events]
    day = 86_400.0
    for number, event in enumerate(lines):
        event["time"] = 1000.0 + number
    again = [event | {"time": event["time"] + day} for event in lines]
    events = [event | {"seq": seq} for seq, event in enumerate([*lines, *again[:1]])]
    journal.path.write_bytes(b"".join(encode(event) + b"\n" for event in events))
    assert show(directory).seconds["wall"] == 5.0 + 3.0 + 5.0  # the start of both, and three events a second apart


def test_a_study_of_an_earlier_version_keeps_the_last_epoch_and_the_argmax(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("tune.records.plan.FORMAT", 3)
        directory, journal = make_study(tmp_path)
    write_trial(journal, 0, auroc=0.6)
    stored = stored_settings(directory)[1]
    assert (stored["select"], stored["decide"]) == ("last", "argmax") and show(directory).records[0].best_epoch == 0
    newer, _ = make_study(tmp_path, name="newer", select="best")
    assert stored_settings(newer)[1]["select"] == "best"
    problems: list[str] = []
    resumed_values({"resume": "s", "select": "best"}, directory, problems)
    assert len(problems) == 1 and "`--select` must stay what the study was begun with, 'last'" in problems[0]


@pytest.mark.parametrize("lock", ["there", "missing", "held"])
def test_show_writes_nothing(tmp_path: Path, monkeypatch, capsys, lock: str) -> None:
    directory, journal = make_study(tmp_path)
    write_trial(journal, 0, auroc=0.6)
    held = StudyLock(directory)
    assert held.acquire() or lock != "held"
    if lock != "held":
        held._file.close()
    if lock == "missing":
        (directory / "lock").unlink()
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    opens, low = builtins.open, os.open

    def read_only(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        assert not set(mode) & set("wax+"), f"{path} is opened for writing"
        return opens(path, mode, *given, **named)

    def low_read_only(path: Any, flags: int, *given: Any, **named: Any) -> int:
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), f"{path} is opened for writing"
        return low(path, flags, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", read_only)
        patch.setattr(io, "open", read_only)
        patch.setattr(os, "open", low_read_only)
        outcome = show(directory)
    assert outcome.running is (lock == "held") and "1 complete" in summary(outcome, capsys)
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "plan",
    ["", "[]", "{}", "null", '{"settings": 3}', '{"settings": {"study": {"trials": 1, "require": []}}, "goals": [7]}'],
)
def test_a_damaged_plan_is_reported(tmp_path: Path, plan: str) -> None:
    directory, _ = make_study(tmp_path)
    (directory / "plan.json").write_text(plan)
    with pytest.raises(SettingsError) as refused:
        show(directory)
    assert len(refused.value.problems) == 1 and "plan.json" in refused.value.problems[0]


def test_a_study_without_a_journal_has_no_results_and_says_why(tmp_path: Path, capsys) -> None:
    directory, journal = make_study(tmp_path)
    journal.path.unlink()
    out = summary(show(directory), capsys)
    assert "journal.jsonl is missing or empty" in out and "--resume s" in out


@pytest.mark.parametrize("where", ["value", "name", "error", "study", "answer"])
def test_hostile_text_is_printed_as_plain_text(tmp_path: Path, capsys, where: str) -> None:
    name = "[/red]" if where == "study" else "s"
    directory, journal = make_study(tmp_path, name="red" if where == "study" else "s", trials=2)
    searched = {"value": {"kind": HOSTILE}, "name": {HOSTILE: 1.0}}.get(where, {})
    write_trial(journal, 0, auroc=0.6, searched=searched)
    journal.write("started", number=1, searched=searched, settings={}, params={})
    facts = {"best": None, "num_ended": 1, "step": 0, "seconds": {}, "applied": {}, "lane": 0, "device": "cpu"}
    error = HOSTILE if where == "error" else "it broke"
    journal.write("ended", number=1, state="FAILED", error=error, device_s=0.0, notes=[], **facts)
    if where == "answer":
        score = {"value": 0.5, "interval": [0.4, 0.6]}
        adapters = {"winner": "trials/0000/final_model"}
        journal.write("tested", tests={"winner": {HOSTILE: score}}, predictions={}, adapters=adapters, num_trials=2)
    end(journal, 0)
    outcome = show(directory)
    outcome.name = name
    out = summary(outcome, capsys)
    assert not set(out) & {"\x1b", "\x00", "\udcff"} and out.encode()
    assert "[/red]" in out or "[/r" in out  # a narrow column breaks it
