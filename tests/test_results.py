"""From predictions to a decision: ranking, intervals, paired differences, and what is said about them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from train_fn.data import Sample, Splits
from tune.results import (
    Outcome,
    TrialRecord,
    difference,
    fold,
    front,
    make_scorer,
    print_summary,
    ranked,
    spent,
    verdict,
    wall_seconds,
    with_intervals,
)
from tune.settings import StudySettings

AUROC = (("auroc", "max"),)


def record(number: int, state: str = "COMPLETE", **metrics: float) -> TrialRecord:
    return TrialRecord(number, {}, {}, state=state, epochs=[metrics])


def test_ranking_breaks_ties_by_loss_and_leaves_out_what_is_no_score() -> None:
    records = [
        record(0, auroc=0.7, loss=1.0),
        record(1, auroc=0.8, loss=0.9),
        record(2, auroc=0.8, loss=0.5),
        record(3, auroc=float("nan"), loss=0.1),
        record(4, "STOPPED", auroc=0.9, loss=0.1),
        record(5, "FAILED"),
    ]
    assert [r.number for r in ranked(records, AUROC)] == [2, 1, 0]
    assert [r.number for r in ranked(records, (("loss", "min"),))] == [3, 2, 1, 0]


def test_confirmation_decides_by_the_mean(tmp_path) -> None:
    records = [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1), record(2, auroc=0.8, loss=1)]
    for number in (0, 1, 2):
        (tmp_path / "trials" / f"{number:04d}" / "confirm-1" / "final_model").mkdir(parents=True)
    (tmp_path / "trials" / "0002" / "confirm-2" / "final_model").mkdir(parents=True)
    outcome = Outcome("s", tmp_path, AUROC, records)
    # The first seed of trial 2 has failed.
    for number, run, value in [(1, 1, 0.7), (1, 2, 0.7), (2, 2, 0.9), (2, 3, 0.7), (0, 1, 0.6), (0, 2, 0.7)]:
        outcome.hear({"event": "confirmed", "number": number, "run": run, "value": value})
    outcome.choose_winner()
    assert outcome.winner is records[2]
    assert outcome.adapter_of(records[2]) == tmp_path / "trials" / "0002" / "confirm-2" / "final_model"


def test_a_new_winner_does_not_inherit_test_scores(tmp_path) -> None:
    records = [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1)]
    for number in (0, 1):
        (tmp_path / "trials" / f"{number:04d}" / "final_model").mkdir(parents=True)
    outcome = Outcome("s", tmp_path, AUROC, records)
    event = {"event": "tested", "tests": {"winner": {}}, "predictions": {}}
    outcome.hear(event | {"adapters": {"winner": "trials/0001/final_model"}})
    outcome.choose_winner()
    assert outcome.tests == {"winner": {}}
    outcome.hear(event | {"adapters": {"winner": "trials/0000/final_model"}})
    outcome.choose_winner()
    assert outcome.tests == {}


def test_a_summary_of_a_cost_and_of_a_score_without_interval(tmp_path, capsys) -> None:
    for goals, tests in [
        ((("trainable_params", "min"), ("auroc", "max")), {"auroc": {"value": 0.7, "interval": [0.6, 0.8]}}),
        (AUROC, {"auroc": {"value": None, "interval": None}}),
    ]:
        outcome = Outcome("s", tmp_path, goals, [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1)])
        outcome.winner = outcome.records[1]
        outcome.tests = {"winner": tests, "guide": tests, "difference": tests}
        print_summary(outcome)
        assert "Test scores" in capsys.readouterr().out


@pytest.fixture(scope="module")
def splits() -> Splits:
    labels = np.random.default_rng(0).choice(2, 200)
    samples = tuple(Sample(f"{n}.png", "?", "ab"[label], int(label)) for n, label in enumerate(labels))
    return Splits(samples, samples, samples, ("a", "b"))


def predicted(splits: Splits, strength: float, seed: int) -> dict[str, np.ndarray]:
    labels = np.array([sample.label for sample in splits.test])
    scores = np.random.default_rng(seed).normal(0, 1, (len(labels), 2))
    scores[np.arange(len(labels)), labels] += strength
    return {"losses": -scores[np.arange(len(labels)), labels], "scores": scores}


def test_a_paired_interval_is_narrower_than_the_two_alone(splits) -> None:
    images = np.arange(200)
    weak = predicted(splits, 1.0, 1)
    strong = {"losses": weak["losses"], "scores": weak["scores"].copy()}
    strong["scores"][np.arange(200), [s.label for s in splits.test]] += 0.4  # the same noise, a little better
    one, two = (make_scorer(p, splits, True, "b") for p in (strong, weak))
    gain = with_intervals(difference(one, two), images)["auroc"]
    alone = with_intervals(one, images)["auroc"]["interval"]
    assert gain["interval"][0] > 0
    assert gain["interval"][1] - gain["interval"][0] < alone[1] - alone[0]
    assert "better than the guide" in verdict(gain, "auroc") and "worse than" in verdict(gain, "loss")


def test_noise_is_called_noise(splits) -> None:
    one, two = (make_scorer(predicted(splits, 1.0, seed), splits, True, "b") for seed in (1, 2))
    gain = with_intervals(difference(one, two), np.arange(200))["auroc"]
    assert "not distinguishable from" in verdict(gain, "auroc")


def test_states_and_exit_codes(tmp_path: Path) -> None:
    outcome = Outcome("s", tmp_path, AUROC, [record(0, "FAILED")])
    outcome.choose_winner()
    assert outcome.winner is None and outcome.exit_code == 1
    outcome.interrupted = True
    assert outcome.exit_code == 130


def events(*told: tuple) -> list[dict]:
    return [{"event": kind, "time": float(when), **fields} for when, (kind, fields) in enumerate(told, 1)]


def report_of(epoch: int, auroc: float, seconds: float) -> tuple[str, dict]:
    facts = {"finished": epoch == 2, "applied": {"trainable_params": 10}, "lane": 0, "turn": 0, "device": "cpu"}
    facts["num_threads"] = 1
    facts |= {"notes": [], "base_gib": 0.0, "base_16_bit_gib": 0.0, "step": epoch, "seconds": {"train": 1.0}}
    facts |= {"wall_s": 1.0, "waited_s": 0.0, "device_s": seconds, "metrics": {"auroc": auroc, "loss": 1.0}}
    return "report", {"number": 0, "epoch": epoch, **facts}


def test_a_trial_is_folded_over_its_sessions() -> None:
    begun = ("started", {"number": 0, "searched": {"lora_r": 4}, "settings": {}})
    told = events(begun, report_of(1, 0.5, 3.0), ("ended", {"number": 0, "state": "INTERRUPTED", "error": "",
                  "device_s": 4.0}), begun, report_of(2, 0.7, 2.0))  # fmt: skip
    trial = fold(told)[0]
    assert trial.state == "RUNNING" and trial.finished and trial.searched == {"lora_r": 4}
    assert [epoch["auroc"] for epoch in trial.epochs] == [0.5, 0.7]
    assert trial.device_seconds == 6.0 and trial.started_at == 1.0 and trial.num_threads == 1


def test_a_journal_from_before_threads_were_told_is_read() -> None:
    begun = ("started", {"number": 0, "searched": {"lora_r": 4}, "settings": {}})
    told = events(begun, report_of(1, 0.5, 3.0))
    del told[1]["num_threads"]
    assert fold(told)[0].num_threads == 0 and fold(told)[0].step == 1


def test_the_front_and_rules_decide() -> None:
    records = [
        record(0, auroc=0.7, sensitivity=0.95, loss=1.0),
        record(1, auroc=0.9, sensitivity=0.5, loss=0.5),
        record(2, auroc=0.8, sensitivity=0.92, loss=0.6),
        record(3, auroc=0.6, sensitivity=0.6, loss=0.9),
    ]
    goals = (("auroc", "max"), ("sensitivity", "max"))
    assert [r.number for r in front(records, goals)] == [0, 1, 2]
    assert [r.number for r in ranked(records, goals)] == [1, 2, 0, 3]
    assert [r.number for r in ranked(records, AUROC, ("sensitivity>=0.9",))] == [2, 0, 1, 3]


def test_budgets_are_named_when_they_are_used_up() -> None:
    records = [record(0, auroc=0.7, loss=1), record(1, "FAILED"), record(2, "FAILED")]
    records[0].device_seconds = 3000.0
    records[1].device_seconds = 601.0
    now = time.time()
    told = [{"event": "session", "time": now - 1000}, {"event": "report", "time": now - 940}]
    told += [{"event": "session", "time": now - 10}]  # 60 s before, 10 s now
    assert wall_seconds(told) == pytest.approx(70, abs=5)
    for options, expected in (
        ({"gpu_hours": 1.0}, "1 GPU-hours"),
        ({"gpu_hours": 2.0}, ""),
        ({"max_failures": 2}, "2 trials have failed"),
        ({"max_failures": 3}, ""),
        ({"stop_when": "auroc>=0.7"}, "trial 0 has reached"),
        ({"stop_when": "auroc>=0.71"}, ""),
        ({"time_budget": "1m"}, "time budget of 1m"),
        ({"time_budget": "2m"}, ""),
    ):
        found = spent(records, told, StudySettings(**options))
        assert (expected in found) if expected else found == ""
