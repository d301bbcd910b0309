"""Calls to a tracking store: time limits, refusals, and what an event looks like there."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from tune.config.uris import scrub
from tune.records.journal import Event

REQUEST_S = 20  # MLFLOW_HTTP_REQUEST_TIMEOUT if the user sets none
CALL_S = 30.0  # time limit of a call without a file; a server may send its answer byte by byte
SLOW_S = 1.0  # a refusal of a file that takes longer has waited for something
UPLOAD_BYTES_PER_S = 250_000  # the slowest upload that is not given up
# MLflow's error codes that are not the request's fault. Any other code is a refusal.
NOT_THE_REQUEST = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
                   "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")  # fmt: skip


class StoreUnavailable(Exception):
    """A store cannot be reached now, or does not answer. A retry may succeed."""


class StoreLost(StoreUnavailable):
    """The file of a store was removed or replaced while it was in use."""


Refusal = tuple[str, str]  # a call of an event that a store has refused, and the reason


def reason_of(error: BaseException) -> str:
    """An error in one line, without credentials."""
    lines = scrub(str(error)).strip().splitlines()
    clear = isinstance(error, StoreUnavailable | ValueError | OSError)
    text = lines[0] if lines else ""
    return (text if clear and text else f"{type(error).__name__}: {text}")[:500]


def bounded(call: Callable[[], Any], limit_s: float) -> Any:
    """Run a call to a server with a time limit.

    The timeout of `requests` restarts at every byte, so a server that sends one now and then would block it for ever. A
    call that is given up goes on in its own thread; if it still succeeds, a retry finds its result in the store.

    Raises:
        StoreUnavailable: after `limit_s` seconds.
        Exception: what the call raises.
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
    """Whether an error is the request's fault, so that a retry would fail as well. False: unknown."""
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
    """Set MLflow's environment variables that the user has not set, and silence its loggers."""
    os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # The delivery thread retries itself; a request that MLflow repeats may create a second run.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))
    # A redirect would send the records, and the host's credentials, to an address that the user has not given.
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")
    import mlflow  # noqa: F401  # its import sets the level of its loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised as well


def log_entries(event: Event) -> list[tuple[int, dict[str, float]]]:
    """A report's metrics by optimizer step: training loss and learning rate of each logged step, then the epoch's."""
    steps = [
        (int(entry["step"]), {f"train/{name}": entry[name] for name in ("loss", "learning_rate")})
        for entry in event["log"]
        if "loss" in entry
    ]
    system = {f"system/{name}": value for name, value in event["system"].items()}
    progress = event.get("progress", event["epoch"])
    return [*steps, (event["step"], {**event["metrics"], "epoch": progress, **system})]


def trial_params(event: Event) -> dict[str, Any]:
    """A trial's parameters from its "started" event, without `lora_alpha` if it follows from what was searched.

    The rank or a ratio already says it, and MLflow's compare page would show the same twice. The artifact settings.json
    has all settings.
    """
    searched = event.get("searched") or {}
    derived = "lora_alpha" not in searched and {"lora_r", "lora_alpha_ratio"} & set(searched)
    return {name: value for name, value in event["params"].items() if not (derived and name == "lora_alpha")}


def final_metrics(event: Event) -> dict[str, float]:
    """A trial's costs, its best epoch and the first goal's value in it, from its "ended" event."""
    seconds = event["seconds"]
    costs = {f"{phase}_s": value for phase, value in seconds.items()} | {"device_s": event["device_s"]}
    if seconds:
        costs["overhead_s"] = seconds["wall"] - seconds["train"] - seconds["evaluation"]
        costs["trainable_params"] = event["applied"]["trainable_params"]
    if event.get("best_epoch"):  # MLflow's table shows the last epoch's value of each metric
        costs |= {"best_epoch": event["best_epoch"], "best_epoch_score": event["score"]}
    return costs
