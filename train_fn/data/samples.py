"""Samples, their tasks, and the three parts of a study's data.

Shapes: S samples, C candidate answers of a task.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PLACEHOLDER = "<image>"  # stands for an image within a question
PARTS = ("train", "validation", "test")
MAX_GENERATED = 200  # validation answers that are generated after each epoch
KINDS = ("closed", "binary", "ordinal", "multilabel", "open", "numeric")


class Prompt(NamedTuple):
    """All words that the model reads before an answer, and the number of images among them."""

    question: str
    num_images: int = 1
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One question about one image or several, with its answer."""

    images: tuple[str, ...]
    question: str
    """May hold PLACEHOLDER where its images stand, as may the questions of `turns`. If none of them does, all images
    stand before the first question."""
    answer: str
    label: int | str = -1
    """The answer's index among the candidates of its task; -1: the task has none. In data whose tasks are not known
    yet: the class as the data names it."""
    system: str = ""
    """The system prompt."""
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier questions with their answers."""
    id: str = ""
    question_type: str = ""
    """What kind of question it is, as the data says."""
    task: str = ""
    """Name of its `Task`."""
    group: str = ""
    """What may not be divided between the parts, such as a patient."""
    split: str = ""
    """The part that the data itself names."""
    source: str = ""
    """File and row that it comes from."""
    unit: int = -1
    """Number of what may not be divided and counts as one observation: near-copies, images of one question, a group.
    -1: not known (of an earlier version)."""

    @property
    def image(self) -> str:
        """The first image."""
        return self.images[0]

    @property
    def prompt(self) -> Prompt:
        """The words before the answer."""
        return Prompt(self.question, len(self.images), self.system, self.turns)


@dataclass(frozen=True)
class Task:
    """What is asked by questions that are alike, and so what its scores are."""

    name: str = ""
    """Unique in a study; "" if the study has one task only."""
    kind: str = "open"
    """One of KINDS. binary: closed with two answers. numeric: answers are numbers."""
    candidates: tuple[str, ...] = ()
    """All answers, in the order of their labels; empty for answers that the model writes itself."""
    positive: str = ""
    """The answer whose sensitivity and specificity are computed."""
    separator: str = ""
    """Of a multilabel task: what stands between the labels of an answer."""

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """Each candidate's index."""
        return {answer: index for index, answer in enumerate(self.candidates)}


@dataclass(frozen=True)
class OwnMetric:
    """A user's own metric, `name(answer, truth) -> number`."""

    name: str
    path: str
    source: str
    """The content of the file at `path` when the study began."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a study's data, fixed before its first trial, and how their answers are scored."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    tasks: tuple[Task, ...] = field(default=(Task(),))
    max_new_tokens: int = 0
    """Most tokens of a generated answer; 0: from the longest answer of the training part."""
    own_metric: OwnMetric | None = None
    decide: str = ""
    """What answers with candidates are chosen for, as `train_fn.data.decision.Decision.aim`. "": the most probable
    candidate, as in earlier versions."""
    prevalence: float = 0.0
    """Share of positive cases for which predictive values are given; 0: as in the data that is scored."""
    allow_flips: bool = False
    """Whether augmentation may flip training images from left to right."""

    @functools.cached_property
    def by_name(self) -> dict[str, Task]:
        """Each task by its name."""
        return {task.name: task for task in self.tasks}

    def task_of(self, sample: Sample) -> Task:
        """The task of a sample."""
        return self.by_name[sample.task]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidate answers, if there is one task only; else empty."""
        return self.tasks[0].candidates if len(self.tasks) == 1 else ()

    @property
    def has_candidates(self) -> bool:
        """Whether any task has candidate answers."""
        return any(task.candidates for task in self.tasks)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of all parts."""
        return (*self.train, *self.validation, *self.test)

    @property
    def images(self) -> tuple[str, ...]:
        """The different images of all parts."""
        return tuple(dict.fromkeys(image for sample in self.samples for image in sample.images))

    def class_counts(self, part: str, task: Task | None = None) -> list[int]:
        """Samples per candidate answer of a task in a part, in the candidates' order. Not given: of the only task."""
        task = task or self.tasks[0]
        counts = Counter(sample.label for sample in getattr(self, part) if sample.task == task.name)
        return [counts[index] for index in range(len(task.candidates))]

    def class_weights(self, task: Task) -> list[float]:
        """Mean loss weight of the training samples of each class of a task [C]: inverse frequency, so that all classes
        count the same, with mean 1 over the training samples."""
        return class_weights(self.class_counts("train", task))

    def sample_weights(self) -> list[float]:
        """Loss weight of each training sample; in a task without candidates 1.

        The weight of a class is shared equally by its units, and the weight of a unit by its samples of this class. So
        an image with a copy counts as one image, and a patient with 20 images as one patient. (With classes weighted by
        their number of units alone, a class of many copies would count more than once: by its many samples, and by its
        few units.) Without copies and groups each sample has the weight of its class.
        """
        weights = {task.name: self.class_weights(task) for task in self.tasks}
        keys = list(zip((s.task for s in self.train), (s.label for s in self.train), units_of(self.train), strict=True))
        in_unit = Counter(keys)  # samples of a class in a unit
        units, samples = Counter(key[:2] for key in in_unit), Counter(key[:2] for key in keys)  # of a class
        return [
            weights[task][int(label)] * (samples[task, label] / units[task, label] / in_unit[task, label, unit])
            if weights[task]
            else 1.0
            for task, label, unit in keys
        ]


def units_of(samples: Sequence[Sample]) -> list[int]:
    """The number of each sample's unit, from 0; samples without one are a unit each. Samples of one unit count as one
    observation: they are drawn together in intervals, and stay in one fold."""
    numbers: dict[object, int] = {}
    keys = (sample.unit if sample.unit >= 0 else f"sample {index}" for index, sample in enumerate(samples))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def closed_set(candidates: Sequence[str], positive: str = "") -> tuple[Task, ...]:
    """The tasks of data with one question and these answers; without answers one open task."""
    if not candidates:
        return (Task(),)
    return (Task(kind="binary" if len(candidates) == 2 else "closed", candidates=tuple(candidates), positive=positive),)


def class_weights(counts: Sequence[int]) -> list[float]:
    """Loss weight per class: inverse frequency, scaled so that the mean over the samples is 1."""
    return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]
