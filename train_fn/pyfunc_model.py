"""An adapter as an MLflow model. MLflow copies this file into the model and runs it wherever the model is loaded.

Input: a table with the column `image`, which holds a path (with its suffix) or the base64 of an image file, also as a
data URL; or several images as a list of these, or as the JSON text of a list. Optional columns are `text`, the
question, and `question_type`, the type of question as in the training data. An empty or missing question is the most
frequent one of the training.
Output, by the tasks that the adapter was trained on:
- One task with candidates: the probability of every candidate in a column of that name, and `answer`, the likeliest.
- One task without: `answer`, which the model generates.
- Several: `answer`, and `probabilities`, the JSON text of an object with those of the candidates; it is empty where the
  answer is generated.

The frozen base is no part of the model: it is loaded from the folder of the training, or from VLM_TUNE_BASE.

A path lets the process read its own files. Outside a server any path is read. A server takes base64 only, unless
VLM_TUNE_IMAGE_ROOT names a folder: then, in a server or not, paths start there and must stay inside it, links included.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from train_fn.data.images import image_problems
from train_fn.data.samples import Sample
from train_fn.model.adapters import read_task
from train_fn.model.preflight import text_problems
from train_fn.predict import BASE_VARIABLE, adapted_base
from train_fn.scoring.answering import answer_samples
from train_fn.support.text import shorten

ROOT_VARIABLE = "VLM_TUNE_IMAGE_ROOT"
# MLflow sets it to "true" in its own server. Its constant for the name is private, and a served model whose import
# fails would not load.
SERVING_VARIABLE = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"


class AdapterModel(PythonModel):
    """Answers questions about images with the base and the adapter that it was saved with."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base and adapter. Raises InputError where there is no base."""
        adapter = Path(context.artifacts["adapter"])
        self.task = read_task(adapter)
        settings = self.task.model
        # Images sent to a server must leave nothing on its disk, so features are not kept.
        settings = replace(settings, model=os.environ.get(BASE_VARIABLE) or settings.model, feature_cache_gib=0)
        self.held = contextlib.ExitStack()  # the adapter stays on for as long as the model is held
        self.base = self.held.enter_context(adapted_base(settings, adapter))
        self.lock = threading.Lock()  # a server predicts in threads, and tokenizers are not made for that

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Answer every row; the module's docstring describes both tables.

        Raises:
            MlflowException: an image or a question cannot be used; the message has every problem.
        """
        samples: list[Sample] = []
        problems: list[str] = []
        questions, types = (texts_of(model_input, name) for name in ("text", "question_type"))
        with self.lock, tempfile.TemporaryDirectory() as folder:
            for row, (images, question, its) in enumerate(zip(model_input["image"], questions, types, strict=True)):
                paths = []
                several = images_of(images) or [""]
                for number, image in enumerate(several):
                    name = f"row {row}" if len(several) == 1 else f"row {row} image {number}"
                    try:
                        paths.append(image_file(image, f"{folder}/{name}"))
                    except ValueError as error:
                        rule = "must be a path with a suffix or the base64 of an image file"
                        problems.append(f"{name}: `image` {rule}, but got {image[:60]!r}: {error}")
                sample = Sample(tuple(paths), question or self.task.question, "", question_type=its)
                samples.append(self.task.assign(sample))
            sound = [sample for sample in samples if sample.images]
            images = (image for sample in sound for image in sample.images)
            problems += image_problems(images, options=self.task.model.image_options).values()
            if sound:
                problems += text_problems(self.base.processor, sound, [task.candidates for task in self.task.tasks])
            if problems:
                raise MlflowException.invalid_parameter_value("; ".join(shorten(problems)).replace(f"{folder}/", ""))
            self.base.forget_inputs()
            task = self.task
            found = answer_samples(self.base, samples, task.by_name, task.max_new_tokens, decisions=task.decisions)
            answers = list(found)
            for row, answer in enumerate(answers):
                if answer.error:
                    text = f"row {row}: {answer.error}".replace(f"{folder}/", "")
                    raise MlflowException.invalid_parameter_value(text)
        rows = []
        for sample, answer in zip(samples, answers, strict=True):
            line = answer.as_dict(self.task.by_name[sample.task])
            found = line.get("probabilities", {})
            if len(self.task.tasks) > 1:
                rows.append([line["answer"], json.dumps(found, ensure_ascii=False)])
            else:
                rows.append([*found.values(), line["answer"]])
        return pd.DataFrame(rows, columns=list(self.task.columns))


def texts_of(table: pd.DataFrame, name: str) -> list[str]:
    """The texts of an optional column; "" where there is none."""
    values = table[name] if name in table else [""] * len(table)
    return [value if isinstance(value, str) and value.strip() else "" for value in values]


def images_of(value: Any) -> list[str]:
    """The images in a cell: one, or those of a list, which may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a path may begin so, too
            value = json.loads(value)
    return [str(item) for item in value] if isinstance(value, list | tuple | np.ndarray) else [str(value)]


def image_file(value: str, target: str) -> str:
    """A file with the image: the one that a path names, or `target` with the decoded bytes of a base64 text.

    Args:
        value: a path or base64; base64 never contains a dot.

    Raises:
        ValueError: the path may not be read, or the text is not base64.
    """
    inline = value.startswith("data:")
    if inline or "." not in value:
        encoded = "".join((value.partition(",")[2] if inline else value).split())
        Path(target).write_bytes(base64.b64decode(encoded, validate=True))
        return target
    root = os.environ.get(ROOT_VARIABLE)
    # MLServer, which MLflow also starts, does not set the variable.
    is_server = os.environ.get(SERVING_VARIABLE, "").lower() in ("true", "1") or "mlserver" in sys.modules
    if not root and is_server:
        raise ValueError(f"a server reads no paths unless its {ROOT_VARIABLE} names the folder that they start from")
    if not root:
        return value
    path = os.path.realpath(os.path.join(root, value))
    if not Path(path).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"it lies outside {ROOT_VARIABLE}")
    return path


set_model(AdapterModel())
