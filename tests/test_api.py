"""A study from Python: results as tables; settings, interrupts and ends as from the command line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from studies import LAYOUT, write_plan, write_trial

import tune
import tune.api
import tune.config.paths
from tune.api import SettingsError, StudyError, load_study, run_study
from tune.config.settings import StudySettings
from tune.records.journal import Journal, StudyLock
from tune.results.progress import progress_view
from tune.show import show

ROOT = Path(__file__).parents[1]


def make_study(folder: Path) -> tuple[Path, Journal]:
    """A study with two complete trials, a failed one, and one that runs."""
    directory = folder / "s"
    directory.mkdir(parents=True)
    write_plan(directory, {"trials": 5, "require": [], "storage": ""})
    journal = Journal(directory / "journal.jsonl")
    journal.write("session", params=LAYOUT, tags={}, startup_s=5.0)
    write_trial(journal, 0, auroc=0.6)
    write_trial(journal, 1, auroc=0.9, searched={"lora_r": 4})
    write_trial(journal, 2, "FAILED")
    write_trial(journal, 3, "RUNNING")
    return directory, journal


def test_a_study_is_read_as_tables(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path)
    score = {"value": 0.8, "interval": [0.7, 0.9]}
    tests = {"winner": {"auroc": score, "ece": {"value": 0.1, "interval": None}}, "guide": {"auroc": score}}
    adapters = {"winner": "trials/0001/final_model", "guide": "trials/0000/final_model"}
    journal.write("tested", tests=tests, predictions={}, adapters=adapters, num_trials=3)
    (directory / "report.html").write_text('<h1 class="a">R\u00e9sum\u00e9</h1><script>1</script>')
    (directory / "study.json").write_text('{"error": "", "notes": ["a copy was left out"]}')
    result = load_study("s", results=tmp_path)
    trials = result.trials
    assert list(trials.columns[:4]) == ["state", "auroc", "learning_rate", "lora_r"] and trials.index.name == "number"
    assert list(trials["state"]) == ["COMPLETE", "COMPLETE", "FAILED", "INTERRUPTED"]
    assert list(trials["auroc"][:2]) == [0.6, 0.9] and trials["auroc"][2:].isna().all()
    assert trials["lora_r"][1] == 4 and trials["error"][2] == "it broke" and trials["train_s"][0] == 1.0
    assert trials["class_balanced_loss"].all()  # a setting that all trials share
    assert result.winner is not None and result.winner.name == 1 and result.winner["auroc"] == 0.9
    assert result.adapter == directory / "trials" / "0001" / "final_model"
    assert list(result.test["winner"].columns) == ["value", "low", "high"]
    assert list(result.test["winner"].loc["auroc"]) == [0.8, 0.7, 0.9]
    assert result.test["winner"].loc["ece"].isna().tolist() == [False, True, True]
    assert result.test["guide"].loc["ece"].isna().all()
    assert result.notes[0] == "a copy was left out" and result.state == "INTERRUPTED"
    assert "trial 1, validation auroc 0.900" in repr(result)
    assert result.report == directory / "report.html" and isinstance(result.report, Path)
    frame = result.report._repr_html_()  # a frame that runs no scripts
    assert (
        'sandbox=""' in frame and "&lt;h1 class=&quot;a&quot;&gt;R\u00e9sum\u00e9" in frame and "<script>" not in frame
    )


def test_a_study_without_trials_has_no_winner(tmp_path: Path) -> None:
    directory, journal = make_study(tmp_path)
    journal.path.write_bytes(b"")
    result = load_study(directory)
    assert result.winner is result.adapter is result.report is None
    assert isinstance(result.trials, pd.DataFrame) and result.trials.empty and result.test.empty


def test_the_progress_of_a_running_study_is_its_journals(tmp_path: Path) -> None:
    directory, _ = make_study(tmp_path)
    lock = StudyLock(directory)
    assert lock.acquire() and load_study(directory).state == "RUNNING"
    view = progress_view(show(directory), StudySettings())
    text = view._repr_mimebundle_((), ())["text/plain"]
    assert (
        "trial 3, 0 of ? epochs" in text and "best auroc 0.900 (trial 1)" in text and "3 of 20 done, 1 running" in text
    )


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"trails": 3}, ["did you mean --trials?"]),
        ({"trials": 0, "lora_r": "many", "data": "nowhere"}, ["`--trials`", "`--data`", "`--lora-r`"]),
        ({"bf16": True, "fp16": True}, ["`--bf16` must not be combined with --fp16"]),
        ({"lora_r": True}, ["`--lora-r` must be a whole number"]),
        ({"metric": ["auroc", "nothing"]}, ["`--metric` must be one of"]),
        ({"resume": "nothing"}, ["`--resume` must name a study"]),
        ({"show": "s"}, ["load_study"]),
        ({"help": True, "doctor": True}, ["help(tune.config.settings)", "vlm-tune"]),
    ],
)
def test_settings_are_checked_as_on_the_command_line(settings: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        run_study(**settings)
    assert len(refused.value.problems) == len(problems)
    assert all(any(words in problem for problem in refused.value.problems) for words in problems)


def test_settings_become_words_of_the_command_line(tmp_path: Path) -> None:
    settings = {"bf16": True, "class_balanced_loss": False, "learning_rate": 2e-4, "metric": ["auroc", "-loss"],
                "lora_exclude_patterns": (), "results": tmp_path, "name": None}  # fmt: skip
    words = tune.api.command_line(settings)
    assert words == ["--bf16", "--no-class-balanced-loss", "--learning-rate=0.0002", "--metric=auroc,-loss",
                     "--lora-exclude-patterns=", f"--results={tmp_path}"]  # fmt: skip
    parsed = tune.api.parse(words)
    assert parsed.study.metric == ("auroc", "-loss") and parsed.trial.class_balanced_loss is False
    assert set(parsed.pinned) == {"class_balanced_loss", "learning_rate", "lora_exclude_patterns"}


def test_problems_of_the_data_come_back_as_they_are_printed(tmp_path: Path, capfd) -> None:
    (tmp_path / "data.json").write_text('[{"image": "a.png", "answer": "x"}, {"image": "b.png", "answer": "y"}]')
    with pytest.raises(SettingsError) as refused:
        run_study(data=tmp_path / "data.json", results=tmp_path / "results", progress=False)
    assert refused.value.problems and all("a.png" in p or "b.png" in p for p in refused.value.problems)
    with pytest.raises(SettingsError) as both:
        run_study(data=tmp_path / "data.json", results=tmp_path / "results", progress=False, trials=0)
    assert "`--trials`" in both.value.problems[0] and both.value.problems[1:] == refused.value.problems
    assert capfd.readouterr().out == "" and not list(tmp_path.glob("results/study*"))


def test_an_interrupt_stops_the_study_and_is_raised(tmp_path: Path, monkeypatch) -> None:
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tune.api, "print_line", interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(num_phantoms=5000, results=tmp_path)
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "Generating 5000 phantoms" in lines[0] and lines[-1] == "Interrupted: nothing has been changed."
    assert after == before


def test_a_process_that_is_killed_is_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tune.api, "print_line", lambda line: os.kill(study_process(tmp_path), signal.SIGKILL))
    with pytest.raises(StudyError, match="ended by SIGKILL") as failed:
        run_study(num_phantoms=5000, results=tmp_path)
    assert failed.value.result is None


def test_a_study_ends_with_the_process_that_has_begun_it(tmp_path: Path) -> None:
    code = f"from tune.api import run_study; run_study(num_phantoms=5000, results={str(tmp_path)!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert caller.stdout and "Generating" in caller.stdout.readline() and study_process(tmp_path)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 60
    while study_process(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def study_process(results: Path) -> int:
    """The id of the process that runs a study with this `--results`; 0: none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"tune.child" in words and f"--results={results}".encode() in words:
            return int(folder.name)
    return 0


