"""`python -m tune.control`: what a user asks of a study that runs, of one that does not, and of one that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import ROOT, environment, finish, report_event, start, wait_for, write_plan, write_trial

from train_fn.jobs import EpochReport
from train_fn.support.storage import Storage
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.stored import resumed_values
from tune.control import control
from tune.records.control import (
    Request,
    added_points,
    asked_trials,
    sentence,
    stopped_trials,
    waiting_requests,
    write_request,
)
from tune.records.end_state import EndState
from tune.records.journal import Event, Journal, StudyLock, read_events
from tune.records.trials import trial_records
from tune.search.callback import STOPPED_BY_USER, StudyLog
from tune.search.control import act_before_session, take_requests
from tune.search.points import propose
from tune.search.searcher import JournalSearcher
from tune.search.tuner import end_decided_trials
from tune.signals import StopSignals

GOALS = (("auroc", "max"),)


class Dispatcher:
    """Stands for the handle of the dispatcher, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda number=-1, **_: self.calls.append((name, number)))


def make_study(folder: Path, *argv: str) -> Any:
    """A study with its journal, as its process holds it."""
    settings = parse(["--trials", "4", *argv])
    directory = folder / "s"
    directory.mkdir(exist_ok=True)
    journal = Journal(directory / "journal.jsonl")
    return SimpleNamespace(
        settings=settings, name="s", directory=directory, goals=GOALS, metric="auroc", journal=journal,
        storage=Storage(directory), plan={"settings": settings.to_dict()},
    )  # fmt: skip


def make_log(study: Any) -> StudyLog:
    """What a session makes of the journal."""
    log = StudyLog(study, Dispatcher(), SimpleNamespace(notify=lambda: None), lambda text: None)  # type: ignore[arg-type]
    end_decided_trials(study, log)
    return log


def look(log: StudyLog) -> None:
    """The next step of Tune's loop."""
    log.next_control = 0.0
    log.on_step_begin(0, [])
    assert log.failure is None


def begin(log: StudyLog, searcher: JournalSearcher) -> Any:
    """Tune starts the next trial."""
    config = searcher.suggest(f"tune-{time.monotonic_ns()}")
    assert isinstance(config, dict)
    trial = SimpleNamespace(config=config, last_result={})
    log.on_trial_start(0, [], trial)
    return trial


def actions(study: Any) -> list[tuple[str, Any, str]]:
    return [(e["action"], e["value"], e["refused"]) for e in study.journal.events if e["event"] == "control"]


# ------------------------------------------------------------------------------------------------ a study that runs


def test_a_running_study_takes_requests_in_order_once_and_removes_their_files(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    log = make_log(study)
    for value in (6, 5, 9):
        write_request(study.directory, Request("trials", value))
    look(log)
    assert [value for _, value, _ in actions(study)] == [6, 5, 9] and log.num_trials == 9
    assert waiting_requests(study.directory) == [] and study.plan["settings"]["study"]["trials"] == 4
    look(log)
    assert len(actions(study)) == 3


def test_two_people_at_once_lose_no_action(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_request(study.directory, Request("add", {"lora_r": 8})), range(40)))
    log = make_log(study)
    log.study.settings = parse(["--trials", "4", "--lora-r", "8"])  # the check of a pinned setting takes no time
    look(log)
    assert len(actions(study)) == 40 and log.num_trials == 44 and len(added_points(study.journal.events)) == 40


def test_a_kill_between_event_and_action_does_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_trial(study.journal, 0)
    write_trial(study.journal, 1, "RUNNING")
    for request in (Request("stop", 1), Request("add", {"lora_r": 16}), Request("trials", 7)):
        write_request(study.directory, request)
    waiting = take_requests(study, trial_records(study.journal.events), 4)
    for _ in range(3):
        next(waiting)  # the third file is still there: the process is killed
    assert len(waiting_requests(study.directory)) == 1
    again = make_study(tmp_path)
    log = make_log(again)
    look(log)
    assert waiting_requests(study.directory) == [] and len(actions(again)) == 3
    assert asked_trials(again.journal.events, 4) == 7 and stopped_trials(again.journal.events) == {1}
    record = log.records[1]
    assert record.state == "STOPPED" and record.notes == [STOPPED_BY_USER]
    assert list(added_points(again.journal.events).values()) == [{"lora_r": 16}]


