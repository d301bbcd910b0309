"""An adapter as an MLflow model. MLflow copies this file into the model and runs it wherever the model is loaded.

Input: a table with the column `image`, which holds a path (with its suffix) or the base64 of an image file, also as a
data URL; and optionally the column `text`, the question. An empty or missing question is that of the training images.
Output: for each row the probability of every candidate answer, in a column of that name, and `answer`, the likeliest.
An adapter without candidates gives only `answer`, which it generates.

The frozen base is no part of the model: it is loaded from the folder of the training, or from VLM_TUNE_BASE.

A path lets the process read its own files. Outside a server any path is read. A server takes base64 only, unless
VLM_TUNE_IMAGE_ROOT names a folder: then, in a server or not, paths start there and must stay inside it, links included.
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
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from train_fn.data.images import image_problems
from train_fn.data.samples import Sample
from train_fn.model.adapters import read_task
from train_fn.model.preflight import text_problems
from train_fn.predict import BASE_VARIABLE, adapted_base, generated_answer, label_probabilities
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
        candidates = self.task.candidates
        samples: list[Sample] = []
        problems: list[str] = []
        texts = model_input["text"] if "text" in model_input else [None] * len(model_input)
        with self.lock, tempfile.TemporaryDirectory() as folder:
            for row, (image, text) in enumerate(zip(map(str, model_input["image"]), texts, strict=True)):
                question = text if isinstance(text, str) and text.strip() else self.task.question
                try:
                    samples.append(Sample((image_file(image, f"{folder}/row {row}"),), question, ""))
                except ValueError as error:
                    rule = "must be a path with a suffix or the base64 of an image file"
                    problems.append(f"row {row}: `image` {rule}, but got {image[:60]!r}: {error}")
            images = (sample.image for sample in samples)
            problems += image_problems(images, options=self.task.model.image_options).values()
            problems += text_problems(self.base.processor, samples, [candidates])
            if problems:
                raise MlflowException.invalid_parameter_value("; ".join(shorten(problems)).replace(f"{folder}/", ""))
            # These grow with every question and path, a server runs without end, and a file may change between calls.
            self.base.tokens.clear()
            self.base.patches.clear()
            try:
                if not candidates:
                    return pd.DataFrame({"answer": [generated_answer(self.base, sample) for sample in samples]})
                found = [label_probabilities(self.base, sample, candidates) for sample in samples]
            except ValueError as error:  # NotFinite, or from a processor that refuses an image
                raise MlflowException.invalid_parameter_value(str(error).replace(f"{folder}/", "")) from error
        rows = [[*line["probabilities"].values(), line["label"]] for line in found]
        return pd.DataFrame(rows, columns=[*candidates, "answer"])


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
