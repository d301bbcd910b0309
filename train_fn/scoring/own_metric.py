"""A user's own metric of one sample: a function of a Python file, `score(answer, truth) -> number`.

The study keeps the file's source, so workers on other machines need no copy of the file, and a study that goes on has
the metric that it was begun with.
"""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

from train_fn.data.samples import OwnMetric
from train_fn.settings import SHOWN

MAX_FILE = 1_000_000  # bytes


def is_own_metric(text: str) -> bool:
    """Whether a --metric such as my.py:score names a function of a Python file."""
    return text.rpartition(":")[0].endswith(".py")


def read_own_metric(text: str) -> OwnMetric:
    """Read a metric such as my.py:score, and try it with ("a", "a").

    Raises:
        ValueError: no such file or function, or it fails.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(
            f"a metric of one's own must be FILE.py:FUNCTION, but got {SHOWN.repr(text)}: write my.py:score"
        )
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_FILE:
        raise ValueError(
            f"a metric of one's own must be in an existing Python file of at most {MAX_FILE:,} bytes, but got {path!r}:"
            f" check the path"
        )
    try:
        metric = OwnMetric(name, os.path.abspath(path), Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} must be a Python file in UTF-8, but {error}: check it") from error
    scorer(metric)("a", "a")
    return metric


def scorer(metric: OwnMetric) -> Callable[[str, str], float]:
    """The function of a metric. It raises ValueError if the user's function raises or returns no finite number.

    Raises:
        ValueError: the file raises, or has no such function.
    """
    where = f"{os.path.basename(metric.path)}:{metric.name}"
    module = types.ModuleType(f"metric_{Path(metric.path).stem}")
    module.__file__ = metric.path
    sys.modules[module.__name__] = module  # dataclasses look it up
    try:
        exec(compile(metric.source, metric.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        raise ValueError(f"{metric.path!r} must be importable, but raised {one_line(error)}: fix it") from error
    function = getattr(module, metric.name, None)
    if not callable(function):
        raise ValueError(f"{metric.path!r} must define a function {metric.name!r}, but does not: check the name")

    def score(answer: str, truth: str) -> float:
        texts = f"answer {SHOWN.repr(answer)} and truth {SHOWN.repr(truth)}"
        call = f"{where!r} must return a finite number, but with {texts}"
        try:
            value = function(answer, truth)
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (Exception, SystemExit) as error:  # a user's own code may raise anything
            raise ValueError(f"{call} raised {one_line(error)}: fix it") from error
        if not math.isfinite(number):
            raise ValueError(f"{call} returned {SHOWN.repr(value)}: fix it")
        return number

    return score


def one_line(error: BaseException) -> str:
    """An error's type and message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
