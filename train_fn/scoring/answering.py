"""Answers to any number of samples, in their order, one by one; and how many of them are right.

Shapes: C candidates of a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.data.decision import Decision
from train_fn.data.samples import Sample, Splits, Task
from train_fn.data.tasks import labels_of
from train_fn.model.memory import is_out_of_memory
from train_fn.model.preflight import text_problems, unreadable_prompts
from train_fn.scoring.answers import answer_of
from train_fn.scoring.scores import metrics_of
from train_fn.support.numbers import parse_number
from train_fn.support.text import shorten

if TYPE_CHECKING:
    from train_fn.model.base import Base

BATCH_SIZE = 16  # as `per_device_eval_batch_size`: the same samples in the same order get a study's own numbers
WINDOW = 1024  # samples among which those with prompts of like length share a batch


@dataclass(frozen=True)
class Answer:
    """What the model answers to one sample."""

    scores: tuple[float, ...] = ()
    """Log-likelihoods of the candidates of its task [C]."""
    probabilities: tuple[float, ...] = ()
    """Of the candidates [C], by the adapter's decision."""
    chosen: int | None = None
    """Index of the candidate that is decided for; None: the most probable."""
    text: str | None = None
    """The generated answer; None: not generated."""
    error: str = ""
    """Why there is no answer."""

    def as_dict(self, task: Task) -> dict[str, Any]:
        """The answer, as in `answers.answer_of`."""
        return answer_of(task.candidates, self.probabilities, self.text, self.chosen)


def sample_errors(
    processor: Any, samples: Sequence[Sample], tasks: Mapping[str, Task], faults: Mapping[str, str]
) -> list[str]:
    """Why each sample cannot be answered; "" where it can.

    Args:
        processor: the base's.
        samples: from `AdapterTask.assign`.
        tasks: by name.
        faults: errors of images that cannot be read, by path.

    Raises:
        ValueError: the base cannot read any question, or cannot read a candidate.
    """
    asked = list({sample.prompt: replace(sample, answer="") for sample in samples}.values())
    unreadable = unreadable_prompts(processor, asked)
    if len(unreadable) == len(asked):
        raise ValueError("; ".join(shorten(list(dict.fromkeys(unreadable.values())))))
    sets = [tasks[name].candidates for name in dict.fromkeys(sample.task for sample in samples)]
    first = next(sample for sample in asked if sample.prompt not in unreadable)
    if problems := text_problems(processor, [first], sets):
        raise ValueError("; ".join(problems))
    errors = [unreadable.get(sample.prompt, "") for sample in samples]
    for number, sample in enumerate(samples):
        errors[number] = next((faults[image] for image in sample.images if image in faults), errors[number])
    return errors


def answer_samples(
    base: Base,
    samples: Sequence[Sample],
    tasks: Mapping[str, Task],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    generate_all: bool = False,
    decisions: Mapping[str, Decision] | None = None,
) -> Iterator[Answer]:
    """Answer each sample.

    A batch that does not fit the memory is halved, and so are all later ones. A batch with a sample that cannot be
    answered is answered one by one. Up to `WINDOW` samples are in the same batches as in `evaluation.predict` with one
    worker, and their scores equal to the last bit. In other batches the last digits differ.

    Args:
        tasks: each sample's task, by its name.
        max_new_tokens: most tokens of a generated answer.
        generate_all: whether an answer is also generated where there are candidates.
        decisions: by the task's name; the most probable candidate is the answer where there is none.

    Yields:
        The answers in the order of the samples, each as soon as it and all before it are there.
    """
    import torch

    from train_fn.scoring.evaluation import in_parts

    for start in range(0, len(samples), WINDOW):
        window = samples[start : start + WINDOW]
        waiting = like_prompts(base, window, batch_size)  # the next sample is in the first of them
        answers: dict[int, Answer] = {}
        num_yielded = 0
        while waiting:
            chosen = [window[index] for index in waiting[0]]
            try:
                task = tasks[chosen[0].task]
                decision = (decisions or {}).get(task.name, Decision())
                found = answer_batch(base, chosen, task, decision, max_new_tokens, generate_all)
            except (ValueError, RuntimeError, IndexError, MemoryError) as error:
                is_too_large = is_out_of_memory(error)
                if isinstance(error, torch.AcceleratorError) and not is_too_large:
                    raise  # the device answers no other sample either
                if len(chosen) > 1:
                    batch_size = (len(chosen) + 1) // 2 if is_too_large else batch_size
                    parts = in_parts(waiting[:1], batch_size if is_too_large else 1)
                    waiting = sorted(parts + in_parts(waiting[1:], batch_size))
                    continue
                found = [Answer(error=str(error) or type(error).__name__)]
            answers.update(zip(waiting.pop(0), found, strict=True))
            while num_yielded in answers:
                yield answers.pop(num_yielded)
                num_yielded += 1


