"""A study from Python:

    from tune.api import Predictor, load_study, run_study

    result = run_study(data="data.json", model="Hulu-Med-4B", trials=20)
    Predictor(result.adapter)("scan.png")

No function here is called `run`, because `tune.run` is the command. The study runs in a process of its own, as from a
shell. So the caller's process keeps its signal handlers, its environment and any Ray of its own, and it survives
whatever ends the study. If the caller is interrupted or ends, the study stops as after Ctrl-C, and can be resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.predictor import Predictor
from tune.config.cli import FIELDS, is_switch, parse
from tune.config.paths import SettingsError, import_path, study_directory
from tune.config.settings import Settings, flag, show
from tune.results.frames import ReportPath, test_frame, trials_frame
from tune.results.outcome import Outcome
from tune.results.progress import progress_view, shown
from tune.results.terminal import print_line
from tune.run import read_settings
from tune.show import show as show_study

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["Predictor", "SettingsError", "StudyError", "StudyResult", "load_study", "run_study"]

POLL_S = 0.5
ELSEWHERE = {
    "show": "load_study(...) opens a study",
    **dict.fromkeys(("doctor", "replay", "trial", "run"), "give it to the command, vlm-tune"),
    **dict.fromkeys(("help", "help_all"), "help(tune.config.settings) has every setting"),
}
"""Options of the command line that begin no study, and what to do instead."""


class StudyError(RuntimeError):
    """A study has ended without a winner. `result` holds what it has done; None: it had not begun."""

    def __init__(self, message: str, result: StudyResult | None) -> None:
        super().__init__(message)
        self.result = result


class StudyResult:
    """A study's results, as they were when this object was made.

    `adapter`: the folder of the winner's adapter, or None. `report`: the path of report.html, or None; a notebook shows
    the report itself. `notes`: sentences on what was out of the ordinary.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self.name, self.folder, self.metric = outcome.name, outcome.directory, outcome.metric
        self.adapter = outcome.adapter
        page = outcome.directory / "report.html"
        self.report = ReportPath(page) if page.is_file() else None
        self.notes = list(dict.fromkeys([*stored_notes(outcome.directory), *outcome.notes]))

    @property
    def state(self) -> str:
        """RUNNING, INTERRUPTED (`run_study(resume=...)` has work left), COMPLETE (there is a winner) or FAILED."""
        if self._outcome.running:
            return "RUNNING"
        return "INTERRUPTED" if self._outcome.unfinished else self._outcome.state

    @property
    def winner(self) -> pd.Series | None:
        """The winner's row of `trials`; None: there is no winner."""
        best = self._outcome.winner
        return None if best is None else self.trials.loc[best.number]

    @cached_property
    def trials(self) -> pd.DataFrame:
        """All trials, a row each; see `tune.results.frames.trials_frame`."""
        return trials_frame(self._outcome)

    @cached_property
    def test(self) -> pd.DataFrame:
        """The test scores of winner, guide's defaults and baselines with 95 % intervals; see
        `tune.results.frames.test_frame`. `result.test["winner"]` is a table of its own."""
        return test_frame(self._outcome.tests)

    def __repr__(self) -> str:
        lines = [f"Study {self.name}: {self.state}, {len(self._outcome.records)} trials"]
        if best := self._outcome.winner:
            lines.append(f"Winner: trial {best.number}, validation {self.metric} {best.value(self.metric):.3f}")
        lines += [f"Adapter: {self.adapter}"] if self.adapter else []
        lines += [f"Report: {self.report}"] if self.report else []
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def stored_notes(directory: Path) -> list[str]:
    """The error and the notes in study.json; none before it is written."""
    try:
        study = json.loads((directory / "study.json").read_text(encoding="utf-8"))
        return [*filter(None, [study["error"]]), *study["notes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def load_study(study: str | os.PathLike[str], **settings: Any) -> StudyResult:
    """The results of a study so far, also while it runs.

    Args:
        study: its name, its folder, or its address on object storage.
        settings: `results`, the folder in which names are looked up.

    Raises:
        SettingsError: there is no such study, or its files cannot be read.
    """
    parsed = parse([f"--show={os.fspath(study)}", *command_line(settings)])
    directory = study_directory(parsed.command.show, parsed.study.results)
    assert directory, "the command line was checked for this"
    return StudyResult(show_study(directory.resolve()))


def run_study(*, progress: bool = True, **settings: Any) -> StudyResult:
    """Run a study to its end. Ctrl-C, or a notebook's stop button, stops it: once, and what runs is kept for
    `run_study(resume=NAME)`; again, at once.

    Args:
        progress: whether to show the study's progress and what it prints.
        settings: the settings of the command line by their own names, such as data="data.json", trials=20, lora_r=16,
            metric=["auroc", "-loss"]; None leaves one out. `resume=NAME_OR_FOLDER` goes on with a study.

    Raises:
        SettingsError: settings or data cannot be used; `problems` has all reasons, in the command line's own words.
        StudyError: the study has ended without a winner, or by an error; `result` holds what it has done.
        KeyboardInterrupt: the caller was interrupted, and the study has stopped.
    """
    refused = [f"`{flag(name)}` begins no study: {ELSEWHERE[name]}" for name in settings if name in ELSEWHERE]
    if refused:
        raise SettingsError(refused)
    argv = command_line(settings)
    asked = read_settings(argv)
    if not (asked.command.resume or asked.study.name):
        from tune.plan.prepare import name_of

        argv.append(f"--name={name_of(asked)}")
        asked = read_settings(argv)
    folders = study_folders(asked)
    code, problems = run_child(argv, folders, asked, progress)
    if code == 2:
        raise SettingsError(problems or ["the study must start, but its command line was refused: see above"])
    directory = current(folders)
    result = StudyResult(show_study(directory)) if directory else None
    if code not in (0, 130):
        raise StudyError(reason(code, result), result)
    if result is None:
        raise StudyError("the study was interrupted before its first trial", None)
    return result


def command_line(settings: dict[str, Any]) -> list[str]:
    """Settings as the words of a command line, by which they are checked."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool) and name in FIELDS and is_switch(FIELDS[name][0], name):
            words.append(flag(name) if value else f"--no-{flag(name).removeprefix('--')}")
        elif value is not None:
            words.append(f"{flag(name)}={show(tuple(value) if isinstance(value, list) else value)}")
    return words


def study_folders(settings: Settings) -> list[Path]:
    """The folders of the study, and of the search on a small base before it, if there is one."""
    from tune.transfer import SUFFIX

    results = settings.study.results
    found = study_directory(settings.command.resume, results) if settings.command.resume else None
    folder = (found or Path(results) / settings.study.name).resolve()
    return [folder, folder.with_name(folder.name + SUFFIX)] if settings.study.model_small else [folder]


def current(folders: list[Path]) -> Path | None:
    """The folder of the study that runs, or ran last: the first whose journal has an event."""
    for folder in folders:
        journal = folder / "journal.jsonl"
        if (folder / "plan.json").is_file() and journal.is_file() and journal.stat().st_size:
            return folder
    return None


def reason(code: int, result: StudyResult | None) -> str:
    """Why a study has ended without success, in a sentence."""
    if code < 0:
        return f"the study's process was ended by {signal.Signals(-code).name}: run_study(resume=...) goes on with it"
    if result is None or (code == 1 and result.adapter):
        return f"the study's process has ended with code {code}: see what it printed"
    if code == 1:
        errors = [error for error in result.trials.get("error", ()) if error]
        return f"the study has no winner: {errors[0].splitlines()[0] if errors else 'see what it printed'}"
    return f"an error has ended the study: {'; '.join(result.notes) or 'see what it printed'}"


# ------------------------------------------------------------------------------------------------ its process


def run_child(argv: list[str], folders: list[Path], settings: Settings, progress: bool) -> tuple[int, list[str]]:
    """Run a command line in a process of its own.

    Returns:
        Its exit code, and the problems of settings and data.

    Raises:
        KeyboardInterrupt: the caller was interrupted; the process has ended.
    """
    with tempfile.TemporaryFile() as problems:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tune.child", str(problems.fileno()), *argv],
            stdin=subprocess.PIPE,  # its end shows the process that the caller is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": import_path()},
            pass_fds=[problems.fileno()],
            start_new_session=True,  # else Ctrl-C would reach it twice: from the terminal and from here
        )
        assert child.stdin
        try:
            with shown(progress_of(folders, settings)) if progress else contextlib.nullcontext(int) as refresh:
                interrupted = follow(child, print_line if progress else lambda line: None, refresh)
        finally:
            child.stdin.close()
            child.wait()
        if interrupted:
            raise KeyboardInterrupt
        problems.seek(0)
        return child.returncode, json.loads(problems.read() or "[]")


def follow(child: subprocess.Popen[str], say: Callable[[str], None], refresh: Callable[[], object]) -> bool:
    """Hand on what a process prints until it has ended, and each interrupt to the process.

    Args:
        say: called with each line.
        refresh: called after each line, and twice a second.

    Returns:
        Whether there was an interrupt.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdout
        with child.stdout as output:
            for line in output:
                lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    has_ended = interrupted = False
    while True:
        try:
            try:
                say(lines.get(timeout=POLL_S).rstrip("\n"))
            except queue.Empty:
                if has_ended:  # Ray's processes may keep the pipe open a little longer
                    return interrupted
                has_ended = child.poll() is not None
            refresh()
        except KeyboardInterrupt:
            interrupted = True
            child.send_signal(signal.SIGINT)


def progress_of(folders: list[Path], settings: Settings) -> Callable[[], Table]:
    """A function that returns the progress of the study now. It reads the journal when that has changed."""
    outcome, size = None, 0

    def render() -> Table:
        nonlocal outcome, size
        with contextlib.suppress(OSError, SettingsError):  # what is shown is then a little older
            folder = current(folders)
            if folder and (now := (folder / "journal.jsonl").stat().st_size) != size:
                outcome, size = show_study(folder), now
        return progress_view(outcome, settings.study)

    return render
