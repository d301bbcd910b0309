"""The facts about a data set as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from train_fn.data.samples import PARTS, PLACEHOLDER, Sample, Task
from train_fn.data.splitting import MIN_SHARE, UNEVEN
from train_fn.datasheet.facts import DataSheet
from train_fn.settings import SHOWN
from train_fn.support.text import plain, shorten

MAX_ROWS = 20  # answers of a table
MAX_OPEN = 8  # answers of a task without a closed set
MAX_ANSWER = 100  # characters of an answer
MAX_GROUPS = 5
MAX_CONTRADICTORY = 50


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def all_tables(sheet: DataSheet) -> Iterator[Table]:
    """Every table that the data allows."""
    for task in sheet.tasks:
        yield task_table(sheet, task)
    yield file_table(sheet)
    if sheet.splits:
        yield part_table(sheet)
    yield copy_table(sheet)
    yield from copy_group_tables(sheet)
    if sheet.groups:
        yield from group_tables(sheet)
    if sheet.tokens:
        yield token_table(sheet)
        if sheet.tokens.beyond:
            yield beyond_table(sheet)


def spread(values: Iterable[float]) -> str:
    """Minimum, median and maximum."""
    values = list(values)
    return f"{min(values):,g} / {median(values):,g} / {max(values):,g}"


def num_words(texts: Iterable[str]) -> str:
    """Minimum, median and maximum of the words of texts; one number if they are equal."""
    numbers = [len(text.replace(PLACEHOLDER, " ").split()) for text in texts]
    return spread(numbers) if len(set(numbers)) > 1 else f"{numbers[0]:,}"


def visible(answer: str) -> str:
    """An answer, shortened, and quoted where blanks at its ends would not be seen."""
    answer = answer if len(answer) <= MAX_ANSWER else f"{answer[:MAX_ANSWER]}..."
    return answer if answer == answer.strip() else repr(answer)


def many(number: int, what: str) -> str:
    """A number and what is counted, which ends in a singular noun."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def task_table(sheet: DataSheet, task: Task) -> Table:
    """The answers of a task, with their counts in all parts."""
    samples = sheet.of_task(task)
    counts = {"all": Counter(sample.answer for sample in samples)}
    for part in PARTS if sheet.splits else ():
        counts[part] = Counter(sample.answer for sample in getattr(sheet.splits, part) if sample.task == task.name)
    questions = Counter(sample.question for sample in samples)
    closed = task.candidates or len(counts["all"]) <= MAX_ROWS
    answers = task.candidates or [answer for answer, _ in counts["all"].most_common(MAX_ROWS if closed else MAX_OPEN)]
    rows: list[list[Any]] = [
        [visible(answer), *(count[answer] for count in counts.values())] for answer in list(answers)[:MAX_ROWS]
    ]
    rows.append([f"{len(counts['all'])} different answers", *(count.total() for count in counts.values())])
    open_set = "" if task.candidates else "; no small closed set of answers: the model writes them"
    if not sheet.splits or not any(one.candidates for one in sheet.tasks):
        open_set = open_set and "; no small closed set of answers: a study tunes on the loss"
    asked = "" if len(questions) > 1 or not questions else f" {SHOWN.repr(next(iter(questions)))}"
    title = (
        f"Task{task.name and f' {task.name}'} ({task.kind}): {many(len(samples), 'sample')}, "
        f"{many(len(questions), 'question')}{asked}{open_set}; words a question "
        f"{num_words(s.question for s in samples)}, an answer {num_words(s.answer for s in samples)}"
    )
    return Table(title, ["answer", *counts], rows)