def like_prompts(base: Base, samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches, see `evaluation.in_batches`. A sample whose length cannot be found stands alone, so that its
    batch raises the error."""
    from train_fn.model.batches import prompt_length
    from train_fn.scoring.evaluation import in_batches

    lengths: dict[int, tuple[str, Any]] = {}
    alone = []
    for index, sample in enumerate(samples):
        try:
            lengths[index] = sample.task, prompt_length(base, sample)
        except Exception:  # readers and processors raise anything for images that they refuse
            alone.append([index])
    return sorted([*in_batches(base, lengths, batch_size), *alone])


def answer_batch(
    base: Base, samples: Sequence[Sample], task: Task, decision: Decision, max_new_tokens: int, generate_all: bool
) -> list[Answer]:
    """Answer samples that `like_prompts` has put into one batch; see `answer_samples`."""
    from train_fn.scoring.evaluation import generate, score_candidates

    answers = [Answer() for _ in samples]
    if task.candidates:
        scores = score_candidates(base, samples, task.candidates).double().cpu().numpy()
        sound = np.isfinite(scores).all(1)
        found = decision.probabilities(np.where(sound[:, None], scores, 0.0))
        for index, (its, row, chosen) in enumerate(zip(scores, found, decision.answers(found), strict=True)):
            answers[index] = Answer(tuple(its.tolist()), tuple(row.tolist()), int(chosen))
            if not sound[index]:
                text = f"the model's scores must be finite, but are {its.tolist()}: try --dtype float32"
                answers[index] = Answer(error=text)
    if generate_all or not task.candidates:
        texts = generate(base, samples, max_new_tokens)
        answers = [its if its.error else replace(its, text=text) for its, text in zip(answers, texts, strict=True)]
    return answers


# ------------------------------------------------------------------------------------------------ right or wrong


def summary(answered: Sequence[tuple[Sample, Answer]], tasks: Mapping[str, Task]) -> str:
    """How many of the answers are right, and the metrics of each task, in a line; "" if no sample has a truth."""
    pairs = [(sample, answer) for sample, answer in answered if sample.answer and not answer.error]
    if not pairs:
        return ""
    num_right = sum(is_right(sample, answer, tasks[sample.task]) for sample, answer in pairs)
    parts = [f"{num_right} of {len(pairs)} answers are right"]
    for name in dict.fromkeys(sample.task for sample, _ in pairs):
        task = tasks[name]
        its = [pair for pair in pairs if pair[0].task == name]
        is_choice = task.candidates and task.kind != "multilabel"
        sound = [pair for pair in its if int(pair[0].label) >= 0] if is_choice else its
        label = f"{name or task.kind} ({len(sound)})" if len({s.task for s, _ in pairs}) > 1 else ""
        found = " ".join(f"{key} {value:.3g}" for key, value in task_metrics(sound, task).items())
        parts += [" ".join(filter(None, [label, found]))] if found else []
        if len(sound) < len(its):
            parts.append(f"{len(its) - len(sound)} true answers are no candidates of theirs")
    return "; ".join(parts)


def is_right(sample: Sample, answer: Answer, task: Task) -> bool:
    """Whether an answer is the true one: the same candidate, set of labels, number or words."""
    text = answer.as_dict(task)["answer"]
    if task.kind == "multilabel":
        return labels_of(text, task.separator) == labels_of(sample.answer, task.separator)
    if task.candidates:
        return sample.label == task.indices[text]
    if task.kind == "numeric":
        return parse_number(text) == parse_number(sample.answer)
    from train_fn.scoring.text_metrics import exact_match

    return exact_match(text, sample.answer) == 1


def task_metrics(pairs: Sequence[tuple[Sample, Answer]], task: Task) -> dict[str, float]:
    """The metrics of answers to samples of one task; without those that the samples cannot give."""
    if not pairs:
        return {}
    samples = tuple(sample for sample, _ in pairs)
    texts = np.empty(len(pairs), dtype=object)
    texts[:] = [answer.text for _, answer in pairs]
    with np.errstate(divide="ignore"):  # a probability may be 0
        scores = np.log(np.array([answer.probabilities for _, answer in pairs]))
        predicted = {"losses": np.full(len(pairs), np.nan), "scores": scores, "texts": texts}
        found = metrics_of(predicted, samples, Splits((), (), samples, (task,)))
    return {name: value for name, value in found.items() if name != "loss" and np.isfinite(value)}
