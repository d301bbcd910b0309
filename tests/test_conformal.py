"""Sets of answers with a promised coverage."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_predict import run

from train_fn.data.samples import Sample, Task
from train_fn.model.adapters import MAX_POINTS, AdapterTask, BadAdapter, read_task
from train_fn.scoring.answering import Answer
from train_fn.scoring.conformal import (
    SetRule,
    answer_set,
    answer_sets,
    calibration_scores,
    coverage_of,
    coverage_problems,
    thresholds,
)
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import save_adapter
from train_fn.trial.lora import adapted
from train_fn.trial.outputs import save_task


def drawn(rng: np.random.Generator, num_units: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [N, 3], labels and units of samples in units of `size`, whose scores have half of their noise in
    common."""
    labels = np.repeat(rng.choice(3, num_units, p=[0.2, 0.5, 0.3]), size)
    units = np.repeat(np.arange(num_units), size)
    noise = rng.normal(size=(num_units, 3))[units] * 0.9 + rng.normal(size=(len(units), 3)) * 0.45
    scores = 1.3 * np.eye(3)[labels] + (noise if size > 1 else rng.normal(size=(num_units, 3)))
    found = np.exp(scores)
    return found / found.sum(1, keepdims=True), labels, units


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_each_class_is_covered_as_promised(size: int, coverage: float) -> None:
    """100 units, 300 repetitions: as much as promised, and hardly more; also where samples come in units of four."""
    rng = np.random.default_rng(size)
    new, new_labels, new_units = drawn(rng, 4_000 // size, size)
    covered, by_class = [], []
    for _ in range(300):
        conformal = calibration_scores(*drawn(rng, 100, size))
        found = coverage_of(answer_sets(new, conformal, coverage), new_labels, new_units)
        covered.append(found["covered"][0])
        by_class.append(found["covered_by_class"][0])
    assert coverage - 0.01 <= np.mean(covered) <= coverage + 0.03
    assert (np.mean(by_class, 0) >= coverage - 0.01).all() and (np.mean(by_class, 0) <= coverage + 0.06).all()


def test_thresholds_by_hand() -> None:
    """Ten samples of class 0, each of mass 1/11: at 0.8 nine of them (9/11) must be in, at 0.9 all ten (10/11)."""
    values = np.arange(1, 11) / 20
    probabilities = np.stack([values, 1 - values], 1)
    conformal = calibration_scores(probabilities, np.zeros(10, dtype=int), range(10))
    assert [sum(mass for _, mass in scores) for scores in conformal] == pytest.approx([10 / 11, 0])
    assert thresholds(conformal, 0.8).tolist() == [0.10, -np.inf]
    assert thresholds(conformal, 0.9).tolist() == [0.05, -np.inf]
    assert thresholds(conformal, 0.95).tolist() == [-np.inf, -np.inf]
    assert answer_set([0.08, 0.92], conformal, 0.8) == [1] and answer_set([0.6, 0.4], conformal, 0.8) == [0, 1]


def test_samples_of_a_unit_share_its_mass() -> None:
    """Units of 1, 2 and 3 samples: each unit has the mass 1/4."""
    probabilities = np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]])
    (scores,) = calibration_scores(probabilities, np.zeros(6, dtype=int), [5, 7, 7, 2, 2, 2])
    assert scores == tuple(
        (p, pytest.approx(mass))
        for p, mass in zip(np.arange(1, 7) / 10, [1 / 4, *[1 / 8] * 2, *[1 / 12] * 3], strict=True)
    )


def test_a_class_with_five_images_is_always_in_the_set() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 5])
    probabilities = rng.dirichlet([1, 1], 65)
    conformal = calibration_scores(probabilities, labels, range(65))
    assert answer_sets(probabilities, conformal, 0.9)[:, 1].all()
    assert not answer_sets(probabilities, conformal, 0.8)[:, 1].all()  # 5/6 of the mass are enough for it
    several = calibration_scores(np.repeat(probabilities, 4, 0), np.repeat(labels, 4), np.repeat(range(65), 4))
    assert answer_sets(probabilities, several, 0.9)[:, 1].all()  # twenty images of five patients


def test_many_scores_are_joined_without_losing_coverage() -> None:
    rng = np.random.default_rng(0)
    probabilities, labels, units = drawn(rng, 30_000, 1)
    joined = calibration_scores(probabilities, labels, units)
    assert max(map(len, joined)) == MAX_POINTS
    for index, count in Counter(labels.tolist()).items():
        assert sum(mass for _, mass in joined[index]) == pytest.approx(count / (count + 1))
        its = np.sort(probabilities[labels == index, index])
        whole = its[: int(0.1 * (count + 1)) + 1].max()  # the threshold of all scores at 0.9
        limit = thresholds(joined, 0.9)[index]
        assert limit <= whole and (its[its < whole] >= limit).mean() < 0.03


