"""MLflow, TensorBoard and W&B: a thread of the driver tells them what the journal holds, in order.

Workers never talk to a tracking store, and the search never waits for one. How far each store has been told is kept
beside the journal: one that was away is told the rest later, by the same study, by `--resume`, or by

    python -m tune.tracking sync STUDY

Telling an event twice changes nothing, so a kill between telling and noting it loses and doubles nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from train_fn.storage import Storage
from tune.journal import Event, StudyLock, read_events

STATES = {"COMPLETE": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED", "INTERRUPTED": "KILLED"}
AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED")
PARAM_LENGTH = 500  # of a parameter's text in MLflow; the whole is in an artifact


def tracking_uri(given: str = "") -> str:
    """--mlflow-uri, or MLFLOW_TRACKING_URI, or the sqlite file that a bare `mlflow ui` in the working folder shows;
    without its credentials."""
    return bare(given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}")


def bare(uri: str) -> str:
    """A URI without user and password, as it may be written down and shown."""
    return re.sub(r"(?<=://)[^/]*@", "", uri)


def with_credentials(uri: str) -> str:
    """A bare URI as this process's MLFLOW_TRACKING_URI has it: a study's files name no secret, so `--resume` and `sync`
    need it in the environment, too."""
    whole = os.environ.get("MLFLOW_TRACKING_URI", "")
    return whole if bare(whole) == uri else uri


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
    metric: str
    """The first goal."""
    uri: str
    report_to: tuple[str, ...]
    storage_uri: str = ""
    """The study's own place on object storage, or nothing."""


class Sink(Protocol):
    """A place where events go. All calls come from one thread; `Away` is raised where a later try may succeed."""

    def deliver(self, event: Event) -> None:
        """Take in one event; a second time changes nothing."""


class Tracking:
    """Tells each store the journal's events. `errors` holds what a store refused; the study goes on without."""

    def __init__(self, target: Target, events: Sequence[Event], retry_s: float = 5.0) -> None:
        self.errors: list[str] = []
        self.away: dict[str, str] = {}  # why a store could not be told, the last time
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
        """Wait until all is told, or a store is away once more, at most so long; the number of events that each store
        still waits for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return {name: len(self._events) - told for name, told in self._told.items() if told < len(self._events)}

    def _run(self) -> None:
        away: dict[str, float] = {}  # when to try again
        while True:
            closing = self._closing
            for name in self._told:
                if closing or time.monotonic() >= away.get(name, 0.0):
                    away.pop(name, None)
                    if not self._tell(name):
                        away[name] = time.monotonic() + self._retry_s
            if closing:
                return
            with self._changed:
                done = all(told == len(self._events) for told in self._told.values())
                if (done or away) and not self._closing:
                    self._changed.wait(self._retry_s)

    def _tell(self, name: str) -> bool:
        """Tell one store all that it has not been told; False: it is away."""
        while name not in self._sinks or self._told[name] < len(self._events):
            try:
                if name not in self._sinks:
                    self._sinks[name] = SINKS[name](self._target)
                    if getattr(self._sinks[name], "knows_nothing", False):
                        self._told[name] = 0  # another store than before, or it was lost with its machine
                    continue
                self._sinks[name].deliver(self._events[self._told[name]])
            except Away as error:
                self.away[name] = bare(str(error).splitlines()[0])
                return False
            except Exception as error:  # a store must not end a study; what it refused is told at the end
                told = bare(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
                if told not in self.errors:
                    self.errors.append(told)
                if self._told[name] == len(self._events):
                    return True
            self._told[name] += 1
            partial = self._path.with_suffix(".partial")
            # A full disk costs no record: after a kill, some are told again.
            with contextlib.suppress(OSError):
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


def note(directory: Path) -> str:
    """A study's end in short, as markdown; empty when it ended before its study.json."""
    from tune.results import number_text, verdict, with_interval

    path = directory / "study.json"
    study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if study.get("winner") is None:
        return ""
    metric, trials = study["metric"], {trial["number"]: trial for trial in study["trials"]}
    states = [trial["state"] for trial in trials.values()]
    counts = ", ".join(f"{states.count(state)} {state.lower()}" for state in STATES if state in states)
    lines = [f"**Winner: trial {study['winner']}** of {len(trials)} ({counts}).", ""]
    gain = study["test"].get("difference", {}).get(metric)
    lines += [verdict(gain, metric), ""] if gain and gain["interval"] else []
    lines += [f"| | validation {metric} | test {metric} (95 % interval) | settings |", "| --- | --- | --- | --- |"]
    for who, number in [("guide", 0), ("winner", study["winner"])][study["winner"] == 0 :]:
        if number in trials and trials[number]["epochs"]:
            trial, tested = trials[number], study["test"].get(who, {}).get(metric)
            values = ", ".join(f"{name} {number_text(value)}" for name, value in trial["searched"].items())
            score = with_interval(tested) if tested else "-"
            lines.append(f"| {who} | {number_text(trial['epochs'][-1].get(metric))} | {score} | {values} |")
    return "\n".join([*lines, "", f"Adapter: `{study['adapter']}`. The whole report: artifact `report.html`."])


