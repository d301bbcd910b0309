"""Metrics of each kind of task: against scikit-learn, sacrebleu, rouge-score and values computed by hand."""

from __future__ import annotations

import math
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from train_fn.scoring.metrics import (
    METRICS,
    MODES,
    NAMED,
    RAW,
    TASKS,
    binary_auroc,
    decision_metrics,
    label_probabilities,
    macro_auroc,
    membership,
    multilabel_metrics,
    numeric_metrics,
    operating_points,
    ordinal_metrics,
    probability_metrics,
    set_metrics,
)
from train_fn.scoring.own_metric import read_own_metric, scorer
from train_fn.scoring.text_metrics import (
    MAX_ROUGE_WORDS,
    bleu_statistics,
    corpus_bleu,
    exact_match,
    rouge_l,
    token_f1,
    words,
)
from train_fn.support.numbers import parse_number

quick = settings(deadline=None, max_examples=60)  # no deadline: the first example loads the libraries
seeds = st.integers(0, 2**32 - 1)
values = st.integers(-(10**8), 10**8).map(lambda number: number / 128)
texts = st.text(max_size=30) | st.lists(st.sampled_from(["mass", "the", "a", "3.5", "-", "肺", "no", "+"])).map(
    " ".join
)


def in_range(found: dict[str, float]) -> bool:
    """Whether each metric is within its range in METRICS, or NaN."""
    return all(math.isnan(v) or METRICS[name].low <= v <= METRICS[name].high for name, v in found.items())


