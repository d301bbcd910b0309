"""optuna.db: made whole or not at all, and made again from the journal when it is damaged, gone or of another study."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search_spaces import lora
from tune.config.cli import parse
from tune.records.trials import TrialRecord
from tune.search.tuner import fill_database, open_database, open_search

SEARCHED = {"lora_r": 16, "lora_alpha_ratio": 1.0, "learning_rate": 1e-3, "train_projector": False}


def record(number: int, state: str = "COMPLETE", **searched: Any) -> TrialRecord:
    values = (dict(lora.GUIDE) if number == 0 else SEARCHED) | searched
    return TrialRecord(number, values, {}, state=state, epochs=[{"auroc": 0.5 + number / 100}], finished=True)


def begin(folder: Path, *records: TrialRecord, argv: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """A study's folder and its log, for `open_search`."""
    study = SimpleNamespace(
        settings=parse(["--name", "s", *argv]), directory=folder, name="s", goals=(("auroc", "max"),), metric="auroc"
    )
    said: list[str] = []
    log = SimpleNamespace(records={r.number: r for r in records}, say=said.append, said=said, end=lambda *given: None)
    return study, log


def trials(folder: Path) -> list[Any]:
    return optuna.load_study(study_name="s", storage=open_database(folder / "optuna.db")).trials


def test_a_new_search_begins_with_the_guide(tmp_path: Path) -> None:
    searcher = open_search(*begin(tmp_path))
    config = searcher.suggest("a")
    assert isinstance(config, dict) and config["number"] == 0
    assert {name: config[name] for name in lora.GUIDE} == lora.GUIDE
    assert isinstance(config := searcher.suggest("b"), dict) and config["number"] == 1


def test_a_kill_while_the_database_is_filled_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "points.json").write_text('[{"lora_r": 8}, {"lora_r": 16}]')
    study, log = begin(tmp_path, argv=("--first-points", str(tmp_path / "points.json")))
    enqueue, calls = optuna.Study.enqueue_trial, []

    def killed(self: optuna.Study, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        enqueue(self, *given)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        open_search(study, log)
    assert not (tmp_path / "optuna.db").exists()
    monkeypatch.undo()
    searcher = open_search(study, log)
    configs: list[Any] = [searcher.suggest(name) for name in "abc"]
    assert [config["number"] for config in configs] == [0, 1, 2]
    assert [config["lora_r"] for config in configs] == [lora.GUIDE["lora_r"], 8, 16]


def damaged_databases(folder: Path) -> dict[str, Any]:
    whole = (folder / "optuna.db").read_bytes()
    middle = len(whole) // 2
    return {
        "empty": b"",
        "cut": whole[:middle],
        "no database": b"hello" * 2000,
        "zeros": bytes(len(whole)),
        "half zeros": whole[:4096] + bytes(middle) + whole[4096 + middle :],
        "gone": None,
    }


@pytest.mark.parametrize("kind", ["empty", "cut", "no database", "zeros", "half zeros", "gone", "a folder"])
def test_a_damaged_database_is_set_aside_and_made_again(tmp_path: Path, kind: str) -> None:
    study, log = begin(tmp_path, record(0), record(1, "STOPPED"), record(2, "FAILED"), record(3))
    open_search(study, log)
    path = tmp_path / "optuna.db"
    if kind == "a folder":
        path.unlink()
        path.mkdir()
    elif (content := damaged_databases(tmp_path)[kind]) is None:
        path.unlink()
    else:
        path.write_bytes(content)
    searcher = open_search(study, log)
    found = trials(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert found[3].params == SEARCHED and found[3].value == 0.53
    assert isinstance(config := searcher.suggest("a"), dict) and config["number"] == 4
    assert len(log.said) == (kind != "gone") and all("set aside" in text for text in log.said)


def test_a_database_of_another_search_is_noticed(tmp_path: Path) -> None:
    study, log = begin(tmp_path, record(0), record(1, lora_r=4))
    open_search(study, log)
    _, other = begin(tmp_path, record(0), record(1, lora_r=8), record(2))
    open_search(study, other)
    assert "lacks trials" in other.said[0]
    _, changed = begin(tmp_path, record(0), record(1, lora_r=16), record(2))
    open_search(study, changed)
    assert "other values for trial 1" in changed.said[0] and trials(tmp_path)[1].params["lora_r"] == 16
    _, shorter = begin(tmp_path, record(0))
    open_search(study, shorter)
    assert "knows nothing" in shorter.said[0]


def test_a_guide_that_the_journal_has_lost_runs_again_under_its_number(tmp_path: Path) -> None:
    searcher = open_search(*begin(tmp_path, record(1), record(2)))
    configs: list[Any] = [searcher.suggest(name) for name in "ab"]
    assert [config["number"] for config in configs] == [0, 3]
    assert {name: configs[0][name] for name in lora.GUIDE} == lora.GUIDE


def test_a_hole_in_the_journal_is_filled_before_new_numbers(tmp_path: Path) -> None:
    searcher = open_search(*begin(tmp_path, record(0), record(2)))
    configs: list[Any] = [searcher.suggest(name) for name in "ab"]
    assert [config["number"] for config in configs] == [1, 3]


def test_a_database_that_is_locked_for_a_while_is_waited_for(tmp_path: Path) -> None:
    study, log = begin(tmp_path, record(0))
    searcher = open_search(study, log)
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Thread(target=lambda: (time.sleep(1), other.execute("COMMIT"))).start()
    assert isinstance(config := searcher.suggest("a"), dict) and config["number"] == 1


@pytest.mark.parametrize("name", ["which one?", "100%20", "a#b", "{x}", "it's", "a&b=c"])
def test_the_database_lies_in_its_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    study, log = begin(folder)
    fill_database(folder / "optuna.db", study, lora.space, log)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in folder.iterdir()] == ["optuna.db"] and len(trials(folder)) == 1
