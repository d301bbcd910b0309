"""The decision, as the report's first page shows it: the rule that gives the answers, its scores, and each answer.

Shapes: n test samples of a task.
"""

from __future__ import annotations

from dataclasses import dataclass

from train_fn.data.decision import ARGMAX, operating_point
from train_fn.scoring.fitting import DECIDED
from train_fn.support.text import plain
from tune.results.comparison import CLEAN, GAIN, MAJORITY, OVER_PROBE, PROBE, UNTUNED, WORDS, Score, direction
from tune.results.operating import aim_of
from tune.results.summary import format_score, is_number
from tune.results.view import ADAPTERS, View

SHOWN = ("winner", "guide", GAIN, PROBE, OVER_PROBE, UNTUNED, MAJORITY)
"""Rows of the table of scores, from top to bottom."""


@dataclass(frozen=True)
class ScoreRow:
    """The test scores of one adapter, baseline or difference."""

    title: str
    scores: list[Score | None]
    """By column."""
    bar: list[float] | None
    """Ends of the first score's interval, then the score itself, in percent of the picture's width; None: a difference,
    or no number."""


@dataclass(frozen=True)
class ScoreTable:
    """The scores that decide, with a small picture of the first column."""

    columns: list[str]
    rows: list[ScoreRow]
    ticks: list[tuple[float, str]]
    """Position in percent, and text."""
    clean: int
    """Number of test samples without a near-copy in training, if some rows are of these alone; 0: none is."""


def rule_metrics(view: View) -> list[str]:
    """The scores that depend on the rule and say whether it is good; empty if no answer is chosen by a rule."""
    if not view.splits or not {task.kind for task in view.splits.tasks} & set(DECIDED):
        return []
    aim = aim_of(view)
    if aim == ARGMAX:
        return ["accuracy", "macro_f1"]
    return ["sensitivity", "specificity"] if operating_point(aim) else [aim]


def deciding_metrics(view: View) -> list[str]:
    """The first goal and the scores of the rule, of the same tasks, that the winner has on the test."""
    prefix = f"{view.metric.rpartition('/')[0]}/".removeprefix("/")
    names = dict.fromkeys([view.metric, *(prefix + name for name in rule_metrics(view))])
    return [name for name in names if name in view.summary.study["test"].get("winner", {})]


def key_of(view: View, who: str) -> str:
    """Whose scores count: those of the test samples without a near-copy in training, if the study has them."""
    return who + CLEAN if who + CLEAN in view.summary.study["test"] else who


def rule_sentence(view: View) -> str:
    """How the winner's answers are chosen, and what this scores on the test; "" without a winner."""
    if not view.summary.winner:
        return ""
    aim, metrics = aim_of(view), rule_metrics(view)
    if not metrics:
        rule = "The winner's answers are taken as the model gives them; no rule is fitted"
    elif aim == ARGMAX:
        rule = "The winner gives its most probable answer; no rule was fitted"
    elif point := operating_point(aim):
        rule = (
            f"A threshold fitted on the validation images gives the answers, for a {point[0]} of at least {point[1]:g}"
        )
    else:
        rule = f"A rule fitted on the validation images for {aim} gives the answers"
    who = key_of(view, "winner")
    scores = view.summary.study["test"].get(who, {})
    names = [name for name in deciding_metrics(view) if name != view.metric] or [view.metric]
    said = [
        f"{name} is {format_score(score)}{compared(view, name) if name != view.metric else ''}"
        for name in names
        if (score := scores.get(name)) and is_number(score["value"])
    ]
    images = "test images without a near-copy in training" if who.endswith(CLEAN) else "test images"
    return f"{rule}. On the {images} its {', and its '.join(said)}." if said else f"{rule}."


def compared(view: View, name: str) -> str:
    """Whether a score of the winner is distinguishable from the guide's and the linear probe's; "" if unknown."""
    test, words = view.summary.study["test"], []
    for who, gain, title in (("guide", GAIN, "the guide's defaults"), (PROBE, OVER_PROBE, "a linear probe")):
        other = test.get(key_of(view, who), {}).get(name)
        difference = test.get(key_of(view, gain), {}).get(name)
        if other and difference and difference["interval"] and is_number(other["value"]):
            same_images = key_of(view, who).endswith(CLEAN) == key_of(view, "winner").endswith(CLEAN)
            value = f" ({other['value']:.3f})" if same_images else ""
            words.append(f"{WORDS[direction(difference, name)]} {title}{value}")
    return f": {', '.join(words)}" if words else ""


def score_table(view: View) -> ScoreTable | None:
    """The winner's test scores beside those of the guide and of the baselines; None without a test."""
    from matplotlib.ticker import MaxNLocator

    test, columns = view.summary.study["test"], deciding_metrics(view)
    keys = [key for who in SHOWN if (key := key_of(view, who)) in test]
    if not columns:
        return None
    drawn: dict[str, list[float]] = {}
    for key in keys:
        score = test[key].get(columns[0])
        if not key.startswith((GAIN, OVER_PROBE)) and score and is_number(score["value"]):
            drawn[key] = [*(score["interval"] or [score["value"]] * 2), score["value"]]
    numbers = [number for ends in drawn.values() for number in ends] or [0.0]
    low, span = min(numbers), max(numbers) - min(numbers) or 1.0
    ticks = [tick for tick in MaxNLocator(3).tick_values(low, low + span) if low <= tick <= low + span]

    def percent(number: float) -> float:
        return round(4 + 92 * (number - low) / span, 1)

    rows = [
        ScoreRow(
            view.summary.title(key),
            [test[key].get(name) for name in columns],
            [percent(number) for number in drawn[key]] if key in drawn else None,
        )
        for key in keys
    ]
    clean = len(view.summary.study["data_report"].get("test_clean", [])) if any(k.endswith(CLEAN) for k in keys) else 0
    return ScoreTable(columns, rows, [(percent(tick), f"{tick:g}") for tick in ticks], clean)


@dataclass(frozen=True)
class AnswerRow:
    """One answer of a closed set."""

    answer: str
    counts: list[int]
    """Images in train, validation and test."""
    right: list[str]
    """How many of its test images winner and guide answer right, in words."""


def answer_rows(view: View) -> list[AnswerRow]:
    """The answers of a study with one closed set; none otherwise."""
    study = view.summary.study
    counts = list(zip(*study.get("class_counts", {}).values(), strict=True))
    tested = view.tested[0] if len(view.tested) == 1 else None
    rows = []
    for index, (answer, its) in enumerate(zip(study["candidates"], counts, strict=False)):
        right = []
        for who in ADAPTERS if tested else ():
            if tested and who in tested.answers:
                found = tested.answers[who][tested.truth == index] == index  # [n of this answer]
                right.append(f"{found.sum()} of {len(found)}" if len(found) else "-")
        rows.append(AnswerRow(plain(answer), list(its), right))
    return rows
