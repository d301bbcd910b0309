"""Calls to a store: bounded in time, and what a refusal means."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from tune.config.uris import scrub
from tune.records.journal import Event

REQUEST_S = 20  # MLFLOW_HTTP_REQUEST_TIMEOUT where the user sets none
CALL_S = 30.0  # longest time for a call without a file; a server may also send its answer byte by byte
SLOW_S = 1.0  # a file that is refused later than that has waited for something
UPLOAD_BYTES_PER_S = 250_000  # slowest upload that is waited for
# Codes of MLflow that do not blame the request. Any other code refuses it.
NOT_THE_REQUEST = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
                   "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")  # fmt: skip


class StoreUnavailable(Exception):
    """A store cannot be reached now, or does not answer. A later try may succeed."""


class StoreLost(StoreUnavailable):
    """The file of a store was removed or replaced while it was in use."""


Refusal = tuple[str, str]


def reason_of(error: BaseException) -> str:
    """An error in one line, without credentials."""
    lines = scrub(str(error)).strip().splitlines()
    known = isinstance(error, StoreUnavailable | ValueError | OSError)
    text = lines[0] if lines else ""
    return (text if known and text else f"{type(error).__name__}: {text}")[:500]


def bounded(call: Callable[[], Any], limit_s: float) -> Any:
    """Run a call to a server, and give it up after a time.

    A timeout of requests counts from byte to byte, so a server that sends one now and then would hold it for ever. The
    call that is given up goes on in its own thread; if it still succeeds, a later try finds what it has done.

    Raises StoreUnavailable after `limit_s` seconds, or what the call raises.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # raised again by the caller
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=limit_s)
    except queue.Empty:
        raise StoreUnavailable(f"no answer within {limit_s:.0f} s") from None
    if error is not None:
        raise error
    return answer


def refuses(error: BaseException) -> bool:
    """Whether an error blames the request, so that a second try would fail, too. False: that cannot be known."""
    from mlflow.exceptions import InvalidUrlException, MlflowException
    from requests import RequestException

    if isinstance(error, InvalidUrlException):
        return True
    if isinstance(error, MlflowException):
        return error.error_code not in NOT_THE_REQUEST
    if isinstance(error, RequestException):
        status = error.response.status_code if error.response is not None else 0
        return isinstance(error, ValueError) or status in (400, 404, 405, 413)
    return isinstance(error, ValueError | TypeError | LookupError)


def prepare_mlflow() -> None:
    """What MLflow reads from the environment, where the user has set nothing else, and silence for its loggers."""
    os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Waiting is the thread's own business, and a request that is sent again unasked may make a second run.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))
    # A redirect would send the records, and credentials of the same host's name, to a place that nobody has named.
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")
    import mlflow  # noqa: F401  # its import sets the level of its loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised, too


def log_entries(event: Event) -> list[tuple[int, dict[str, float]]]:
    """A report's metrics by optimizer step: training loss and learning rate on the way, then the epoch's."""
    steps = [
        (int(entry["step"]), {f"train/{name}": entry[name] for name in ("loss", "learning_rate")})
        for entry in event["log"]
        if "loss" in entry
    ]
    system = {f"system/{name}": value for name, value in event["system"].items()}
    return [*steps, (event["step"], {**event["metrics"], "epoch": event["epoch"], **system})]


def final_metrics(event: Event) -> dict[str, float]:
    """What a trial is compared by, at its end."""
    found = {f"{phase}_s": value for phase, value in event["seconds"].items()} | {"device_s": event["device_s"]}
    if event["seconds"]:
        overhead = event["seconds"]["wall"] - event["seconds"]["train"] - event["seconds"]["evaluation"]
        found |= {"overhead_s": overhead, "trainable_params": event["applied"]["trainable_params"]}
    return found