class MLflowSink:
    """A parent run for the study, a child run per trial, each found again by its tag."""

    def __init__(self, target: Target) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # Waiting is the thread's own business, and a request that is sent again unasked may make a second run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised, too
        self.target = target
        self.client = self._reach(lambda: MlflowClient(target.uri))
        self.experiment_id = self._reach(self._experiment)
        self.runs: dict[str, str] = {}
        self.knows_nothing = not self._reach(lambda: self._find("study"))
        self.when = 0  # ms of the event that is told: a run that is told late was not begun late

    def deliver(self, event: Event) -> None:
        self.when = int(event["time"] * 1000)
        self._reach(lambda: getattr(self, f"_{event['event']}")(event))

    def _reach(self, call: Callable[[], Any]) -> Any:
        """Run a call; a store that does not answer, says that it cannot now, or lets nobody in is away."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import OperationalError

        try:
            return call()
        except OperationalError as error:
            raise Away(str(error)) from error
        except RequestException as error:  # of an artifact: a 4xx that waiting does not mend is refused
            if error.response is not None and error.response.status_code in (400, 404, 405, 413):
                raise
            raise Away(str(error)) from error
        except MlflowException as error:
            if error.error_code in AWAY:
                raise Away(str(error)) from error
            raise

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.target.experiment)
        if found:
            return found.experiment_id
        return self.client.create_experiment(self.target.experiment)

    def _run(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """The run of a key, made where there is none."""
        if key not in self.runs:
            found = self._find(key)
            if not found:
                tags = {"vlm_tune.key": f"{self.target.study_id}/{key}", "study": self.target.study, **tags}
                found = [self.client.create_run(self.experiment_id, self.when, tags, name)]
            self.runs[key] = found[0].info.run_id
        return self.runs[key]

    def _find(self, key: str) -> Any:
        """The run of a key in a list, if it is there."""
        wanted = f"tags.`vlm_tune.key` = '{self.target.study_id}/{key}'"
        return self.client.search_runs([self.experiment_id], wanted, max_results=1)

    def _parent(self) -> str:
        return self._run("study", self.target.study, {})

    def _child(self, number: int) -> str:
        if str(number) in self.runs:
            return self.runs[str(number)]
        parent = self._parent()
        shared = self.client.get_run(parent).data.tags
        tags = {name: value for name, value in shared.items() if name.startswith("version_")}
        return self._run(str(number), f"trial {number}", {**tags, "mlflow.parentRunId": parent, "trial": str(number)})

    def _session(self, event: Event) -> None:
        run = self._parent()
        self._log(run, tags=event["tags"], params=event["params"])
        self.client.update_run(run, status="RUNNING")

    def _started(self, event: Event) -> None:
        run = self._child(event["number"])
        self._log(run, params=event["params"])
        self.client.log_dict(run, event["settings"], "settings.json")
        self.client.update_run(run, status="RUNNING")

    def _report(self, event: Event) -> None:
        *steps, (step, found) = log_entries(event)
        first = {name: found[name] for name in (self.target.metric,) if name in found}  # what MLflow's plots begin with
        self._log(self._child(event["number"]), metrics=[(step, first | found), *steps])

    def _ended(self, event: Event) -> None:
        run = self._child(event["number"])
        tags = {name: event[name] for name in ("error", "lane", "device")}
        tags |= {"end_state": event["state"], "notes": "; ".join(event["notes"])}
        self._log(run, metrics=[(event["step"], final_metrics(event))], tags=tags)
        if event["applied"]:
            self.client.log_dict(run, event["applied"], "applied.json")
        if event["error"]:
            self.client.log_text(run, event["error"], "error.txt")
        self.client.set_terminated(run, STATES[event["state"]], self.when)
        if event["best"] is not None and event["state"] != "INTERRUPTED":
            self._log(self._parent(), metrics=[(event["num_ended"], {"best_so_far": event["best"]})])

    def _confirmed(self, event: Event) -> None:
        self._log(self._child(event["number"]), metrics=[(event["run"], {"confirmed": event["value"]})])

    def _tested(self, event: Event) -> None:
        found = {f"test_{who}_{name}".replace(",", ""): score["value"] for who, scores in event["tests"].items()
                 for name, score in scores.items()}  # fmt: skip
        self._log(self._parent(), metrics=[(event["num_trials"], found)])

    def _study_ended(self, event: Event) -> None:
        run = self._parent()
        tags = {"end_state": event["state"], **event["tags"], "mlflow.note.content": note(self.target.directory)}
        self._log(run, metrics=[(event["num_trials"], event["metrics"])], tags=tags)
        self.client.set_terminated(run, STATES[event["state"]], self.when)
        for path in event["artifacts"]:
            folder = "pictures" if Path(path).parent.name == "pictures" else None
            self.client.log_artifact(run, str(self.target.directory / path), folder)
        if event["adapter"]:
            from tune.registry import log_model

            adapter = self.target.directory / event["adapter"]
            log_model(self.client, run, adapter, register=event["register"], tags=event["model_tags"])

    def _log(
        self,
        run: str,
        metrics: Sequence[tuple[int, Mapping[str, float]]] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Metrics by step, parameters and tags, in as few calls as the store takes. MLflow's parameters never change:
        what a later session raised is in study.json."""
        from mlflow.entities import Metric, Param, RunTag

        if params:
            known = self.client.get_run(run).data.params
            texts = {name: str(value) for name, value in params.items()}
            if any(len(text) > PARAM_LENGTH for text in texts.values()):
                self.client.log_dict(run, texts, "parameters.json")
            new = [Param(name, text[:PARAM_LENGTH]) for name, text in texts.items() if name not in known]
            for first in range(0, len(new), 100):
                self.client.log_batch(run, params=new[first : first + 100])
        found = [Metric(name, float(value), self.when, step) for step, told in metrics for name, value in told.items()]
        for first in range(0, len(found), 1000):
            self.client.log_batch(run, metrics=found[first : first + 1000])
        if tags:
            texts = {name: str(value)[:5000] for name, value in tags.items() if value not in ("", None)}
            self.client.log_batch(run, tags=[RunTag(name, text) for name, text in texts.items()])


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


