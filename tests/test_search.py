"""What a search tries next, when it stops a trial, and what optuna.db holds: functions of the journal alone."""

from __future__ import annotations

import dataclasses
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search_spaces import lora
from train_fn.settings import TrialSettings
from train_fn.support.storage import Storage
from tune.config.cli import parse
from tune.config.samplers import grid_points
from tune.config.settings import SAMPLERS
from tune.records.end_state import EndState
from tune.records.goals import epoch_goal
from tune.records.journal import Journal, read_events
from tune.records.optuna_study import DatabaseExport, as_optuna, distributions_json
from tune.records.trials import TrialRecord, trial_records
from tune.search.early_stopping import should_stop
from tune.search.point import Point
from tune.search.points import propose, recover_distributions
from tune.search.searcher import JournalSearcher
from tune.search.tried import training_key
from tune.search.tuner import exhausted, search

GOALS = (("auroc", "max"),)
NAN = float("nan")
START = {name: value for name, value in lora.GUIDE.items() if name != "lora_alpha_ratio"}  # of --search-alpha
WIDE = "GUIDE = {}\ndef space(trial):\n    return {'lora_r': trial.suggest_int('lora_r', 1, 64)}\n"


def make_study(*argv: str, name: str = "s", folder: Path = Path()) -> Any:
    journal = SimpleNamespace(events=[])
    settings = parse([*argv])
    return SimpleNamespace(settings=settings, name=name, directory=folder, goals=GOALS, metric="auroc", journal=journal)


def record_of(point: Point, number: int, auroc: float | None, state: str = "COMPLETE") -> TrialRecord:
    epochs = [] if auroc is None else [{"auroc": auroc}]
    settings = dataclasses.asdict(point.settings)
    finished = state == "COMPLETE"
    return TrialRecord(
        number, point.searched, settings, point.distributions, state, epochs, finished=finished, repeats=point.repeats
    )


def run(study: Any, num_trials: int, records: dict[int, TrialRecord] | None = None) -> dict[int, TrialRecord]:
    """The records of a search with one lane, whose scores depend on the points."""
    records = dict(records or {})
    grid = grid_points(study.settings) if study.settings.study.sampler == "grid" else []
    for number in range(num_trials):
        if number not in records:
            if (point := propose(study, records, number, grid=grid)) is None:
                break
            records[number] = record_of(point, number, 1 / (1 + abs(point.settings.learning_rate - 1e-3)))
    return records


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_killed_search_goes_on_with_the_points_of_an_undisturbed_one(name: str) -> None:
    study = make_study("--sampler", name)
    whole = run(study, 13)
    points = [record.searched for record in whole.values()]
    assert points[0] == START and len({str(point) for point in points}) == 13
    for kept in (1, 11):  # TPE and GP draw their first ten at random
        again = run(study, 13, {number: whole[number] for number in range(kept)})
        assert [record.searched for record in again.values()] == points


def test_a_grid_tries_every_point_once_with_any_number_of_lanes() -> None:
    pinned = ["--space", "wide", "--lora-r", "8", "--learning-rate", "1e-3", "--sampler", "grid"]
    study = make_study(*pinned)
    points = grid_points(study.settings)
    assert len(points) == len({str(point) for point in points}) == 4 * (1 + 4)  # ratios, and rates of the projector
    for lanes in (1, 2, 4):
        records: dict[int, TrialRecord] = {}
        number = 0
        while (point := propose(study, records, number, grid=points)) is not None:
            records[number] = record_of(point, number, None, "RUNNING")
            if number >= lanes:
                records[number - lanes].state = "COMPLETE" if number % 2 else "FAILED"
            number += 1
        tried = [json.dumps(record.searched, sort_keys=True) for record in records.values()]
        assert sorted(tried) == sorted(json.dumps(point, sort_keys=True) for point in points)


