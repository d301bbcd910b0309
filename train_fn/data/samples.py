"""Samples, and the three parts of a study's data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One question about one image. `label` is the index of `answer` in the candidates; -1 without a closed set."""

    image: str
    text: str
    answer: str
    label: int


@dataclass(frozen=True)
class Splits:
    """The three parts of a study's data, fixed before its first trial, and the closed set of answers, if any."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    candidates: tuple[str, ...]

    def class_counts(self, part: str) -> list[int]:
        """Images per candidate answer in a part, in the candidates' order."""
        counts = Counter(sample.label for sample in getattr(self, part))
        return [counts[index] for index in range(len(self.candidates))]
