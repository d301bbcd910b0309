"""Tasks: which questions are alike, and which answers belong to them.

Answers are never pooled over unlike questions. With one pool of candidates, a model that only reads the question would
already know which of them are possible, and score far above chance without an image. So:

- Questions of one type are alike, where the data names types. Otherwise questions with the same set of answers are. A
  question that is asked too rarely for a set of its own joins the smallest set that holds its answers, or the other
  rare questions with which it shares answers.
- Questions that are answered with yes or no are alike, and unlike all others.
- The answers to like questions form a closed set if there are at least two and at most `max_answers` of them, and each
  occurs three times on average. Otherwise the model writes its answers itself: they are open.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train_fn.data.samples import Sample, Task
from train_fn.settings import SHOWN
from train_fn.support.text import plain_form, shorten

MAX_ANSWERS = 20
MIN_PER_ANSWER = 3  # samples of each answer of a closed set, on average: one for each part
YES_NO = {"yes", "no"}
# The answer of two that names the finding: sensitivity and specificity are about it.
POSITIVE = ("malignant", "abnormal", "positive", "present", "yes", "true")


@dataclass(frozen=True, kw_only=True)
class TaskRules:
    """What the user says about the answers."""

    max_answers: int = MAX_ANSWERS
    """Most answers of a closed set."""
    ordinal: tuple[str, ...] = ()
    """Grades, from the lowest to the highest."""
    multilabel: str = ""
    """What stands between the labels of an answer; "": each answer is one label."""
    numeric: bool = False
    """Whether answers that are numbers are measured values, not classes."""
    merge_variants: bool = False
    """Whether answers that differ in case, spaces or Unicode form only are made equal."""
    positive: str = ""
    """The positive answer; "": the usual ones."""


@dataclass
class Found:
    """Tasks that `find_tasks` has found."""

    samples: list[Sample]
    """With their task, and with `label` as an index among its candidates."""
    tasks: tuple[Task, ...]
    notes: list[str]
    """Facts that the user should know."""
    problems: list[str]


def find_tasks(samples: Sequence[Sample], rules: TaskRules) -> Found:
    """Find the tasks of samples. Their `label` is the class as the data names it."""
    notes: list[str] = []
    problems: list[str] = []
    samples = list(samples)
    if rules.multilabel:
        samples = [with_sorted_labels(sample, rules.multilabel) for sample in samples]
    if rules.merge_variants:
        notes += merge_variants(samples)
    found: list[tuple[Task, list[int]]] = []
    typed = any(sample.question_type for sample in samples)
    scopes = indices_by(range(len(samples)), lambda index: plain_form(samples[index].question_type))
    for question_type, members in scopes.items():
        unclosed: dict[str, list[int]] = {}  # by kind
        families = like_questions(samples, members, rules, typed)
        for family in families:
            task, faults, note = closed_task([samples[index] for index in family], rules)
            notes += filter(None, [note])
            problems += faults
            if task is None:
                unclosed.setdefault(open_kind([samples[index] for index in family], rules), []).extend(family)
                continue
            name = question_type or name_of(task, {samples[index].question for index in family})
            if question_type and len(families) > 1:
                name = f"{question_type} {name_of(task, set())}"
            found.append((replace(task, name=name), family))
        notes += filter(None, [asked_rarely([samples[i] for i in unclosed.get("open", [])], rules)])
        for kind, of_kind in unclosed.items():
            name = question_type if question_type and len(of_kind) == len(members) else f"{question_type} {kind}"
            found.append(
                (Task(name.strip(), kind, separator=rules.multilabel if kind == "multilabel" else ""), of_kind)
            )
    if samples and len({sample.answer for sample in samples}) == 1:
        problems.append(
            f"the data must have two different answers at least, but each of {len(samples):,} is "
            f"{SHOWN.repr(samples[0].answer)}: add samples with other answers"
        )
    problems += unused_rules(samples, {task.kind for task, _ in found}, rules)
    taken: set[str] = set()
    tasks = []
    for task, members in found:
        task = replace(task, name=unique(task.name, taken) if len(found) > 1 else "")
        tasks.append(task)
        for index in members:
            answer = samples[index].answer
            samples[index] = replace(samples[index], task=task.name, label=task.indices.get(answer, -1))
    return Found(samples, tuple(tasks), notes, problems)


def asked_rarely(samples: Sequence[Sample], rules: TaskRules) -> str:
    """A sentence if open answers would be classes, were their questions alike; else ""."""
    num_answers = len({plain_form(sample.answer) for sample in samples})
    num_questions = len({question_form(sample) for sample in samples})
    if num_questions < 2 or not is_closed_set(num_answers, len(samples), rules):
        return ""
    return (
        f"{num_questions:,} questions that are asked too rarely have only {num_answers} different answers, but count "
        f"as open, since they may be unlike: if they ask the same, give them one question_type to score the answers as "
        f"classes"
    )


def unused_rules(samples: Sequence[Sample], kinds: set[str], rules: TaskRules) -> list[str]:
    """A problem for each rule of the user that no answer follows: it would be ignored without a word."""
    problems = []
    if rules.ordinal and "ordinal" not in kinds:
        other = next((s.answer for s in samples if s.answer not in rules.ordinal), "")
        problems.append(
            f"`--ordinal` must list every answer of a question, but of {', '.join(rules.ordinal)} no question has all "
            f"its answers, such as {SHOWN.repr(other)}: complete the list, or leave it out"
        )
    if rules.multilabel and "multilabel" not in kinds:
        problems.append(
            f"`--multilabel` must be what stands between labels, but no answer holds {SHOWN.repr(rules.multilabel)}: "
            f"correct it, or leave it out"
        )
    if rules.numeric and "numeric" not in kinds:
        other = next((s.answer for s in samples if not is_number(s.answer)), "")
        problems.append(
            f"`--numeric` must go with answers that are numbers, but no question has only those; one is "
            f"{SHOWN.repr(other)}: leave it out"
        )
    return problems if samples else []


def indices_by(indices: Sequence[int], key: Callable[[int], Any]) -> dict[Any, list[int]]:
    """Indices by a key, in the order in which the keys come."""
    groups: dict[Any, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups


# ------------------------------------------------------------------------------------------------ like questions


def like_questions(samples: Sequence[Sample], members: list[int], rules: TaskRules, typed: bool) -> list[list[int]]:
    """The members in families of like questions.

    Args:
        members: indices of samples; of one type, if the data is `typed`.
    """
    by_question = indices_by(members, lambda index: question_form(samples[index]))
    if len(by_question) == 1:
        return [members]
    answers = {question: {plain_form(samples[i].answer) for i in its} for question, its in by_question.items()}
    families: dict[frozenset[str], list[str]] = {}  # questions by their set of answers
    if yes_no := [question for question, its in answers.items() if its <= YES_NO]:
        families[frozenset(YES_NO)] = yes_no
    others = [question for question in by_question if question not in set(yes_no)]
    if typed:
        return [
            sorted(index for question in questions for index in by_question[question])
            for questions in (yes_no, others)
            if questions
        ]
    rare = []
    for question in others:
        if is_closed_set(len(answers[question]), len(by_question[question]), rules):
            families.setdefault(frozenset(answers[question]), []).append(question)
        else:
            rare.append(question)
    sets = sorted(families, key=lambda its: (len(its), sorted(its)))
    holders: dict[str, list[frozenset[str]]] = defaultdict(list)  # sets by each of their answers
    for its in sets:
        for answer in its:
            holders[answer].append(its)
    left: list[str] = []
    for question in rare:
        first = next(iter(answers[question]))
        home = next((its for its in holders[first] if answers[question] <= its), None)
        (families[home] if home else left).append(question)
    together = [*families.values(), *connected(left, answers)]
    return [sorted(index for question in questions for index in by_question[question]) for questions in together]


def connected(questions: Sequence[str], answers: dict[str, set[str]]) -> list[list[str]]:
    """Questions in groups that share answers, directly or through others."""
    home: dict[str, str] = {}  # union-find over answers

    def root(answer: str) -> str:
        while home.setdefault(answer, answer) != answer:
            home[answer] = answer = home[home[answer]]
        return answer

    for question in questions:
        first, *more = sorted(answers[question])
        for answer in more:
            home[root(answer)] = root(first)
    groups: dict[str, list[str]] = {}
    for question in questions:
        groups.setdefault(root(min(answers[question])), []).append(question)
    return list(groups.values())


def question_form(sample: Sample) -> str:
    """The question without differences that nobody means. Earlier turns do not count: they differ by image."""
    return plain_form(sample.question)


def is_closed_set(num_answers: int, num_samples: int, rules: TaskRules) -> bool:
    """Whether so many different answers to so many samples form a closed set."""
    return 2 <= num_answers <= rules.max_answers and num_answers * MIN_PER_ANSWER <= num_samples


# ------------------------------------------------------------------------------------------------ closed sets


def closed_task(samples: Sequence[Sample], rules: TaskRules) -> tuple[Task | None, list[str], str]:
    """The task of like questions, without a name; None if their answers form no closed set.

    Returns:
        The task; every contradiction between answers and labels; and a fact that the user should know, or "".
    """
    answers = Counter(sample.answer for sample in samples)
    variants: dict[str, list[str]] = {}
    for answer in answers:
        variants.setdefault(plain_form(answer), []).append(answer)
    if rules.numeric and all(map(is_number, answers)):
        return None, [], ""
    if rules.ordinal and set(answers) <= set(rules.ordinal):
        return Task(kind="ordinal", candidates=rules.ordinal), [], ""
    if not is_closed_set(len(variants), len(samples), rules) or len(answers) < 2:
        limit = rules.max_answers
        crossed = len(variants) > limit and len(variants) * MIN_PER_ANSWER <= len(samples)
        note = (
            f"{len(variants)} different answers to {SHOWN.repr(samples[0].question)} are more than --max-answers "
            f"{limit} and count as open: add --max-answers {len(variants)} to score them as classes"
        )
        return None, [], note if crossed else ""
    if mixed := [same for same in variants.values() if len(same) > 1]:
        return None, shorten([
            "answers that differ in case, spaces or Unicode form only must be written alike, but got "
            + ", ".join(f"{SHOWN.repr(answer)} ({answers[answer]}x)" for answer in same)
            + ": make them equal, or add --merge-variants"
            for same in mixed
        ]), ""  # fmt: skip
    if rules.multilabel and any(rules.multilabel in answer for answer in answers):
        candidates = tuple(sorted(answers))
        return Task(kind="multilabel", candidates=candidates, separator=rules.multilabel), [], ""
    pairs = Counter((sample.label, sample.answer) for sample in samples)
    order = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    candidates = tuple(dict.fromkeys(answer for _, answer in order))
    positive = rules.positive if rules.positive in candidates else usual_positive(candidates)
    kind = "binary" if len(candidates) == 2 else "closed"
    return Task(kind=kind, candidates=candidates, positive=positive), label_problems(pairs), ""


def label_problems(pairs: Counter[tuple[Any, str]]) -> list[str]:
    """Every contradiction between answers and labels, given how often each pair of label and answer occurs."""
    problems = []
    for side, other in ((0, 1), (1, 0)):
        partners: dict[Any, list[tuple[Any, int]]] = {}
        for pair, count in pairs.items():
            partners.setdefault(pair[side], []).append((pair[other], count))
        name, its = (("label", "answers"), ("answer", "labels"))[side]
        problems += [
            f"each {name} must go with one of the {its}, but {name} {SHOWN.repr(value)} goes with "
            + " and ".join(
                f"{SHOWN.repr(partner)} ({count}x)" for partner, count in sorted(counts, key=lambda pair: -pair[1])
            )
            + ": correct the rarer one"
            for value, counts in partners.items()
            if len(counts) > 1
        ]
    return shorten(problems)


def usual_positive(candidates: Sequence[str]) -> str:
    """The answer that usually counts as positive: of two any usual one, of more only Malignant; "": none."""
    usual = POSITIVE if len(candidates) == 2 else POSITIVE[:1]
    found = [answer for answer in candidates if plain_form(answer) in usual]
    return found[0] if len(found) == 1 else ""


# ------------------------------------------------------------------------------------------------ other answers


def open_kind(samples: Sequence[Sample], rules: TaskRules) -> str:
    """The kind of like questions whose answers form no closed set."""
    if rules.numeric and all(is_number(sample.answer) for sample in samples):
        return "numeric"
    has_labels = rules.multilabel and any(rules.multilabel in sample.answer for sample in samples)
    return "multilabel" if has_labels else "open"


def is_number(text: str) -> bool:
    """Whether a text is a finite number and nothing else."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text.strip()) is not None