def test_first_points_follow_the_guide_and_what_they_leave_open_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text('[{"lora_r": 4}, {"lora_r": 16}]')
    study = make_study("--first-points", str(tmp_path / "points.json"))
    records = run(study, 4)
    assert records[0].searched == START
    assert [records[n].searched["lora_r"] for n in (1, 2)] == [4, 16]
    assert set(records[1].searched) >= set(START)


def test_a_pinned_setting_is_not_asked_for() -> None:
    records = run(make_study("--lora-r", "8"), 3)
    assert all("lora_r" not in record.searched for record in records.values())


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_searches_with_other_seeds_share_no_sampled_point(sampler: str) -> None:
    searches = [run(make_study("--sampler", sampler, "--study-seed", str(seed)), 9) for seed in range(3)]
    rates = [record.searched["learning_rate"] for records in searches for n, record in records.items() if n > 0]
    assert len(set(rates)) == 3 * 8


# ------------------------------------------------------------------------------------------------ no point twice

# The two cases of a pinned rate: 24 and 4 points.
FEW = ["--space", "wide", "--learning-rate", "2e-4", "--no-train-projector"]
FEWEST = [*FEW, "--lora-r", "64"]


def noisy(study: Any, num_trials: int, records: dict[int, TrialRecord] | None = None) -> dict[int, TrialRecord]:
    """The records of a search with one lane, whose scores are noise."""
    records = dict(records or {})
    for number in range(num_trials):
        if number not in records:
            point = propose(study, records, number)
            assert point
            score = random.Random(study.settings.study.study_seed * 1000 + number).gauss(0.7, 0.05)
            records[number] = record_of(point, number, score)
    return records


def settings_of(records: dict[int, TrialRecord]) -> list[str]:
    return [json.dumps(record.settings, sort_keys=True) for record in records.values()]


@pytest.mark.parametrize(("sampler", "seed"), [*((s, n) for s in ("tpe", "random") for n in range(10)), ("gp", 0)])
def test_no_settings_and_seed_are_tried_twice(sampler: str, seed: int) -> None:
    for pins, num_points in ((FEW, 24), (FEWEST, 4)):
        records = noisy(make_study(*pins, "--sampler", sampler, "--study-seed", str(seed)), 20)
        assert len(set(settings_of(records))) == 20
        again = [record for record in records.values() if record.repeats is not None]
        assert len(again) == max(0, 20 - num_points)
        for record in again:
            first = records[record.repeats]  # type: ignore[index]
            assert first.repeats is None and record.searched == first.searched
            assert record.settings == first.settings | {"seed": record.settings["seed"]}
            assert record.settings["seed"] > 1000, "the fresh seeds of --confirm"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_killed_search_repeats_the_points_of_an_undisturbed_one(sampler: str) -> None:
    study = make_study(*FEWEST, "--sampler", sampler)
    whole = noisy(study, 14)
    for kept in (3, 7, 13):
        assert noisy(study, 14, {number: whole[number] for number in range(kept)}) == whole
    gaps = {number: record for number, record in whole.items() if number not in (2, 6)}  # their begin was lost
    assert len(set(settings_of(noisy(study, 14, gaps)))) == 14


def test_a_search_with_a_given_seed_ends_when_every_point_has_been_tried() -> None:
    study = make_study(*FEWEST, "--seed", "5")
    records = noisy(study, 4)
    assert propose(study, records, 4) is None
    searcher = JournalSearcher(study, Log(records))  # type: ignore[arg-type]
    assert searcher.suggest("4") == searcher.FINISHED and searcher.exhausted
    assert "--seed allows no other seed" in exhausted("tpe", study.settings.pinned)
    assert exhausted("grid", ()) == "every point of the grid has been tried"


def test_points_of_trials_that_run_or_failed_are_not_tried_again() -> None:
    study = make_study(*FEWEST)
    records = noisy(study, 4)
    for state in ("RUNNING", "INTERRUPTED", "STOPPED", "FAILED"):
        for record in records.values():
            record.state = state
        point = propose(study, records, 4)
        # The other seeds of a point that failed would fail, too.
        assert (point is None) == (state == "FAILED")
    records[2].state, records[2].epochs = "COMPLETE", [{"auroc": 0.9}]
    points = [propose(make_study(*FEWEST, "--study-seed", str(seed)), records, 4) for seed in range(5)]
    assert {point.repeats for point in points if point} == {2}


