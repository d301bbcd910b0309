"""Data as the guide's JSON has it, for tests: entries become samples, and samples entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_fn.data.samples import Sample, Splits
from train_fn.data.splitting import DataReport, SplitRules, make_splits
from train_fn.data.tasks import TaskRules, find_tasks


def as_sample(entry: dict[str, Any]) -> Sample:
    """The sample of an entry."""
    return Sample((entry["image"],), entry["text"], entry["answer"], entry["label"], split=entry.get("split", ""))


def as_entry(sample: Sample) -> dict[str, Any]:
    """The entry of a sample about one image."""
    (image,) = sample.images
    entry = {"image": image, "text": sample.question, "answer": sample.answer, "label": sample.label}
    return entry | ({"split": sample.split} if sample.split else {})


def split(
    data: list[dict[str, Any]],
    val_data: list[dict[str, Any]] | None = None,
    test_data: list[dict[str, Any]] | None = None,
    *,
    hash_cache: Path | None = None,
    **rules: Any,
) -> tuple[Splits, DataReport, list[str]]:
    """The parts of entries; `rules` are those of `SplitRules`."""
    parts = [None if its is None else list(map(as_sample, its)) for its in (data, val_data, test_data)]
    return make_splits(parts[0] or [], parts[1], parts[2], SplitRules(**rules), hash_cache=hash_cache)


def answers_of(entries: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """The candidate answers of entries with one question, and every problem."""
    found = find_tasks(list(map(as_sample, entries)), TaskRules())
    return found.tasks[0].candidates, found.problems
