"""MLflow, TensorBoard and W&B: a thread of the driver tells them what the journal holds, in order.

Workers never talk to a tracking store, and the search never waits for one. How far each store has been told is kept
beside the journal: one that was away is told the rest later, by the same study, by `--resume`, or by

    python -m tune.tracking sync STUDY

Telling an event twice changes nothing, so a kill between telling and noting it loses and doubles nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tune.journal import Event, StudyLock, read_events

STATES = {"COMPLETE": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED", "INTERRUPTED": "KILLED"}
PARAM_LENGTH = 500  # of a parameter's text in MLflow; the whole is in an artifact


def tracking_uri(given: str = "") -> str:
    """--mlflow-uri, or MLFLOW_TRACKING_URI, or the sqlite file that a bare `mlflow ui` in the working folder shows."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


class Away(Exception):
    """A store cannot be reached now; what it was to be told is told later."""


@dataclass(frozen=True)
class Target:
    """Which study is recorded, and where."""

    study: str
    study_id: str
    """Unique, so that a run is found again and never mistaken for one of another study of the same name."""
    directory: Path
    experiment: str
    uri: str
    report_to: tuple[str, ...]


class Sink(Protocol):
    """A place where events go. All calls come from one thread; `Away` is raised where a later try may succeed."""

    def deliver(self, event: Event) -> None:
        """Take in one event; a second time changes nothing."""


