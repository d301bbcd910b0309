"""The end of a study, and what `--show` says of one: nothing that is finished is lost, and no word is false.

The studies here are real but for Ray: their lanes, their search and their scoring job are stand-ins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from studies import LAYOUT, ROOT, write_adapter, write_trial

from train_fn.jobs import EpochReport, Job, JobFailed, JobReport, ScoreReport, TrainJob
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.records.journal import Journal
from tune.results.console import print_summary

NUM_TEST = 12


def adapter_of(folder: Path) -> str:
    return (folder / "adapter_model.safetensors").read_text()


@pytest.fixture(autouse=True)
def quick_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds: a report without pictures, but for the tests that ask for `real_report`."""
    import tune.results.report

    def write(content: dict[str, Any], directory: Path) -> list[Path]:
        path = directory / "report.html"
        path.write_text("<html>")
        return [path]

    if "real_report" not in request.fixturenames:
        monkeypatch.setattr(tune.results.report, "write_report", write)


class Stores:
    """Stands in for the tracking stores."""

    runs_address = ""

    def __init__(self, target: Any, events: Any) -> None:
        pass

    def notify(self) -> None:
        pass

    def close(self, timeout_s: float = 60) -> dict[str, int]:
        return {}

    def notes(self, timeout_s: float = 60) -> list[str]:
        self.close(timeout_s)
        return []


@pytest.fixture(autouse=True)
def hang_up_is_heard() -> Iterator[None]:
    """These tests may themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def no_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store is there."""
    monkeypatch.setattr("tune.study.Tracking", Stores)


@pytest.fixture
def real_report() -> None:
    """The report as it is."""


