"""Rungs within an epoch: reports for early stopping alone, which change nothing in the training of a trial."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train_fn.data.samples import Splits
from train_fn.jobs import EpochReport, Verdict
from train_fn.settings import TrialSettings
from train_fn.trial import loop
from train_fn.trial.loop import Preempted, run_trial, rung_steps
from tune.config.cli import parse
from tune.config.paths import SettingsError
from tune.records.end_state import EndState
from tune.records.optuna_study import as_optuna
from tune.records.trials import TrialRecord, trial_records
from tune.search import early_stopping
from tune.search.early_stopping import should_stop

# Four steps an epoch, with dropout, so that a draw more or less would show.
SETTINGS = TrialSettings(num_train_epochs=2, lora_r=4, lora_alpha=8, learning_rate=1e-2, per_device_train_batch_size=2,
                         gradient_accumulation_steps=1, lora_dropout=0.2, save_steps=1)  # fmt: skip
RUNGS = (0.5, 1.5, 4.5)


@pytest.fixture(scope="module")
def splits(splits) -> Splits:
    return replace(splits, train=splits.train[:8], validation=splits.validation[:4])


def train(base, splits, output: Path | None, rungs=RUNGS, stop_at=None, leave_after=99, **changes) -> list[EpochReport]:
    reports: list[EpochReport] = []
    steps = iter(range(1, 99))

    def report(message: EpochReport) -> Verdict:
        reports.append(message)
        return stop_at[1] if stop_at and message.progress == stop_at[0] else Verdict.GO_ON

    run_trial(base, splits, replace(SETTINGS, **changes), report, output=output, rungs=rungs, best_by=("loss", "min"),
              preempted=lambda: next(steps) == leave_after)  # fmt: skip
    return reports


def numbers(reports: list[EpochReport]) -> list[Any]:
    return [(report.progress, report.epoch, report.step, report.metrics, report.best_epoch) for report in reports]


@pytest.fixture(scope="module")
def whole(base, splits, tmp_path_factory) -> tuple[list[EpochReport], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(base, splits, folder), folder


def test_a_report_within_an_epoch_changes_nothing_in_the_training(base, splits, whole, tmp_path) -> None:
    reports, folder = whole
    plain = train(base, splits, tmp_path, rungs=())
    assert [(r.progress, r.epoch, r.step, r.finished) for r in reports] == [
        (0.5, 1, 2, False), (1.0, 1, 4, False), (1.5, 2, 6, False), (2.0, 2, 8, True)]  # fmt: skip
    assert numbers(reports[1::2]) == numbers(plain)
    assert len({report.metrics["loss"] for report in reports}) == 4
    ours, theirs = (load_file(path / "final_model" / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_evaluation_within_an_epoch_may_draw_numbers(base, splits, whole, monkeypatch) -> None:
    """As a dropout would that a model keeps in evaluation."""
    evaluate, calls = loop.evaluate, []

    def draws(*args: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] % 2 == 0:  # at a rung
            torch.rand(7)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", draws)
    assert numbers(train(base, splits, None)) == numbers(whole[0]) and len(calls) == 4


@pytest.mark.parametrize("leave_after", [2, 3, 6])  # at a rung, after it, at the second one
def test_a_trial_that_is_preempted_around_a_rung_gives_the_same_numbers(
    base, splits, whole, tmp_path, leave_after
) -> None:
    with pytest.raises(Preempted):
        train(base, splits, tmp_path, leave_after=leave_after)
    again = train(base, splits, tmp_path)
    assert numbers(again) == numbers(whole[0]) and again[-1].notes == []


@pytest.mark.parametrize("rung", [0.5, 1.5])
def test_a_trial_that_pauses_at_a_rung_goes_on_from_it(base, splits, whole, tmp_path, monkeypatch, rung) -> None:
    train(base, splits, tmp_path, stop_at=(rung, Verdict.PAUSE))
    assert not (tmp_path / "final_model").exists()
    steps = []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: steps.append(args[2]) or step(*args))
    again = train(base, splits, tmp_path)
    assert steps == list(range(int(4 * rung) + 1, 9))
    assert numbers(again) == numbers(whole[0])


def test_a_trial_that_ends_at_a_rung_keeps_no_state(base, splits, tmp_path) -> None:
    reports = train(base, splits, tmp_path, stop_at=(0.5, Verdict.END))
    assert [report.progress for report in reports] == [0.5] and reports[0].best_epoch == 0
    assert not (tmp_path / "state").exists() and not (tmp_path / "final_model").exists()


def test_a_training_shorter_than_an_epoch_has_its_rungs_as_a_whole(base, splits) -> None:
    reports = train(base, splits, None, rungs=(0.5,), max_steps=2)
    assert [(r.progress, r.step, r.finished) for r in reports] == [(0.5, 1, False), (1.0, 2, True)]


@pytest.mark.parametrize(
    ("rungs", "steps_per_epoch", "num_steps", "expected"),
    [
        ((1, 3, 9), 10, 30, {}),  # the epochs' own reports serve
        ((0.5, 1.5, 4.5), 10, 30, {5: 0.5, 15: 1.5}),
        ((0.5, 1.5, 4.5), 7, 21, {4: 0.5, 11: 1.5}),  # the first step by which half an epoch is trained
        ((0.1, 0.1 * 3, 0.9, 2.7), 10, 30, {1: 0.1, 3: 0.1 * 3, 9: 0.9, 27: 2.7}),
        ((0.5, 1.5), 1, 3, {}),  # the first step is an epoch
        ((0.1, 0.3, 0.9), 3, 9, {1: 0.3}),  # two rungs at one step; the third is the epoch's end
        ((0.5, 1.5), 10, 17, {5: 0.5, 15: 1.5}),
        ((0.5, 1.5), 10, 15, {5: 0.5}),  # the training's own end serves
        ((0.5, 1.5), 100, 20, {10: 0.5}),  # shorter than an epoch
        ((), 10, 30, {}),
    ],
)
def test_rungs_lie_after_whole_steps(rungs, steps_per_epoch, num_steps, expected) -> None:
    assert rung_steps(rungs, steps_per_epoch, num_steps) == expected


# ------------------------------------------------------------------------------------------------ records and decisions

GOALS = (("auroc", "max"),)


def journal_of(*reports: tuple[int, float, float], select: str = "best") -> dict[int, TrialRecord]:
    """Records from reports (trial, epochs trained, score) in their order."""
    events: list[Any] = []
    best: dict[int, tuple[float, int]] = {}
    for seq, (number, progress, auroc) in enumerate(reports):
        if number not in {event["number"] for event in events}:
            events.append({"event": "started", "number": number, "searched": {}, "settings": {}, "time": 0.0})
        epoch = math.ceil(progress)
        if progress == epoch and auroc > best.get(number, (-1.0, 0))[0]:
            best[number] = auroc, epoch
        facts = {"seconds": {}, "wall_s": 0.0, "waited_s": 0.0, "device_s": 0.0, "seq": seq, "step": seq}
        facts |= {"best_epoch": best.get(number, (0.0, 0))[1] if select == "best" else 0}
        at = {"epoch": epoch, "progress": progress, "metrics": {"auroc": auroc}}
        events.append({"event": "report", "number": number, **at, **facts})
    return trial_records(events)


def stops(records: dict[int, TrialRecord], number: int, progress: float, *argv: str) -> str:
    return should_stop(records, number, progress, parse(["--grace-period", "0.5", *argv]).study, GOALS)


def test_the_rungs_of_a_study() -> None:
    def of(*argv: str) -> tuple[float, ...]:
        return early_stopping.rungs(parse([*argv]).study, GOALS)

    assert of()[:3] == (1, 3, 9) and of("--grace-period", "0.5")[:4] == (0.5, 1.5, 4.5, 13.5)
    assert of("--grace-period", "0.5", "--scheduler", "median") == (0.5,)
    assert of("--scheduler", "none") == ()
    assert early_stopping.rungs(parse([]).study, (*GOALS, ("loss", "min"))) == ()
    with pytest.raises(SettingsError, match="`--grace-period` must be a number above 0 and at most 10,000, but got 0"):
        parse(["--grace-period", "0"])


def test_asha_stops_within_an_epoch() -> None:
    records = journal_of((0, 0.5, 0.5), (1, 0.5, 0.9), (2, 0.5, 0.6), (1, 1, 0.6))
    assert stops(records, 2, 0.5) == "worse than the best third after 0.5 epochs"
    assert not stops(records, 1, 0.5) and not stops(records, 1, 1)  # no rung
    assert not stops(records, 0, 0.5)  # the guide's
    assert not stops(records, 2, 0.5, "--grace-period", "1") and not stops(records, 2, 0.5, "--scheduler", "none")
    records[3] = TrialRecord(3, {}, {})
    assert not stops(records, 3, records[3].progress)  # a trial that was killed before its first report


def test_the_reason_names_one_epoch_as_one() -> None:
    records = journal_of((1, 1, 0.9), (2, 1, 0.6))
    assert stops(records, 2, 1, "--grace-period", "1") == "worse than the best third after 1 epoch"


def test_a_trial_without_steps_for_a_rung_counts_by_the_end_of_its_epoch() -> None:
    assert stops(journal_of((1, 0.5, 0.9), (2, 1, 0.6)), 2, 1) == "worse than the best third after 0.5 epochs"
    assert stops(journal_of((1, 1, 0.9), (2, 0.5, 0.6)), 2, 0.5)
    both = journal_of((1, 1, 0.6), (1, 2, 0.9), (2, 1, 0.7), (2, 2, 0.7))
    assert not stops(both, 2, 1) and stops(both, 2, 2) == "worse than the best third after 1.5 epochs"


def test_a_rung_counts_by_itself_or_by_the_best_epoch_before_it() -> None:
    """Its own adapter is not kept, so it is no best epoch."""
    reports = ((1, 0.5, 0.9), (1, 1.0, 0.6), (1, 1.5, 0.5), (1, 2.0, 0.7))
    best, last = journal_of(*reports)[1], journal_of(*reports, select="last")[1]
    assert best.values(GOALS[0]).tolist() == [0.9, 0.6, 0.6, 0.7] and best.best_epoch == 2
    assert last.values(GOALS[0]).tolist() == [0.9, 0.6, 0.5, 0.7]
    assert [epoch["auroc"] for epoch in best.epochs] == [0.6, 0.7] and best.metrics == {"auroc": 0.7}
    assert best.progress == 2 and journal_of(*reports[:3])[1].progress == 1.5
    again = {"event": "report", "number": 1, "epoch": 2, "progress": 1.5, "metrics": {"auroc": 0.1}}
    best.apply(again)  # a trial that continues sends its reports again
    assert len(best.rungs) == 2 and len(best.epochs) == 2


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_decision_within_an_epoch_is_the_same_however_much_the_journal_knows(rule: str) -> None:
    marks = (0.5, 1.0, 1.5, 2.0)
    reports = [(number, mark, 0.5 + (7 * number + int(6 * mark)) % 11 / 20) for mark in marks for number in range(9)]
    now = {(n, mark): stops(journal_of(*reports[: i + 1]), n, mark, "--scheduler", rule)
           for i, (n, mark, _) in enumerate(reports)}  # fmt: skip
    later = journal_of(*reports)
    assert now == {key: stops(later, *key, "--scheduler", rule) for key in now}
    assert {mark for (_, mark), reason in now.items() if reason} == ({0.5, 1.5} if rule == "asha" else {0.5, 1.0})


def test_the_median_rule_begins_within_an_epoch() -> None:
    records = journal_of((1, 0.5, 0.8), (2, 0.5, 0.9), (3, 0.5, 0.7), (4, 0.5, 0.2), (5, 0.5, 0.85))
    assert stops(records, 4, 0.5, "--scheduler", "median") == "worse than the median after 0.5 epochs"
    assert not stops(records, 5, 0.5, "--scheduler", "median")


def test_a_trial_stopped_within_its_first_epoch_has_the_score_of_its_rung() -> None:
    record = journal_of((1, 0.5, 0.6))[1]
    record.state = EndState.STOPPED
    assert record.metrics == {"auroc": 0.6} and record.progress == 0.5
    trial = as_optuna({1: record}, GOALS).trials[1]
    assert trial.intermediate_values == {500: 0.6} and trial.value == 0.6 and trial.state.name == "PRUNED"
    assert as_optuna(journal_of((0, 1, 0.6)), GOALS).trials[0].intermediate_values == {1: 0.6}  # epochs, as before


def test_journals_and_states_of_earlier_versions_have_epochs_alone() -> None:
    events = [{"event": "started", "number": 1, "searched": {}, "settings": {}, "time": 0.0}]
    facts = {"seconds": {}, "wall_s": 0.0, "waited_s": 0.0, "device_s": 0.0, "step": 1, "best_epoch": 1}
    events += [{"event": "report", "number": 1, "epoch": n, "metrics": {"auroc": n / 10}, **facts} for n in (1, 2)]
    record = trial_records(events)[1]
    assert (record.progress, len(record.epochs), record.rungs) == (2.0, 2, [])
    assert EpochReport.from_dict({"epoch": 2, "metrics": {}}).progress == 2.0


def test_a_trial_whose_training_loss_rises_far_above_its_first_one_has_diverged() -> None:
    def after(*losses: float, number: int = 1) -> str:
        records = journal_of(*((number, (n + 1) / 2, 0.5) for n in range(len(losses))))
        for report, loss in zip(records[number].reports, losses, strict=True):
            report["metrics"]["train_loss"] = loss
        goals = (*GOALS, ("loss", "min"))  # for which no trial is compared with others
        return should_stop(records, number, len(losses) / 2, parse([]).study, goals)

    assert after(1.0, 3.1) == "diverged: the training loss rose from 1 to 3.1"
    assert after(1.0, 0.5, 4.0) and not after(1.0, 2.9) and not after(5.0)
    assert not after(1.0, 0.001, 0.1)  # a spike below its start
    assert not after(1.0, 9.0, number=0)  # the guide's
    assert not after(1.0, 9.0, 1.1)  # it has come back; only its present loss counts


def test_a_trial_that_gives_all_images_one_answer_goes_on() -> None:
    """On BUSI, trials that did so after their first epoch were among the best in the end (benchmarks/README.md)."""
    one_answer = {"accuracy_raw": 0.27, "balanced_accuracy_raw": 1 / 3, "macro_f1_raw": 0.142}
    records = journal_of((1, 1.0, 0.5), (2, 1.0, 0.6))
    records[2].epochs[0] |= one_answer
    assert not stops(records, 2, 1.0)