def plain(found: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of one row of weights, as numbers."""
    return {name: float(value[0]) for name, value in found.items()}


def ones(size: int) -> np.ndarray:
    """Weights that count each sample once [1, size]."""
    return np.ones((1, size))


def predictions(seed: int, num_classes: int = 3, size: int = 60) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Random probabilities [N, C] in 64ths, so that there are ties and sums are exact; and labels [N]."""
    rng = np.random.default_rng(seed)
    probabilities = np.array([rng.multinomial(64, rng.dirichlet(np.ones(num_classes))) for _ in range(size)]) / 64
    return probabilities, rng.integers(0, num_classes, size), rng


# ------------------------------------------------------------------------------------------------ the table


def test_every_metric_has_a_direction_tasks_and_a_description() -> None:
    assert len(NAMED) == 26 and len(METRICS) == 26 + len(RAW) == 38 and list(MODES) == list(METRICS)
    for metric in METRICS.values():
        assert metric.mode in ("max", "min") and metric.description and metric.low < metric.high
        assert metric.tasks and set(metric.tasks) <= set(TASKS)
    less_is_better = [name for name in NAMED if MODES[name] == "min"]
    assert less_is_better == ["loss", "log_loss", "brier", "ece", "grade_mae", "mae", "rmse"]
    assert all(MODES[f"{name}_raw"] == MODES[name] for name in RAW) and METRICS["brier_raw"].high == 2


def test_functions_return_the_metrics_of_their_task() -> None:
    probabilities, labels, _ = predictions(0)
    members, weights = membership([(), ("a",), ("a", "b")], ["a", "b"]), ones(60)
    returned = {
        "binary": decision_metrics(labels, labels, weights, 3, positive=1)
        | probability_metrics(probabilities, labels, weights)
        | operating_points(labels == 1, probabilities[:, 1], weights),
        "ordinal": ordinal_metrics(labels, labels, weights, 3),
        "multilabel": multilabel_metrics(probabilities, members, members[labels], weights),
        "numeric": numeric_metrics(probabilities[:, 0], probabilities[:, 1], weights),
    }
    for task, found in returned.items():
        assert all(task in METRICS[name].tasks for name in found)
    shared = {"loss", "auroc"} | set(returned["binary"])
    for task in ("ordinal", "multilabel", "numeric"):
        assert {n for n in NAMED if task in METRICS[n].tasks} - shared == set(returned[task])


# ------------------------------------------------------------------------------------------------ area under the curve


def auroc_of_one_question(positive: np.ndarray, scores: np.ndarray) -> float:
    """`binary_auroc` before it knew questions: from the mean ranks of equal scores."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


@quick
@given(seeds, st.integers(1, 200), st.integers(1, 40))
def test_auroc_of_one_question_is_bit_identical(seed: int, size: int, num_values: int) -> None:
    rng = np.random.default_rng(seed)
    positive, scores = rng.random(size) < 0.3, rng.random(num_values)[rng.integers(0, num_values, size)]
    expected = auroc_of_one_question(positive, scores)
    for questions in (None, np.zeros(size, int), np.full(size, 7)):
        assert np.array_equal(binary_auroc(positive, scores, ones(size), questions), [expected], equal_nan=True)


@quick
@given(seeds, st.integers(1, 80), st.integers(1, 10))
def test_auroc_within_questions_counts_the_pairs_of_each(seed: int, size: int, num_questions: int) -> None:
    rng = np.random.default_rng(seed)
    positive, scores, questions = rng.random(size) < 0.5, rng.integers(0, 5, size), rng.integers(0, num_questions, size)
    wins = [
        (float(scores[i] > scores[j]) + float(scores[i] == scores[j]) / 2)
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive & (questions == questions[i]))
    ]
    found = float(binary_auroc(positive, scores, ones(size), questions)[0])
    assert found == pytest.approx(sum(wins) / len(wins)) if wins else math.isnan(found)
    order = rng.permutation(size)
    again = binary_auroc(positive[order], scores[order], ones(size), questions[order])
    assert np.array_equal(again, [found], equal_nan=True)
    if wins:
        assert binary_auroc(~positive, scores, ones(size), questions) == pytest.approx(1 - found)


@quick
@given(seeds, st.integers(2, 6), st.integers(1, 12))
def test_a_predictor_that_sees_no_image_has_exactly_one_half(seed: int, num_classes: int, num_questions: int) -> None:
    rng = np.random.default_rng(seed)
    priors = rng.dirichlet(np.full(num_classes, 0.3), num_questions)
    questions = rng.integers(0, num_questions, 150)
    labels = np.array([rng.choice(num_classes, p=priors[q]) for q in questions])
    weights = np.vstack([np.ones(150), rng.integers(0, 3, (4, 150))])
    found = macro_auroc(labels[:, None] == np.arange(num_classes), priors[questions], weights, questions)
    assert all(value == 0.5 or math.isnan(value) for value in found)
    members = rng.random((num_classes, 3)) < 0.5
    found = multilabel_metrics(priors[questions], members, members[labels], weights, questions)["label_auroc"]
    assert all(value == 0.5 or math.isnan(value) for value in found)


def test_without_questions_the_blind_predictor_seems_to_be_good() -> None:
    priors = np.array([[0.45, 0.45, 0.05, 0.05], [0.05, 0.05, 0.45, 0.45]])  # two questions share a pool of answers
    questions, labels = np.repeat([0, 1], 20), np.tile([0, 1], 20) + np.repeat([0, 2], 20)
    one_of_each = labels[:, None] == np.arange(4)
    assert macro_auroc(one_of_each, priors[questions], ones(40)) > 0.8
    assert macro_auroc(one_of_each, priors[questions], ones(40), questions) == 0.5


def test_auroc_is_undefined_where_no_question_has_both_kinds() -> None:
    positive, scores = np.array([True, True, False, False]), np.arange(4.0)
    assert math.isnan(binary_auroc(positive, scores, ones(4), np.array([0, 0, 1, 1]))[0])
    assert binary_auroc(positive, scores, ones(4), np.array([0, 1, 1, 2])) == 0.0
    assert math.isnan(macro_auroc(np.ones((4, 2), bool), np.ones((4, 2)), ones(4))[0])


# ------------------------------------------------------------------------------------------------ grades


@quick
@given(seeds, st.integers(2, 6), st.integers(2, 40))
def test_grades_equal_to_scikit_learn(seed: int, num_grades: int, size: int) -> None:
    probabilities, labels, rng = predictions(seed, num_grades, size)
    called, grades = probabilities.argmax(1), list(range(num_grades))
    found = plain(ordinal_metrics(called, labels, ones(size), num_grades))
    if len(set(labels) | set(called)) > 1:
        assert found["quadratic_kappa"] == pytest.approx(
            sk.cohen_kappa_score(labels, called, labels=grades, weights="quadratic"), abs=1e-12
        )
    else:
        assert math.isnan(found["quadratic_kappa"])
    assert found["grade_mae"] == pytest.approx(sk.mean_absolute_error(labels, called))
    assert in_range(found)
    order = rng.permutation(size)
    again = plain(ordinal_metrics(called[order], labels[order], ones(size), num_grades))
    assert again == pytest.approx(found, nan_ok=True)


def test_far_grades_cost_more_than_near_ones() -> None:
    labels, near, far = np.arange(5), np.array([1, 1, 2, 3, 3]), np.array([4, 1, 2, 3, 0])
    assert plain(ordinal_metrics(labels, labels, ones(5), 5)) == {"quadratic_kappa": 1.0, "grade_mae": 0.0}
    assert ordinal_metrics(near, labels, ones(5), 5)["grade_mae"] == pytest.approx(0.4)
    assert plain(ordinal_metrics(far, labels, ones(5), 5)) == pytest.approx({"quadratic_kappa": -0.6, "grade_mae": 1.6})


# ------------------------------------------------------------------------------------------------ sets of labels


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 40))
def test_sets_of_labels_equal_to_scikit_learn(seed: int, num_labels: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    members = rng.random((6, num_labels)) < 0.4
    probabilities, _, _ = predictions(seed, 6, size)
    truth = members[rng.integers(0, 6, size)]
    called = members[probabilities.argmax(1)]
    found = plain(multilabel_metrics(probabilities, members, truth, ones(size)))
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(truth, called))
    present = np.flatnonzero(truth.any(0) | called.any(0))
    if len(present):
        scores = [sk.f1_score(truth[:, label], called[:, label], zero_division=0) for label in present]
        assert found["label_f1"] == pytest.approx(np.mean(scores))
    mixed = np.flatnonzero(truth.any(0) & ~truth.all(0))
    if len(mixed):
        scores = [sk.roc_auc_score(truth[:, n], (probabilities * members[:, n]).sum(1)) for n in mixed]
        assert found["label_auroc"] == pytest.approx(np.mean(scores))
    assert math.isnan(found["label_f1"]) == (not len(present)) and math.isnan(found["label_auroc"]) == (not len(mixed))
    assert in_range(found)


def test_sets_of_labels_by_hand() -> None:
    names, sets = ["mass", "cyst", "rib"], [("mass",), ("mass", "cyst"), ()]
    members = membership(sets, names)
    assert members.tolist() == [[True, False, False], [True, True, False], [False, False, False]]
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert label_probabilities(probabilities, members) == pytest.approx(np.array([[0.8, 0.3, 0], [0.3, 0.2, 0]]))
    found = plain(multilabel_metrics(probabilities, members, membership([("mass", "cyst"), ()], names), ones(2)))
    assert found == pytest.approx({"exact_match": 0.5, "label_f1": 0.5, "label_auroc": 1.0})  # F1: mass 1, cyst 0


def test_generated_sets_of_labels_need_no_probabilities() -> None:
    names = ["mass", "cyst", "moon"]
    truth, predicted = membership([("mass",), ("cyst",)], names), membership([("mass", "moon"), ("cyst",)], names)
    assert plain(set_metrics(truth, predicted, ones(2))) == pytest.approx({"exact_match": 0.5, "label_f1": 2 / 3})
    empty = membership([(), ()], names)
    assert plain(set_metrics(empty, empty, ones(2))) == pytest.approx(
        {"exact_match": 1.0, "label_f1": math.nan}, nan_ok=True
    )


# ------------------------------------------------------------------------------------------------ numbers


def numbers(answers: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """`numeric_metrics` of samples that count once."""
    return plain(numeric_metrics(answers, truths, ones(len(answers))))


@quick
@given(st.lists(st.tuples(values, values), min_size=1, max_size=30), seeds)
def test_numeric_metrics_equal_to_scikit_learn_and_numpy(pairs: list[tuple[float, float]], seed: int) -> None:
    answers, truths = np.array(pairs).T
    found = numbers(answers, truths)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truths, answers))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(truths, answers), rel=1e-9)
    assert found["mae"] <= found["rmse"] * (1 + 1e-12) and found["parsed"] == 1 and in_range(found)
    swapped = numbers(truths, answers)
    assert swapped == pytest.approx(found, nan_ok=True)
    if np.std(answers) > 1e-3 and np.std(truths) > 1e-3:
        assert found["pearson_r"] == pytest.approx(np.corrcoef(answers, truths)[0, 1], abs=1e-6)
    order = np.random.default_rng(seed).permutation(len(answers))
    assert numbers(answers[order], truths[order]) == pytest.approx(found, nan_ok=True, abs=1e-9)


def test_answers_that_are_no_numbers_count_in_the_share_alone() -> None:
    found = numbers(np.array([1.0, np.nan, 5.0, 2.0]), np.array([2.0, 3.0, 3.0, np.nan]))
    assert found == pytest.approx({"mae": 1.5, "rmse": math.sqrt(2.5), "pearson_r": 1.0, "parsed": 2 / 3})
    nothing = numbers(np.array([np.nan]), np.array([1.0]))
    assert nothing == pytest.approx(
        {"mae": math.nan, "rmse": math.nan, "pearson_r": math.nan, "parsed": 0}, nan_ok=True
    )
    assert math.isnan(numbers(np.full(3, 0.1), np.arange(3.0))["pearson_r"])
    assert math.isnan(numbers(np.array([]), np.array([]))["parsed"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3), ("-3.5", -3.5), ("−3", -3), ("+4", 4), (".5", 0.5), ("-.5", -0.5), ("(-4)", -4), ("3.", 3),
        ("about 3.5 cm", 3.5), ("5%", 5), ("12mm", 12), ("5 cm²", 5), ("Answer: 7, not 8", 7), ("3, 4", 3),
        ("2-3", 2), ("COVID-19", 19), ("T2 lesion of 8 mm", 8), ("HER2", None), ("G2.5", None),
        ("约3厘米", 3), ("３．５", 3.5), ("٣", 3),
        ("1e-3", 1e-3), ("2E4", 2e4), ("1.5 x 10^9", 1.5e9), ("1.5 × 10⁹/L", 1.5e9), ("10⁻³", 1e-3), ("3 x 10 cm", 3),
        ("1.234", 1.234), ("3,5", 3.5), ("0,125", 0.125), ("1234,567", 1234.567), ("1,234", 1234),
        ("1,234,567.8", 1234567.8), ("1.234.567", 1234567), ("1.234,5", 1234.5), ("1 234", 1),
        ("1.2.3", None), ("12.05.2020", None), ("1,23,456", None), ("1e999", None), ("9" * 400, None),
        ("", None), ("none", None), ("nan", None), ("inf", None), ("two", None),
    ],
)  # fmt: skip
def test_the_first_number_of_a_text(text: str, number: float | None) -> None:
    found = parse_number(text)
    assert math.isnan(found) if number is None else found == pytest.approx(number, rel=1e-15)


@quick
@given(st.floats(allow_nan=False, allow_infinity=False), st.text(" .,()cm%", max_size=3))
def test_any_number_that_python_writes_is_read_again(number: float, after: str) -> None:
    assert parse_number(f"it is {number!r} {after}") == number
    assert parse_number(f"{abs(number) % 1e15:,.2f}") == float(f"{abs(number) % 1e15:.2f}")


@quick
@given(st.text())
def test_any_text_is_a_number_or_not(text: str) -> None:
    found = parse_number(text)
    assert math.isfinite(found) or math.isnan(found)


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The X-ray shows a mass, no fracture.", "xray shows mass no fracture"),
        ("Don’t", "dont"), ("**Benign**", "benign"), ("STRASSE Straße", "strasse strasse"),
        ("ﬁne cafe\u0301", "fine café"), ("mam\u00admogram", "mammogram"), ("", ""), (" \n", ""), ("\u200b", ""),
        ("A", "a"), ("(A).", "a"), ("the", "the"), ("hepatitis A", "hepatitis a"),
        ("3.5 cm", "3.5 cm"), ("BP 120/80.", "bp 120/80"), ("(-3)", "-3"), ("−3", "-3"), ("2–3", "2-3"), (".5", ".5"),
        ("HER2+", "her2 +"), ("HER2-", "her2"), ("+", "+"), ("-", "-"), ("?", "?"), ("<5 mm", "< 5 mm"),
        ("37℃", "37 ° c"), ("👍", "👍"), ("안녕하세요 세계", "안녕하세요 세계"),
        ("CT檢查：正常。", "ct 檢 查 正 常"), ("ラーメン", "ラ ー メ ン"), ("สวัสดี", "ส วั ส ดี"),
        ("हिन्दी भाषा", "हिन्दी भाषा"), ("مرحبا، العالم", "مرحبا العالم"),
    ],
)  # fmt: skip
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()


def squad_words(text: str) -> list[str]:
    """The normalisation of SQuAD's evaluation script."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


@quick
@given(st.text("ab TheN.,;:!?'\"()[]{}/-_*&%#@\\\n"))
def test_words_are_those_of_squad(text: str) -> None:
    assert words(text + " end") == squad_words(text + " end")


@quick
@given(texts)
def test_words_are_stable_and_not_empty(text: str) -> None:
    found = words(text)
    assert words(f" {text.casefold()}\n") == found
    assert all(word.split() == [word] for word in found)
    assert found or not any(c.isalnum() or c in string.punctuation for c in text)


# ------------------------------------------------------------------------------------------------ texts


class OurWords:
    """Our tokenizer, in the form that rouge-score takes."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def test_rouge_l_equal_to_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=OurWords())
    rng, vocabulary = np.random.default_rng(0), ["lung", "肺", "no", "mass", "3.5", "left", "seen"]
    num_cases = 0
    for _ in range(200):
        answer, truth = (" ".join(rng.choice(vocabulary, rng.integers(0, 20))) for _ in range(2))
        if words(answer) or words(truth):
            assert rouge_l(answer, truth) == pytest.approx(scorer.score(truth, answer)["rougeL"].fmeasure)
            num_cases += 1
    assert num_cases > 150


def test_token_f1_by_hand() -> None:
    assert token_f1("a mass in the left lung", "left lung mass") == pytest.approx(2 * 3 / (4 + 3))
    assert token_f1("mass mass", "mass") == pytest.approx(2 / 3)
    assert rouge_l("left lung mass", "mass in left lung") == pytest.approx(2 * 2 / (3 + 4))


@pytest.mark.parametrize("score", [exact_match, token_f1, rouge_l])
def test_empty_texts(score: Any) -> None:
    assert [score(*pair) for pair in (("", ""), ("", "mass"), ("mass", ""), (" ", "\n"))] == [1, 0, 0, 1]


@quick
@given(texts, texts)
def test_scores_of_a_text(answer: str, truth: str) -> None:
    exact, overlap, sequence = exact_match(answer, truth), token_f1(answer, truth), rouge_l(answer, truth)
    assert 0 <= exact <= sequence <= overlap <= 1
    assert (exact == 1) == (sequence == 1)
    assert (exact, overlap, sequence) == (exact_match(truth, answer), token_f1(truth, answer), rouge_l(truth, answer))
    assert exact_match(truth, truth) == token_f1(truth, truth) == rouge_l(truth, truth) == 1
    assert overlap == pytest.approx(sk_f1(words(answer), words(truth)))


def sk_f1(found: list[str], true: list[str]) -> float:
    """F1 from precision and recall, as SQuAD's script computes it."""
    common = sum((Counter(found) & Counter(true)).values())
    if not found or not true:
        return float(found == true)
    precision, recall = common / len(found), common / len(true)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def bleu(statistics: np.ndarray) -> float:
    """`corpus_bleu` of samples that count once."""
    return float(corpus_bleu(statistics, ones(len(statistics)))[0])


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), seeds)
def test_bleu_equal_to_sacrebleu(pairs: list[tuple[str, str]], seed: int) -> None:
    import sacrebleu

    answers, truths = ([" ".join(words(text)) for text in side] for side in zip(*pairs, strict=True))
    statistics = np.array([bleu_statistics(*pair) for pair in pairs])
    assert statistics.shape == (len(pairs), 10)
    found = bleu(statistics)
    if max(len(words(truth)) for _, truth in pairs) < 4:
        assert math.isnan(found)
    else:
        expected = sacrebleu.corpus_bleu(answers, [truths], tokenize="none", force=True).score / 100
        assert found == pytest.approx(expected) and 0 <= found <= 1
        assert bleu(np.random.default_rng(seed).permutation(statistics)) == found