OPTIONS = ["--name", "s", "--report-to", "tensorboard"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Any:
    """A study as `prepare` makes it, which the others are copies of."""
    from tune.plan.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    return prepare(parse([*OPTIONS, "--results", str(folder), "--data", str(phantoms)]), lambda text: None)


@pytest.fixture
def new_study(tmp_path: Path, phantoms: Path, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A prepared study, without trials, in the folder `results` of the working folder."""
    from train_fn.support.storage import Storage
    from tune.records.journal import StudyLock

    monkeypatch.chdir(tmp_path)

    def make(*argv: str) -> Any:
        directory = tmp_path / "results" / "s"
        directory.mkdir(parents=True)
        settings = parse([*OPTIONS, "--data", str(phantoms), *argv])
        lock = StudyLock(directory)
        assert lock.acquire()
        parts = {"journal": Journal(directory / "journal.jsonl"), "lock": lock, "storage": Storage(directory)}
        plan = prepared.plan | {"settings": settings.to_dict()}
        return dataclasses.replace(prepared, settings=settings, directory=directory, plan=plan, **parts)

    return make


def finished_study(make: Callable[..., Any], *argv: str) -> Path:
    """A study of three trials on disk: trial 2 has won, and the test is scored. Returns its folder."""
    from tune.study import write_plan

    study = make("--trials", "3", *argv)
    write_plan(study)
    study.journal.write("session", params=LAYOUT, tags={}, startup_s=1.0)
    for number, auroc in enumerate((0.6, 0.7, 0.8)):
        write_trial(study.journal, number, auroc=auroc)
    write_adapter(study.directory / "best_adapter", "2")
    score = {"value": 0.8, "interval": [0.7, 0.9]}
    adapters = {"winner": "trials/0002/final_model", "guide": "trials/0000/final_model"}
    tests = {who: {"auroc": score, "loss": score} for who in ("winner", "guide", "difference")}
    study.journal.write("tested", tests=tests, predictions={}, adapters=adapters, num_trials=3)
    tags = {"winner": 2, "adapter": "best_adapter", "ended_by": ""}
    study.journal.write("study_ended", state="COMPLETE", tags=tags, metrics={}, num_trials=3, artifacts=[],
                        adapter="best_adapter", register="", model_tags={})  # fmt: skip
    study.lock._file.close()
    return study.directory


def resume(*argv: str) -> Any:
    """The outcome of `--resume s`, in this process."""
    from tune.plan.prepare import resume as prepare_again
    from tune.study import run

    study = prepare_again(parse(["--resume", "s", *argv]))
    try:
        return run(study, lambda text: None, time.perf_counter())
    finally:
        study.lock._file.close()


def summary(outcome: Any, capsys: pytest.CaptureFixture) -> str:
    print_summary(outcome)
    return capsys.readouterr().out


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray is a fault of the test."""
    monkeypatch.setattr("tune.study.start_ray", lambda settings: pytest.fail("Ray was started"))


LOST = JobFailed(error="lost 3 times, last because an image is gone", device_s=0.0)


class Trainings:
    """Stands in for the dispatcher: answers jobs at once, scoring jobs by the adapter's content."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.before: Callable[[Job], None] = lambda job: None
        self.answers: dict[int, JobReport] = {}
        self.epochs: list[float] = [0.7]  # the first goal's value after each epoch of a training
        for name in ("submit", "next_report", "last_report", "snapshot", "stop"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    def _submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.before(job)
        if isinstance(job, TrainJob):
            write_adapter(job.output / "final_model", "again")
            self.answers[job.number] = self._report(len(self.epochs))
        else:
            self.answers[job.number] = ScoreReport(predictions=[self._score(path) for path in job.adapters])

    def _score(self, adapter: Path) -> dict[str, Any]:
        if not (adapter / "adapter_model.safetensors").is_file() or adapter_of(adapter) == "cut":
            return {"error": "SafetensorError: header"}
        value = np.nan if adapter_of(adapter) == "nan" else 0.5
        return {"losses": np.full(NUM_TEST, value), "scores": np.tile([value, 0.0, 0.0], (NUM_TEST, 1))}

    def _report(self, epoch: int) -> EpochReport:
        metrics = {"auroc": self.epochs[epoch - 1], "loss": 1.0 / epoch}
        best_epoch = 1 + int(np.argmax(self.epochs[:epoch]))
        return EpochReport(epoch=epoch, metrics=metrics, best_epoch=best_epoch, finished=epoch == len(self.epochs))

    def _next_report(self, number: int, seen: int) -> JobReport:
        answer = self.answers[number]
        return self._report(seen + 1) if isinstance(answer, EpochReport) else answer

    def _last_report(self, number: int) -> JobReport:
        return self.answers[number]

    def _snapshot(self) -> dict[str, Any]:
        return {"lanes": 2, "starting": 0, "running": []}

    def _stop(self, number: int, for_good: bool = False) -> None:
        pass


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """No Ray: `search` is to be set by the test; `dispatcher` answers jobs at once."""
    import ray

    import tune.lanes.trainers
    import tune.search.tuner
    from tune.lanes.layout import Layout

    lanes = SimpleNamespace(over=False, drain=lambda: None, close=lambda: None)
    made = SimpleNamespace(dispatcher=Trainings(), lanes=lanes, search=lambda study, log: None)
    monkeypatch.setattr("tune.study.start_ray", lambda settings: {"CPU": 2})
    monkeypatch.setattr("tune.study.session_folder", lambda: Path("session"))
    monkeypatch.setattr("tune.study.watch_control_service", lambda directory, say: threading.Event())
    monkeypatch.setattr("tune.study.plan_layout", lambda settings, resources: Layout(2, 1, False, 1))
    monkeypatch.setattr(tune.lanes.trainers, "start_dispatcher", lambda study, layout: made.dispatcher)
    monkeypatch.setattr(tune.lanes.trainers, "Lanes", lambda study, layout, dispatcher, say: lanes)
    monkeypatch.setattr(tune.search.tuner, "search", lambda study, layout, dispatcher, log: made.search(study, log))
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    yield made


def trains(scores: dict[int, float], contents: dict[int, str] | None = None) -> Callable[[Any, Any], None]:
    """A search whose trials complete with these scores, and fail where there is none."""

    def search(study: Any, log: Any) -> None:
        for number, auroc in scores.items():
            write_trial(study.journal, number, "COMPLETE" if auroc else "FAILED", auroc=auroc)
            if number in (contents or {}):
                write_adapter(study.directory / "trials" / f"{number:04d}" / "final_model", contents[number])

    return search


def run_new(study: Any) -> Any:
    from tune.study import run

    try:
        return run(study, lambda text: None, time.perf_counter())
    finally:
        study.lock._file.close()


# ------------------------------------------------------------------------------------------------ the winner's adapter


@pytest.mark.parametrize("fault", ["cut", "nan", "missing"])
def test_a_winner_whose_adapter_is_broken_is_passed_over(new_study, stand_ins, capsys, fault: str) -> None:
    broken = {2: fault} if fault != "missing" else {}
    stand_ins.search = trains({0: 0.6, 1: 0.7, 2: 0.8}, broken)
    study = new_study("--trials", "3")
    if fault == "missing":
        searched = stand_ins.search
        stand_ins.search = lambda study, log: (
            searched(study, log),
            shutil.rmtree(study.directory / "trials" / "0002"),
        )
    outcome = run_new(study)
    assert outcome.exit_code == 0 and outcome.winner.number == 1
    assert adapter_of(study.directory / "best_adapter") == "1"
    reason = {"cut": "cannot be loaded", "nan": "not finite", "missing": "is missing"}[fault]
    out = summary(outcome, capsys)
    assert "trial 2 cannot be the winner: its adapter" in out and reason in out
    assert "winner (trial 1)" in out
    saved = json.loads((study.directory / "study.json").read_text())
    assert saved["winner"] == 1 and saved["state"] == "COMPLETE"


def test_without_any_adapter_that_works_there_is_no_winner(new_study, stand_ins, capsys) -> None:
    stand_ins.search = trains({0: 0.6, 1: 0.7}, {0: "nan", 1: "cut"})
    outcome = run_new(new_study("--trials", "2"))
    assert outcome.exit_code == 1 and outcome.state == "FAILED"
    assert "No adapter can be used, so there is no winner" in summary(outcome, capsys)
    assert not (outcome.directory / "best_adapter").exists()


def test_a_broken_adapter_that_was_mended_is_taken_by_resume(new_study, stand_ins) -> None:
    stand_ins.search = trains({0: 0.6, 1: 0.7, 2: 0.8}, {2: "cut"})
    assert run_new(new_study("--trials", "3")).winner.number == 1
    stand_ins.search = lambda study, log: None
    assert resume().winner.number == 1 and len(stand_ins.dispatcher.jobs) == 2  # not scored again
    write_adapter(Path("results/s/trials/0002/final_model"), "mended")
    outcome = resume()
    assert outcome.exit_code == 0 and outcome.winner.number == 2
    assert adapter_of(Path("results/s/best_adapter")) == "mended"


def test_the_guides_broken_adapter_costs_the_comparison_only(new_study, stand_ins, capsys) -> None:
    stand_ins.search = trains({0: 0.6, 1: 0.7}, {0: "cut"})
    outcome = run_new(new_study("--trials", "2"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 0 and outcome.winner.number == 1
    assert "no test score of the guide's defaults" in out and "winner (trial 1)" in out
    assert "winner = the guide" not in out
    assert resume().tests and len(stand_ins.dispatcher.jobs) == 1  # it is not scored again, until it is mended
    write_adapter(Path("results/s/trials/0000/final_model"), "mended")
    stand_ins.search = lambda study, log: None
    assert {"winner", "guide", "difference", "majority answer"} == resume().tests.keys()


def test_a_guide_that_failed_is_not_called_the_winner(new_study, stand_ins, real_report, capsys) -> None:
    stand_ins.search = trains({0: 0.0, 1: 0.7})
    outcome = run_new(new_study("--trials", "2"))
    out = summary(outcome, capsys)
    assert (
        list(outcome.tests) == ["winner", "majority answer"]
        and "winner (trial 1)" in out
        and "winner = the guide" not in out
    )
    report = (outcome.directory / "report.html").read_text()
    assert "trial 0 ended as failed" in report


@pytest.mark.usefixtures("no_ray")
def test_the_last_copy_is_never_removed(new_study, capsys) -> None:
    folder = finished_study(new_study)
    shutil.rmtree(folder / "trials")
    outcome = resume()
    assert outcome.exit_code == 0 and outcome.winner.number == 2
    assert outcome.adapter == folder / "best_adapter" and adapter_of(outcome.adapter) == "2"
    # Neither is anything else left of it: no winner, no path, and not 0.
    shutil.rmtree(folder / "best_adapter")
    outcome = resume()
    out = summary(outcome, capsys)
    assert outcome.exit_code == 1 and outcome.adapter is None
    assert "trial 2 cannot be the winner" in out and "Use it" not in out


def test_a_new_winner_leaves_the_only_copy_of_the_old_one(new_study, stand_ins) -> None:
    folder = finished_study(new_study)
    shutil.rmtree(folder / "trials" / "0002")
    stand_ins.search = trains({3: 0.9})
    outcome = resume("--trials", "4")
    assert outcome.winner.number == 3 and adapter_of(folder / "best_adapter") == "3"
    assert adapter_of(folder / "best_adapter-trials-0002-final_model") == "2"


@pytest.mark.usefixtures("no_ray")
def test_a_full_disk_while_the_winner_is_copied(new_study, monkeypatch, capsys) -> None:
    folder = finished_study(new_study)
    shutil.rmtree(folder / "best_adapter")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("tune.results.outcome.copy_folder", full)
    outcome = resume()
    out = summary(outcome, capsys)
    assert outcome.exit_code == 0 and outcome.adapter == folder / "trials" / "0002" / "final_model"
    assert "No space left" in out and "Go on" in out and "--resume s" in out
    monkeypatch.undo()
    monkeypatch.chdir(folder.parents[1])
    outcome = resume()
    assert outcome.adapter == folder / "best_adapter" and "Extend it" in summary(outcome, capsys)


def test_a_lost_test_can_be_given_by_resume(new_study, stand_ins, capsys) -> None:
    stand_ins.search = trains({0: 0.6, 1: 0.7})

    stand_ins.dispatcher._next_report = lambda number, seen: LOST
    stand_ins.dispatcher.next_report = SimpleNamespace(remote=stand_ins.dispatcher._next_report)
    outcome = run_new(new_study("--trials", "2"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 3 and "the test could not be scored" in out and "--resume s" in out
    assert outcome.winner.number == 1 and outcome.adapter.is_dir()
    stand_ins.dispatcher, stand_ins.search = Trainings(), lambda study, log: None
    outcome = resume()
    assert outcome.exit_code == 0 and outcome.tests["winner"]["auroc"]["value"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ not to be written


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("of plotly's making")])
def test_a_report_that_fails_costs_the_report_only(new_study, monkeypatch, capsys, error: Exception) -> None:
    folder = finished_study(new_study)

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("tune.results.report.write_report", fail)
        outcome = resume()
    out = summary(outcome, capsys)
    assert outcome.exit_code == 0 and outcome.winner.number == 2
    assert "the report could not be written" in out and str(error) in out
    assert re.search(r"Go on +python tune/run.py .*--resume s$", out, flags=re.MULTILINE)
    assert not (folder / "report.html").exists() and (folder / "study.json").exists()
    outcome = resume()
    assert (folder / "report.html").exists() and "Extend it" in summary(outcome, capsys)


@pytest.mark.parametrize("when", ["study.json", "winner", "renamed"])
def test_a_disk_that_is_full_at_the_end(new_study, stand_ins, monkeypatch, capsys, when: str) -> None:
    stand_ins.search = trains({0: 0.6, 1: 0.7})
    study = new_study("--trials", "2")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "study.json":
            patch.setattr("tune.results.outcome.write_json", full)
        elif when == "winner":
            patch.setattr("tune.results.outcome.copy_folder", full)
            patch.setattr("tune.results.outcome.write_json", full)
        else:
            stand_ins.dispatcher.before = lambda job: study.directory.rename(study.directory.parent / "other")
        outcome = run_new(study)
    out = summary(outcome, capsys)
    assert outcome.exit_code == (1 if when == "renamed" and not outcome.error else 3)
    assert ("No space left" in out or "is gone" in out or "cannot be loaded" in out) and "--resume s" in out
    assert "1 complete" in out or "2 complete" in out
    if when == "renamed":
        (study.directory.parent / "other").rename(study.directory)
    stand_ins.dispatcher.before = lambda job: None
    stand_ins.search = lambda study, log: None
    outcome = resume()
    assert outcome.exit_code == 0 and adapter_of(outcome.adapter) == "1"
    assert (study.directory / "study.json").is_file()


@pytest.mark.usefixtures("no_ray")
def test_a_finished_study_is_written_again_without_ray(new_study, real_report, capsys) -> None:
    folder = finished_study(new_study)
    outcome = resume()
    assert outcome.exit_code == 0 and (folder / "report.html").stat().st_size > 10_000
    again = json.loads((folder / "study.json").read_text())
    assert again["winner"] == 2 and again["state"] == "COMPLETE" and again["lanes"] == 2
    assert again["layout"]["lanes_per_gpu"] == 1
    assert "Extend it" in summary(outcome, capsys)


# ------------------------------------------------------------------------------------------------ other ends


def test_a_study_that_reached_its_budget_is_complete(new_study, stand_ins, capsys) -> None:
    def search(study: Any, log: Any) -> None:
        trains({0: 0.6})(study, log)
        log.ended_by = "trial 0 has reached auroc>=0.5"

    stand_ins.search = search
    outcome = run_new(new_study("--trials", "3"))
    assert outcome.exit_code == 0 and "Ended because trial 0 has reached" in summary(outcome, capsys)
    saved = json.loads((outcome.directory / "study.json").read_text())
    assert saved["state"] == "COMPLETE" and saved["winner"] == 0 and "auroc>=0.5" in saved["ended_by"]


def test_a_study_without_a_complete_trial_fails(new_study, stand_ins, capsys) -> None:
    stand_ins.search = trains({0: 0.0, 1: 0.0})
    outcome = run_new(new_study("--trials", "2"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 1 and "2 failed" in out and "it broke" in out and "no winner" in out
    saved = json.loads((outcome.directory / "study.json").read_text())
    assert saved["state"] == "FAILED" and saved["winner"] is None


# ------------------------------------------------------------------------------------------------ ended by an error


def raises(error: BaseException) -> Callable[[Any, Any], None]:
    """A search that ends by an error after its first trial."""

    def search(study: Any, log: Any) -> None:
        write_trial(study.journal, 0, auroc=0.6)
        raise error

    return search


def wrapped_by_tune(error: Exception) -> Exception:
    """An error as Ray Tune raises what its callbacks have raised."""
    import traceback

    from ray.tune import TuneError

    try:
        try:
            raise error
        except Exception:
            raise TuneError(traceback.format_exc())  # noqa: B904  # as Tune does
    except TuneError as wrapped:
        return wrapped


def storage_error(text: str) -> Exception:
    """An error of SQLite as Optuna raises it."""
    import sqlite3

    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    try:
        try:
            raise OperationalError("UPDATE trials", {}, sqlite3.OperationalError(text))
        except OperationalError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error
    except StorageInternalError as error:
        return error


@pytest.mark.parametrize(
    ("text", "wrap"),
    [
        ("database is locked", wrapped_by_tune),
        ("database or disk is full", wrapped_by_tune),
        ("attempt to write a readonly database", lambda error: error),
    ],
)
def test_errors_of_storage_are_told_in_a_sentence(new_study, stand_ins, capsys, text: str, wrap: Callable) -> None:
    stand_ins.search = raises(wrap(storage_error(text)))
    outcome = run_new(new_study("--trials", "3"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 3 and outcome.state == "INTERRUPTED"
    assert "storage failed" in out and text in out and "--resume s" in out
    assert outcome.winner.number == 0 and outcome.adapter.is_dir()


SPACES = {
    "raise KeyError('lora_rank')": "KeyError: 'lora_rank'",
    "sys.exit(0)": "SystemExit: 0",
    "return {'lorar': 3}": "ValueError",
    "trial.suggest_float('x', 2, 1)": "`low <= high` must hold",
}


@pytest.mark.parametrize("body", SPACES)
def test_errors_of_a_space_are_told_in_a_sentence(new_study, stand_ins, capsys, body: str) -> None:
    import optuna

    from tune.config.space import searched_settings

    scope: dict[str, Any] = {}
    exec(f"import sys\ndef space(trial):\n    {body}\n    return {{}}", scope)

    def search(study: Any, log: Any) -> None:
        write_trial(study.journal, 0, auroc=0.6)
        searched_settings(study.settings, scope["space"], optuna.create_study().ask())

    stand_ins.search = search
    outcome = run_new(new_study("--trials", "3"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 3 and "the search space must" in out and SPACES[body] in out
    assert outcome.winner.number == 0 and "--resume s" in out


def test_errors_of_our_own_are_not_explained_away(new_study, stand_ins) -> None:
    stand_ins.search = raises(wrapped_by_tune(AssertionError("a fault of this program")))
    with pytest.raises(Exception, match="a fault of this program"):
        run_new(new_study("--trials", "3"))


def test_an_error_of_a_callback_is_told_in_a_sentence_and_resume_goes_on(new_study, stand_ins, capsys, caplog) -> None:
    def search(study: Any, log: Any) -> None:
        write_trial(study.journal, 0, auroc=0.6)
        write_trial(study.journal, 1, "RUNNING")
        log.failure = KeyError("no such thing")
        raise log.failure

    stand_ins.search = search
    outcome = run_new(new_study("--trials", "3"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 3 and "error of this program" in out and "no such thing" in out and "--resume s" in out
    assert "no such thing" in caplog.text and caplog.records[-1].exc_info  # with its trace, for a report
    stand_ins.search = trains({1: 0.7, 2: 0.8})
    again = resume()
    assert again.exit_code == 0 and again.winner.number == 2


# ------------------------------------------------------------------------------------------------ signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PHASES = [("search", 0), ("search", 1), ("search", 2), ("confirmation", 0), ("confirmation", 1), ("scoring", 1),
          ("scoring", 2), ("report", 0), ("report", 2), ("stores", 1)]  # fmt: skip


@pytest.mark.parametrize(("phase", "number"), [(phase, SIGNALS[which]) for phase, which in PHASES])
def test_one_signal_stops_a_study_in_every_phase(
    new_study, stand_ins, monkeypatch, capsys, phase: str, number: signal.Signals
) -> None:
    complete = trains({0: 0.6, 1: 0.7})

    def search(study: Any, log: Any) -> None:
        # As Ray Tune's loop: it ends when its handler for SIGUSR1 has been called.
        stop: list[int] = []
        signal.signal(signal.SIGUSR1, lambda *given: stop.append(1))
        complete(study, log)
        if phase == "search":
            signal.raise_signal(number)
            assert stop

    reached: list[str] = []

    def at(what: str) -> None:
        if phase == what and what not in reached:
            reached.append(what)
            signal.raise_signal(number)
            pytest.fail("nothing has stopped the study")

    stand_ins.search = search
    stand_ins.dispatcher.before = lambda job: at("confirmation" if isinstance(job, TrainJob) else "scoring")
    with monkeypatch.context() as patch:
        patch.setattr("tune.results.report.write_report", lambda *given: at("report") or [])
        patch.setattr(Stores, "close", lambda *given: at("stores") or {})
        before = [signal.getsignal(one) for one in SIGNALS]
        outcome = run_new(new_study("--trials", "2", "--confirm", "1", "--confirm-seeds", "1"))
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert outcome.exit_code == 130 and reached == [phase] * (phase != "search")
    out = summary(outcome, capsys)
    assert "2 complete" in out and "--resume s" in out and outcome.winner.number in (0, 1)
    assert json.loads((outcome.directory / "study.json").read_text())["state"] == "INTERRUPTED"
    stand_ins.search, stand_ins.dispatcher.before = lambda study, log: None, lambda job: None
    assert resume().exit_code == 0


def test_a_second_signal_ends_at_once_and_shows_what_is_safe(new_study, stand_ins, monkeypatch, capsys) -> None:
    def interrupted(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    stand_ins.search = lambda study, log: (trains({0: 0.6, 1: 0.7})(study, log), interrupted())
    monkeypatch.setattr("tune.results.outcome.write_json", interrupted)
    outcome = run_new(new_study("--trials", "3"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 130 and "2 complete" in out and "--resume s" in out
    assert "before all of its results were written" in out and not (outcome.directory / "study.json").exists()
    assert outcome.winner.number == 1 and str(outcome.adapter) in out


def test_a_second_signal_while_the_lanes_write_their_state(new_study, stand_ins, monkeypatch, capsys) -> None:
    def interrupted(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    stand_ins.search = lambda study, log: (trains({0: 0.6, 1: 0.7})(study, log), interrupted())
    stand_ins.lanes.drain = interrupted
    outcome = run_new(new_study("--trials", "3"))
    out = summary(outcome, capsys)
    assert outcome.exit_code == 130 and "2 complete" in out and "--resume s" in out and "at once" in out
    assert outcome.winner.number == 1 and outcome.adapter.is_dir() and str(outcome.adapter) in out


def test_a_signal_before_the_lanes_shows_what_earlier_sessions_have_done(new_study, monkeypatch, capsys) -> None:
    finished_study(new_study)
    monkeypatch.setattr("tune.study.start_ray", lambda settings: signal.raise_signal(signal.SIGTERM))
    outcome = resume("--trials", "9")
    out = summary(outcome, capsys)
    assert outcome.exit_code == 130 and "3 complete" in out and "Go on" in out and outcome.winner.number == 2


def test_a_signal_before_a_study_has_begun(new_study, monkeypatch) -> None:
    monkeypatch.setattr("tune.study.start_ray", lambda settings: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):  # `main` says that nothing has been changed
        run_new(new_study("--trials", "9"))


def test_a_signal_waits_until_an_event_is_written(tmp_path: Path, monkeypatch) -> None:
    from tune.signals import StopSignals

    journal = Journal(tmp_path / "journal.jsonl")
    write = journal._append

    def slow(line: bytes) -> None:
        write(line[:5])
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)
        write(line[5:])

    monkeypatch.setattr(journal, "_append", slow)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        journal.write("session", params={})
        assert stop.count == 0
        time.sleep(5)
    assert stop.count == 1 and len(journal.events) == 1
    assert json.loads((tmp_path / "journal.jsonl").read_text())["event"] == "session"


HANG_UP = """
import signal, sys
from rich.text import Text
from tune.signals import StopSignals
from tune.results.terminal import live, print_line
with StopSignals() as stop:
    try:
        with live(lambda: Text("the footer")):
            print_line("begun")
            signal.pause()
    except KeyboardInterrupt:
        pass
    for _ in range(3):
        print_line("after")
sys.exit(100 + stop.count)
"""


@pytest.mark.parametrize("closed", [False, True])
def test_a_closed_terminal_gets_its_cursor_back_and_raises_nothing(closed: bool) -> None:
    reader, writer = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", HANG_UP], cwd=ROOT, env=os.environ | {"TERM": "xterm"},
                               stdin=writer, stdout=writer, stderr=writer, start_new_session=True)  # fmt: skip
    os.close(writer)
    seen = b""
    while b"begun" not in seen or b"footer" not in seen:
        seen += os.read(reader, 1000)
    if closed:
        os.close(reader)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 101
    if not closed:
        with contextlib.suppress(OSError):
            while part := os.read(reader, 1000):
                seen += part
        os.close(reader)
        assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l") and b"after" in seen


def test_under_nohup_a_study_goes_on() -> None:
    from tune.signals import StopSignals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.count == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------ the pieces


def test_a_scoring_job_answers_for_each_adapter(base, splits, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from train_fn.settings import TrialSettings
    from train_fn.trial.loop import run_trial
    from train_fn.trial.scoring import score_adapter, try_adapter
    from tune.final_test import adapter_problem

    run_trial(base, splits, TrialSettings(max_steps=1, lora_r=4, lora_alpha=8), lambda report: False, output=tmp_path)
    sound = tmp_path / "final_model"
    tensors = load_file(sound / "adapter_model.safetensors")

    def change(name: str, write: Callable[[Path], object]) -> Path:
        copy = Path(shutil.copytree(sound, tmp_path / name))
        write(copy / "adapter_model.safetensors")
        return copy

    def without_one(path: Path) -> None:
        save_file(dict(list(tensors.items())[1:]), path)

    faults = {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "empty": lambda path: path.write_bytes(b""),
        "missing": Path.unlink,
        "no config": lambda path: (path.parent / "adapter_config.json").unlink(),
        "no JSON": lambda path: (path.parent / "adapter_config.json").write_text("{"),
        "fewer tensors": without_one,
        "other shape": lambda path: save_file({n: t.repeat(2, 2) for n, t in tensors.items()}, path),
        "NaN": lambda path: save_file({n: torch.full_like(t, torch.nan) for n, t in tensors.items()}, path),
    }
    before = score_adapter(base, splits, "test", 16, sound)
    for name, fault in faults.items():
        answer = try_adapter(base, splits, "test", 16, change(name, fault))
        problem = adapter_problem(answer)
        assert problem.startswith("cannot be loaded"), name
    after = try_adapter(base, splits, "test", 16, sound)  # a fault leaves nothing on the base
    assert adapter_problem(after) == "" and np.array_equal(before["scores"], after["scores"])

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr("train_fn.trial.adapter_files.load_file", denied)
        try_adapter(base, splits, "test", 16, sound)  # a disk that fails is no fault of the adapter


@pytest.mark.parametrize("uri", ["", "file:///bucket"])
def test_a_replay_writes_where_all_nodes_can(new_study, stand_ins, monkeypatch, tmp_path: Path, uri: str) -> None:
    from train_fn.support.storage import Storage
    from tune.replay import replay

    monkeypatch.setattr("tune.replay.start_ray", lambda settings: {})
    study = new_study("--trials", "1")
    write_trial(study.journal, 0, auroc=0.7)
    storage = Storage(study.directory, uri and f"file://{tmp_path}/bucket/s")
    study = dataclasses.replace(study, storage=storage)
    seen: list[Path] = []

    def train(job: Job) -> None:
        assert isinstance(job, TrainJob)
        seen.append(job.output)
        assert not seen[0].exists()

    stand_ins.dispatcher.before = train
    (study.directory / "replay").mkdir()  # of one that was killed
    assert replay(study, 0, 0, lambda text: None) == 1  # other metrics
    assert seen[0].is_relative_to(study.directory) and storage.directory == study.directory
    assert not seen[0].exists()


def test_a_confirmation_is_recorded_whole_and_replayed(new_study, stand_ins, monkeypatch) -> None:
    """It counts by its best epoch; each epoch is compared; the seed is the confirmation's."""
    from tune.confirm import confirm
    from tune.replay import replay
    from tune.study import earlier_outcome

    monkeypatch.setattr("tune.replay.start_ray", lambda settings: {})
    study = new_study("--trials", "1", "--confirm", "1", "--confirm-seeds", "2")
    write_trial(study.journal, 0, auroc=0.9)
    stand_ins.dispatcher.epochs = [0.6, 0.8, 0.7]
    confirm(study, stand_ins.dispatcher, earlier_outcome(study, print), print)
    one, two = (event for event in study.journal.events if event["event"] == "confirmed")
    assert (one["run"], one["seed"], one["best_epoch"], one["value"]) == (1, 1, 2, 0.8) and two["seed"] == 2
    assert one["metrics"] == {"auroc": 0.8, "loss": 0.5}
    assert [epoch["auroc"] for epoch in one["epochs"]] == [0.6, 0.8, 0.7]
    outcome = earlier_outcome(study, print)
    outcome.pick_winner()
    assert outcome.delivered() == {"trial": 0, "seed": 1, "run": 1, "folder": "trials/0000/confirm-1/final_model",
                                   "metrics": {"auroc": 0.8, "loss": 0.5}}  # fmt: skip

    assert replay(study, 0, 2, print) == 0
    assert stand_ins.dispatcher.jobs[-1].settings.seed == 2  # type: ignore[union-attr]
    stand_ins.dispatcher.epochs = [0.6, 0.8, 0.71]  # one epoch differs, and not the one that counts
    assert replay(study, 0, 2, print) == 1
    for number in (3, 9):
        with pytest.raises(
            SettingsError, match=rf"`--run` must be a training of trial 0 .*\(0, 1, 2\), but got {number}"
        ):
            replay(study, 0, number, print)


def test_a_confirmation_of_an_earlier_version_is_replayed_by_its_value(new_study, stand_ins, monkeypatch) -> None:
    from tune.replay import replay

    monkeypatch.setattr("tune.replay.start_ray", lambda settings: {})
    study = new_study("--trials", "1")
    write_trial(study.journal, 0, auroc=0.9)
    study.journal.write("confirmed", number=0, run=1, value=0.7)
    assert replay(study, 0, 1, print) == 0 and stand_ins.dispatcher.jobs[-1].settings.seed == 1
    stand_ins.dispatcher.epochs = [0.71]
    assert replay(study, 0, 1, print) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Benign é 良性", "Benign é 良性"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\nb\r", "a\\nb\\r"),
        ("\x00\udcff", "\\x00\\udcff"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        (3.5, "3.5"),
    ],
)
def test_plain_text_commands_no_terminal(text: Any, shown: str) -> None:
    from train_fn.support.text import plain, plain_values

    assert plain(text) == shown and plain(text).isprintable()
    assert plain("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert plain_values({"\x1b": ["\x00\n", 1, None, ("\udcff",)]}) == {"\\x1b": ["\\x00\n", 1, None, ["\\udcff"]]}


def test_output_that_nobody_reads_ends_no_study() -> None:
    code = (
        "from tune.results.terminal import print_line\nfor _ in range(9): print_line('x' * 99999)\nraise SystemExit(7)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}; echo $? >&2"
    run = subprocess.run(["bash", "-c", f"({command}) | head -c 1"], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.strip() == "7"