def test_points_that_train_the_same_are_one() -> None:
    one = TrialSettings()
    same = [dict(projector_learning_rate=1e-3), dict(logging_steps=1), dict(save_steps=7, save_total_limit=0)]
    other = [dict(seed=1), dict(lora_alpha=64), dict(gradient_accumulation_steps=4), dict(train_projector=True)]
    for values in same:
        assert training_key(dataclasses.replace(one, **values)) == training_key(one)
    for values in other:
        assert training_key(dataclasses.replace(one, **values)) != training_key(one)
    projector = dataclasses.replace(one, train_projector=True)
    assert training_key(dataclasses.replace(projector, projector_learning_rate=2e-4)) == training_key(projector)
    assert training_key(dataclasses.replace(projector, projector_learning_rate=1e-4)) != training_key(projector)
    alone = dataclasses.replace(projector, use_lora=False, projector_learning_rate=1e-4)
    assert training_key(dataclasses.replace(alone, lora_r=8, learning_rate=1.0)) == training_key(alone)
    steps = dataclasses.replace(one, max_steps=10)
    assert training_key(dataclasses.replace(steps, num_train_epochs=9)) == training_key(steps)
    assert training_key(dataclasses.replace(one, num_train_epochs=9)) != training_key(one)


ALIKE = (  # twelve points with four settings
    "GUIDE = {'r': 8, 'x': 1}\ndef space(trial):\n"
    "    return {'lora_r': trial.suggest_int('r', 8, 32, step=8) + 0 * trial.suggest_int('x', 0, 2)}\n"
)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_asked_points_with_the_same_settings_are_one(tmp_path: Path, sampler: str) -> None:
    (tmp_path / "own.py").write_text(ALIKE)
    study = make_study("--space", str(tmp_path / "own.py"), "--sampler", sampler)
    for lanes in (1, 2, 4):
        searcher = JournalSearcher(study, log := Log({}))  # type: ignore[arg-type]
        ranks = []
        for number in range(6 if sampler != "grid" else 4):
            config: Any = searcher.suggest(str(number))
            ranks.append((config["settings"].lora_r, config["settings"].seed))
            if number >= lanes:  # the others have not been started yet
                log.records[number - lanes] = searcher._handed_out[number - lanes]
        assert len(set(ranks)) == len(ranks) and {rank for rank, _ in ranks[:4]} == {8, 16, 24, 32}
        assert [seed > 0 for _, seed in ranks] == [False] * 4 + [True] * (len(ranks) - 4)
        assert sampler != "grid" or searcher.suggest("4") == searcher.FINISHED


def test_a_first_point_that_was_tried_is_not_tried_again(tmp_path: Path) -> None:
    guide = {"lora_r": 64, "lora_alpha_ratio": 2.0, "learning_rate": 2e-4, "train_projector": False}
    (tmp_path / "points.json").write_text(json.dumps([guide, {"lora_r": 64}, {"lora_r": 8, "lora_alpha_ratio": 1.0}]))
    for sampler in ("tpe", "grid"):
        study = make_study("--space", "wide", "--sampler", sampler, "--first-points", str(tmp_path / "points.json"))
        records = run(study, 4)
        assert len(set(settings_of(records))) == 4
        assert [records[n].searched["lora_r"] for n in (0, 2, 3)] == [64, 64, 8]


# ------------------------------------------------------------------------------------------------ the searcher


class Log:
    """Stands for `StudyLog`."""

    def __init__(self, records: dict[int, TrialRecord]) -> None:
        self.records, self.space_error, self.said, self.num_trials = records, "", [], 100

    def end_stopped(self, handed_out: Any) -> None:
        pass  # the user has stopped none

    def say(self, text: str) -> None:
        self.said.append(text)


