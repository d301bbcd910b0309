"""The facts about a data set as one HTML page with thumbnails. It needs no other file and no network.

The page's words are in page.html.jinja. Every name and text of the data is escaped.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from train_fn.data.augment import STRENGTHS, Variant, label_of, path_of, read_shown
from train_fn.data.samples import Sample, Task
from train_fn.datasheet.facts import DataSheet
from train_fn.datasheet.tables import Table, all_tables, visible
from train_fn.settings import ImageOptions
from train_fn.support.files import write_file
from train_fn.support.text import plain

SIDE = 112  # pixels of a thumbnail
MAX_EXAMPLES = 96  # thumbnails of examples, of all tasks together
EXAMPLES = 6  # of one answer
ANSWERS = 12  # of one task
GROUPS = 8  # groups of each kind
MEMBERS = 6  # pictures of a group
AUGMENTED = 6  # training images that are shown with variants
VARIANTS = 2  # of each strength
MAX_TEXT = 200  # characters of a text
NUMBERS = re.compile(r"[\d.,%/ ]+|\d+% of the test images")


@dataclass(frozen=True)
class Picture:
    """An image with its words."""

    name: str
    data: str
    """The thumbnail as a data: URI; "" if it cannot be read any more."""
    answers: str


@dataclass(frozen=True)
class Row:
    """Pictures side by side."""

    title: str
    pictures: list[Picture]
    num_more: int = 0
    """Images that are not shown."""


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures under a heading."""

    title: str
    rows: list[Row]
    num_more: int = 0
    """Rows that are not shown."""


def write_page(sheet: DataSheet, path: Path) -> None:
    """Write the page. Raises OSError."""
    import jinja2

    pictures = Pictures(sheet)
    tables = [shown_table(table) for table in all_tables(sheet)] if sheet.samples else []
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = page.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")).render(
        name=plain(sheet.name),
        num_samples=len(sheet.samples),
        num_images=len(sheet.files),
        num_tasks=len(sheet.tasks),
        num_unreadable=len(sheet.unreadable),
        num_copies=sum(map(len, sheet.copies.groups)),
        num_groups=len(sheet.groups),
        recognised=[plain(text) for text in sheet.recognised],
        problems=[plain(text, keep="\n") for text in sheet.problems],
        remarks=[plain(text) for text in sheet.remarks],
        tables=tables,
        sheets=[one for one in sheets(sheet, pictures) if one.rows],
        unreadable=[(plain(sheet.shown(path)), plain(text)) for path, text in sheet.unreadable.items()],
    )
    write_file(path, text)


def shown_table(table: Table) -> dict[str, Any]:
    """The table with printable text, and whether each column holds numbers only."""
    rows = [[plain(cell, keep="\n") for cell in row] for row in table.rows]
    numbers = [all(NUMBERS.fullmatch(row[column]) for row in rows) for column in range(len(table.columns))]
    return {"title": plain(table.title), "columns": table.columns, "rows": rows, "numbers": numbers}


