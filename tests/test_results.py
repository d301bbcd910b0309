"""From predictions to a decision: ranking, intervals, paired differences, and the sentences about them."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import numpy as np
import pytest

from train_fn.data.decision import softmax
from train_fn.data.manifest import group_note
from train_fn.data.rows import resolve
from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.scoring.fitting import Decided
from train_fn.scoring.scores import PartScorer
from tune.config.settings import StudySettings
from tune.config.uris import default_uri
from tune.plan.checks import check_name
from tune.records.budgets import exhausted_budget, wall_seconds
from tune.records.ranking import front, ranked
from tune.records.trials import TrialRecord, trial_records
from tune.results.comparison import comparison_sentence
from tune.results.console import print_summary
from tune.results.intervals import difference, difference_over_seeds, with_intervals
from tune.results.outcome import Outcome
from tune.results.summary import Summary

AUROC = (("auroc", "max"),)


def record(number: int, state: str = "COMPLETE", **metrics: float) -> TrialRecord:
    return TrialRecord(number, {}, {}, state=state, epochs=[metrics])


def test_ranking_breaks_ties_by_loss_and_excludes_missing_scores() -> None:
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
        outcome.apply({"event": "confirmed", "number": number, "run": run, "value": value})
    outcome.choose_winner()
    assert outcome.winner is records[2]
    assert outcome.adapter_of(records[2]) == tmp_path / "trials" / "0002" / "confirm-2" / "final_model"


def test_rules_hold_after_confirmation_too(tmp_path) -> None:
    records = [
        record(0, auroc=0.9, sensitivity=0.2, loss=1),
        record(1, auroc=0.8, sensitivity=0.95, loss=1),
        record(2, auroc=0.7, sensitivity=0.95, loss=1),
    ]
    confirmed = {0: [0.95, 0.95], 1: [0.6, 0.6], 2: [0.7, 0.7]}
    for confirmations, expected in (
        (confirmed, [2, 1, 0]),  # 0 has the best mean, and breaks the rule
        ({0: [0.95]}, [1, 2, 0]),  # only the guide was confirmed
        ({0: [0.95], 2: [0.1]}, [2, 1, 0]),  # of those that keep the rule one was confirmed
        ({0: [float("nan")], 1: [float("nan")], 2: [0.1]}, [2, 1, 0]),
    ):
        outcome = Outcome("s", tmp_path, AUROC, records, require=("sensitivity>=0.9",), confirmations=confirmations)
        assert [r.number for r in outcome.best()] == expected, confirmations
    free = Outcome("s", tmp_path, AUROC, records, confirmations=confirmed)
    assert [r.number for r in free.best()] == [0, 2, 1]


def confirmed(outcome: Outcome, number: int, run: int, **metrics: float) -> None:
    event = {"event": "confirmed", "number": number, "run": run, "value": metrics["auroc"], "seed": 40 + run}
    outcome.apply(event | {"metrics": metrics, "best_epoch": 1, "folds": 0, "epochs": [metrics]})


def test_the_delivered_adapter_is_the_one_that_is_judged(tmp_path) -> None:
    records = [record(0, auroc=0.6, sensitivity=0.9, loss=1), record(1, auroc=0.9, sensitivity=0.95, loss=1)]
    for each in records:
        each.settings = {"seed": 40}
    outcome = Outcome("s", tmp_path, AUROC, records, require=("sensitivity>=0.9",))
    trial = tmp_path / "trials" / "0001"
    assert outcome.adapters_of(records[1]) == [trial / "final_model"] and outcome.delivered() is None
    (trial / "final_model").mkdir(parents=True)
    outcome.pick_winner()
    assert outcome.delivered() == {"trial": 1, "seed": 40, "run": 0, "folder": "trials/0001/final_model",
                                   "metrics": records[1].metrics}  # fmt: skip
    confirmed(outcome, 1, 2, auroc=0.7, sensitivity=0.92)  # they come in any order
    confirmed(outcome, 1, 1, auroc=0.8, sensitivity=0.91)
    for run in (1, 2):
        (trial / f"confirm-{run}" / "final_model").mkdir(parents=True)
    assert outcome.adapters_of(records[1]) == [trial / f"confirm-{run}" / "final_model" for run in (1, 2)]
    assert outcome.adapter_of(records[1]) == trial / "confirm-1" / "final_model"
    outcome.choose_winner()
    assert outcome.winner is records[1] and outcome.notes == []
    assert outcome.to_dict()["delivered"] == {
        "trial": 1, "seed": 41, "run": 1, "folder": "trials/0001/confirm-1/final_model",
        "metrics": {"auroc": 0.8, "sensitivity": 0.91},
    }  # fmt: skip
    replay = shlex.split(Summary(outcome.to_dict(), tmp_path).commands["Reproduce it"])
    assert replay[-6:] == ["--replay", "s", "--trial", "1", "--run", "1"]


def test_a_rule_must_hold_for_the_delivered_adapter(tmp_path) -> None:
    """Trial 1 kept the rule in the search, and its mean is the best; the adapter that would be delivered breaks it."""
    records = [record(n, auroc=0.5 + n / 10, sensitivity=0.95, loss=1) for n in (0, 1, 2)]
    records[2].epochs[0]["sensitivity"] = 0.5  # broke it in the search, keeps it now
    for number in (0, 1, 2):
        (tmp_path / "trials" / f"{number:04d}" / "confirm-1" / "final_model").mkdir(parents=True)
    outcome = Outcome("s", tmp_path, AUROC, records, require=("sensitivity>=0.9",))
    confirmed(outcome, 0, 1, auroc=0.6, sensitivity=0.9)
    confirmed(outcome, 1, 1, auroc=0.9, sensitivity=0.85)
    confirmed(outcome, 1, 2, auroc=0.9, sensitivity=0.99)
    confirmed(outcome, 2, 1, auroc=0.7, sensitivity=0.95)
    outcome.pick_winner()
    assert outcome.winner is records[2]
    assert outcome.notes == [
        "trial 1 kept sensitivity>=0.9 in the search (0.950), but its adapter of seed 1 breaks it (0.850)"
    ]
    outcome.require = ("sensitivity>=0.97",)
    outcome.pick_winner()
    assert outcome.winner is records[1] and "no trial keeps every rule" in outcome.notes[-1]


def test_confirmations_of_an_earlier_version_change_no_rule_and_no_front(tmp_path) -> None:
    records = [record(0, auroc=0.9, loss=0.5, sensitivity=0.95), record(1, auroc=0.8, loss=0.4, sensitivity=0.95)]
    goals = (("auroc", "max"), ("loss", "min"))
    outcome = Outcome("s", tmp_path, goals, records, require=("sensitivity>=0.9",))
    outcome.apply({"event": "confirmed", "number": 0, "run": 1, "value": 0.1})
    assert [r.number for r in outcome.best()] == [0, 1] and [r.number for r in outcome.front()] == [0, 1]
    assert outcome.delivered_metrics(records[0]) == records[0].metrics and outcome.value(records[0], "auroc") == 0.9


def test_the_front_after_confirmation_is_of_the_means(tmp_path) -> None:
    records = [record(n, auroc=auroc, loss=loss) for n, auroc, loss in ((0, 0.9, 0.5), (1, 0.8, 0.4), (2, 0.99, 0.1))]
    outcome = Outcome("s", tmp_path, (("auroc", "max"), ("loss", "min")), records)
    assert [r.number for r in outcome.front()] == [2]
    for run, auroc in ((1, 0.5), (2, 0.7)):
        confirmed(outcome, 0, run, auroc=auroc, loss=0.6)
        confirmed(outcome, 1, run, auroc=0.65, loss=0.5)
    assert outcome.value(records[0], "auroc") == pytest.approx(0.6) and outcome.value(records[0], "loss") == 0.6
    assert [r.number for r in outcome.front()] == [1]  # trial 2, which was not confirmed, has a single score only
    assert Outcome("s", tmp_path, AUROC, records).front() == []


def test_how_often_the_test_was_scored_is_a_number(tmp_path) -> None:
    outcome = Outcome("s", tmp_path, AUROC, [])
    event: dict = {"event": "tested", "tests": {}, "predictions": {}, "adapters": {"winner": "a", "guide": "b"}}
    outcome.apply(event)
    assert outcome.test_note() == "scored once, after the search, with 2 adapters"
    outcome.apply(event | {"num_adapters": 7})
    assert outcome.test_note() == (
        "scored 2 times after the search, because the study was resumed after scoring, with 2 + 7 adapters"
    )
    outcome.read([event | {"num_adapters": 1, "time": 0.0}], 0.0)
    assert outcome.test_note() == "scored once, after the search, with 1 adapter"


def test_a_study_that_went_on_is_not_busier_than_its_lanes(tmp_path) -> None:
    first = [{"event": "session", "time": 0.0, "params": {"lanes": 2}, "startup_s": 10.0}]
    first += [{"event": "started", "time": 1.0, "number": 0, "searched": {}, "settings": {}}]
    first += [event(0, 1, 100.0, {"train": 60.0, "evaluation": 20.0}, wall_s=90.0, waited_s=5.0)]
    outcome = Outcome("s", tmp_path, AUROC, [])
    outcome.read(first, 100.0)
    assert outcome.seconds["wall"] == 110 and outcome.lane_seconds == 220
    assert outcome.busy_share == pytest.approx(80 / 220)
    # A day later, on one lane, it takes a second: what the trial took before is in its seconds.
    later = [{"event": "session", "time": 90_000.0, "params": {"lanes": 1}, "startup_s": 3.0}]
    later += [{"event": "started", "time": 90_001.0, "number": 0, "searched": {}, "settings": {}}]
    later += [event(0, 2, 90_004.0, {"train": 61.0, "evaluation": 21.0, "setup": 1.0}, wall_s=2.5, waited_s=0.5)]
    outcome.read(first + later, 90_004.0)
    assert outcome.seconds["wall"] == 110 + 7 and outcome.lane_seconds == 220 + 7
    assert outcome.busy_share == pytest.approx(82 / 227)
    assert outcome.records[0].overhead_s == pytest.approx(1.5)  # 0.5 s of waiting, 1 s of setting up
    assert outcome.records[0].attempt_s == 2.0


def event(number: int, epoch: int, when: float, seconds: dict[str, float], **times: float) -> dict:
    facts = {"finished": False, "applied": {}, "lane": 0, "turn": 0, "device": "cpu", "notes": [], "device_s": 1.0}
    facts |= {"number": number, "epoch": epoch, "metrics": {"auroc": 0.5}, "seconds": seconds, **times}
    return {"event": "report", "time": when, **facts}


def test_a_trial_killed_before_its_first_report_has_no_negative_overhead(tmp_path) -> None:
    begun = {"event": "started", "time": 0.0, "number": 0, "searched": {}, "settings": {}}
    # 50 s of training were done in an attempt that was lost; the state that it left is gone on from.
    journal = [
        begun,
        event(0, 1, 70.0, {"train": 55.0, "evaluation": 2.0, "profile_forward": 40.0}, wall_s=9.0, waited_s=1),
    ]
    assert trial_records(journal)[0].overhead_s == pytest.approx(1.0)
    # Without a loss nothing changes: the lane's wall time, less training and evaluation.
    journal = [begun, event(0, 1, 70.0, {"train": 5.0, "evaluation": 2.0, "setup": 0.5}, wall_s=9.0, waited_s=1)]
    assert trial_records(journal)[0].overhead_s == pytest.approx(2.0)


@pytest.mark.parametrize("folder", ["plain", "with space", "it's; rm -rf $HOME", "which one?", "50% & [/red]", "-x"])
def test_printed_commands_can_be_pasted_into_a_shell(tmp_path, capsys, monkeypatch, folder: str) -> None:
    directory = tmp_path / folder / "s"
    (directory / "trials" / "0000" / "final_model").mkdir(parents=True)
    monkeypatch.chdir(directory.parent)
    uri = default_uri()
    outcome = Outcome("s", directory, AUROC, [record(0, auroc=0.7, loss=1)], num_trials=1, tracking_uri=uri)
    outcome.choose_winner()
    print_summary(outcome)
    out = capsys.readouterr().out
    lines = {line[:15].strip(): shlex.split(line[15:]) for line in out.splitlines() if "python " in line}
    assert lines["Use it"][4] == lines["Merge it"][4] == str(directory / "best_adapter")
    assert lines["Extend it"] == [
        *("python", "tune/run.py", "--results", str(directory.parent), "--resume", "s", "--trials", "11")
    ]
    assert "Compare trials mlflow ui\n" in out
    outcome.tracking_uri = "sqlite:////else where/it's.db"
    print_summary(outcome)
    (compare,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Compare trials")]
    assert shlex.split(compare)[-1] == "sqlite:////else where/it's.db"


def test_names_in_advice_can_be_pasted_into_a_shell(tmp_path) -> None:
    samples = [Sample((f"{n}.png",), "?", "a", 0, group="p") for n in range(4)]
    assert "add --group-field 'Patient ID' if" in group_note(samples, "Patient ID", given=False)
    (problem,) = resolve(["Image Path", "file path", "answer"])[1]
    assert "add --columns 'image=Image Path'" in problem
    directory = tmp_path / "it's mine"
    directory.mkdir()
    (directory / "plan.json").touch()
    (problem,) = check_name(directory)
    assert shlex.split(problem.partition("go on with ")[2]) == ["--resume", "it's mine"]


def test_a_new_winner_does_not_inherit_test_scores(tmp_path) -> None:
    records = [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1)]
    for number in (0, 1):
        (tmp_path / "trials" / f"{number:04d}" / "final_model").mkdir(parents=True)
    outcome = Outcome("s", tmp_path, AUROC, records)
    event = {"event": "tested", "tests": {"winner": {}}, "predictions": {}}
    outcome.apply(event | {"adapters": {"winner": "trials/0001/final_model"}})
    outcome.choose_winner()
    assert outcome.tests == {"winner": {}}
    outcome.apply(event | {"adapters": {"winner": "trials/0000/final_model"}})
    outcome.choose_winner()
    assert outcome.tests == {}


def test_a_summary_of_a_cost_and_of_a_score_without_interval(tmp_path, capsys) -> None:
    for goals, tests, why in [
        ((("trainable_params", "min"), ("auroc", "max")), {"auroc": {"value": 0.7, "interval": [0.6, 0.8]}},
         "trainable_params is undefined on these test images"),
        (AUROC, {"auroc": {"value": None, "interval": None}}, "auroc is undefined on these test images"),
        (AUROC, {"auroc": {"value": 0.7, "interval": None}}, "too few patients, groups or images"),
    ]:  # fmt: skip
        outcome = Outcome("s", tmp_path, goals, [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1)])
        outcome.winner = outcome.records[1]
        outcome.tests = {"winner": tests, "guide": tests, "difference": tests}
        print_summary(outcome)
        out = " ".join(capsys.readouterr().out.split())
        assert "Test scores" in out and why in out


@pytest.fixture(scope="module")
def splits() -> Splits:
    labels = np.random.default_rng(0).choice(2, 200)
    samples = tuple(Sample((f"{n}.png",), "?", "ab"[label], int(label)) for n, label in enumerate(labels))
    return Splits(samples, samples, samples, closed_set(("a", "b"), "b"))


def predicted(splits: Splits, strength: float, seed: int) -> dict[str, np.ndarray]:
    labels = np.array([sample.label for sample in splits.test])
    scores = np.random.default_rng(seed).normal(0, 1, (len(labels), 2))
    scores[np.arange(len(labels)), labels] += strength
    return {"losses": -scores[np.arange(len(labels)), labels], "scores": scores}


def test_a_paired_interval_is_narrower_than_the_two_alone(splits) -> None:
    units = list(range(200))
    weak = predicted(splits, 1.0, 1)
    strong = {"losses": weak["losses"], "scores": weak["scores"].copy()}
    strong["scores"][np.arange(200), [s.label for s in splits.test]] += 0.4  # the same noise, a little better
    one, two = (PartScorer(p, splits.test, splits) for p in (strong, weak))
    gain = difference(one, two, units)["auroc"]
    alone = with_intervals(one, units)["auroc"]["interval"]
    assert gain["interval"][0] > 0
    assert gain["interval"][1] - gain["interval"][0] < alone[1] - alone[0]
    assert "better than the guide" in comparison_sentence(gain, "auroc") and "worse than" in comparison_sentence(
        gain, "loss"
    )


def test_noise_is_no_significant_difference(splits) -> None:
    one, two = (PartScorer(predicted(splits, 1.0, seed), splits.test, splits) for seed in (1, 2))
    gain = difference(one, two, range(200))["auroc"]
    assert "not distinguishable from" in comparison_sentence(gain, "auroc")


def answering(answers: np.ndarray, labels: np.ndarray, positive: str = "b") -> PartScorer:
    """A scorer of these answers to questions with two candidates."""
    samples = tuple(Sample(("",), "?", "ab"[label], int(label)) for label in labels)
    return PartScorer({"losses": np.ones(len(labels)), "scores": np.eye(2)[answers]}, samples,
                      Splits((), (), samples, closed_set(("a", "b"), positive)))  # fmt: skip


def test_a_share_has_wilsons_interval() -> None:
    labels = np.repeat([0, 1], [35, 13])
    answers = np.concatenate([np.zeros(35, int), np.repeat([1, 0], [10, 3])])
    found = with_intervals(answering(answers, labels), range(48))
    t = 2.012  # with 47 degrees of freedom
    assert found["specificity"]["value"] == 1
    assert found["specificity"]["interval"] == pytest.approx([35 / (35 + t**2), 1], abs=1e-3)
    low, high = found["accuracy"]["interval"]
    # The score test: at each bound, 45 of 48 is t standard errors away. The jackknife's divisor is 47.
    for bound in (low, high):
        assert abs(45 / 48 - bound) / np.sqrt(bound * (1 - bound) / 47) == pytest.approx(t, abs=0.01)


def test_no_perfect_score_is_certain() -> None:
    labels = np.repeat([0, 1], 24)
    found = with_intervals(answering(labels, labels), range(48))
    for name in ("auroc", "accuracy", "macro_f1", "sensitivity", "ppv", "sensitivity_at_specificity_90"):
        low, high = found[name]["interval"]
        assert found[name]["value"] == high == 1 and 0.8 < low < 0.95, name


def test_a_share_of_0_widens_no_other_interval(splits) -> None:
    """A model that calls nothing positive has a sensitivity of 0, and ranks as before."""
    weak, units = predicted(splits, 1.0, 1), range(200)
    never = {"": Decided(softmax(weak["scores"]), np.zeros(200, dtype=int))}
    found, ranking = (with_intervals(PartScorer(weak, splits.test, splits, d), units) for d in (never, None))
    assert found["sensitivity"]["value"] == 0 < found["sensitivity"]["interval"][1] < 0.1
    assert found["auroc"] == ranking["auroc"]


def test_an_area_that_no_sample_can_change_is_certain(splits) -> None:
    same = {"losses": np.zeros(200), "scores": np.tile([-0.3, -1.2], (200, 1))}
    assert with_intervals(PartScorer(same, splits.test, splits), range(200))["auroc"] == {
        "value": 0.5,
        "interval": [0.5, 0.5],
    }


def test_models_that_no_sample_tells_apart_may_still_differ() -> None:
    labels = np.repeat([0, 1], 24)
    scorer = answering(1 - labels, labels)
    found = difference(scorer, scorer, range(48))
    bound = 2.012**2 / (48 + 2.012**2)  # that of a share of 0 among 48
    assert found["accuracy"] == {"value": 0, "interval": pytest.approx([-bound, bound], abs=1e-4)}


def test_samples_of_one_unit_count_once() -> None:
    rng = np.random.default_rng(0)
    labels, right = rng.integers(0, 2, 60), rng.random(60) < 0.7
    answers = np.where(right, labels, 1 - labels)
    alone = with_intervals(answering(answers, labels), range(60))
    four = np.repeat(np.arange(60), 4)
    groups = with_intervals(answering(answers[four], labels[four]), four)
    for name in ("accuracy", "macro_f1", "sensitivity", "auroc", "brier", "log_loss", "specificity_at_sensitivity_90"):
        assert groups[name] == {key: pytest.approx(value) for key, value in alone[name].items()}, name
    apart = with_intervals(answering(answers[four], labels[four]), range(240))["accuracy"]["interval"]
    widths = [high - low for low, high in (apart, groups["accuracy"]["interval"])]
    assert widths[0] == pytest.approx(widths[1] / 2, rel=0.05)


def test_intervals_of_a_chosen_part_are_those_of_that_part() -> None:
    rng = np.random.default_rng(1)
    labels, answers = rng.integers(0, 2, (2, 90))
    chosen, units = np.arange(0, 90, 2), rng.integers(0, 40, 90)
    found = with_intervals(answering(answers, labels), units, chosen)
    alone = with_intervals(answering(answers[chosen], labels[chosen]), units[chosen])
    assert {name: entry for name, entry in found.items() if name != "ece"} == {
        name: {key: pytest.approx(value) for key, value in entry.items()}
        for name, entry in alone.items()
        if name != "ece"  # its bins are those of all samples
    }


def test_what_cannot_be_known_has_no_interval() -> None:
    labels = np.repeat([0, 1], [39, 1])
    answers = np.repeat([0, 1], [30, 10])
    found = with_intervals(answering(answers, labels), range(40))
    assert found["sensitivity"] == {"value": 1, "interval": None}  # one positive sample
    assert found["auroc"]["interval"] is None and found["ece"]["interval"] is None
    assert found["specificity"]["interval"] is not None
    few = with_intervals(answering(answers, labels), np.arange(40) // 5)  # eight units
    assert all(entry["interval"] is None for entry in few.values())


def test_intervals_of_many_samples_take_seconds() -> None:
    rng = np.random.default_rng(2)
    labels, answers = rng.integers(0, 2, (2, 5000))
    scorer = answering(answers, labels)
    start = time.perf_counter()
    found = with_intervals(scorer, range(5000))["accuracy"]
    assert time.perf_counter() - start < 20
    low, high = found["interval"]  # in blocks of units, nearly the same
    assert [low, high] == pytest.approx([found["value"] - 0.0139, found["value"] + 0.0139], abs=1e-3)


def test_seeds_enter_the_interval_of_a_difference() -> None:
    """Two ways to train that are equal; each seed shifts the answers, so single pairs of seeds differ for sure."""
    rng, held, by_pairs = np.random.default_rng(3), 0, 0
    for _ in range(100):
        labels = rng.integers(0, 2, 60)
        hard = rng.random(60)  # the same samples are hard for all
        models = []
        for shift in rng.normal(0.25, 0.1, 6):  # each seed's share of wrong answers
            answers = np.where(hard + rng.normal(0, 0.1, 60) < shift, 1 - labels, labels)
            models.append(answering(answers, labels, positive=""))
        low, high = difference_over_seeds(models[:3], models[3:], range(60))["accuracy"]["interval"]
        held += low <= 0 <= high
        low, high = difference(models[0], models[3], range(60))["accuracy"]["interval"]
        by_pairs += low <= 0 <= high
    assert held >= 90 and by_pairs < 70


def test_states_and_exit_codes(tmp_path: Path) -> None:
    outcome = Outcome("s", tmp_path, AUROC, [record(0, "FAILED")])
    outcome.choose_winner()
    assert outcome.winner is None and outcome.exit_code == 1
    outcome.interrupted = True
    assert outcome.exit_code == 130


def events(*entries: tuple) -> list[dict]:
    return [{"event": kind, "time": float(when), **fields} for when, (kind, fields) in enumerate(entries, 1)]


def report_of(epoch: int, auroc: float, seconds: float) -> tuple[str, dict]:
    facts = {"finished": epoch == 2, "applied": {"trainable_params": 10}, "lane": 0, "turn": 0, "device": "cpu"}
    facts["num_threads"] = 1
    facts |= {"notes": [], "base_gib": 0.0, "base_16_bit_gib": 0.0, "step": epoch, "seconds": {"train": 1.0}}
    facts |= {"wall_s": 1.0, "waited_s": 0.0, "device_s": seconds, "metrics": {"auroc": auroc, "loss": 1.0}}
    return "report", {"number": 0, "epoch": epoch, **facts}


def test_a_trials_record_covers_all_its_sessions() -> None:
    begun = ("started", {"number": 0, "searched": {"lora_r": 4}, "settings": {}})
    journal = events(begun, report_of(1, 0.5, 3.0), ("ended", {"number": 0, "state": "INTERRUPTED", "error": "",
                  "device_s": 4.0}), begun, report_of(2, 0.7, 2.0))  # fmt: skip
    trial = trial_records(journal)[0]
    assert trial.state == "RUNNING" and trial.finished and trial.searched == {"lora_r": 4}
    assert [epoch["auroc"] for epoch in trial.epochs] == [0.5, 0.7]
    assert trial.device_seconds == 6.0 and trial.started_at == 1.0 and trial.num_threads == 1


def test_a_journal_without_num_threads_is_read() -> None:
    begun = ("started", {"number": 0, "searched": {"lora_r": 4}, "settings": {}})
    journal = events(begun, report_of(1, 0.5, 3.0))
    del journal[1]["num_threads"]
    assert trial_records(journal)[0].num_threads == 0 and trial_records(journal)[0].step == 1


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
    journal = [{"event": "session", "time": now - 1000}, {"event": "report", "time": now - 940}]
    journal += [{"event": "session", "time": now - 10}]  # 60 s before, 10 s now
    assert wall_seconds(journal) == pytest.approx(70, abs=5)
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
        found = exhausted_budget(records, journal, StudySettings(**options))
        assert (expected in found) if expected else found == ""