def test_a_trial_that_is_stopped_by_the_user_ends_as_stopped_with_a_note(tmp_path: Path) -> None:
    study = make_study(tmp_path, "--num-train-epochs", "3")
    log = make_log(study)
    searcher = JournalSearcher(study, log)
    trials = [begin(log, searcher) for _ in range(3)]
    for number in (0, 1, 2):
        write_request(study.directory, Request("stop", number))
    look(log)
    assert log.dispatcher.calls == [("stop_soon", 0), ("stop_soon", 1), ("stop_soon", 2)]
    assert "guide" in next(e for e in study.journal.events if e["event"] == "control")["done"]
    # Trial 0 trains: its next report is its last. Trial 1 waits for a lane. The last report of trial 2 is on its way.
    facts = {name: value for name, value in report_event(0, 0.6).items() if name != "number"}
    for number, finished in ((0, False), (2, True)):
        message = EpochReport(**facts | {"finished": finished})
        assert log("", {"number": number, "epoch": 1, "report": message})
        log.on_trial_complete(0, [], trials[number])
    trials[1].last_result = {"stopped": True, "device_s": 3.0, "done": True}
    assert not log("", trials[1].last_result)
    log.on_trial_complete(0, [], trials[1])
    assert log.failure is None
    records = trial_records(read_events(study.journal.path))
    assert [records[n].state for n in range(3)] == ["STOPPED", "STOPPED", "COMPLETE"]
    assert records[0].notes == [STOPPED_BY_USER] == records[1].notes and records[2].notes == []
    assert records[0].value("auroc") == 0.6 and records[1].device_seconds == 3.0