def labels_of(answer: str, separator: str) -> list[str]:
    """The labels of an answer, each once, in alphabetical order."""
    return sorted({label.strip() for label in answer.split(separator)} - {""})


def with_sorted_labels(sample: Sample, separator: str) -> Sample:
    """The sample with its labels in one order, so that equal sets are equal answers."""
    join = separator if separator[-1:].isspace() else f"{separator} "
    answer = join.join(labels_of(sample.answer, separator)) or sample.answer
    return replace(sample, answer=answer, label=answer if sample.label == sample.answer else sample.label)


def merge_variants(samples: list[Sample]) -> list[str]:
    """Give answers that differ in case, spaces or Unicode form only their most frequent form, in place.

    Returns: a sentence for each that was changed.
    """
    counts = Counter(sample.answer for sample in samples)
    variants: dict[str, list[str]] = {}
    for answer, _ in counts.most_common():
        variants.setdefault(plain_form(answer), []).append(answer)
    for index, sample in enumerate(samples):
        first = variants[plain_form(sample.answer)][0]
        if sample.answer != first:
            samples[index] = replace(
                sample, answer=first, label=first if sample.label == sample.answer else sample.label
            )
    return shorten([
        f"Answers merged: {', '.join(f'{SHOWN.repr(other)} ({counts[other]}x)' for other in others)} -> "
        f"{SHOWN.repr(first)} ({counts[first]}x)"
        for first, *others in variants.values()
        if others
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------ names


def name_of(task: Task, questions: set[str]) -> str:
    """A name for a task without a question type: its question if there is only one, else its answers."""
    if len(questions) == 1:
        return next(iter(questions))
    few = len(task.candidates) <= 3
    return " or ".join(task.candidates) if few else f"{len(task.candidates)} answers"


def unique(name: str, taken: set[str]) -> str:
    """A name that metrics can begin with, unlike those taken; it is taken then."""
    slug = re.sub(r"\W+", "_", plain_form(name)).strip("_")[:40].rstrip("_") or "task"
    number = 2
    chosen = slug
    while chosen in taken:
        chosen, number = f"{slug}_{number}", number + 1
    taken.add(chosen)
    return chosen
