"""The test's scores: baselines, seeds, the clean part, and the sentences about them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from studies import write_adapter, write_trial

from train_fn.data.decision import Decision
from train_fn.data.samples import Sample, Splits, Task, closed_set
from train_fn.jobs import ScoreReport
from train_fn.scoring.probe import probe_images
from train_fn.support.storage import Storage
from tune.final_test import fitted_with, score_test
from tune.records.journal import Journal
from tune.results.baselines import Model, baselines, majority, scores_of, test_scores
from tune.results.comparison import comparison_sentence, others_sentence, probe_sentence
from tune.results.outcome import Outcome
from tune.results.summary import Summary

test_scores.__test__ = False  # type: ignore[attr-defined]


def splits_of(num_classes: int = 3, size: int = 90, num_common: int = 30) -> Splits:
    """Three equal parts with the classes in turn, and `num_common` more training samples of the second class."""
    parts = []
    for part in ("train", "validation", "test"):
        labels = [n % num_classes for n in range(size)] + [1] * num_common * (part == "train")
        parts.append(tuple(Sample((f"{part}{n}.png",), "?", "abc"[c], c) for n, c in enumerate(labels)))
    return Splits(*parts, closed_set("abc"[:num_classes], "b"), decide="macro_f1")


def answers_of(splits: Splits, strength: float, seed: int = 0, part: str = "test") -> dict[str, Any]:
    """Predictions: noise, and `strength` for the true candidate."""
    labels = np.array([sample.label for sample in getattr(splits, part)])
    scores = np.random.default_rng(seed).normal(size=(len(labels), len(splits.candidates)))
    scores[np.arange(len(labels)), labels] += strength
    return {"losses": np.ones(len(labels)), "scores": scores}


def report_of(splits: Splits, strength: float) -> ScoreReport:
    """What workers send for baselines: an untuned base that is a coin, and features with the class in a column."""
    label = {image: int(sample.label) for sample in splits.samples for image in sample.images}
    images = probe_images(splits)
    features = np.random.default_rng(0).normal(size=(len(images), 6)).astype(np.float32)
    features[np.arange(len(images)), [label[image] for image in images]] += strength
    untuned = {part: answers_of(splits, 0.0, 5, part) for part in ("validation", "test")}
    return ScoreReport(predictions=[], untuned=untuned, features=features)


# ------------------------------------------------------------------------------------------------ baselines


def test_the_majority_answer_is_right_by_chance_only() -> None:
    splits = splits_of()
    model = majority(splits)
    assert (model.predicted["scores"].argmax(1) == 1).all()
    assert np.exp(model.predicted["scores"][0]) == pytest.approx([0.25, 0.5, 0.25])  # of 30, 60 and 30
    scores = scores_of(model, range(90), splits)
    assert scores["balanced_accuracy"]["value"] == pytest.approx(1 / 3)
    assert scores["accuracy"]["value"] == pytest.approx(1 / 3)
    assert scores["auroc"]["value"] == 0.5
    assert scores["macro_f1"]["value"] == pytest.approx(0.5 / 3)  # of the answer that is always given: 2 * 30 / 120
    assert (scores["sensitivity"]["value"], scores["specificity"]["value"]) == (1.0, 0.0)
    assert "loss" not in scores


def test_the_majority_answer_of_an_open_task_is_its_most_frequent_text() -> None:
    tasks = (Task("side", "binary", ("left", "right")), Task("report", "open"))
    train = [Sample(("a.png",), "Side?", "left", 0, task="side")]
    train += [Sample((f"{n}.png",), "What?", text, task="report") for n, text in enumerate(("cyst", "mass", "mass"))]
    test = (Sample(("t.png",), "What?", "mass", task="report"), Sample(("t.png",), "Side?", "right", 1, task="side"))
    splits = Splits(tuple(train), (), test, tasks)
    model = majority(splits)
    assert list(model.predicted["texts"]) == ["mass", None]
    scores = scores_of(model, range(2), splits)
    assert scores["report/exact_match" if "report/exact_match" in scores else "exact_match"]["value"] == 1.0
    assert scores["accuracy"]["value"] == 0.0


def test_baselines_have_scores_of_their_own() -> None:
    splits, notes = splits_of(), []
    found = baselines(splits, report_of(splits, 20.0), True, notes.append)
    assert list(found) == ["untuned base", "majority answer", "linear probe"] and notes == []
    tests = test_scores({"winner": [Model(answers_of(splits, 1.0))]}, found, splits, ())
    assert list(tests) == ["winner", *found, "winner minus probe"]
    assert tests["linear probe"]["auroc"]["value"] == 1.0 and "loss" not in tests["linear probe"]
    assert 0.4 < tests["untuned base"]["auroc"]["value"] < 0.6 and "loss" in tests["untuned base"]
    gain = tests["winner minus probe"]["auroc"]
    assert gain["value"] == pytest.approx(tests["winner"]["auroc"]["value"] - 1)
    assert gain["interval"][1] < 0 and gain["num_seeds"] == [1, 1] and gain["num_samples"] == 90
    # The untuned base and the probe choose answers by a decision of their own, from their validation predictions.
    assert found["linear probe"].decisions[""].aim == found["untuned base"].decisions[""].aim == "macro_f1"
    assert found["majority answer"].decisions[""].aim == "argmax"


def test_a_probe_that_cannot_be_had_leaves_one_note() -> None:
    splits, notes = splits_of(), []
    report = replace(report_of(splits, 20.0), features=None)
    assert list(baselines(splits, report, True, notes.append)) == ["untuned base", "majority answer"]
    assert notes == ["the winner is not compared with a linear probe: this base keeps no vision features by image"]
    parts = [(Sample(("a.png",), "?", "a mass"),) for _ in range(3)]
    found = baselines(Splits(*parts), ScoreReport(predictions=[]), True, notes.append)
    assert list(found) == ["majority answer"] and len(notes) == 2 and "no question has one answer" in notes[1]
    report = report_of(splits, 20.0)
    assert report.features is not None
    report.features[3] = np.nan
    report.untuned["test"]["losses"][0] = np.nan
    assert list(baselines(splits, report, True, notes.append)) == ["majority answer"] and "finite" in notes[2]


def test_a_probe_of_some_tasks_is_compared_on_their_samples() -> None:
    one = splits_of()
    tasks = (Task("kind", "closed", ("a", "b", "c")), Task("report", "open"))

    def mixed(part: str) -> tuple[Sample, ...]:
        its = [Sample(s.images, s.question, s.answer, s.label, task="kind") for s in getattr(one, part)]
        return (Sample((f"open {part}.png",), "What?", "a mass", task="report"), *its)

    splits = Splits(mixed("train"), mixed("validation"), mixed("test"), tasks)
    closed = answers_of(one, 30.0)
    texts = np.array(["a mass", *[None] * 90], dtype=object)
    predicted = {"losses": np.ones(91), "scores": np.vstack([[np.nan] * 3, closed["scores"]]), "texts": texts}
    report = ScoreReport(predictions=[], features=report_of(one, 20.0).features)
    tests = test_scores({"winner": [Model(predicted)]}, baselines(splits, report, True, lambda note: None), splits, ())
    gain = tests["winner minus probe"]
    assert gain["accuracy"]["num_samples"] == 90
    assert gain["accuracy"]["value"] == gain["kind/auroc"]["value"] == 0.0 and "exact_match" not in gain
    assert tests["winner"]["exact_match"]["value"] == 1.0


# ------------------------------------------------------------------------------------------------ seeds and clean part


def test_a_difference_over_seeds_is_of_their_means_and_wider_than_of_one() -> None:
    splits = splits_of(2, 200, 0)

    def models(*strengths: float) -> list[Model]:
        return [Model(answers_of(splits, strength, seed)) for seed, strength in enumerate(strengths)]

    def value(model: Model) -> float:
        return scores_of(model, range(200), splits)["auroc"]["value"]

    # The seeds of a side differ much, so which seed one happens to take decides.
    winners, guides = models(2.0, 0.4, 2.0), models(0.4, 2.0, 0.4)
    one = test_scores({"winner": winners[:1], "guide": guides[:1]}, {}, splits, ())
    all_seeds = test_scores({"winner": winners, "guide": guides}, {}, splits, (), folds=True)
    assert one["winner"] == all_seeds["winner"]  # the delivered adapter's own score
    gain, alone = all_seeds["difference"]["auroc"], one["difference"]["auroc"]
    assert gain["value"] == pytest.approx(np.mean([*map(value, winners)]) - np.mean([*map(value, guides)]))
    assert alone["num_seeds"] == [1, 1] and gain["num_folds"] == [3, 3] and "num_seeds" not in gain
    assert alone["interval"][0] > 0  # one pair of adapters seems sure
    assert gain["interval"][0] < 0 < gain["interval"][1]  # the seeds say otherwise


def test_the_clean_part_has_scores_and_differences_of_its_own() -> None:
    splits = splits_of(2, 60, 0)
    ours, theirs = answers_of(splits, 1.0), answers_of(splits, 1.0, 1)
    clean = list(range(20))
    ours["scores"][:20] = -theirs["scores"][:20]  # the opposite answer to the clean ones
    found = baselines(splits, report_of(splits, 20.0), True, lambda note: None)
    tests = test_scores({"winner": [Model(ours)], "guide": [Model(theirs)]}, found, splits, clean)
    assert list(tests)[:6] == ["winner", "winner, clean part", "guide", "guide, clean part", "difference",
                               "difference, clean part"]  # fmt: skip
    assert tests["winner, clean part"]["auroc"]["value"] == pytest.approx(
        1 - tests["guide, clean part"]["auroc"]["value"]
    )
    gain = tests["difference, clean part"]["auroc"]
    assert gain["num_samples"] == 20 and gain["value"] == pytest.approx(
        tests["winner, clean part"]["auroc"]["value"] - tests["guide, clean part"]["auroc"]["value"]
    )
    assert tests["winner minus probe, clean part"]["auroc"]["num_samples"] == 20
    everything = test_scores({"winner": [Model(ours)]}, {}, splits, range(60))
    assert list(everything) == ["winner"]  # all of it is clean


# ------------------------------------------------------------------------------------------------ the test as a job


class Lanes:
    """Stands in for the dispatcher: scores adapters by their content, the strength of the true candidate."""

    def __init__(self, splits: Splits) -> None:
        self.splits, self.jobs = splits, []  # type: tuple[Splits, list[ScoreJob]]
        self.submit = SimpleNamespace(remote=self.jobs.append)
        self.next_report = SimpleNamespace(remote=lambda number, seen: self.answer())

    def answer(self) -> ScoreReport:
        found = [self.score(folder / "adapter_model.safetensors") for folder in self.jobs[-1].adapters]
        return replace(report_of(self.splits, 20.0), predictions=found)

    def score(self, path: Path) -> dict[str, Any]:
        content = path.read_text()
        return {"error": "cut"} if content == "cut" else answers_of(self.splits, float(content))


@pytest.fixture
def confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Outcome, Lanes]:
    """A study whose trials 0 and 1 were confirmed over the seeds 1 to 3, its outcome, and lanes for it."""
    monkeypatch.setattr("ray.get", lambda answer: answer)
    splits, journal = splits_of(2, 40, 0), Journal(tmp_path / "journal.jsonl")
    for number in range(2):
        write_trial(journal, number, auroc=0.6)
        for run in (1, 2, 3):
            folder = tmp_path / "trials" / f"{number:04d}" / f"confirm-{run}" / "final_model"
            write_adapter(folder, str(number + run / 10))
            journal.write("confirmed", number=number, run=run, value=0.5 + number / 10)
    outcome = Outcome("s", tmp_path, (("auroc", "max"),), [], storage=Storage(tmp_path))
    outcome.read(journal.events)
    outcome.pick_winner()
    settings = SimpleNamespace(study=SimpleNamespace(folds=0))
    report = SimpleNamespace(test_clean=())
    study = SimpleNamespace(journal=journal, splits=splits, data_report=report, settings=settings)
    return study, outcome, Lanes(splits)


def test_every_confirmed_adapter_of_winner_and_guide_is_scored(confirmed: tuple[Any, Outcome, Lanes]) -> None:
    study, outcome, lanes = confirmed
    assert score_test(study, lanes, outcome, lambda text: None, 1) == ""
    names = [path.relative_to(outcome.directory).as_posix() for path in lanes.jobs[0].adapters]
    expected = [f"trials/000{number}/confirm-{run}/final_model" for number in (1, 0) for run in (1, 2, 3)]
    assert names == expected and lanes.jobs[0].baselines
    assert outcome.tests["difference"]["auroc"]["num_seeds"] == [3, 3]
    assert outcome.tests["winner minus probe"]["auroc"]["num_seeds"] == [3, 1]
    delivered = Model(answers_of(study.splits, 1.1))
    assert outcome.tests["winner"]["auroc"] == scores_of(delivered, range(40), study.splits)["auroc"]
    event = study.journal.events[-1]
    assert event["num_adapters"] == 6 and len(set(event["sha256"].values())) == 6
    assert event["adapters"] == {"winner": expected[0], "guide": expected[3]} and list(event["predictions"]) == [
        "winner",
        "guide",
    ]


def test_a_test_is_scored_again_if_any_of_its_adapters_has_changed(confirmed: tuple[Any, Outcome, Lanes]) -> None:
    study, outcome, lanes = confirmed

    def score() -> int:
        """Score the test if need be. Returns how often it was scored so far."""
        score_test(study, lanes, outcome, lambda text: None, 1)
        return len(lanes.jobs)

    assert score() == score() == 1
    write_adapter(outcome.directory / "trials/0000/confirm-3/final_model", "1.9")
    assert score() == score() == 2
    # A test of an earlier version, which has scored the delivered adapters only, stands.
    old = {name: value for name, value in study.journal.events[-1].items() if name != "num_adapters"}
    old["sha256"] = {who: sha for who, sha in old["sha256"].items() if who in ("winner", "guide")}
    study.journal.events.append(old)
    assert score() == 2


def test_a_seed_whose_adapter_cannot_be_used_is_left_out_with_a_note(confirmed: tuple[Any, Outcome, Lanes]) -> None:
    study, outcome, lanes = confirmed
    write_adapter(outcome.directory / "trials/0001/confirm-2/final_model", "cut")
    shutil.rmtree(outcome.directory / "trials/0000/confirm-2")
    assert score_test(study, lanes, outcome, lambda text: None, 1) == ""
    assert outcome.tests["difference"]["auroc"]["num_seeds"] == [2, 2]
    assert study.journal.events[-1]["num_adapters"] == 4
    for number in (0, 1):
        note = f"1 of the 3 confirmed adapters of trial {number} cannot be used, and are not in the test's comparison"
        assert note in outcome.notes
    write_adapter(outcome.directory / "trials/0001/confirm-1/final_model", "cut")  # the delivered one
    assert score_test(study, lanes, outcome, lambda text: None, 2) == "its adapter cannot be loaded (cut)"


def test_answers_of_the_test_are_chosen_by_the_decision_beside_the_adapter(tmp_path: Path, monkeypatch) -> None:
    decision = Decision("macro_f1", rule=(5.0, 0.0))
    task = SimpleNamespace(decisions={"": decision}, conformal={})
    monkeypatch.setattr("train_fn.model.adapters.read_task", lambda adapter: task)
    assert fitted_with(tmp_path)[0] == {"": decision}
    monkeypatch.undo()
    assert fitted_with(tmp_path)[0] == {}  # no task.json: of an earlier version


# ------------------------------------------------------------------------------------------------ sentences


def gain_of(value: float, low: float, high: float, seeds: Sequence[int] = (1, 1), num: int = 126) -> dict[str, Any]:
    return {"value": value, "interval": [low, high], "num_seeds": list(seeds), "num_samples": num}


def summary_of(tests: dict[str, Any], **study: Any) -> Summary:
    trials = [{"number": n, "searched": {}, "settings": {}, "state": "COMPLETE", "epochs": []} for n in range(2)]
    content = {"goals": [["auroc", "max"]], "trials": trials, "winner": 1, "test": tests, "state": "COMPLETE"}
    return Summary(content | study, Path("s"))


BETTER, EVEN, WORSE = gain_of(0.042, 0.008, 0.076), gain_of(0.009, -0.042, 0.064), gain_of(-0.05, -0.09, -0.01)
CAVEAT = "This compares two adapters, not two settings: another seed may turn it (--confirm trains both again)."


@pytest.mark.parametrize(
    ("gain", "words", "lower_is_better"),
    [
        (BETTER, "better than", "worse than"),
        (EVEN, "not distinguishable from", "not distinguishable from"),
        (WORSE, "worse than", "better than"),
    ],
)
def test_the_interval_decides_the_word(gain: dict[str, Any], words: str, lower_is_better: str) -> None:
    assert f"the winner is {words} the guide's defaults: auroc" in comparison_sentence(gain, "auroc")
    assert f"the winner is {lower_is_better} the guide's" in comparison_sentence(gain, "loss")
    assert f"the winner is {lower_is_better} the guide's" in comparison_sentence(gain, "auroc", "min")


def test_two_adapters_are_called_so_and_seeds_are_counted() -> None:
    text = summary_of({"difference": {"auroc": BETTER}}).explanation
    assert text == (
        "On the test images the winner is better than the guide's defaults: auroc +0.042 (95 % interval +0.008 to "
        f"+0.076, paired). {CAVEAT}"
    )
    text = summary_of({"difference": {"auroc": gain_of(0.042, 0.008, 0.076, (3, 3))}}).explanation
    assert text == (
        "On the test images the winner's settings are better than the guide's defaults over 3 seeds each: auroc "
        "+0.042 (95 % interval +0.008 to +0.076, paired)."
    )
    folds = gain_of(0.0, -0.1, 0.1) | {"num_folds": [5, 4]}
    text = summary_of({"difference": {"auroc": folds}}).explanation
    assert "settings are not distinguishable from the guide's defaults over 5 and 4 folds: auroc" in text
    assert CAVEAT in summary_of({"difference": {"auroc": gain_of(0.1, 0.0, 0.2, (3, 1))}}).explanation


def test_a_tables_difference_says_how_many_seeds_it_is_the_mean_of() -> None:
    """The scores beside it are of one adapter each, so that it is not their difference."""
    tests = {"difference": gain_of(0.1, 0.0, 0.2, (3, 3)), "winner minus probe": gain_of(0.1, 0.0, 0.2, (3, 1))}
    summary = summary_of({who: {"auroc": gain} for who, gain in tests.items()})
    assert summary.title("difference") == "winner minus guide, paired, mean of 3 seeds"
    assert summary.title("winner minus probe") == "winner minus probe, paired, mean of 3 seeds"
    assert summary_of({"difference": {"auroc": BETTER}}).title("difference") == "winner minus guide, paired"


def test_the_headline_is_of_the_clean_part_and_the_whole_follows_in_brackets() -> None:
    clean = gain_of(0.009, -0.042, 0.064, num=94)
    tests = {"difference": {"auroc": BETTER}, "difference, clean part": {"auroc": clean}}
    assert summary_of(tests).explanation == (
        "On the 94 test images without a copy in training the winner is not distinguishable from the guide's defaults: "
        "auroc +0.009 (95 % interval -0.042 to +0.064, paired; all 126 test images, copies included: +0.042, "
        f"+0.008 to +0.076). {CAVEAT}"
    )
    undefined = {"value": None, "interval": None}
    tests["difference, clean part"] = {"auroc": undefined}
    assert "On the test images the winner is better than" in summary_of(tests).explanation


def test_a_study_of_an_earlier_version_has_its_sentence() -> None:
    old = {"value": 0.042, "interval": [0.008, 0.076]}
    tests = {"winner": {"auroc": old}, "winner, clean part": {"auroc": old}, "difference": {"auroc": old}}
    summary = summary_of(tests)
    assert summary.explanation == (
        "On the test images the winner is better than the guide's defaults: auroc +0.042 (95 % interval +0.008 to "
        "+0.076, paired)."
    )
    assert summary.compared == []


def test_other_scores_that_differ_clearly_are_said() -> None:
    gains = {"auroc": EVEN, "specificity": gain_of(-0.543, -0.697, -0.382), "accuracy": gain_of(0.01, -0.1, 0.1)}
    text = summary_of({"difference": gains}).explanation
    assert "not distinguishable from" in text and text.endswith(
        f"paired). But specificity is lower: -0.543 (-0.697 to -0.382). {CAVEAT}"
    )
    gains |= {"sensitivity": gain_of(0.2, 0.1, 0.3), "macro_f1": gain_of(-0.1, -0.2, -0.05)}
    gains |= {"balanced_accuracy": gain_of(-0.06, -0.1, -0.02), "accuracy_raw": gain_of(-0.9, -0.95, -0.8)}
    gains |= {"loss": gain_of(-0.9, -0.95, -0.8)}
    assert others_sentence(gains, "auroc") == (
        "But specificity is lower: -0.543 (-0.697 to -0.382), and sensitivity is higher: +0.200 (+0.100 to +0.300), "
        "and macro_f1 is lower: -0.100 (-0.200 to -0.050)."
    )
    same = {"auroc": BETTER, "accuracy": gain_of(0.1, 0.05, 0.2)}
    assert others_sentence(same, "auroc") == "Also, accuracy is higher: +0.100 (+0.050 to +0.200)."
    assert others_sentence({"auroc": BETTER, "accuracy": EVEN}, "auroc") == ""
    undefined = {"value": None, "interval": None}
    assert others_sentence({"auroc": BETTER, "accuracy": undefined}, "auroc") == ""
    # Of the same tasks as the goal only.
    several = {"side/auroc": BETTER, "side/accuracy": WORSE, "accuracy": WORSE, "kind/accuracy": WORSE}
    assert others_sentence(several, "side/auroc") == "But side/accuracy is lower: -0.050 (-0.090 to -0.010)."
    # Of the clean part, if the headline is.
    tests = {"difference": gains, "difference, clean part": {"auroc": EVEN, "specificity": EVEN}}
    assert "specificity" not in summary_of(tests).explanation


def test_the_first_sentence_says_that_the_winner_does_not_beat_the_probe() -> None:
    score = {"value": 0.796, "interval": [0.7, 0.9]}
    tests = {"winner": {"auroc": score}, "linear probe": {"auroc": score | {"value": 0.812}}}
    tests |= {"winner minus probe": {"auroc": gain_of(-0.016, -0.05, 0.018)}, "difference": {"auroc": BETTER}}
    first = (
        "The tuned winner does not beat a linear probe on the base's frozen vision features: auroc 0.796 against "
        "0.812; winner minus probe, auroc -0.016 (95 % interval -0.050 to +0.018, paired)."
    )
    assert summary_of(tests).explanation.startswith(f"{first} On the test images the winner is better than")
    assert summary_of(tests | {"difference": {}}, winner=0).explanation.startswith(first)
    tests["winner minus probe"] = {"auroc": gain_of(0.016, 0.01, 0.018)}
    assert summary_of(tests).explanation.startswith("On the test images the winner is better than")
    tests["winner minus probe, clean part"] = {"auroc": gain_of(-0.1, -0.2, -0.05, num=94)}
    text = summary_of(tests).explanation
    assert text.startswith("On the 94 test images without a copy in training the tuned winner is worse than a linear")
    assert "all 126 test images, copies included: 0.796 against 0.812, +0.016, +0.010 to +0.018)." in text
    seeds = probe_sentence(gain_of(-0.1, -0.2, -0.05, (3, 1)), score, score, "auroc")
    assert "winner minus probe, mean of 3 seeds, auroc -0.100" in seeds
    assert probe_sentence(gain_of(-0.1, -0.2, -0.05), score, score, "loss") == ""


def test_the_table_of_baselines_has_scores_of_the_goals_tasks() -> None:
    names = ("loss", "auroc", "kind/auroc", "kind/accuracy", "other/accuracy", "kind/loss")
    tests = {"winner": dict.fromkeys(names, BETTER)}
    assert summary_of(tests).compared_metrics == ["auroc"]
    assert summary_of(tests, goals=[["kind/auroc", "max"]]).compared_metrics == ["kind/auroc", "kind/accuracy"]
    assert summary_of(tests, goals=[["loss", "min"]]).compared_metrics == ["loss", "auroc"]


def test_tables_have_baselines_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from test_results import AUROC, record

    from tune.results.console import print_summary

    score = {"auroc": {"value": 0.8, "interval": [0.7, 0.9]}, "macro_f1": {"value": 0.4, "interval": [0.3, 0.5]}}
    outcome = Outcome("s", tmp_path, AUROC, [record(0, auroc=0.7, loss=1), record(1, auroc=0.9, loss=1)])
    outcome.winner = outcome.records[1]
    whose = ("winner", "guide", "untuned base", "majority answer", "linear probe")
    outcome.tests = dict.fromkeys(whose, score) | {
        "difference": {"auroc": BETTER},
        "winner minus probe": {"auroc": EVEN},
        "winner, clean part": score,
        "guide, clean part": score,
    }
    print_summary(outcome)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "│" in line]
    for who in ("untuned base", "majority answer", "linear probe"):
        (row,) = [row for row in rows if row.startswith(f"│ {who}")]
        assert row.count("0.800 (0.700 to 0.900)") == 1 and "0.400 (0.300 to 0.500)" in row
    (row,) = [row for row in rows if row.startswith("│ winner minus probe, paired")]
    assert "0.009 (-0.042 to 0.064)" in row and "-" in row
    assert "Test scores (95 % interval)" in out and "Test scores, clean part (95 % interval)" in out
    assert "does not beat a linear probe" in out
    assert out.index("does not beat a linear probe") < out.index("The test images were scored")