def numbers(study: Any, records: dict[int, TrialRecord], count: int) -> list[int]:
    searcher = JournalSearcher(study, Log(records))  # type: ignore[arg-type]
    return [searcher.suggest(str(n))["number"] for n in range(count)]  # type: ignore[index]


def write_study(path: Path, study: Any, num_trials: int, distributions: bool = True) -> None:
    """The journal of a finished search."""
    journal = Journal(path)
    for number, record in run(study, num_trials).items():
        fields: dict[str, Any] = {"searched": record.searched, "settings": record.settings}
        fields |= {"distributions": record.distributions} if distributions else {}
        journal.write("started", number=number, params={}, **fields)
        for epoch in (1, 2):
            journal.write("report", number=number, epoch=epoch, step=epoch, metrics={"auroc": 0.5}, seconds={},
                          wall_s=1.0, waited_s=0.0, device_s=1.0, finished=epoch == 2)  # fmt: skip
        journal.write("ended", number=number, state="COMPLETE", error="", step=2, device_s=1.0)


def test_whatever_line_the_journal_loses_no_trial_is_lost_and_none_doubled(tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "journal.jsonl"
    write_study(path, study, 5)
    whole = trial_records(read_events(path))
    assert len(whole) == 5 and {record.state for record in whole.values()} == {"COMPLETE"}
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 20
    for lost in range(len(lines)):
        path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
        records = trial_records(read_events(path))
        # The trial that the line was about is tried again, under its number; then come new ones.
        first, second = numbers(study, records, 2)
        done = {number for number, record in records.items() if record.state == "COMPLETE"}
        assert len(done) in (4, 5) and (first, second) == ((5, 6) if len(done) == 5 else (lost // 4, 5))
        if first == 0 and 0 not in records:
            assert propose(study, records, 0).searched == START  # type: ignore[union-attr]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_points_that_tune_has_not_started_yet_are_not_proposed_again(sampler: str) -> None:
    """Tune asks for a point for each lane before it starts the first."""
    searcher = JournalSearcher(make_study("--sampler", sampler), Log({}))  # type: ignore[arg-type]
    points = [searcher.suggest(str(n))["point"].searched for n in range(6)]  # type: ignore[index]
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 6


def test_a_journal_of_an_older_version_gets_its_ranges(tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "journal.jsonl"
    write_study(path, study, 3, distributions=False)
    study.journal = Journal(path)
    records = trial_records(study.journal.events)
    assert as_optuna(records, GOALS).trials[1].params == {}
    recover_distributions(study, list(records.values()))
    read = trial_records(read_events(path))
    assert as_optuna(read, GOALS).trials[1].params == read[1].searched == records[1].searched
    assert [record.distributions for record in read.values()] == [record.distributions for record in records.values()]
    count = len(study.journal.events)
    recover_distributions(study, list(read.values()))
    assert len(study.journal.events) == count  # once


def test_unfinished_trials_keep_their_settings_and_come_first() -> None:
    study = make_study()
    records = run(study, 4)
    for number in (1, 3):
        records[number].state = "INTERRUPTED"
        records[number].settings = {"learning_rate": number / 1000}
    del records[2]  # its begin was lost
    searcher = JournalSearcher(study, Log(records))  # type: ignore[arg-type]
    configs: list[Any] = [searcher.suggest(str(n)) for n in range(4)]
    assert [config["number"] for config in configs] == [1, 2, 3, 4]
    assert [config["settings"].learning_rate for config in configs[::2]] == [0.001, 0.003]
    assert [config["known_epochs"] for config in configs] == [1, 0, 1, 0]


def test_a_space_that_fails_ends_the_search_and_is_asked_again_later(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(WIDE.replace("    return", "    if trial.number == 2: raise RuntimeError('no more')\n    return"))
    study = make_study("--space", str(path), "--trials", "2")
    log = Log({})
    searcher = JournalSearcher(study, log)  # type: ignore[arg-type]
    assert [searcher.suggest(str(n))["number"] for n in range(2)] == [0, 1]  # type: ignore[index]
    assert searcher.suggest("2") == searcher.FINISHED and "no more" in log.space_error


# ------------------------------------------------------------------------------------------------ Tune's callback


def make_log(folder: Path, *argv: str) -> Any:
    """A `StudyLog` of a study whose trial 0 has begun."""
    from tune.search.callback import StudyLog

    study = make_study(*argv, folder=folder)
    study.journal, study.storage, study.plan = Journal(folder / "journal.jsonl"), Storage(folder), {}
    tracking, remote = SimpleNamespace(notify=lambda: None), SimpleNamespace(remote=lambda *_, **__: None)
    dispatcher: Any = SimpleNamespace(stop=remote)
    log = StudyLog(study, dispatcher, tracking, lambda text: None)  # type: ignore[arg-type]
    log.on_trial_start(0, [], trial_of(study, {}))
    return log


def trial_of(study: Any, records: dict[int, TrialRecord], number: int = 0) -> Any:
    """Tune's object of a trial."""
    point = propose(study, records, number)
    assert point
    return SimpleNamespace(config={"number": number, "point": point, "settings": point.settings}, last_result={})


@pytest.mark.parametrize("name", ["on_trial_start", "__call__", "on_trial_complete", "on_step_begin", "on_trial_error"])
def test_an_error_of_our_own_in_a_callback_ends_the_search_and_not_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Tune would take it for the trial's error, and run the trial again."""
    log = make_log(tmp_path)
    monkeypatch.setattr(log, "check_lanes", lambda: None)
    trial = trial_of(log.study, log.records, number=1)
    arguments: dict[str, Any] = {"trial_id": "a", "result": {"number": 0, "epoch": 1, "report": None}}
    if name != "__call__":
        arguments = {"iteration": 0, "trials": []} | ({} if name == "on_step_begin" else {"trial": trial})
    if name in ("on_trial_complete", "on_trial_error"):
        trial.config["number"] = 0

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    for inner in ("_write", "end"):
        monkeypatch.setattr(log, inner, broken)
    monkeypatch.setattr("tune.search.callback.take_requests", broken)
    assert not log.stop_all()
    assert not getattr(log, name)(**arguments)
    assert log.stop_all() and isinstance(log.failure, (KeyError, TypeError, AttributeError))
    first = log.failure
    assert not log.on_trial_complete(0, [], trial) and log.failure is first  # nothing is written any more
    log.close()
    monkeypatch.undo()
    monkeypatch.setattr("ray.tune.with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr("ray.tune.Tuner", lambda *_, **__: SimpleNamespace(fit=lambda: None))
    with pytest.raises(type(first)):  # whoever has begun the search learns of it
        search(log.study, SimpleNamespace(lanes=1), None, log)  # type: ignore[arg-type]
    assert [event["event"] for event in read_events(tmp_path / "journal.jsonl")] == ["started"]  # --resume goes on


def test_a_dispatcher_that_is_gone_is_not_taken_for_an_error_of_our_own(tmp_path: Path) -> None:
    import ray

    log = make_log(tmp_path)

    def gone() -> None:
        raise ray.exceptions.RayActorError

    log.check_lanes = gone
    for callback in (log.on_trial_error, log.on_trial_recover):
        with pytest.raises(ray.exceptions.RayActorError):
            callback(0, [], trial_of(log.study, {}))
    assert log.failure is None


# ------------------------------------------------------------------------------------------------ early stopping


def journal_of(*reports: tuple[int, float], select: str = "last", mode: str = "max") -> dict[int, TrialRecord]:
    """Records from reports (trial, score) in their order; the epochs of a trial are counted."""
    events: list[Any] = []
    begun: dict[int, int] = {}
    best: dict[int, tuple[float, int]] = {}  # score, the higher the better, and the epoch
    for seq, (number, auroc) in enumerate(reports):
        if number not in begun:
            events.append({"event": "started", "number": number, "searched": {}, "settings": {}, "time": 0.0})
        begun[number] = begun.get(number, 0) + 1
        score = -auroc if mode == "min" else auroc
        if auroc == auroc and (number not in best or score > best[number][0]):
            best[number] = score, begun[number]
        chosen = {"best_epoch": best.get(number, (0.0, 0))[1]} if select == "best" else {}  # as earlier versions
        facts = {"seconds": {}, "wall_s": 0.0, "waited_s": 0.0, "device_s": 0.0, "seq": seq, **chosen}
        report = {"event": "report", "number": number, "epoch": begun[number], "metrics": {"auroc": auroc}}
        events.append(report | facts)
    return trial_records(events)


def stops(records: dict[int, TrialRecord], number: int, epoch: int, *argv: str, goals: Any = GOALS) -> bool:
    return bool(should_stop(records, number, epoch, parse([*argv]).study, goals))


def test_asha_goes_on_with_the_best_third_at_each_rung() -> None:
    records = journal_of((0, 0.5), (1, 0.6), (2, 0.7), (3, 0.62), (4, 0.9), (4, 0.1), (4, 0.1))
    assert not stops(records, 2, 1) and stops(records, 3, 1) and not stops(records, 4, 1)
    assert not stops(records, 4, 2)  # no rung
    assert not stops(records, 4, 3)  # the first to reach it
    assert stops(journal_of((1, 0.5), (2, 0.4)), 2, 1) and not stops(journal_of((1, 0.5), (2, 0.5)), 2, 1)
    assert not stops(journal_of((1, 0.5), (2, 0.4)), 2, 1, "--grace-period", "2")
    assert not stops(journal_of((1, 0.4), (2, 0.5)), 2, 1) and stops(
        journal_of((1, 0.4), (2, 0.5)), 2, 1, goals=(("auroc", "min"),)
    )


def test_asha_compares_the_best_so_far_with_the_best_so_far() -> None:
    """Where the best epoch counts, at the rung of epoch 3: trial 1 has 0.9 from its first epoch, trial 2 has 0.8."""
    reports = ((1, 0.9), (1, 0.5), (1, 0.6), (2, 0.9), (2, 0.5), (2, 0.8))
    assert not stops(journal_of(*reports), 2, 3)  # 0.8 against 0.6
    late = ((1, 0.9), (1, 0.5), (1, 0.6), (2, 0.6), (2, 0.5), (2, 0.8))
    assert not stops(journal_of(*late), 2, 3)
    assert stops(journal_of(*late, select="best"), 2, 3)  # 0.8 against 0.9
    assert not stops(journal_of(*reports, select="best"), 2, 3)  # 0.9 against 0.9
    holed = ((1, 0.9), (1, 0.5), (1, NAN), (2, 0.6), (2, 0.5), (2, 0.8))
    assert stops(journal_of(*holed, select="best"), 2, 3)  # an epoch without a score changes no best one
    costs = tuple((number, 1 - score) for number, score in late)
    assert stops(journal_of(*costs, select="best", mode="min"), 2, 3, goals=(("auroc", "min"),))
    unscored = ((1, NAN), (1, NAN), (1, NAN), (2, 0.6), (2, 0.5), (2, 0.8))
    assert not stops(journal_of(*unscored, select="best"), 2, 3)


def test_costs_and_the_last_epoch_need_no_choice() -> None:
    assert epoch_goal((("loss", "min"), ("train_s", "min")), "best") == ("loss", "min")
    assert epoch_goal((("train_s", "min"), ("loss", "min")), "best") is None
    assert epoch_goal(GOALS, "last") is None


def test_a_record_counts_by_its_best_epoch_or_by_its_last() -> None:
    reports = ((1, 0.5), (1, 0.9), (1, 0.7))
    assert journal_of(*reports)[1].metrics == {"auroc": 0.7} and journal_of(*reports)[1].best_epoch == 0
    best = journal_of(*reports, select="best")[1]
    assert best.metrics == {"auroc": 0.9} and best.value("auroc") == 0.9 and best.best_epoch == 2
    assert [epoch["auroc"] for epoch in best.epochs] == [0.5, 0.9, 0.7]  # all are kept
    wrong = {"event": "report", "number": 1, "epoch": 4, "best_epoch": 9, "metrics": {"auroc": 0.7}}
    best.apply(wrong)
    assert best.incomplete and best.best_epoch == 2  # no such epoch: the line counts as damaged


def test_optuna_sees_the_value_by_which_a_trial_counted() -> None:
    """A sampler takes the last intermediate value of a pruned trial as its score, and the value of a complete one."""
    for select, values in (("best", [0.5, 0.9, 0.9]), ("last", [0.5, 0.9, 0.7])):
        (record,) = journal_of((0, 0.5), (0, 0.9), (0, 0.7), select=select).values()
        for state in (EndState.COMPLETE, EndState.STOPPED):
            record.state = state
            trial = as_optuna({0: record}, GOALS).trials[0]
            assert trial.intermediate_values == dict(enumerate(values, 1)) and trial.value == values[-1]


def test_asha_decides_as_rays_own() -> None:
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    draw = random.Random(0)
    for mode in ("max", "min"):
        theirs = AsyncHyperBandScheduler("epoch", "auroc", mode, max_t=10**6, grace_period=1, reduction_factor=3)
        reports: list[tuple[int, float]] = []
        num_stopped = 0
        for number in range(1, 30):
            trial: Any = SimpleNamespace(trial_id=str(number))
            theirs.on_trial_add(None, trial)  # type: ignore[arg-type]
            for epoch in range(1, 10):
                reports.append((number, draw.random()))
                result = {"epoch": epoch, "auroc": reports[-1][1]}
                decision = theirs.on_trial_result(None, trial, result)  # type: ignore[arg-type]
                ours = stops(journal_of(*reports), number, epoch, goals=(("auroc", mode),))
                assert ours == (decision == TrialScheduler.STOP), (number, epoch)
                if ours:
                    num_stopped += 1
                    break
        assert 10 < num_stopped < 29


def test_a_decision_is_the_same_however_much_the_journal_knows_by_now() -> None:
    reports = [(n, 0.5 + (7 * n % 11) / 20) for n in range(9)] + [(n, 0.6 + (5 * n % 11) / 20) for n in range(9)] * 2
    for rule in ("asha", "median"):
        seen: dict[tuple[int, int], bool] = {}
        for count in range(1, len(reports) + 1):
            number = reports[count - 1][0]
            epoch = [n for n, _ in reports[:count]].count(number)
            seen[number, epoch] = stops(journal_of(*reports[:count]), number, epoch, "--scheduler", rule)
        later = {key: stops(journal_of(*reports), *key, "--scheduler", rule) for key in seen}
        assert later == seen and set(seen.values()) == {True, False}


def test_the_median_rule_compares_the_best_so_far_with_the_others_means() -> None:
    reports = [(number, auroc) for _ in range(3) for number, auroc in enumerate([0.1, 0.8, 0.9, 0.85])]
    records = journal_of(*reports, (4, 0.2))
    assert stops(records, 4, 1, "--scheduler", "median")
    assert not any(stops(records, number, 3, "--scheduler", "median") for number in range(4))
    assert not stops(journal_of((0, 0.9), (1, 0.9), (2, 0.1)), 2, 1, "--scheduler", "median")  # too few others


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_the_guide_runs_to_its_end_but_counts_for_the_others(rule: str) -> None:
    records = journal_of((1, 0.9), (2, 0.9), (3, 0.9), (0, 0.1))
    assert not stops(records, 0, 1, "--scheduler", rule)
    assert stops(journal_of((0, 0.9), (1, 0.9), (2, 0.9), (3, 0.1)), 3, 1, "--scheduler", rule)


def test_nothing_is_stopped_without_a_rule_or_with_several_goals() -> None:
    records = journal_of((1, 0.9), (2, 0.1))
    assert not stops(records, 2, 1, "--scheduler", "none")
    assert not stops(records, 2, 1, goals=(*GOALS, ("loss", "min")))


# ------------------------------------------------------------------------------------------------ Optuna's view


def mixed() -> dict[int, TrialRecord]:
    records = run(make_study(), 5)
    records[1].state, records[2].state = "STOPPED", "FAILED"
    del records[3]
    return records


def test_records_as_an_optuna_study() -> None:
    records = mixed()
    trials = as_optuna(records, GOALS).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL,
                                         TrialState.COMPLETE]  # fmt: skip
    assert trials[4].params == records[4].searched and trials[4].value == records[4].metrics["auroc"]
    assert trials[1].intermediate_values == {1: records[1].metrics["auroc"]}
    assert trials[1].value == records[1].metrics["auroc"]
    records[4].epochs = [{"auroc": float("nan")}]
    assert as_optuna(records, GOALS).trials[4].state == TrialState.FAIL
    records[4].state = "INTERRUPTED"
    assert as_optuna(records, GOALS).trials[4].state == TrialState.RUNNING
    records[0].distributions = {}  # of an older version
    assert as_optuna(records, GOALS).trials[0].params == {}


@pytest.mark.parametrize("name", ["plain", "which one?", "100%20", "a#b", "{x}", "it's", "a&b=c"])
def test_the_export_holds_ended_trials_in_order_and_all_at_the_end(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    path = folder / "optuna.db"

    def states() -> list[str]:
        connection = sqlite3.connect(path)
        rows = connection.execute("select state from trials order by number").fetchall()
        connection.close()
        return [state for (state,) in rows]

    records = run(make_study(), 4)
    records[1].state = "RUNNING"
    export = DatabaseExport(path, name, GOALS)
    export.write(records)
    assert states() == ["COMPLETE"]
    records[1].state = "STOPPED"
    export.write(records)
    assert states() == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    records[4] = record_of(propose(make_study(), records, 4), 4, None, "INTERRUPTED")  # type: ignore[arg-type]
    export.write(records, ended_only=False)
    assert states() == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "RUNNING"]
    assert [p.name for p in tmp_path.iterdir()] == [name] and [p.name for p in folder.iterdir()] == ["optuna.db"]
    (tmp_path / "copy.db").write_bytes(path.read_bytes())
    found = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'copy.db'}")
    assert found.best_value == max(records[n].metrics["auroc"] for n in (0, 2, 3))
    assert [t.params for t in found.trials] == [record.searched for record in records.values()]
    assert found.metric_names == ["auroc"]
    assert [t.user_attrs["end_state"] for t in found.trials] == [str(record.state) for record in records.values()]
    assert [t.user_attrs["epochs"] for t in found.trials] == [len(record.epochs) for record in records.values()]


def test_the_export_begins_when_a_later_trial_ends_before_the_first(tmp_path: Path) -> None:
    """The first one still runs, so no trial is written yet. An error here would make Tune run the trial again."""
    records = run(make_study(), 2)
    records[0].state = "RUNNING"
    DatabaseExport(tmp_path / "optuna.db", "s", GOALS).write(records)
    found = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert found.trials == []


@pytest.mark.parametrize("make", ["DatabaseExport(Path({folder!r}) / 'x.db', 's', GOALS)", "as_optuna({{}}, GOALS)"])
def test_optuna_logs_nothing_between_the_lines_of_the_display(tmp_path: Path, make: str) -> None:
    begin = "from pathlib import Path; from tune.records.optuna_study import *; GOALS = [('auroc', 'max')]; "
    code = begin + make.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == ""


def test_distributions_come_back_from_the_journal() -> None:
    ranges = {"a": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
              "b": optuna.distributions.CategoricalDistribution([None, True, 2, "x"])}  # fmt: skip
    read = {name: optuna.distributions.json_to_distribution(text) for name, text in distributions_json(ranges).items()}
    assert read == ranges
