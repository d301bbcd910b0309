"""An adapter as an MLflow model. MLflow copies this file into the model and runs it wherever the model is loaded.

In: a table with the column `image`, a path (with its suffix) or the base64 of an image file, also as a data URL; and if
wanted `text`, the question. Without it, or where it is empty, the question is that of the training images. Out: for
each row the probability of every candidate answer, in a column of that name, and `answer`, the likeliest; for an
adapter without candidates only `answer`, generated.

The frozen base is no part of the model: it is loaded from where it was trained, or from VLM_TUNE_BASE.

A path makes the process read its own files. In a program of one's own any path is read; a server takes base64 only,
unless VLM_TUNE_IMAGE_ROOT names a folder: paths then start there and must stay inside it, links included, everywhere.
"""

from __future__ import annotations

import base64
import contextlib
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from train_fn.data.images import image_problems
from train_fn.data.manifest import shorten
from train_fn.data.samples import Sample
from train_fn.model.adapters import read_task
from train_fn.model.preflight import text_problems
from train_fn.predict import BASE_VARIABLE, adapted_base, generated_answer, label_probabilities

ROOT_VARIABLE = "VLM_TUNE_IMAGE_ROOT"


class AdapterModel(PythonModel):
    """Answers questions about images with the base and the adapter that it was saved with."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base and adapter. Raises InputError where there is no base."""
        adapter = Path(context.artifacts["adapter"])
        self.task = read_task(adapter)
        settings = self.task.model
        # What a server is sent must not stay on its disk, so features are not kept.
        settings = replace(settings, model=os.environ.get(BASE_VARIABLE) or settings.model, feature_cache_gib=0)
        self.held = contextlib.ExitStack()  # the adapter stays on for as long as the model is held
        self.base = self.held.enter_context(adapted_base(settings, adapter))
        self.lock = threading.Lock()  # a server predicts in threads, and tokenizers are not made for that

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """See the module. Raises MlflowException, with every problem found, when an image cannot be read."""
        candidates = self.task.candidates
        samples: list[Sample] = []
        problems: list[str] = []
        texts = model_input["text"] if "text" in model_input else [None] * len(model_input)
        with self.lock, tempfile.TemporaryDirectory() as folder:
            for row, (image, text) in enumerate(zip(map(str, model_input["image"]), texts, strict=True)):
                question = text if isinstance(text, str) and text.strip() else self.task.question
                try:
                    samples.append(Sample(image_file(image, f"{folder}/row {row}"), question, "", -1))
                except ValueError as error:
                    rule = "must be a path with a suffix or the base64 of an image file"
                    problems.append(f"row {row}: `image` {rule}, but got {image[:60]!r}: {error}")
            problems += image_problems(sample.image for sample in samples).values()
            problems += text_problems(self.base.processor, [sample.text for sample in samples], candidates)
            if problems:
                raise MlflowException.invalid_parameter_value("; ".join(shorten(problems)).replace(f"{folder}/", ""))
            # Kept by question and by path: a server is asked without end, and a file may change between two calls.
            self.base.tokens.clear()
            self.base.patches.clear()
            try:
                if not candidates:
                    return pd.DataFrame({"answer": [generated_answer(self.base, sample) for sample in samples]})
                found = [label_probabilities(self.base, sample, candidates) for sample in samples]
            except ValueError as error:  # what processors raise for an image that they do not take; NotFinite
                raise MlflowException.invalid_parameter_value(str(error).replace(f"{folder}/", "")) from error
        rows = [[*line["probabilities"].values(), line["label"]] for line in found]
        return pd.DataFrame(rows, columns=[*candidates, "answer"])


def image_file(value: str, target: str) -> str:
    """The file that a path names, or `target` with the bytes of a base64 text, which never has a dot in it.

    Raises ValueError with the reason when the path may not be read or the text is not base64.
    """
    inline = value.startswith("data:")
    if inline or "." not in value:
        encoded = "".join((value.partition(",")[2] if inline else value).split())
        Path(target).write_bytes(base64.b64decode(encoded, validate=True))
        return target
    root = os.environ.get(ROOT_VARIABLE)
    # MLflow's own server tells that it is one; MLServer, which MLflow also starts, does not.
    if not root and (_MLFLOW_IS_IN_SERVING_ENVIRONMENT.get() or "mlserver" in sys.modules):
        raise ValueError(f"a server reads no paths unless its {ROOT_VARIABLE} names the folder that they start from")
    if not root:
        return value
    path = os.path.realpath(os.path.join(root, value))
    if not Path(path).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"it lies outside {ROOT_VARIABLE}")
    return path


set_model(AdapterModel())