def test_a_stopped_trial_that_waits_to_go_on_is_not_handed_out(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_trial(study.journal, 0)
    for number in (1, 2):
        write_trial(study.journal, number, "INTERRUPTED")
    log = make_log(study)
    searcher = JournalSearcher(study, log)
    assert searcher.suggest("a")["number"] == 1  # type: ignore[index]
    write_request(study.directory, Request("stop", 2))
    look(log)
    assert searcher.suggest("b")["number"] == 3 and log.records[2].state == "STOPPED"  # type: ignore[index]


def test_an_added_point_is_tried_next_after_the_first_points_and_once(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    log = make_log(study)
    searcher = JournalSearcher(study, log)
    write_request(study.directory, Request("add", {"lora_r": 16, "learning_rate": 0.001}))
    look(log)
    assert log.num_trials == 5
    points = [begin(log, searcher).config["point"] for _ in range(3)]
    assert points[0].added == "" and points[2].added == ""  # the guide's, and the sampler's
    assert points[1].searched["lora_r"] == 16 and points[1].searched["learning_rate"] == 0.001
    assert len(points[1].searched) > 2  # the sampler has chosen the rest
    assert added_points(read_events(study.journal.path)) == {}
    # A kill before the trial has begun: the point comes again, and only then.
    events = [event for event in study.journal.events if event.get("number") != 1]
    (item,) = added_points(events).items()
    assert propose(study, {}, 1, added=item).searched["lora_r"] == 16  # type: ignore[union-attr]


def test_the_search_ends_at_the_number_of_trials_that_holds_when_the_last_one_ends(tmp_path: Path) -> None:
    study = make_study(tmp_path, "--trials", "2")
    log = make_log(study)
    searcher = JournalSearcher(study, log)
    for name in ("a", "b"):
        assert isinstance(searcher.suggest(name), dict)
    assert searcher.suggest("c") is None  # not the end: trials run
    write_request(study.directory, Request("trials", 3))
    look(log)
    assert searcher.suggest("c")["number"] == 2  # type: ignore[index]
    for name in ("a", "b"):
        searcher.on_trial_complete(name)
    assert searcher.suggest("d") is None
    searcher.on_trial_complete("c", error=True)
    assert searcher.suggest("d") == searcher.FINISHED


@pytest.mark.parametrize(("state", "repeats"), [("COMPLETE", 0), ("FAILED", None)])
def test_a_point_that_was_tried_may_be_added(tmp_path: Path, state: str, repeats: int | None) -> None:
    """Again with another seed or, if it has failed, as another point: the request is done either way."""
    study = make_study(tmp_path)
    log = make_log(study)
    tried = begin(log, JournalSearcher(study, log)).config["point"]
    log.records[0].state = EndState(state)
    point = propose(study, log.records, 1, added=("1-a.json", tried.searched))
    assert point and point.added == "1-a.json" and point.repeats == repeats
    assert (point.searched == tried.searched) is (repeats == 0)


def test_an_added_point_is_checked_by_the_ranges_of_the_studys_own_base(results: Path) -> None:
    study = results / "s"
    (study / "plan.json").unlink()
    base = {"model_type": "llama", "hidden_size": 4096, "learning_rate": 1e-4}  # rates up to 6e-4
    write_plan(study, {"trials": 4}, settings=json.loads(json.dumps(parse(["--trials", "4"]).to_dict())), base=base)
    with pytest.raises(SettingsError, match=r"learning_rate must be between 2e-05 and 0\.0006, but got 0\.002"):
        control("s", str(results), "add", '{"learning_rate": 0.002}')


def test_fewer_trials_than_have_begun_leave_those_to_their_end(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_trial(study.journal, 0)
    for number in (1, 2):
        write_trial(study.journal, number, "RUNNING")
    log = make_log(study)
    write_request(study.directory, Request("trials", 1))
    look(log)
    assert log.num_trials == 3 and "so many have begun" in sentence(study.journal.events[-1])


def test_pause_is_a_first_ctrl_c(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    log = make_log(study)
    write_request(study.directory, Request("pause"))
    ended: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: ended.append(1))  # as Tune's loop
    try:
        with StopSignals() as stop, stop.searching():
            look(log)
            assert stop.count == 1 and ended == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert actions(study) == [("pause", None, "")] and waiting_requests(study.directory) == []


UNUSABLE = (
    "",
    "{",
    "[]",
    '{"action": "rm"}',
    '{"action": "stop"}',
    '{"action": "stop", "value": [1]}',
    '{"action": "trials", "value": "9"}',
    '{"action": "add", "value": {"lora_r": 1e9}}',
    '{"action": "add", "value": {"nothing": 1}}',
)


@pytest.mark.parametrize("content", UNUSABLE)
def test_a_request_that_cannot_be_taken_is_refused_and_the_search_goes_on(tmp_path: Path, content: str) -> None:
    study = make_study(tmp_path)
    (study.directory / "control").mkdir()
    (study.directory / "control" / "1-a.json").write_text(content)
    log = make_log(study)
    look(log)
    ((_, _, refused),) = actions(study)
    assert refused and log.num_trials == 4 and waiting_requests(study.directory) == []


# ------------------------------------------------------------------------------------------------ one that does not


def test_a_study_that_does_not_run_takes_its_requests_when_it_goes_on(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_trial(study.journal, 0)
    write_trial(study.journal, 1, "INTERRUPTED")
    for request in (Request("trials", 9), Request("add", {"lora_r": 16}), Request("stop", 1), Request("pause")):
        write_request(study.directory, request)
    study.settings = parse(["--trials", "4"])
    said: list[str] = []
    journal = study.journal
    from tune.plan.prepare import Study

    parts = {"splits": None, "data_report": None, "lock": None, "lease": None}
    made: Any = Study(**{name: value for name, value in vars(study).items() if name != "metric"}, **parts)  # type: ignore[arg-type]
    made = act_before_session(made, said.append)
    assert made.settings.study.trials == 10 == made.plan["settings"]["study"]["trials"]
    assert len(said) == 4 and "does not" in said[3]
    log = make_log(made)
    assert log.records[1].state == "STOPPED" and log.num_trials == 10
    assert [e["event"] for e in journal.events].count("control") == 4


def test_the_number_of_trials_outlives_a_kill(tmp_path: Path) -> None:
    """plan.json is written before each session's first event; what the user has asked for since is in the journal."""

    def events(*numbers: int | None) -> list[Event]:
        """None is the first event of a session, a number an action after which the study is to have so many trials."""
        fields = {"event": "control", "file": "", "action": "trials", "refused": "", "done": ""}
        return [fields | {"trials": n, "value": n} if n else {"event": "session"} for n in numbers]

    assert asked_trials([], 20) == 20 and asked_trials(events(None, 30, 25), 20) == 25
    assert asked_trials(events(None, 30, None), 40) == 40 and asked_trials(events(None, 10, None, 12), 10) == 12
    strange: list[Event] = [{"event": "control"}, {"event": "control", "action": "stop", "value": "1", "refused": ""}]
    assert asked_trials(strange, 20) == 20 and stopped_trials(strange) == set() and added_points(strange) == {}
    directory = tmp_path / "s"
    directory.mkdir()
    write_plan(directory, {"trials": 20})
    journal = Journal(directory / "journal.jsonl")
    journal.write("session", params={}, tags={})
    journal.write("control", file="1.json", action="trials", value=12, refused="", done="", trials=12)
    problems: list[str] = []
    assert resumed_values({"resume": "s"}, directory, problems)[0]["trials"] == 12 and problems == []
    assert resumed_values({"resume": "s", "trials": 15}, directory, problems)[0]["trials"] == 15 and problems == []
    resumed_values({"resume": "s", "trials": 11}, directory, problems)
    assert "12 became 11" in problems[0]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a study of trials 0 (complete), 1 (running) and 2 (stopped)."""
    study = make_study(tmp_path)
    write_plan(study.directory, {"trials": 4}, settings=json.loads(json.dumps(study.settings.to_dict())))
    (study.directory / "lock").touch()
    for number, state in enumerate(("COMPLETE", "RUNNING", "STOPPED")):
        write_trial(study.journal, number, state)
    return tmp_path


@pytest.mark.parametrize(
    ("action", "value", "rule"),
    [
        ("stop", "7", "must name a trial that has begun, but got 7: choose one of 1"),
        ("stop", "2", "trial 2 is stopped: choose one of 1"),
        ("stop", "one", "but got 'one'"),
        ("stop", None, "must be followed by a value"),
        ("trials", "1", "at least 2, since so many have ended"),
        ("trials", "2.5", "must be a whole number"),
        ("trials", "1000000", "100,000"),
        ("trials", "true", "must be a whole number"),
        ("add", "16", "must be a JSON object"),
        ("add", "{'lora_r': 16}", "must be a JSON object"),
        ("add", '{"lora_r": 1000}', "`add`: lora_r must be"),
        ("add", '{"lora_rank": 8}', "must name what the space asks for, but has lora_rank"),
        ("pause", None, "there is nothing to pause"),
        ("pause", "7", "must stand alone"),
    ],
)
def test_the_command_refuses_what_cannot_be_done(results: Path, action: str, value: str | None, rule: str) -> None:
    with pytest.raises(SettingsError) as error:
        control("s", str(results), action, value)
    assert rule in str(error.value), str(error.value)
    assert waiting_requests(results / "s") == []


def test_a_pinned_setting_and_a_grid_take_no_points(tmp_path: Path) -> None:
    from tune.search.control import problems_of

    for argv, point, rule in ((["--lora-r", "8"], {"lora_r": 16}, "--lora-r 8, but got 16"),
                              (["--sampler", "grid"], {}, "--sampler grid")):  # fmt: skip
        (problem,) = problems_of(Request("add", point), {}, parse(argv), True)
        assert rule in problem


def test_the_command_leaves_its_request_to_a_study_that_does_not_run(results: Path, capsys: Any) -> None:
    assert control("s", str(results), "trials", "9") == 0
    assert control(str(results / "s"), "", "stop", "1") == 0
    out = capsys.readouterr().out
    assert "does not run" in out and f"--results {results} --resume s" in out
    assert len(waiting_requests(results / "s")) == 2
    with pytest.raises(SettingsError, match="on this machine"):
        control("s3://bucket/s", str(results), "stop", "1")


def test_the_command_prints_the_answer_of_a_study_that_runs(results: Path, capsys: Any) -> None:
    study = make_study(results)
    lock = StudyLock(study.directory)
    assert lock.acquire()
    log = make_log(study)
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.05):
            look(log)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert control("s", str(results), "trials", "9") == 0
        assert "the study ends after 9 trials" in capsys.readouterr().out
    finally:
        over.set()
        thread.join()


def test_the_command_line_ends_without_a_traceback(results: Path) -> None:
    command = [sys.executable, "-m", "tune.control", "s", "stop", "9", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Nothing was done" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ on a real Ray

SPACE = """
GUIDE = {"lora_r": 4}
def space(trial):
    return {"lora_r": trial.suggest_int("lora_r", 1, 64), "lora_alpha": 8, "learning_rate": 1e-3,
            "num_train_epochs": 200 if trial.number == 1 else 1}
"""


def events_of(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "results" / "s" / "journal.jsonl") if event["event"] == kind]


@pytest.mark.campaign
@pytest.mark.ray
def test_stop_add_and_extend_a_running_study_that_is_killed_and_goes_on(tmp_path: Path) -> None:
    """Trial 1 would train for minutes. The study is killed after trial 2, and acted on before it goes on."""
    (tmp_path / "space.py").write_text(SPACE)
    options = ["--trials", "2", "--lanes", "1", "--scheduler", "none", "--num-phantoms", "60"]
    process = start(tmp_path, "--space", "space.py", *options)
    command = [sys.executable, "-m", "tune.control", "--results", str(tmp_path / "results"), "s"]
    asked = environment(tmp_path) | {"PYTHONPATH": str(ROOT)}

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], env=asked, capture_output=True, text=True)

    wait_for(process, "[1/2]")
    while len(events_of(tmp_path, "started")) < 2:
        time.sleep(0.1)
    with ThreadPoolExecutor(2) as pool:  # two people
        answers = list(pool.map(lambda words: ask(*words), (("add", '{"lora_r": 33}'), ("trials", "5"))))
    answers.append(ask("stop", "1"))
    assert [answer.returncode for answer in answers] == [0, 0, 0], answers
    assert "is tried next" in answers[0].stdout and "5 trials" in answers[1].stdout, answers
    stop_s = events_of(tmp_path, "control")[-1]["time"]
    wait_for(process, "stopped")
    wait_for(process, "trial 2")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    late = ask("trials", "4")
    assert late.returncode == 0 and "does not run" in late.stdout
    finished = finish(start(tmp_path, "--resume", "s", name=""), tmp_path)
    assert finished.code == 0, finished.out + finished.err
    trials = finished.study["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "STOPPED", "COMPLETE", "COMPLETE"]
    assert finished.study["settings"]["study"]["trials"] == 4
    assert trials[1]["notes"] == [STOPPED_BY_USER] and trials[1]["ended_at"] - stop_s < 60
    assert trials[2]["searched"] == {"lora_r": 33}
    assert trials[2]["turn"] == 2  # the lane has kept its workers, which left trial 1 at a step
    assert len(events_of(tmp_path, "control")) == 4 and not list((tmp_path / "results" / "s" / "control").iterdir())
    runs = {run.data.tags.get("trial", "parent"): run for run in finished.runs()}
    tags = runs["parent"].data.tags
    assert sorted(text.rpartition(": ")[0] for name, text in tags.items() if name.startswith("control_")) == [
        'add {"lora_r": 33}', "stop 1", "trials 4", "trials 5"]  # fmt: skip
    assert runs["1"].info.status == "KILLED" and runs["1"].data.tags["notes"] == STOPPED_BY_USER