class Tracking:
    """Tells each store the journal's events. `errors` holds what a store refused; the study goes on without."""

    def __init__(self, target: Target, events: Sequence[Event], retry_s: float = 5.0) -> None:
        self.errors: list[str] = []
        self._events = events  # the journal's own list: it grows
        self._target = target
        self._retry_s = retry_s
        self._sinks: dict[str, Sink] = {}
        self._path = target.directory / "tracking.json"
        told = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._told: dict[str, int] = {name: told.get(name, 0) for name in target.report_to}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """The journal has grown."""
        with self._changed:
            self._changed.notify_all()

    def close(self, timeout_s: float = 60) -> dict[str, int]:
        """Wait until all is told, at most so long; the number of events that each store still waits for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return {name: len(self._events) - told for name, told in self._told.items() if told < len(self._events)}

    def _run(self) -> None:
        away: dict[str, float] = {}  # when to try again
        while True:
            for name in self._told:
                if time.monotonic() >= away.get(name, 0.0):
                    away.pop(name, None)
                    if not self._tell(name):
                        away[name] = time.monotonic() + self._retry_s
            with self._changed:
                done = all(told == len(self._events) for told in self._told.values())
                if self._closing and done:
                    return
                if done or away:
                    self._changed.wait(0.2 if self._closing else self._retry_s)

    def _tell(self, name: str) -> bool:
        """Tell one store all that it has not been told; False: it is away."""
        while self._told[name] < len(self._events):
            try:
                if name not in self._sinks:
                    self._sinks[name] = SINKS[name](self._target)
                self._sinks[name].deliver(self._events[self._told[name]])
            except Away:
                return False
            except Exception as error:  # a store must not end a study; what it refused is told at the end
                told = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
                if told not in self.errors:
                    self.errors.append(told)
            self._told[name] += 1
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._told))
            partial.replace(self._path)
        return True


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


class MLflowSink:
    """A parent run for the study, a child run per trial, each found again by its tag."""

    def __init__(self, target: Target) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # waiting is the thread's own business
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.target = target
        self.client = self._reach(lambda: MlflowClient(target.uri))
        self.experiment_id = self._reach(self._experiment)
        self.runs: dict[str, str] = {}

    def deliver(self, event: Event) -> None:
        self._reach(lambda: getattr(self, f"_{event['event']}")(event))

    def _reach(self, call: Callable[[], Any]) -> Any:
        """Run a call; a store that does not answer, or only says that it cannot now, is away."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        try:
            return call()
        except RequestException as error:
            raise Away(str(error)) from error
        except MlflowException as error:
            if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
                raise Away(str(error)) from error
            raise

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.target.experiment)
        return found.experiment_id if found else self.client.create_experiment(self.target.experiment)

    def _run(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """The run of a key, made where there is none."""
        if key not in self.runs:
            full = f"{self.target.study_id}/{key}"
            found = self.client.search_runs([self.experiment_id], f"tags.`vlm_tune.key` = '{full}'", max_results=1)
            if found:
                self.runs[key] = found[0].info.run_id
            else:
                tags = {"vlm_tune.key": full, "study": self.target.study, **tags}
                self.runs[key] = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        return self.runs[key]

    def _parent(self) -> str:
        return self._run("study", self.target.study, {})

    def _child(self, number: int) -> str:
        tags = {"mlflow.parentRunId": self._parent(), "trial": str(number)}
        return self._run(str(number), f"trial {number}", tags)

    def _session(self, event: Event) -> None:
        run = self._parent()
        for name, value in event["tags"].items():
            self.client.set_tag(run, name, str(value)[:5000])
        known = self.client.get_run(run).data.params
        params = {name: value for name, value in event["params"].items() if name not in known}
        self._params(run, params)  # MLflow's parameters never change: what a later session raised is in study.json
        self.client.update_run(run, status="RUNNING")

    def _started(self, event: Event) -> None:
        run = self._child(event["number"])
        self._params(run, event["params"])
        self.client.log_dict(run, event["settings"], "settings.json")
        self.client.update_run(run, status="RUNNING")

    def _report(self, event: Event) -> None:
        for step, metrics in log_entries(event):
            self._metrics(self._child(event["number"]), metrics, step, event["time"])

    def _ended(self, event: Event) -> None:
        run = self._child(event["number"])
        self._metrics(run, final_metrics(event), event["step"], event["time"])
        tags = {name: event[name] for name in ("error", "lane", "device", "applied")}
        self._tags(run, {**tags, "end_state": event["state"], "notes": "; ".join(event["notes"])})
        if event["error"]:
            self.client.log_text(run, event["error"], "error.txt")
        self.client.set_terminated(run, STATES[event["state"]], int(event["time"] * 1000))
        if event["best"] is not None:
            self._metrics(self._parent(), {"best_so_far": event["best"]}, event["num_ended"], event["time"])

    def _confirmed(self, event: Event) -> None:
        self._metrics(self._child(event["number"]), {"confirmed": event["value"]}, event["run"], event["time"])

    def _tested(self, event: Event) -> None:
        found = {f"test_{who}_{name}".replace(",", ""): score["value"] for who, scores in event["tests"].items()
                 for name, score in scores.items()}  # fmt: skip
        self._metrics(self._parent(), found, event["num_trials"], event["time"])

    def _study_ended(self, event: Event) -> None:
        run = self._parent()
        self._metrics(run, event["metrics"], event["num_trials"], event["time"])
        for path in event["artifacts"]:
            folder = "pictures" if Path(path).parent.name == "pictures" else None
            self.client.log_artifact(run, path, folder)
        self._tags(run, {"end_state": event["state"], **event["tags"]})
        if event["adapter"]:
            from tune.registry import log_model

            log_model(self.client, run, Path(event["adapter"]), register=event["register"], tags=event["model_tags"])
        self.client.set_terminated(run, STATES[event["state"]], int(event["time"] * 1000))

    def _params(self, run: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(run, params=[Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()])
        if any(len(str(value)) > PARAM_LENGTH for value in params.values()):
            self.client.log_dict(run, dict(params), "parameters.json")

    def _metrics(self, run: str, metrics: Mapping[str, float], step: int, when: float) -> None:
        from mlflow.entities import Metric

        entities = [Metric(key, float(value), int(when * 1000), step) for key, value in metrics.items()]
        self.client.log_batch(run, metrics=entities)

    def _tags(self, run: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(
            run, tags=[RunTag(key, str(value)[:5000]) for key, value in tags.items() if value not in ("", None)]
        )


class TensorBoardSink:
    """Event files under `trials/0007/runs/`, as the guide's monitoring reads them."""

    def __init__(self, target: Target) -> None:
        self.directory = target.directory
        self.writers: dict[int, Any] = {}

    def deliver(self, event: Event) -> None:
        if event["event"] == "started":
            lines = "\n".join(f"{name}: {value}  " for name, value in event["settings"].items())
            self._writer(event["number"]).add_text("settings", lines)
        elif event["event"] == "report":
            for step, metrics in log_entries(event):
                for name, value in metrics.items():
                    self._writer(event["number"]).add_scalar(name, value, step, walltime=event["time"])
        elif event["event"] == "ended":
            self._writer(event["number"]).close()
            del self.writers[event["number"]]

    def _writer(self, number: int) -> Any:
        from tensorboardX import SummaryWriter

        if number not in self.writers:
            self.writers[number] = SummaryWriter(str(self.directory / "trials" / f"{number:04d}" / "runs"))
        return self.writers[number]


class WandbSink:
    """A run per trial, grouped by study. WANDB_MODE=offline keeps them on disk."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.runs: dict[int, Any] = {}

    def deliver(self, event: Event) -> None:
        if event["event"] == "started":
            self._run(event["number"]).config.update(event["params"], allow_val_change=True)
        elif event["event"] == "report":
            for step, metrics in log_entries(event):
                self._run(event["number"]).log(metrics, step=step)
        elif event["event"] == "ended":
            run = self._run(event["number"])
            run.summary.update({"end_state": event["state"], "error": event["error"]})
            run.finish(exit_code=0 if STATES[event["state"]] == "FINISHED" else 1)
            del self.runs[event["number"]]

    def _run(self, number: int) -> Any:
        import wandb

        if number not in self.runs:
            self.runs[number] = wandb.init(
                project=self.target.experiment,
                group=self.target.study,
                dir=str(self.target.directory),
                name=f"trial {number}",
                id=f"{self.target.study_id}-{number}",  # found again when the study goes on
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True),
            )
        return self.runs[number]


SINKS: dict[str, Callable[[Target], Sink]] = {
    "mlflow": MLflowSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def target_of(directory: Path, plan: Mapping[str, Any], uri: str = "") -> Target:
    """The target of a study that was begun. uri: another MLflow store than the study's own."""
    study = plan["settings"]["study"]
    return Target(
        study=directory.name,
        study_id=plan["study_id"],
        directory=directory,
        experiment=study["experiment"],
        uri=uri or plan["tracking_uri"],
        report_to=tuple(study["report_to"]),
    )


def main(argv: list[str]) -> int:
    """`sync STUDY [--mlflow-uri URI]`: tell the stores what they have not been told. 0: all told, 1: one is away."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tune.tracking", description="Deliver a study's records.")
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("study", type=Path, help="the study's folder")
    parser.add_argument("--mlflow-uri", default="", help="MLflow's store. Not given: the study's own")
    options = parser.parse_args(argv)
    directory: Path = options.study.resolve()
    if not (directory / "plan.json").exists():
        print(
            f"STUDY must be the folder of a study, but {directory} holds no plan.json: check the path", file=sys.stderr
        )
        return 2
    lock = StudyLock(directory)
    if not lock.acquire():
        print(f"{directory.name} is running: it tells its stores itself", file=sys.stderr)
        return 2
    plan = json.loads((directory / "plan.json").read_text())
    tracking = Tracking(target_of(directory, plan, options.mlflow_uri), read_events(directory / "journal.jsonl"), 1.0)
    left = tracking.close()
    for error in tracking.errors:
        print(f"refused by {error}", file=sys.stderr)
    for name in plan["settings"]["study"]["report_to"]:
        print(f"{name}: {f'{left[name]} records wait, it cannot be reached' if name in left else 'all records told'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
