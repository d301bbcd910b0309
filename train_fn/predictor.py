"""An adapter that stays loaded, for programs and notebooks: `Predictor(adapter)(images)`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.images import image_problems
from train_fn.data.samples import Sample
from train_fn.model.adapters import BadAdapter, check_files, read_config, read_shapes, read_task
from train_fn.predict import InputError, adapted_base, find_samples, line_of
from train_fn.scoring.answering import BATCH_SIZE, Answer, answer_samples, sample_errors
from train_fn.scoring.conformal import SetRule, coverage_problems
from train_fn.settings import DTYPES

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    Input = str | os.PathLike[str] | Image

__all__ = ["BadAdapter", "InputError", "Predictor"]


class Predictor:
    """Answers questions about images as `python -m train_fn.predict` does. It holds the base, with the adapter on it.

    Args:
        adapter: folder of the adapter, such as a study's best_adapter.
        model: the base model, if not the one that the adapter was trained on.
        dtype: number format of the base, if not that of the training.
        raw: give the model's own probabilities and its most probable answer, not those of the fitted decision.
        coverage: share of samples whose set of `answers` shall hold the true one; None: no sets.
        batch_size: samples a batch.

    Raises:
        BadAdapter: the adapter is damaged, or does not fit the base.
        InputError: the base does not load, or an argument cannot be used.
    """

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        *,
        model: str = "",
        dtype: str = "",
        raw: bool = False,
        coverage: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        folder = Path(adapter)
        task = read_task(folder)
        read_shapes(folder, read_config(folder))  # before the base is loaded, which takes minutes
        check_files(folder)
        if dtype and dtype not in DTYPES:
            raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, but got {dtype!r}: choose one")
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, but got {batch_size}: raise it")
        settings = replace(task.model, model=model or task.model.model, feature_cache_gib=0.0)
        if dtype:
            settings = replace(settings, dtype=dtype, bf16=False, fp16=False)
        self.task = replace(task, decisions={}, conformal={}) if raw else task
        if problems := coverage_problems(self.task, coverage):
            raise InputError("; ".join(problems))
        self.sets = SetRule(self.task, coverage)
        self.batch_size = batch_size
        self._held = contextlib.ExitStack()  # the adapter stays on for as long as this object lives
        self.base = self._held.enter_context(adapted_base(settings, folder))

    def __call__(self, images: Input | Sequence[Input], question: str = "", *, generate: bool = False) -> pd.DataFrame:
        """Answer one question about each image.

        Args:
            images: one or several of: the path of an image; a folder of images; data in any format of a study, with its
                own questions; an image of Pillow.
            question: what is asked; not given: the most frequent question of the training.
            generate: whether the model also writes an answer where there are candidates.

        Returns:
            A row a sample, in their order, with the columns of predict's lines: `image`, `answer`, `probabilities` (a
            dict by candidate), `question`, and so on; `error` where a sample has no answer. If all samples have the
            same candidates, each candidate has a column of that name with its probability instead.

        Raises:
            InputError: there is no image, or none can be used.
        """
        many: Sequence[Input] = images if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
        with tempfile.TemporaryDirectory() as folder:
            samples: list[Sample] = []
            for number, given in enumerate(many):
                samples += self._samples(given, Path(folder) / f"image {number}.png", question)
            lines = self._answer(samples, generate)
        for line in lines:  # the files of images in memory are gone
            line |= {name: line[name].replace(f"{folder}/", "") for name in ("image", "error") if name in line}
        return table_of(lines)

    def _samples(self, given: Input, target: Path, question: str) -> list[Sample]:
        """The samples of one input. An image in memory is written to `target`."""
        asked = question or self.task.question
        if not isinstance(given, str | os.PathLike):
            if not hasattr(given, "save"):
                kind = type(given).__name__
                raise InputError(f"an image must be a path or an image of Pillow, but got {kind}: use Image.fromarray")
            given.save(target)
            return [Sample((str(target),), asked, "")]
        samples, problems = find_samples(Path(given), None, asked, candidates=self.task.candidates)
        if problems:
            raise InputError("; ".join(problems))
        return samples

    def _answer(self, samples: Sequence[Sample], generate: bool) -> list[dict[str, Any]]:
        """The line of each sample, as predict prints it."""
        task, base = self.task, self.base
        samples = [task.assign(sample) for sample in samples]
        if not samples:
            raise InputError("nothing to predict: give an image")
        images = [image for sample in samples for image in sample.images]
        faults = image_problems(images, options=task.model.image_options)
        try:
            errors = sample_errors(base.processor, samples, task.by_name, faults)
        except ValueError as error:
            raise InputError(str(error)) from error
        base.forget_inputs()
        sound = [sample for sample, error in zip(samples, errors, strict=True) if not error]
        answers = answer_samples(
            base, sound, task.by_name, task.max_new_tokens, self.batch_size, generate, task.decisions
        )
        lines = []
        for sample, text in zip(samples, errors, strict=True):
            answer = Answer(error=text) if text else next(answers)
            lines.append(line_of(sample, answer, task) | self.sets.line(sample, answer))
        return lines


def table_of(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Predict's lines as a table; see `Predictor.__call__`."""
    import pandas as pd

    sets = {tuple(line["probabilities"]) for line in lines if "probabilities" in line}
    names = {name: None for line in lines for name in line if name != "label"}  # the same as `answer`
    candidates = next(iter(sets)) if len(sets) == 1 and not names.keys() & set(*sets) else ()
    first = ("image", "images", "truth", "answer", *(candidates or ("probabilities",)))
    rows = [line | (line.get("probabilities", {}) if candidates else {}) for line in lines]
    rest = [name for name in names if name not in ("probabilities", *first)]
    columns = [name for name in [*first, *rest] if any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=columns)