def test_coverage_counts_units_and_weights() -> None:
    sets = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)
    found = coverage_of(sets, np.array([0, 0, 1, 1]), [0, 1, 2, 3])
    assert {name: value.tolist() for name, value in found.items()} == {
        "covered": [0.5], "covered_by_class": [[0.5, 0.5]], "set_size": [1.0], "one_answer": [0.5]
    }  # fmt: skip
    together = coverage_of(sets, np.array([0, 0, 1, 1]), [0, 1, 1, 1])
    assert together["covered"].tolist() == [pytest.approx((1 + 1 / 3) / 2)]
    drawn_twice = coverage_of(sets, np.array([0, 0, 1, 1]), [0, 1, 2, 3], np.array([[2, 0, 1, 1], [0, 0, 4, 0]]))
    assert drawn_twice["covered"].tolist() == [0.75, 1.0]
    assert np.isnan(drawn_twice["covered_by_class"][1, 0]) and drawn_twice["covered_by_class"][1, 1] == 1


# ------------------------------------------------------------------------------------------------ predict --coverage

MANY, FEW = tuple((p / 100, 1 / 51) for p in range(30, 80)), ((0.4, 1 / 3), (0.5, 1 / 3))
TASK = AdapterTask(
    ModelSettings(), "?", (Task("mass", "closed", ("no", "yes")), Task("open")), {}, conformal={"mass": (MANY, FEW)}
)


def test_lines_and_notes_of_sets() -> None:
    sets = SetRule(TASK, 0.9)  # "no" from 0.35 on, "yes" always
    sample = Sample(("a.png",), "?", "yes", 1, task="mass")
    pairs = [(sample, Answer(probabilities=(0.6, 0.4))), (replace(sample, answer=""), Answer(probabilities=(0.2, 0.8)))]
    assert [sets.line(*pair) for pair in pairs] == [
        {"answers": ["no", "yes"], "for_reader": True},
        {"answers": ["yes"], "for_reader": False},
    ]
    open_question = (replace(sample, task="open"), Answer(text="A mass."))
    assert sets.line(*open_question) == sets.line(sample, Answer(error="no")) == {}
    counts, rare = sets.notes([*pairs, open_question])
    assert counts == "coverage 0.9: 1 of 2 sets hold one answer, the others need a reader; 1 of 1 hold the true answer"
    assert rare.startswith("'yes' in every set: a coverage of 0.9 needs 9 validation images")
    silent = SetRule(TASK, None)
    assert silent.line(*pairs[0]) == {} and silent.notes(pairs) == []


def test_coverage_that_cannot_be_given() -> None:
    assert coverage_problems(TASK, 0.9) == coverage_problems(TASK, None) == []
    assert len(coverage_problems(replace(TASK, conformal={}), 1.0)) == 2
    assert "`--coverage` must be above 0 and below 1" in coverage_problems(TASK, float("nan"))[0]


@pytest.fixture(scope="module")
def adapter(base, splits, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("conformal") / "final_model"
    settings = TrialSettings(lora_r=4)
    with adapted(base, settings) as model:
        save_adapter(base, model, settings, directory)
    save_task(base, splits, directory)
    return directory


def with_conformal(adapter: Path, folder: Path, value: object) -> Path:
    shutil.copytree(adapter, folder)
    stored = json.loads((folder / "task.json").read_text())
    stored["tasks"][0]["conformal"] = value
    (folder / "task.json").write_text(json.dumps(stored))
    return folder


def test_predict_gives_sets(adapter, splits, tmp_path) -> None:
    images = [sample.image for sample in splits.test[:6]]
    found = run("--adapter", adapter, "--coverage", 0.9, *images)
    assert found.returncode == 2 and "task.json has none for these answers" in found.stderr
    rows = [json.loads(line)["probabilities"] for line in run("--adapter", adapter, *images).stdout.splitlines()]
    table = np.array([list(row.values()) for row in rows])
    rng = np.random.default_rng(0)
    units, labels = np.arange(90), np.repeat([0, 1, 2], 30)
    conformal = calibration_scores(table[rng.integers(0, 6, 90)], labels, units)
    calibrated = with_conformal(adapter, tmp_path / "calibrated", conformal)
    assert read_task(calibrated).conformal == {"": conformal}
    found = run("--adapter", calibrated, "--coverage", 0.6, *images)
    assert found.returncode == 0 and "coverage 0.6: " in found.stderr
    sets = answer_sets(table, conformal, 0.6)
    assert 0 < sets.mean() < 1
    for line, row, its in zip(map(json.loads, found.stdout.splitlines()), table, sets, strict=True):
        chosen = [splits.candidates[k] for k in np.argsort(-row) if its[k]]
        assert line["answers"] == chosen and line["for_reader"] == (len(chosen) != 1)
    other = run("--adapter", calibrated, "--coverage", 0.6, "--candidates", "cat,dog", images[0])
    assert other.returncode == 2 and "leave out what replaces its answers" in other.stderr


@pytest.mark.parametrize(
    "value",
    [
        "0.9",
        [[]],
        [[], [], 0.5],
        [[], [], [[0.5]]],
        [[], [], [[0.5, True]]],
        [[], [], [[1.5, 0.1]]],
        [[], [], [[0.5, float("nan")]]],
        [[], [], [[0.5, 0.6], [0.5, 0.6]]],
        [[], [], [[0.5, 0.0001]] * (MAX_POINTS + 1)],
    ],
)
def test_calibration_scores_of_a_stranger_are_checked(adapter, tmp_path, value) -> None:
    with pytest.raises(BadAdapter, match=r"tasks\[0\]\.conformal` must hold at most 500 pairs"):
        read_task(with_conformal(adapter, tmp_path / "changed", value))
