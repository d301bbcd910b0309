"""Damaged plan.json and splits.json: each is refused in one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.data.splits_file import load_splits, save_splits
from train_fn.support.files import DamagedFile
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.config.settings import REMOVED_SAMPLERS
from tune.records.plan import read_plan, save_plan
from tune.show import show

SETTINGS = {"study": {}, "model": {}, "data": {}, "trial": {}, "pinned": []}
PLAN: dict[str, Any] = {
    "study_id": "1", "settings": SETTINGS, "tracking_uri": "", "data_report": {}, "goals": [["auroc", "max"]],
    "candidates": ["a", "b"], "positive_label": "", "data_hash": "", "base_hash": "", "space_hash": "",
    "splits_hash": "",
}  # fmt: skip


def test_a_plan_reads_back_as_written(tmp_path: Path) -> None:
    save_plan(tmp_path, PLAN)
    assert read_plan(tmp_path) == PLAN | {"format": 4}
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))  # of the first version
    as_then = {"study": {"decide": "argmax", "select": "last"} | PLAN["settings"]["study"]}
    assert read_plan(tmp_path) == PLAN | {"format": 1, "settings": PLAN["settings"] | as_then}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": {"study": {}}},
        {"goals": []},
        {"goals": [["auroc", "up"]]},
        {"goals": ["auroc"]},
        {"candidates": "ab"},
        {"candidates": [1]},
        {"study_id": 1},
        {"format": 99},
        {"format": "new"},
    ],
)
def test_a_plan_with_wrong_types_is_refused(tmp_path: Path, change: dict) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | change))
    with pytest.raises(DamagedFile, match=r"plan\.json must"):
        read_plan(tmp_path)


def test_any_change_of_a_plan_is_noticed(tmp_path: Path) -> None:
    save_plan(tmp_path, PLAN | {"tracking_uri": "sqlite:///a"})
    path = tmp_path / "plan.json"
    whole = path.read_bytes()
    kept = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_plan(tmp_path) == PLAN | {"tracking_uri": "sqlite:///a", "format": 2}
            kept += 1  # a line end turned into another kind of space
        except DamagedFile:
            continue
    assert kept < len(whole) / 10


def test_a_plan_without_a_key_is_refused(tmp_path: Path) -> None:
    for name in PLAN:
        (tmp_path / "plan.json").write_text(json.dumps({key: PLAN[key] for key in PLAN if key != name}))
        with pytest.raises(DamagedFile, match=name):
            read_plan(tmp_path)


@pytest.mark.parametrize("sampler", REMOVED_SAMPLERS)
def test_a_study_with_a_removed_sampler_is_shown_and_not_resumed(tmp_path: Path, sampler: str) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    stored = parse(["--results", str(tmp_path)]).to_dict()
    save_plan(directory, PLAN | {"settings": stored | {"study": stored["study"] | {"sampler": sampler}}})
    assert show(directory).metric == "auroc"
    with pytest.raises(SettingsError, match=f"was begun with {sampler}: go on with the version that began it"):
        parse(["--results", str(tmp_path), "--resume", "old"])


@pytest.mark.parametrize(
    ("settings", "goal"),
    [
        ({"metric": ["macro_f1_prior_corrected", "auroc"]}, ["macro_f1_prior_corrected", "max"]),
        ({"require": ["macro_f1_prior_corrected>=0.5", "auroc>=0.5"]}, ["auroc", "max"]),
        ({"stop_when": "macro_f1_prior_corrected>=0.9"}, ["auroc", "max"]),
    ],
)
def test_a_study_with_a_removed_metric_is_shown_and_not_resumed(tmp_path: Path, settings: dict, goal: list) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    stored = parse(["--results", str(tmp_path)]).to_dict()
    changed = stored | {"study": stored["study"] | settings}
    save_plan(directory, PLAN | {"settings": changed, "goals": [goal]})
    assert show(directory).metric == goal[0]
    with pytest.raises(SettingsError, match="begun with macro_f1_prior_corrected: go on with the version that began"):
        parse(["--results", str(tmp_path), "--resume", "old"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train": 1}', "null", "\0\0"])
def test_malformed_splits_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=r"splits\.json must"):
        load_splits(path)


def test_splits_with_a_malformed_sample_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    sample = Sample(("a.png",), "?", "a", 0)
    save_splits(Splits((sample,), (sample,), (sample,), closed_set(("a", "b"))), path)
    assert load_splits(path).train == (sample,)
    whole = json.loads(path.read_text())
    for change in ({"label": 2}, {"label": None}, {"image": 3}, {"more": 1}):
        path.write_text(json.dumps(whole | {"test": [whole["test"][0] | change]}))
        with pytest.raises(DamagedFile, match=r"splits\.json must"):
            load_splits(path)


def test_a_new_study_refuses_a_folder_with_a_journal_but_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare
    from tune.records.journal import Journal

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "s"
    folder.mkdir(parents=True)
    words = ["--num-phantoms", "30", "--name", "s"]
    journal = Journal(folder / "journal.jsonl")  # of a study that was ended before its first event: no hindrance
    assert prepare(parse(words), lambda text: None).journal.events == []
    journal.write("confirmed", number=0, run=1, value=0.5)
    with pytest.raises(SettingsError, match=r"plan\.json is gone"):
        prepare(parse(words), lambda text: None)


def test_splits_of_an_earlier_version_get_their_positive_answer(tmp_path: Path) -> None:
    old = {"image": "a.png", "text": "?", "answer": "a", "label": 0}
    content = {"train": [old], "validation": [old], "test": [old], "candidates": ["a", "b"]}
    (tmp_path / "splits.json").write_text(json.dumps(content))
    splits = load_splits(tmp_path / "splits.json", "b")
    assert splits.train == (Sample(("a.png",), "?", "a", 0),) and splits.tasks[0].positive == "b"