def test_bleu_of_equal_reports_and_of_none() -> None:
    report = "No focal consolidation, effusion or pneumothorax. The heart is normal."
    assert bleu(np.array([bleu_statistics(report, report)] * 3)) == pytest.approx(1)
    assert bleu(np.array([bleu_statistics("", report)])) == 0
    assert math.isnan(bleu(np.array([bleu_statistics("benign", "benign")])))
    assert math.isnan(bleu(np.zeros((0, 10))))


@pytest.mark.parametrize("unit", ["mass ", "肺", "1.1,", "((", "\u200b", "a\u0301\u0301", "1"])
def test_long_texts_take_seconds(unit: str) -> None:
    answer, truth = (unit * 100_000)[:100_000], (unit * 100_000)[3:100_003]
    start = time.perf_counter()
    for score in (exact_match, token_f1, rouge_l, bleu_statistics):
        score(answer, truth)
    parse_number(answer)
    assert time.perf_counter() - start < 10


def test_rouge_l_of_very_long_texts_compares_their_first_words() -> None:
    longest = "mass " * MAX_ROUGE_WORDS
    assert rouge_l(longest + "cyst " * 80_000, longest) == 1.0
    assert rouge_l("cyst " + longest, longest) == pytest.approx((MAX_ROUGE_WORDS - 1) / MAX_ROUGE_WORDS)