def sheets(sheet: DataSheet, pictures: Pictures) -> list[Sheet]:
    """All pictures of the page."""
    copies, groups = sheet.copies, sheet.groups
    most = MAX_EXAMPLES // max(1, len(sheet.tasks))
    made = [example_sheet(sheet, task, pictures, most) for task in sheet.tasks]
    mixed = [pictures.row("", its) for its in copies.contradictory[:GROUPS]]
    made.append(Sheet("Contradictory near-copies", mixed, len(copies.contradictory) - len(mixed)))
    of_image: dict[str, list[Sample]] = {}
    for sample in sheet.samples:
        for image in sample.images:
            of_image.setdefault(image, []).append(sample)
    alike = [
        pictures.row(f"{len(its)} images", [sample for image in its for sample in of_image[image]], set(its))
        for its in copies.groups[:GROUPS]
    ]
    made.append(Sheet("Largest groups of near-copies", alike, len(copies.groups) - len(alike)))
    named = [
        pictures.row(f"{group.name}: {', '.join(group.parts) or 'in no part'}", group.samples)
        for group in groups[: GROUPS // 2]
    ]
    made.append(Sheet("Largest groups that the data names", named, len(groups) - len(named)))
    made.append(augmented_sheet(sheet, pictures))
    return made


def example_sheet(sheet: DataSheet, task: Task, pictures: Pictures, most: int) -> Sheet:
    """Examples of each answer of a task, or of answers that are all different, drawn with a fixed seed.

    Args:
        most: the most pictures.
    """
    samples = sheet.of_task(task)
    title = f"Examples{f' of task {task.name}' if task.name else ''}"
    by_answer: dict[str, list[Sample]] = {}
    for sample in samples:
        by_answer.setdefault(sample.answer, []).append(sample)
    if not task.candidates and len(by_answer) > ANSWERS:
        chosen = random.Random(0).sample(samples, min(ANSWERS, most, len(samples)))
        return Sheet(title, [Row("", [pictures.of(sample.image, [sample]) for sample in chosen])] if chosen else [])
    order = [answer for answer in task.candidates if answer in by_answer]
    order += sorted(by_answer.keys() - set(order), key=lambda answer: (-len(by_answer[answer]), answer))
    each = max(1, min(EXAMPLES, most // max(1, min(ANSWERS, len(order)))))
    rows = []
    for answer in order[: min(ANSWERS, most)]:
        images = list(dict.fromkeys(sample.image for sample in by_answer[answer]))
        shown = random.Random(0).sample(images, min(each, len(images)))
        heading = plain(f"{visible(answer)} ({len(by_answer[answer]):,})")
        rows.append(Row(heading, [pictures.of(image, []) for image in shown]))
    return Sheet(f"{title} by answer", rows, len(order) - len(rows))


def augmented_sheet(sheet: DataSheet, pictures: Pictures) -> Sheet:
    """A training image of each answer as it is, and as --augment varies it."""
    first: dict[tuple[str, str], Sample] = {}
    for sample in sheet.splits.train if sheet.splits else ():
        first.setdefault((sample.task, sample.answer), sample)
    rows = []
    for sample in list(first.values())[:AUGMENTED]:
        shown: list[str | Variant] = [sample.image]
        for strength in STRENGTHS:
            shown += [Variant(sample.image, strength, n, sheet.allow_flips) for n in range(1, VARIANTS + 1)]
        rows.append(Row(plain(visible(sample.answer)), [pictures.of(image, [], label_of(image)) for image in shown]))
    return Sheet("Training images as --augment varies them", rows)


class Pictures:
    """Thumbnails of a data set, each made once."""

    def __init__(self, sheet: DataSheet) -> None:
        self.sheet = sheet
        self.made: dict[str | Variant, str] = {}

    def row(self, title: str, samples: Sequence[Sample], images: set[str] | None = None) -> Row:
        """A row of the first images of samples, with the answers.

        Args:
            images: those of the samples' images that belong to the row; None: all.
        """
        by_image: dict[str, list[Sample]] = {}
        for sample in samples:
            for image in sample.images:
                if images is None or image in images:
                    by_image.setdefault(image, []).append(sample)
        shown = [self.of(image, its) for image, its in list(by_image.items())[:MEMBERS]]
        return Row(plain(title), shown, len(by_image) - len(shown))

    def of(self, image: str | Variant, samples: Sequence[Sample], words: str = "") -> Picture:
        """The picture of an image or variant, with these words, or the answers of samples."""
        if image not in self.made:
            self.made[image] = thumbnail(image, self.sheet.images)
        words = words or " | ".join(dict.fromkeys(visible(sample.answer) for sample in samples))
        return Picture(plain(self.sheet.shown(path_of(image))), self.made[image], plain(words[:MAX_TEXT]))


def thumbnail(shown: str | Variant, options: ImageOptions) -> str:
    """A small upright image as a data: URI; "" if it cannot be read any more."""
    try:
        image = read_shown(shown, options)
    except Exception:  # decoders raise anything, and the file may be gone since it was checked
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