def file_table(sheet: DataSheet) -> Table:
    """Formats, sizes and orientations of the image files."""
    kinds: dict[str, list[Any]] = {}
    for facts in sheet.files.values():
        kinds.setdefault(f"{facts.format} {facts.mode}", []).append(facts)
    rows = [
        [kind, len(its), spread(f.size[0] for f in its), spread(f.size[1] for f in its), sum(f.turned for f in its),
         spread(-(-f.num_bytes // 1024) for f in its)]
        for kind, its in sorted(kinds.items())
    ]  # fmt: skip
    columns = ["format and mode", "files", "width", "height", "turned by EXIF", "KiB"]
    return Table("Image files (min / median / max)", columns, rows)


def part_table(sheet: DataSheet) -> Table:
    """Size and share of each part."""
    assert sheet.splits, "asked for only with parts"
    total = len(sheet.splits.samples)
    rows = []
    for name in PARTS:
        part: Sequence[Sample] = getattr(sheet.splits, name)
        images = len({image for sample in part for image in sample.images})
        asked = sheet.asked.get(name)
        rows.append([name, len(part), images, f"{len(part) / max(1, total):.1%}"])
        wanted = (asked or 0) * total
        misses = wanted >= MIN_SHARE and abs(len(part) - wanted) > UNEVEN * wanted
        rows[-1].append("set by the data" if asked is None else f"{asked:.1%}{', missed' if misses else ''}")
    return Table("Parts", ["part", "samples", "images", "share", "asked for"], rows)


def copy_table(sheet: DataSheet) -> Table:
    """Near-copies in numbers."""
    copies, report = sheet.copies, sheet.report
    sizes = [len(group) for group in copies.groups]
    rows: list[list[Any]] = [
        ["images that have one", sum(sizes)],
        ["pairs", copies.num_pairs],
        ["groups", len(sizes)],
        ["images in the largest group", max(sizes, default=0)],
        ["groups with contradictory answers", len(copies.contradictory)],
    ]
    if report:
        rows.append(["images left out for a contradiction", report.num_left_out])
        rows.append(["validation images with one in train", report.leaked["validation"]])
        rows.append(["test images with one in train or validation", report.leaked["test"]])
        rows.append(["the same, had the split been random", f"{report.leaked_if_random:.0%} of the test images"])
    return Table("Near-copies", ["", "number"], rows)


def copy_group_tables(sheet: DataSheet) -> Iterator[Table]:
    """The largest groups of near-copies, and the contradictory ones."""
    groups = sheet.copies.groups[:MAX_GROUPS]
    first: dict[str, Sample] = {}
    for sample in sheet.samples:
        for image in sample.images:
            first.setdefault(image, sample)
    if groups:
        rows = [[len(its), lines(f"{sheet.shown(i)}: {visible(first[i].answer)}" for i in its)] for its in groups]
        title = f"Largest groups of near-copies ({len(groups)} of {len(sheet.copies.groups)})"
        yield Table(title, ["images", "file: answer"], rows)
    if mixed := sheet.copies.contradictory[:MAX_CONTRADICTORY]:
        rows = [[len(its), lines(named_answers(sheet, its))] for its in mixed]
        title = f"Contradictory near-copies ({len(mixed)} of {len(sheet.copies.contradictory)})"
        yield Table(title, ["entries", "file: answer"], rows)


def named_answers(sheet: DataSheet, samples: Sequence[Sample]) -> Iterator[str]:
    """File and answer of each sample, with the question where there are several."""
    several = len({sample.question for sample in samples}) > 1
    for sample in samples:
        asked = f"{SHOWN.repr(sample.question)} " if several else ""
        yield f"{sheet.shown(sample.image)}: {asked}{visible(sample.answer)}"


def lines(texts: Iterable[str]) -> str:
    """The first ten texts, a line each."""
    return "\n".join(shorten([plain(text) for text in texts], 10))


def group_tables(sheet: DataSheet) -> Iterator[Table]:
    """The groups that the data names, such as patients."""
    sizes = [len(group.samples) for group in sheet.groups]
    shared = [group for group in sheet.groups if len(group.parts) > 1]
    rows: list[list[Any]] = [
        ["groups", len(sizes)],
        ["samples without a group", len(sheet.samples) - sum(sizes)],
        ["samples a group, min / median / max", spread(sizes)],
        ["groups shared by several parts", len(shared)],
    ]
    yield Table("Groups that the data names", ["", "number"], rows)
    for title, its in (("Largest groups", sheet.groups), ("Groups shared by several parts", shared)):
        if its:
            rows = [[g.name, len(g.samples), ", ".join(g.parts)] for g in its[:MAX_GROUPS]]
            yield Table(f"{title} ({len(rows)} of {len(its)})", ["group", "samples", "parts"], rows)


def token_table(sheet: DataSheet) -> Table:
    """Tokens of prompts and answers, and how many samples exceed the model's limit."""
    tokens = sheet.tokens
    assert tokens, "asked for only with a model"
    rows: list[list[Any]] = [
        [what, *(f"{share:,.0f}" for share in quantiles(lengths))]
        for what, lengths in (
            ("an image", tokens.images),
            ("prompt with its images", tokens.prompts),
            ("answer with its end", tokens.answers),
            ("prompt and answer", tokens.totals),
        )
        if lengths
    ]
    limit = f"{tokens.limit:,}" if tokens.limit else "not given by its configuration"
    beyond = f"; {many(len(tokens.beyond), 'sample')} beyond it" if tokens.limit else ""
    return Table(f"Tokens (the model's limit: {limit}{beyond})", ["", "median", "95 %", "max"], rows)


def beyond_table(sheet: DataSheet) -> Table:
    """The longest samples that exceed the model's limit."""
    assert sheet.tokens, "asked for only with a model"
    totals = sheet.tokens.totals
    longest = sorted(sheet.tokens.beyond, key=lambda index: -totals[index])[:MAX_ROWS]
    rows = [
        [sheet.shown(sheet.samples[index].image), SHOWN.repr(sheet.samples[index].question), f"{totals[index]:,}"]
        for index in longest
    ]
    title = f"Longest samples beyond the model's limit ({len(rows)} of {len(sheet.tokens.beyond)})"
    return Table(title, ["image", "question", "tokens"], rows)


def quantiles(values: Sequence[int]) -> tuple[float, float, float]:
    """Median, 95 % quantile (a value that occurs) and maximum."""
    ordered = sorted(values)
    return median(ordered), ordered[-(-95 * len(ordered) // 100) - 1], ordered[-1]