def test_the_version_stands_in_one_place() -> None:
    assert f"## {tune.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {tune.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'dynamic.version.attr = "tune.__version__"' in (ROOT / "pyproject.toml").read_text()


def test_printed_commands_are_those_of_a_checkout_or_of_the_wheel(tmp_path: Path, monkeypatch) -> None:
    directory, journal = make_study(tmp_path)
    journal.write("study_ended", state="COMPLETE", tags={"winner": 1}, metrics={}, num_trials=3, artifacts=[])
    (tmp_path / "tune" / "config").mkdir(parents=True)
    ends = ["--results", str(tmp_path), "--resume", "s"]
    assert shlex.split(show(directory).next_step()[1])[:6] == ["python", "tune/run.py", *ends]
    monkeypatch.setattr(tune.config.paths, "__file__", str(tmp_path / "tune" / "config" / "paths.py"))
    assert shlex.split(show(directory).next_step()[1])[:5] == ["vlm-tune", *ends]


def test_the_project_is_imported_from_its_checkout_and_installed_packages_stay_behind_the_standard_library(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert tune.config.paths.import_path() == f"{ROOT}{os.pathsep}{tmp_path}"
    installed = Path(sysconfig.get_path("purelib"), "tune", "config", "paths.py")
    monkeypatch.setattr(tune.config.paths, "__file__", str(installed))
    assert tune.config.paths.import_path() == f"{tmp_path}{os.pathsep}{ROOT}"
