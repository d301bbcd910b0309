"""From predictions to a decision: ranking, intervals, paired differences, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train_fn.data import Sample, Splits
from tune.results import Outcome, TrialRecord, difference, make_scorer, ranked, verdict, with_intervals


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
    assert [r.number for r in ranked(records, "auroc")] == [2, 1, 0]
    assert [r.number for r in ranked(records, "loss")] == [3, 2, 1, 0]


def test_confirmation_decides_by_the_mean(tmp_path) -> None:
    records = [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1), record(2, auroc=0.8, loss=1)]
    for number in (0, 1, 2):
        (tmp_path / "trials" / f"{number:04d}" / "confirm-1" / "final_model").mkdir(parents=True)
    outcome = Outcome("s", tmp_path, "auroc", records, confirmations={1: [0.7, 0.7], 2: [0.9, 0.7], 0: [0.6, 0.7]})
    outcome.choose_winner()
    assert outcome.winner is records[2]
    assert outcome.adapter_of(records[2]) == tmp_path / "trials" / "0002" / "confirm-1" / "final_model"


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
    outcome = Outcome("s", tmp_path, "auroc", [record(0, "FAILED")])
    outcome.choose_winner()
    assert outcome.winner is None and outcome.exit_code == 1
    outcome.interrupted = True
    assert outcome.exit_code == 130