def test_a_thousand_resamples_take_seconds() -> None:
    probabilities, labels, rng = predictions(0, 5, 500)
    questions, members = rng.integers(0, 20, 500), rng.random((5, 8)) < 0.4
    statistics = np.array([bleu_statistics("no mass in left lung", "mass in left lung seen")] * 500)
    weights, called = rng.multinomial(500, np.full(500, 1 / 500), 1000).astype(float), probabilities.argmax(1)
    start = time.perf_counter()
    found = decision_metrics(called, labels, weights, 5, 1) | ordinal_metrics(called, labels, weights, 5)
    found |= multilabel_metrics(probabilities, members, members[labels], weights, questions)
    found |= numeric_metrics(probabilities[:, 0], probabilities[:, 1], weights)
    found |= {"bleu": corpus_bleu(statistics, weights)}
    assert time.perf_counter() - start < 5
    assert len(found) == 17 and all(value.shape == (1000,) for value in found.values())


def test_metrics_load_no_heavy_library() -> None:
    code = "import sys, train_fn.scoring.text_metrics as m; m.rouge_l('a b', 'a'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rapidfuzz" in loaded and not {"torch", "sacrebleu", "nltk", "scipy"} & set(loaded)


# ------------------------------------------------------------------------------------------------ a user's own metric


