"""Tasks: which questions are alike, which answers belong to them, and what each kind is scored by."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from train_fn.data.samples import Sample, Splits, Task
from train_fn.data.splits_file import load_splits, save_splits
from train_fn.data.splitting import SplitRules, make_splits
from train_fn.data.tasks import TaskRules, find_tasks
from train_fn.scoring.fitting import Decided
from train_fn.scoring.metrics import METRICS
from train_fn.scoring.own_metric import read_own_metric
from train_fn.scoring.scores import PartScorer, metrics_of
from train_fn.scoring.text_metrics import bleu_statistics, corpus_bleu, rouge_l, token_f1
from tune.records.goals import metric_of


def asked(question: str, *answers: str, question_type: str = "", first: int = 0, **more: Any) -> list[Sample]:
    """A sample for each answer to a question, each about an image of its own."""
    return [
        Sample((f"{question} {first + n}.png",), question, answer, answer, question_type=question_type, **more)
        for n, answer in enumerate(answers)
    ]


def tasks_of(samples: list[Sample], **rules: Any) -> dict[str, Task]:
    """Tasks by name. The samples may have no problems."""
    found = find_tasks(samples, TaskRules(**rules))
    assert found.problems == []
    return {task.name: task for task in found.tasks}


MODALITY = asked("What is the modality?", *["ct", "mri", "x-ray"] * 6)
PLANE = asked("What is the plane?", *["axial", "coronal"] * 9)
YES_NO = asked("Is it a mass?", *["yes", "no"] * 6) + asked("Is it the liver?", *["no", "no", "yes"] * 4)
OPEN = [s for n in range(20) for s in asked(f"What is seen {n}?", f"one small finding number {n}")]


# ------------------------------------------------------------------------------------------------ like questions


def test_answers_are_never_pooled_over_unlike_questions() -> None:
    tasks = tasks_of([*MODALITY, *PLANE, *YES_NO, *OPEN])
    assert {name: (task.kind, task.candidates) for name, task in tasks.items()} == {
        "what_is_the_modality": ("closed", ("ct", "mri", "x-ray")),
        "what_is_the_plane": ("binary", ("axial", "coronal")),
        "no_or_yes": ("binary", ("no", "yes")),
        "open": ("open", ()),
    }
    assert tasks["no_or_yes"].positive == "yes" and tasks["what_is_the_plane"].positive == ""


def test_one_question_is_one_task_without_a_name() -> None:
    assert tasks_of(MODALITY) == {"": Task("", "closed", ("ct", "mri", "x-ray"))}
    assert tasks_of(asked("?", *map(str, range(30)))) == {"": Task()}


def test_rare_questions_join_what_holds_their_answers() -> None:
    asked_once = asked("Modality, please?", "ct") + asked("Is there a fracture?", "no")
    found = find_tasks([*MODALITY, *YES_NO, *asked_once], TaskRules())
    assert [found.samples[-2].task, found.samples[-1].task] == ["ct_or_mri_or_x_ray", "no_or_yes"]


def test_rare_ways_to_ask_one_question_are_one_task() -> None:
    rng = random.Random(0)
    samples = [s for n in range(20) for s in asked(f"Diagnosis, way {n}?", *rng.choices(["benign", "malignant"], k=3))]
    (task,) = tasks_of(samples).values()
    assert task == Task("", "binary", ("benign", "malignant"), "malignant")


def test_a_question_of_its_own_set_keeps_it() -> None:
    tasks = tasks_of(asked("Side?", *["left", "right"] * 5) + asked("Lungs?", *["left", "right", "both"] * 5))
    assert sorted(task.candidates for task in tasks.values()) == [("both", "left", "right"), ("left", "right")]


def test_types_of_the_data_say_which_questions_are_alike() -> None:
    samples = (
        asked("CT or MRI?", *["ct", "mri"] * 5, question_type="MODALITY")
        + asked("Which machine?", *["x-ray", "ct"] * 5, question_type="MODALITY")
        + asked("Is it a CT?", *["yes", "no"] * 5, question_type="MODALITY")
        + [s for n in range(8) for s in asked(f"What organ {n}?", f"organ {n}", question_type="ORGAN")]
    )
    tasks = tasks_of(samples)
    assert {name: task.candidates for name, task in tasks.items()} == {
        "modality_no_or_yes": ("no", "yes"),
        "modality_ct_or_mri_or_x_ray": ("ct", "mri", "x-ray"),
        "organ": (),
    }


def test_ten_thousand_different_questions_take_seconds() -> None:
    samples = [s for n in range(10_000) for s in asked(f"Question {n}?", f"answer {n % 997}", f"answer {n % 991}")]
    assert len(tasks_of(samples)) == 1


def test_types_that_differ_in_case_are_one() -> None:
    samples = asked("?", *["a", "b"] * 5, question_type="Organ") + asked("?", *["a", "b"] * 5, question_type="organ ")
    assert len(tasks_of(samples)) == 1


def test_questions_that_may_ask_the_same_are_named() -> None:
    samples = [s for n in range(30) for s in asked(f"Diagnosis of image {n}?", ["benign", "malignant"][n % 2])]
    (note,) = find_tasks(samples, TaskRules()).notes
    assert note.startswith("30 questions that are asked too rarely have only 2 different answers") and "type" in note


def test_a_single_answer_is_no_task() -> None:
    (problem,) = find_tasks(asked("?", *["normal"] * 9), TaskRules()).problems
    assert "two different answers at least, but each of 9 is 'normal'" in problem


@pytest.mark.parametrize("rules", [{"ordinal": ("ct", "mri")}, {"multilabel": "|"}, {"numeric": True}])
def test_a_rule_that_no_answer_follows_is_refused(rules: dict[str, Any]) -> None:
    (problem,) = find_tasks(MODALITY, TaskRules(**rules)).problems
    assert f"`--{next(iter(rules))}` must" in problem


# ------------------------------------------------------------------------------------------------ kinds


def test_more_answers_than_the_limit_are_open_and_that_is_said() -> None:
    samples = asked("Which of 25?", *[f"class {n}" for n in range(25)] * 4)
    found = find_tasks(samples, TaskRules())
    assert [task.kind for task in found.tasks] == ["open"]
    assert "25 different answers" in found.notes[0] and "--max-answers 25" in found.notes[0]
    assert len(tasks_of(samples, max_answers=25)[""].candidates) == 25


def test_grades_keep_their_order_and_those_that_nobody_has() -> None:
    grades = ("1", "2", "3", "4", "10")
    task = tasks_of(asked("Grade?", *["10", "2", "3"] * 5), ordinal=grades)[""]
    assert (task.kind, task.candidates) == ("ordinal", grades)


def test_sets_of_labels_in_any_order_are_equal() -> None:
    found = find_tasks(asked("Findings?", *["b; a", "a;b", "none", "c"] * 4), TaskRules(multilabel=";"))
    (task,) = found.tasks
    assert (task.kind, task.candidates) == ("multilabel", ("a; b", "c", "none"))
    assert {s.answer for s in found.samples} == {"a; b", "c", "none"}


def test_reports_beside_sets_of_labels_stay_open() -> None:
    labels = [s for n in range(9) for s in asked("Findings?", f"label {n}; label {n + 1}", f"label {n}")]
    tasks = tasks_of([*labels, *OPEN], multilabel=";")
    assert {task.kind: task.candidates for task in tasks.values()} == {"multilabel": (), "open": ()}


def test_numbers_are_measured_values_when_the_user_says_so() -> None:
    samples = asked("Diameter?", *["12", "3.5", "-1e2"] * 5)
    assert tasks_of(samples)[""].kind == "closed"
    assert tasks_of(samples, numeric=True)[""].kind == "numeric"


def test_variants_are_merged_on_request() -> None:
    samples = asked("?", *["Benign", "Benign", "benign", "Benign ", "Normal"] * 4)
    (problem,) = find_tasks(samples, TaskRules()).problems
    assert "'Benign' (8x)" in problem and "'Benign ' (4x)" in problem and "--merge-variants" in problem
    found = find_tasks(samples, TaskRules(merge_variants=True))
    assert found.problems == [] and found.tasks[0].candidates == ("Benign", "Normal")
    assert found.notes == ["Answers merged: 'benign' (4x), 'Benign ' (4x) -> 'Benign' (8x)"]


# ------------------------------------------------------------------------------------------------ no image, no skill


def splits_of(samples: list[Sample], **rules: Any) -> Splits:
    """Splits with all samples in each part."""
    found = find_tasks(samples, TaskRules(**rules))
    assert not found.problems
    part = tuple(found.samples)
    return Splits(part, part, part, found.tasks)


def predictions(splits: Splits, scores: Any, text: Any = lambda sample: sample.answer) -> dict[str, np.ndarray]:
    """Predictions of the test part. scores: a function of sample and candidates."""
    widest = max(len(task.candidates) for task in splits.tasks)
    table = np.full((len(splits.test), widest), np.nan)
    texts = np.empty(len(splits.test), dtype=object)
    for row, sample in enumerate(splits.test):
        if candidates := splits.task_of(sample).candidates:
            table[row, : len(candidates)] = scores(sample, candidates)
        else:
            texts[row] = text(sample)
    return {"losses": np.ones(len(splits.test)), "scores": table, "texts": texts}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_model_that_sees_no_image_has_an_auroc_of_one_half(seed: int) -> None:
    """It knows the words of each question and how often each answer to it is right, and nothing else."""
    rng = random.Random(seed)
    samples = [*MODALITY, *PLANE]
    for n in range(6):  # yes/no questions with very different shares of yes
        share = rng.random()
        samples += asked(f"Is it {n}?", "yes", "no", *["yes" if rng.random() < share else "no" for _ in range(20)])
    splits = splits_of(samples)
    counts: dict[tuple[str, str], int] = {}
    for sample in splits.train:
        counts[sample.question, sample.answer] = counts.get((sample.question, sample.answer), 0) + 1

    def prior(sample: Sample, candidates: tuple[str, ...]) -> list[float]:
        return [np.log(counts.get((sample.question, answer), 0.01)) for answer in candidates]

    metrics = metrics_of(predictions(splits, prior), splits.test, splits)
    assert {value for name, value in metrics.items() if name.endswith("auroc")} == {0.5}
    assert metrics["what_is_the_modality/balanced_accuracy"] == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ metrics by task


def test_metrics_by_task_are_those_of_scikit_learn_and_of_the_text_metrics() -> None:
    rng = np.random.default_rng(0)
    grades = asked("Grade?", *["1", "2", "3", "4"] * 6)
    splits = splits_of([*MODALITY, *PLANE, *grades, *OPEN], ordinal=("1", "2", "3", "4"))
    written = {s.answer: f"one small finding number {n % 7}" for n, s in enumerate(OPEN)}
    predicted = predictions(
        splits, lambda sample, candidates: rng.normal(size=len(candidates)), lambda sample: written[sample.answer]
    )
    metrics = metrics_of(predicted, splits.test, splits)
    sizes, values = [], []
    for name in ("what_is_the_modality", "what_is_the_plane", "grade"):
        task = splits.by_name[name]
        rows = [i for i, s in enumerate(splits.test) if s.task == name]
        labels = np.array([splits.test[i].label for i in rows])
        scores = np.exp(predicted["scores"][rows, : len(task.candidates)])
        p = scores / scores.sum(1, keepdims=True)
        best = p.argmax(1)
        assert metrics[f"{name}/accuracy"] == pytest.approx(accuracy_score(labels, best))
        assert metrics[f"{name}/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, best))
        assert metrics[f"{name}/macro_f1"] == pytest.approx(f1_score(labels, best, average="macro"))
        one_against_rest = [roc_auc_score(labels == c, p[:, c]) for c in range(len(task.candidates))]
        assert metrics[f"{name}/auroc"] == pytest.approx(np.mean(one_against_rest))
        sizes.append(len(rows))
        values.append(metrics[f"{name}/auroc"])
        if task.kind == "ordinal":
            assert metrics["ordinal/quadratic_kappa"] == pytest.approx(
                cohen_kappa_score(labels, best, weights="quadratic", labels=range(4))
            )
    assert metrics["auroc"] == pytest.approx(np.average(values, weights=sizes))
    assert metrics["macro/auroc"] == pytest.approx(np.mean(values)) != metrics["auroc"]
    pairs = [(written[s.answer], s.answer) for s in splits.test if s.task == "open"]
    assert metrics["open/token_f1"] == pytest.approx(np.mean([token_f1(*pair) for pair in pairs]))
    assert metrics["open/rouge_l"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    statistics = np.array([bleu_statistics(*pair) for pair in pairs])
    assert metrics["open/bleu"] == pytest.approx(corpus_bleu(statistics, np.ones((1, len(pairs))))[0])
    assert metrics["open/exact_match"] == pytest.approx(np.mean([a == b for a, b in pairs]))


def mixed_splits(rng: np.random.Generator) -> Splits:
    """Data with a task of each kind, with decisions."""
    grades, sizes = asked("Grade?", *["low", "middle", "high"] * 5), asked("Diameter?", *["10", "20", "30.5"] * 4)
    sets = asked("Findings?", *["mass; cyst", "mass", "cyst; rib"] * 4)
    rules = {"ordinal": ("low", "middle", "high"), "multilabel": ";", "numeric": True}
    splits = splits_of([*MODALITY, *YES_NO, *OPEN, *grades, *sets, *sizes], **rules)
    assert {task.kind for task in splits.tasks} == {"closed", "binary", "open", "ordinal", "multilabel", "numeric"}
    return replace(splits, decide="macro_f1", prevalence=float(rng.choice([0.0, 0.2])))


def some(decided: Decided, places: np.ndarray) -> Decided:
    return Decided(decided.probabilities[places], decided.answers[places])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_metrics_under_integer_weights_are_those_of_the_repeated_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    splits = mixed_splits(rng)
    words = ["10", "30", "no number", None, "one small finding", "one small finding number 3 in the left lung"]
    predicted = predictions(splits, lambda sample, candidates: rng.integers(0, 4, len(candidates)),
                            lambda sample: words[rng.integers(len(words))])  # fmt: skip
    predicted["losses"] = rng.integers(0, 9, len(splits.test)) / 4
    own = {task.name: np.flatnonzero([s.task == task.name for s in splits.test]) for task in splits.tasks}
    decided = {}
    for task in splits.tasks:
        if task.kind in ("closed", "binary", "ordinal"):
            classes, size = len(task.candidates), len(own[task.name])
            decided[task.name] = Decided(rng.dirichlet(np.ones(classes), size), rng.integers(0, classes, size))
    weights = rng.integers(0, 3, (3, len(splits.test)))
    found = PartScorer(predicted, splits.test, splits, decided)(weights)
    assert "accuracy_raw" in found and "ordinal/quadratic_kappa_raw" in found and "auroc_raw" not in found
    for row, counts in enumerate(weights):
        chosen = np.repeat(np.arange(len(counts)), counts)
        repeated = {
            name: some(its, np.repeat(np.arange(len(own[name])), counts[own[name]])) for name, its in decided.items()
        }
        part = {key: values[chosen] for key, values in predicted.items()}
        alone = metrics_of(part, [splits.test[i] for i in chosen], splits, repeated)
        for name, value in found.items():
            if metric_of(name).removesuffix("_raw") != "ece":  # its bins are those of all samples
                assert value[row] == pytest.approx(alone.get(name, np.nan), nan_ok=True, abs=1e-9), name


def test_a_decision_changes_answers_and_probabilities_and_no_auroc() -> None:
    splits = replace(splits_of(YES_NO), decide="accuracy")
    labels = np.array([sample.label for sample in splits.test])
    predicted = predictions(splits, lambda sample, candidates: [1.0, 0.0] if sample.label else [2.0, 0.0])
    right = {task.name: Decided(np.eye(2)[labels], labels) for task in splits.tasks}
    found, raw = metrics_of(predicted, splits.test, splits, right), metrics_of(predicted, splits.test, splits)
    assert found["accuracy"] == found["macro_f1"] == found["ppv"] == 1 and found["brier"] == found["log_loss"] == 0
    assert found["auroc"] == raw["auroc"] == 1  # the scores rank right, although the most probable answer is always 0
    assert found["accuracy_raw"] == raw["accuracy"] == pytest.approx((labels == 0).mean())
    assert {f"{name}_raw" for name in raw if f"{name}_raw" in METRICS} == {n for n in found if n.endswith("_raw")}
    plain = metrics_of(predicted, splits.test, replace(splits, decide="argmax"), right)
    assert not any(name.endswith("_raw") for name in plain) and plain.keys() == raw.keys()


def test_an_answer_that_is_no_number_counts_with_the_range_of_the_training_values() -> None:
    splits = splits_of(asked("Diameter?", *["10", "20", "30", "50"] * 3), numeric=True)
    metrics = metrics_of(predictions(splits, None, lambda s: "none" if s.answer == "50" else s.answer), splits.test,
                         splits)  # fmt: skip
    assert metrics["mae"] == pytest.approx(40 / 4) and metrics["parsed"] == 0.75
    assert metrics["rmse"] == pytest.approx((40**2 / 4) ** 0.5) and metrics["pearson_r"] == pytest.approx(1)


def test_a_score_that_nobody_can_give_is_absent() -> None:
    splits = splits_of(OPEN)
    predicted = predictions(splits, None, lambda sample: None)
    assert metrics_of(predicted, splits.test, splits) == {"loss": 1.0}


def test_a_metric_of_ones_own_is_the_mean_over_the_samples(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def first(answer, truth): return answer[0] == truth[0]\n")
    splits = replace(splits_of([*PLANE, *OPEN]), own_metric=read_own_metric(f"{tmp_path}/my.py:first"))
    predicted = predictions(splits, lambda sample, candidates: [1.0, 0.0], lambda sample: "the finding")
    metrics = metrics_of(predicted, splits.test, splits)
    assert metrics["what_is_the_plane/first"] == 0.5 and metrics["open/first"] == 0.0
    assert metrics["first"] == pytest.approx(9 / 38)


# ------------------------------------------------------------------------------------------------ parts


def test_patients_and_images_of_one_sample_stay_in_one_part() -> None:
    rng = random.Random(0)
    samples = [
        Sample((f"{n}.png", f"{n + 1}.png") if n % 2 else (f"{n}.png",), "?", answer, answer, group=f"patient {n % 23}")
        for n, answer in enumerate(rng.choices(["benign", "malignant"], k=150))
    ]
    rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0, copies_distance=-1)
    splits, report, problems = make_splits(samples[::3], None, None, rules)
    assert not problems and report.leaked == {"validation": 0, "test": 0} and report.num_groups == 23
    for things in (lambda s: {s.group}, lambda s: set(s.images)):
        parts = [set().union(*map(things, part)) for part in (splits.train, splits.validation, splits.test)]
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_a_patient_in_two_given_parts_is_a_leak() -> None:
    data = [Sample((f"{n}.png",), "?", "ab"[n % 2], n % 2, group=f"p{n}") for n in range(12)]
    test = [replace(sample, images=(f"t{n}.png",)) for n, sample in enumerate(data[:4])]
    rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0, copies_distance=-1)
    _, report, _ = make_splits(data, None, test, rules)
    assert report.leaked["test"] == 4 and report.test_clean == ()
    assert any("4 test images have an image, a near-copy or a group in another part" in s for s in report.sentences())


def test_a_part_that_misses_its_share_is_reported() -> None:
    samples = [Sample((f"{n}.png",), "?", "ab"[n % 2], n % 2, group="one" if n < 70 else str(n)) for n in range(100)]
    rules = SplitRules(val_fraction=0.4, test_fraction=0.4, seed=0, copies_distance=-1)
    _, report, _ = make_splits(samples, None, None, rules)
    assert any("instead of 40" in line and "--split-seed" in line for line in report.sentences())


def test_parts_of_many_small_classes_are_not_put_down_to_groups() -> None:
    samples = asked("Which of 25?", *[f"class {n}" for n in range(25)] * 4)
    rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0, copies_distance=-1)
    splits, report, problems = make_splits(samples, None, None, rules, TaskRules(max_answers=25))
    assert problems == [] and [len(splits.train), len(splits.validation), len(splits.test)] == [50, 25, 25]
    assert not any("instead of" in sentence for sentence in report.sentences()) and report.shown == ()


def test_splits_read_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def first(answer, truth): return 1.0\n")
    whole = Sample(
        ("a.png", "b.png"), "Compare <image> with <image>.", "same", "same", system="You are a radiologist.",
        turns=(("Is it a CT?", "yes"),), id="7", question_type="compare", group="p", split="train", source="m.json 3",
    )  # fmt: skip
    splits = splits_of([*MODALITY, *YES_NO, whole])
    splits = replace(splits, max_new_tokens=9, own_metric=read_own_metric(f"{tmp_path}/my.py:first"))
    save_splits(splits, tmp_path / "splits.json")
    assert load_splits(tmp_path / "splits.json") == splits
