"""The operating point in the report: right rates, predictive values and net benefit, and what is said about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from test_report import Page, make_study

from train_fn.data.samples import Sample, Splits, Task
from train_fn.data.splits_file import save_splits
from tune.results.answer_pictures import NO_POSITIVE, confusions, decision_curve, precision_recall, reliability, roc
from tune.results.operating import (
    net_benefit,
    operating_points,
    positive_tasks,
    precision,
    proportion,
    rates,
)
from tune.results.report import mistakes, score_tables, write_report
from tune.results.view import View

BENIGN_OR_NOT = Task(kind="binary", candidates=("benign", "malignant"), positive="malignant")


def score(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


def make_tested(
    folder: Path,
    truth: list[int],
    positive: list[float],
    *,
    decided: list[int] | None = None,
    raw: list[float] | None = None,
    task: Task = BENIGN_OR_NOT,
    decide: str = "",
    prevalence: float = 0.0,
    units: list[int] | None = None,
    clean: list[int] | None = None,
    **scores: Any,
) -> tuple[dict[str, Any], Path]:
    """A study whose test has these true answers, and these probabilities of the second answer by the winner.

    scores: of the winner.
    """
    study, directory = make_study(folder, ["COMPLETE"] * 3)
    test = tuple(
        Sample((f"/x/{i}.png",), "?", task.candidates[label], label, task=task.name, unit=units[i] if units else -1)
        for i, label in enumerate(truth)
    )
    save_splits(Splits(test, test, test, (task,), decide=decide, prevalence=prevalence), directory / "splits.json")
    part: dict[str, Any] = {"answers": truth, "probabilities": [[1 - p, p] for p in positive]}
    if decided is not None:
        part |= {"decided": decided, "raw_probabilities": [[1 - p, p] for p in raw or positive]}
    study["predictions"] = {"winner": part}
    study["test"] = {"winner": {"auroc": score(0.8, 0.7, 0.9)} | scores}
    study["data_report"]["test_clean"] = clean or []
    if clean:
        study["test"]["winner, clean part"] = dict(study["test"]["winner"])
    study["settings"]["study"] |= {"decide": decide, "prevalence": prevalence}
    study["positive_label"] = task.positive
    return study, directory


# ------------------------------------------------------------------------------------------------ numbers


def test_rates_and_precision_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    positive, scores = rng.random(200) < 0.3, rng.integers(0, 40, 200) / 40  # with ties
    hits, alarms = rates(positive, scores)
    expected_alarms, expected_hits, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(np.array([alarms, hits]), [expected_alarms[1:], expected_hits[1:]])
    expected_precision, recall, _ = sk.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(precision(hits, alarms, positive.mean())[::-1], expected_precision[:-1])
    np.testing.assert_allclose(hits[::-1], recall[:-1])


def test_precision_at_another_prevalence_is_that_of_a_test_with_that_prevalence() -> None:
    rng = np.random.default_rng(1)
    positive, scores = rng.random(100) < 0.5, rng.random(100)
    repeated = np.repeat(np.arange(100), np.where(positive, 1, 9))  # nine times as many negatives
    there = positive[repeated].mean()
    np.testing.assert_allclose(
        precision(*rates(positive, scores), there),
        precision(*rates(positive[repeated], scores[repeated]), positive[repeated].mean()),
    )


def test_net_benefit_by_hand() -> None:
    positive = np.array([True, True, True, False, False, False, False, False, False, False])
    probabilities = np.array([0.9, 0.6, 0.1, 0.7, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    found = net_benefit(positive, probabilities, np.array([0.05, 0.2, 0.5, 0.95]), 0.3)
    everybody = 3 / 10 - 7 / 10 * 0.05 / 0.95
    # From 0.2 on: two true positives, three false ones (0.7, 0.3, 0.2); from 0.5 on: two and one.
    assert found == pytest.approx([everybody, 2 / 10 - 3 / 10 * 0.25, 2 / 10 - 1 / 10, 0.0])
    rarer = net_benefit(positive, probabilities, np.array([0.5]), 0.1)
    assert rarer == pytest.approx([0.1 * 2 / 3 - 0.9 * 1 / 7])


def test_a_proportion_counts_units_and_has_wilsons_interval() -> None:
    hits = np.array([True] * 35)
    # Wilson's lower end of k = n is n / (n + z^2).
    assert proportion(hits, np.arange(35)) == {"value": 1.0, "interval": pytest.approx([35 / (35 + 1.96**2), 1.0])}
    assert proportion(hits, np.arange(35) // 5)["interval"][0] == pytest.approx(7 / (7 + 1.96**2))
    assert proportion(hits[:0], np.arange(0)) == {"value": None, "interval": None}


# ------------------------------------------------------------------------------------------------ what was answered

TRUTH = [0] * 6 + [1] * 4
POSITIVE = [0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.2, 0.35, 0.6, 0.8]


def test_answers_are_the_decided_ones_and_of_older_studies_the_most_probable(tmp_path: Path) -> None:
    decided = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]  # from 0.3 on
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, decided=decided, raw=[0.5] * 10))
    (tested,) = view.tested
    assert tested.answers["winner"].tolist() == decided and tested.raw["winner"].tolist() == [[0.5, 0.5]] * 10
    (table,) = confusions(view)
    assert table.counts == [[4, 2], [1, 3]]
    named = [(name, truth, answer, round(p, 2)) for name, truth, answer, p in mistakes(view)]
    assert named == [
        ("/x/6.png", "malignant", "benign", 0.8),
        ("/x/5.png", "benign", "malignant", 0.4),
        ("/x/4.png", "benign", "malignant", 0.3),
    ]


def test_a_study_without_a_stored_decision_answers_by_the_most_probable(tmp_path: Path) -> None:
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE))
    (tested,) = view.tested
    assert tested.answers["winner"].tolist() == [0] * 8 + [1, 1] and tested.raw == {}
    (point,) = operating_points(view)
    assert "no rule was fitted" in point.sentences[-1]


def test_reliability_shows_both_errors_where_a_calibration_was_fitted(tmp_path: Path) -> None:
    study, directory = make_tested(tmp_path, [0, 0, 1, 0, 1] * 2, [0.4] * 10, decided=[0] * 10, raw=[0.1] * 10)
    figure = reliability(View(study, directory))
    assert not isinstance(figure, str)
    # Six of ten are benign, as the calibrated 0.6 says; the raw 0.9 is 0.3 too sure.
    assert figure.axes[0].get_title().endswith("ECE 0.000, raw 0.300")
    assert figure.axes[0].get_legend_handles_labels()[1] == ["raw probabilities", "calibrated on validation"]
    del study["predictions"]["winner"]["raw_probabilities"]
    figure = reliability(View(study, directory))
    assert not isinstance(figure, str)
    assert figure.axes[0].get_title().endswith(": ECE 0.000")


# ------------------------------------------------------------------------------------------------ the operating point


def rows_of(view: View) -> dict[str, list[Any]]:
    (point,) = operating_points(view)
    return dict(point.rows)


def test_the_table_takes_the_studys_own_scores_and_counts_what_is_missing(tmp_path: Path) -> None:
    decided = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    sensitivity = score(0.75, 0.3, 0.95)
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, decided=decided, sensitivity=sensitivity))
    rows = rows_of(view)
    assert rows["sensitivity"] == [sensitivity]
    assert rows["specificity"][0]["value"] == pytest.approx(4 / 6)
    assert rows["positive predictive value at the prevalence of the test"][0]["value"] == pytest.approx(3 / 5)
    assert rows["negative predictive value at the prevalence of the test"][0]["value"] == pytest.approx(4 / 5)
    assert len(rows) == 4


def test_predictive_values_at_a_given_prevalence_stand_beside_those_of_the_test(tmp_path: Path) -> None:
    at_ten = {"ppv": score(0.2, 0.1, 0.4), "npv": score(0.96, 0.9, 0.99)}
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, decided=[1] * 10, prevalence=0.1, **at_ten))
    rows = rows_of(view)
    assert rows["positive predictive value at a prevalence of 10 %"] == [at_ten["ppv"]]
    assert rows["negative predictive value at a prevalence of 10 %"] == [at_ten["npv"]]
    assert rows["positive predictive value at the prevalence of the test"][0]["value"] == pytest.approx(0.4)
    (task,) = positive_tasks(view)
    assert task.prevalence == 0.1


def test_the_clean_part_has_a_column_of_its_own(tmp_path: Path) -> None:
    decided = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, decided=decided, clean=[0, 4, 6, 9]))
    (point,) = operating_points(view)
    assert point.columns == ["winner", "winner, clean part"]
    assert [s["value"] for s in dict(point.rows)["specificity"] if s] == pytest.approx([4 / 6, 1 / 2])


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.90, 0.98, "the interval contains 0.95"),
        (0.80, 0.94, "the whole interval lies below 0.95, so what was asked for is not reached"),
        (0.96, 0.99, "the whole interval lies above 0.95"),
    ],
)
def test_an_operating_point_is_compared_with_what_was_asked_for(
    tmp_path: Path, low: float, high: float, text: str
) -> None:
    scores = {"sensitivity": score(0.94, low, high)}
    study, directory = make_tested(tmp_path, TRUTH, POSITIVE, decided=[1] * 10, decide="sensitivity>=0.95", **scores)
    for trial in study["trials"]:
        trial["epochs"][-1]["sensitivity"] = 0.955
    (point,) = operating_points(View(study, directory))
    assert point.sentences[0] == "4 of 10 test samples have the positive answer, malignant (40 %)."
    assert "for a sensitivity of at least 0.95, where trial 2 has 0.955 (out-of-fold)." in point.sentences[1]
    assert point.sentences[1].endswith(f"On the test images it is 0.940 ({low:.3f} to {high:.3f}): {text}.")


# ------------------------------------------------------------------------------------------------ pictures and page


def test_curves_pass_where_they_should(tmp_path: Path) -> None:
    decided = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    scores = {"sensitivity": score(0.75, 0.3, 0.95), "specificity": score(4 / 6, 0.3, 0.9)}
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, decided=decided, **scores))
    figures = [picture(view) for picture in (roc, precision_recall, decision_curve)]
    lines = []
    for figure in figures:
        assert not isinstance(figure, str)
        lines.append([np.array(line.get_xydata()) for line in figure.axes[0].lines])
    for index, mark in ((0, (1 - 4 / 6, 0.75)), (1, (0.75, 3 / 5))):
        winner = lines[index][0]
        assert np.isclose(winner, mark).all(1).any()  # of two answers, the decision is a threshold
        assert np.isclose(lines[index][1], mark).all()
    winner, treat_all, treat_none = lines[2]
    assert np.allclose(winner[0], treat_all[0]) and (treat_none[:, 1] == 0).all()  # at 0.01 everybody is called
    at_half = winner[np.isclose(winner[:, 0], 0.5), 1]
    assert at_half == pytest.approx([2 / 10])  # 0.6 and 0.8


def test_curves_of_thresholds_are_of_the_raw_and_net_benefit_of_the_calibrated_probability(tmp_path: Path) -> None:
    calibrated, raw = [0.3] * 6 + [0.4] * 4, [0.9] * 6 + [0.2] * 4
    view = View(*make_tested(tmp_path, TRUTH, calibrated, decided=[0] * 10, raw=raw))
    for picture, expected in ((roc, [[0, 0], [1, 0], [1, 1]]), (decision_curve, None)):
        figure = picture(view)
        assert not isinstance(figure, str)
        winner = np.array(figure.axes[0].lines[0].get_xydata())
        if expected:
            assert winner.tolist() == expected  # the raw one ranks them all wrong
        else:
            assert winner[:, 1] == pytest.approx([0.4 - 0.6 * t / (1 - t) if t < 0.305 else 0.4 if t < 0.405 else 0
                                                  for t in winner[:, 0]])  # fmt: skip


def test_the_page_explains_the_operating_point(tmp_path: Path) -> None:
    names = {"accuracy": score(0.7, 0.4, 0.9), "accuracy_raw": score(0.8, 0.5, 0.9), "ece": score(0.03, 0.01, 0.1)}
    at_fixed = {"sensitivity_at_specificity_90": score(0.456, 0.2, 0.7)}
    study, directory = make_tested(
        tmp_path,
        TRUTH,
        POSITIVE,
        decided=[0] * 10,
        raw=[0.2] * 10,
        decide="macro_f1",
        prevalence=0.1,
        **names,
        **at_fixed,
    )
    covered = {"value": 0.91, "interval": [0.85, 0.95]}
    entry = {"task": "", "coverage": 0.9, "covered": covered, "mean_size": 1.3, "single": covered}
    study["coverage"] = [entry | {"by_class": {"benign": covered, "malignant": score(0.77, 0.5, 0.9)}}]
    paths = write_report(study, directory)
    page = Page((directory / "report.html").read_text())
    text = " ".join(page.text.split())
    assert "fitted on the validation images for macro_f1" in text
    assert "0.456 (0.200 to 0.700)" in text and "(--prevalence)" in text
    before_and_after = "".join(page.text.split("winner, decided")[1].split("</table>")[0].split())
    assert before_and_after.startswith("accuracy0.800(0.500to0.900)0.700(0.400to0.900)")
    assert "accuracy_raw" not in text
    assert "of benignof malignantone answer only" in text and "0.770" in text
    assert {"roc", "precision_recall", "decision_curve"} <= {path.stem for path in paths}


def test_baselines_and_the_clean_part_have_tables_of_their_own(tmp_path: Path) -> None:
    study, directory = make_tested(tmp_path, TRUTH, POSITIVE, clean=[0, 4, 6, 9], accuracy=score(0.7, 0.5, 0.8))
    study["test"] |= {name: {"auroc": score(0.6, 0.5, 0.7)} for name in ("untuned base", "linear probe")}
    tables = score_tables(View(study, directory))
    assert [(table["columns"], table["names"]) for table in tables] == [
        (["winner, clean part"], ["auroc", "accuracy"]),
        (["winner"], ["auroc", "accuracy"]),
        (["untuned base", "linear probe"], ["auroc"]),
    ]


def test_without_a_positive_answer_the_curves_are_not_drawn(tmp_path: Path) -> None:
    task = dataclasses.replace(BENIGN_OR_NOT, positive="")
    view = View(*make_tested(tmp_path, TRUTH, POSITIVE, task=task))
    assert operating_points(view) == []
    assert {picture(view) for picture in (roc, precision_recall, decision_curve)} == {NO_POSITIVE}
