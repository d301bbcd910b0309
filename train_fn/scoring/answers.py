"""Predictions as lines for people and programs: one a sample, with question, truth and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train_fn.data.samples import Sample, Splits


def answer_of(
    candidates: Sequence[str], probabilities: Sequence[float], text: str | None, chosen: int | None = None
) -> dict[str, Any]:
    """An `answer`, and the `probabilities` of the candidates if there are any; empty for a sample without an answer.

    chosen: index of the candidate that was decided for; None: the most probable.
    """
    if candidates:
        if chosen is None:
            chosen = max(range(len(candidates)), key=lambda index: probabilities[index])
        return {"answer": candidates[chosen], "probabilities": dict(zip(candidates, probabilities, strict=True))}
    return {} if text is None else {"answer": text}


def described(sample: Sample) -> dict[str, Any]:
    """What was asked: `id`, `image` or `images`, `question`, `task` and `truth`, each if it is there."""
    several = len(sample.images) > 1
    return {
        name: value
        for name, value in {
            "id": sample.id,
            "image": "" if several else sample.image,
            "images": list(sample.images) if several else [],
            "question": sample.question,
            "task": sample.task,
            "truth": sample.answer,
        }.items()
        if value
    }


def answer_lines(
    samples: Sequence[Sample], splits: Splits, predictions: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One dict for each sample.

    Args:
        predictions: by the name of whoever answers, as `scores.stored_predictions` returns them. A single name "" puts
            its answer into the line itself.
    """
    for index, sample in enumerate(samples):
        line = described(sample)
        candidates = splits.task_of(sample).candidates
        for who, its in predictions.items():
            text, chosen = (its[name][index] if name in its else None for name in ("texts", "decided"))
            found = answer_of(candidates, its["probabilities"][index], text, chosen)
            line |= {who: found} if who else found
        yield line