def own(metric: str) -> Callable[[str, str], float]:
    return scorer(read_own_metric(metric))


def test_a_users_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(
        "import numpy as np\n"
        "def score(answer, truth): return np.float32(len(answer) / 2)\n"
        "def same(answer, truth): return answer == truth\n"
    )
    assert own("my.py:score")("abc", "") == 1.5
    assert own(f"{tmp_path}/my.py:same")("abc", "") == 0.0


@pytest.mark.parametrize(
    ("source", "metric", "problem"),
    [
        ("", "my.py", "must be FILE.py:FUNCTION"),
        ("", "my.py:", "must be FILE.py:FUNCTION"),
        ("", "gone.py:score", "must be in an existing Python file of at most 1,000,000 bytes, but got 'gone.py'"),
        ("", "my.py:score", "must define a function 'score'"),
        ("score = 3", "my.py:score", "must define a function 'score'"),
        ("def score(:", "my.py:score", "must be importable, but raised SyntaxError"),
        ("import sys; sys.exit(1)", "my.py:score", "must be importable, but raised SystemExit"),
        ("def score(answer): return 1", "my.py:score", "raised TypeError"),
        ("def score(answer, truth): return 1 / 0", "my.py:score", "raised ZeroDivisionError: division by zero"),
        ("def score(answer, truth): raise KeyError('one\\ntwo')", "my.py:score", "raised KeyError"),
        ("def score(answer, truth): raise OSError('one\\n  two')", "my.py:score", "raised OSError: one two: fix it"),
        ("def score(answer, truth): pass", "my.py:score", "raised TypeError"),
        ("def score(answer, truth): return '0.5'", "my.py:score", "returned '0.5'"),
        ("def score(answer, truth): return float('nan')", "my.py:score", "returned nan"),
    ],
)
def test_errors_of_a_users_own_metric(
    source: str, metric: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(source)
    with pytest.raises(ValueError) as error:
        own(metric)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_users_metric_that_fails_later_names_the_sample(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def score(answer, truth): return 1 / (len(answer) - 2)")
    score = own(f"{tmp_path}/my.py:score")
    assert score("abc", "") == 1
    with pytest.raises(ValueError, match="with answer 'no' and truth 'yes' raised ZeroDivisionError"):
        score("no", "yes")
