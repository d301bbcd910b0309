"""The file splits.json of a study: its three parts and their tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_fn.data.decision import is_aim
from train_fn.data.samples import KINDS, PARTS, OwnMetric, Sample, Splits, Task, closed_set
from train_fn.settings import SHOWN
from train_fn.support.files import DamagedFile, read_json, write_json


def save_splits(splits: Splits, path: Path) -> None:
    """Write the splits to a JSON file."""
    write_json(path, asdict(splits))


def load_splits(path: Path, positive: str = "") -> Splits:
    """Read a file of `save_splits`, also of earlier versions.

    Args:
        positive: the positive answer, which earlier versions keep in plan.json.

    Raises OSError, or DamagedFile if it holds anything else.
    """
    content = read_json(path, dict)
    try:
        old = "tasks" not in content
        tasks = closed_set(content["candidates"], positive) if old else tuple(map(read_task, content["tasks"]))
        parts = {name: tuple(read_sample(sample, old) for sample in content[name]) for name in PARTS}
        splits = Splits(
            **parts,
            tasks=tasks,
            max_new_tokens=content.get("max_new_tokens", 0),
            own_metric=read_metric(content.get("own_metric")),
            decide=read_aim(content.get("decide", "")),
            prevalence=float(content.get("prevalence", 0.0)),
            allow_flips=content.get("allow_flips", False) is True,
        )
        names = {task.name: len(task.candidates) for task in tasks}
        sound = all(
            type(sample.label) is int and -1 <= sample.label < names[sample.task] and sample.images
            for sample in splits.samples
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} must hold the parts of a study's data, but {error}: put it back") from error
    if not (sound and splits.train and splits.validation and type(splits.max_new_tokens) is int):
        raise DamagedFile(f"{path} must hold sound samples in every part, but does not: put it back from a copy")
    return splits


def read_task(values: dict[str, Any]) -> Task:
    """A task as JSON holds it. Raises TypeError or ValueError for anything else."""
    task = Task(**{**values, "candidates": tuple(values["candidates"])})
    check_texts(task.name, task.kind, task.positive, task.separator, *task.candidates)
    if task.kind not in KINDS or len(task.indices) < len(task.candidates):
        raise ValueError(f"task {SHOWN.repr(values)} is none")
    return task


def read_metric(values: dict[str, str] | None) -> OwnMetric | None:
    """A user's own metric as JSON holds it. Its source is not run. Raises TypeError for anything else."""
    if values is None:
        return None
    metric = OwnMetric(**values)
    check_texts(metric.name, metric.path, metric.source)
    return metric


def read_aim(text: Any) -> str:
    """`Splits.decide` as JSON holds it. Raises TypeError or ValueError for anything else."""
    check_texts(text)
    if text and not is_aim(text):
        raise ValueError(f"nothing can be decided for {SHOWN.repr(text)}")
    return text


def read_sample(values: dict[str, Any], old: bool) -> Sample:
    """A sample as JSON holds it. Raises KeyError, TypeError or ValueError for anything else.

    old: in the form of earlier versions, with one image and `text`.
    """
    if old:
        sample = Sample((values["image"],), values["text"], values["answer"], values["label"])
    else:
        if type(values.get("unit", -1)) is not int:
            raise TypeError(f"unit {SHOWN.repr(values['unit'])} is no whole number")
        turns = tuple((question, answer) for question, answer in values["turns"])
        sample = Sample(**{**values, "images": tuple(values["images"]), "turns": turns})
    texts = (sample.question, sample.answer, sample.system, sample.id, sample.question_type, sample.task, sample.group)
    check_texts(*texts, sample.split, sample.source, *sample.images, *(text for turn in sample.turns for text in turn))
    return sample


def check_texts(*values: Any) -> None:
    """Raise TypeError if a value is no text."""
    if wrong := next((value for value in values if not isinstance(value, str)), None):
        raise TypeError(f"{SHOWN.repr(wrong)} is no text")