class StorageSink:
    """The study's files on object storage (`--storage`). Trials copy theirs themselves, from where they run."""

    def __init__(self, target: Target) -> None:
        self.storage = Storage(target.directory, target.storage_uri)

    def deliver(self, event: Event) -> None:
        names = {
            "session": ["splits.json", "journal.jsonl", "plan.json"],
            "report": [],  # its trial tells it again from its state, if the journal is needed before the next end
            "study_ended": ["journal.jsonl", "study.json", "report.html", "pictures", "best_adapter"],
        }.get(event["event"], ["journal.jsonl"])
        try:
            for name in names:
                if (self.storage.directory / name).exists():
                    self.storage.push(self.storage.directory / name)
        except OSError as error:
            raise Away(str(error)) from error


SINKS: dict[str, Callable[[Target], Sink]] = {
    "mlflow": MLflowSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "storage": StorageSink,
}


def target_of(directory: Path, plan: Mapping[str, Any], uri: str = "") -> Target:
    """The target of a study that was begun. uri: another MLflow store than the study's own."""
    study = plan["settings"]["study"]
    uri = uri or plan["tracking_uri"]
    return Target(
        study=directory.name,
        study_id=plan["study_id"],
        directory=directory,
        experiment=study["experiment"],
        metric=plan["goals"][0][0],
        uri=with_credentials(uri),
        report_to=(*study["report_to"], *(["storage"] if study["storage"] else [])),
        storage_uri=Storage.under(study["storage"], directory).uri,
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
    if bare(options.mlflow_uri) != options.mlflow_uri:
        print("--mlflow-uri must hold no key or password: give the whole address as MLFLOW_TRACKING_URI, too",
              file=sys.stderr)  # fmt: skip
        return 2
    lock = StudyLock(directory)
    if not lock.acquire():
        print(f"{directory.name} is running: it tells its stores itself", file=sys.stderr)
        return 2
    plan = json.loads((directory / "plan.json").read_text())
    tracking = Tracking(target_of(directory, plan, options.mlflow_uri), read_events(directory / "journal.jsonl"), 1.0)
    left = tracking.close(timeout_s=24 * 3600)  # as long as the stores answer
    for error in tracking.errors:
        print(f"refused by {error}", file=sys.stderr)
    for name in plan["settings"]["study"]["report_to"]:
        waits = f"{left.get(name)} records wait, it cannot be reached: {tracking.away.get(name, 'no answer')}"
        print(f"{name}: {waits if name in left else 'all records told'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
