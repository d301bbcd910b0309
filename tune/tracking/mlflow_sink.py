"""MLflow: a run per study, a child run per trial."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tune.config.uris import local_path
from tune.records.end_state import IN_MLFLOW, EndState
from tune.records.journal import Event
from tune.tracking.calls import (
    CALL_S,
    SLOW_S,
    UPLOAD_BYTES_PER_S,
    Refusal,
    StoreLost,
    StoreUnavailable,
    bounded,
    final_metrics,
    log_entries,
    prepare_mlflow,
    reason_of,
    refuses,
)
from tune.tracking.target import Target, inside

PARAM_LENGTH = 500  # of a parameter's text in MLflow; the whole is in an artifact


def note(directory: Path) -> str:
    """A study's end in short, as markdown; empty when it ended before its study.json."""
    from tune.results.intervals import verdict
    from tune.results.summary import number_text, with_interval

    path = inside(directory, "study.json")
    study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if study.get("winner") is None:
        return ""
    metric, trials = study["metric"], {trial["number"]: trial for trial in study["trials"]}
    states = [trial["state"] for trial in trials.values()]
    counts = ", ".join(f"{states.count(state)} {state.lower()}" for state in EndState if state in states)
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
        prepare_mlflow()
        from mlflow import MlflowClient

        self.target = target
        self.path = local_path(target.uri)
        self.refused: list[Refusal] = []
        self.left_out: set[str] = set()  # files that events name, but the folder lacks
        self.num_slow = 0  # files in a row that were refused slowly
        self.pause_until = 0.0
        self.slow_reason = ""
        self.runs: dict[str, str] = {}
        self.epochs: dict[str, dict[int, int]] = {}  # ms at which a run's epochs were recorded, by optimizer step
        self.when = 0  # ms of the event that is delivered: a run that is recorded late was not begun late
        self.client: MlflowClient = self._open(lambda: MlflowClient(target.uri))
        self.experiment_id: str = self._open(self._experiment)
        self.inode = self._inode()

    def deliver(self, event: Event) -> list[Refusal]:
        self.check_file()
        self.refused = []
        self.when = int(event["time"] * 1000)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler:
            handler(event)
        return self.refused

    # -------------------------------------------------------------------------------- calls

    def _bounded(self, call: Callable[[], Any], num_bytes: int = 0) -> Any:
        """Run a call, at most for the time that it may take. A local file has no server that could hold it."""
        if self.path is not None:
            return call()
        limit = max(CALL_S, 1.5 * float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
        return bounded(call, limit + num_bytes / UPLOAD_BYTES_PER_S)

    def _open(self, call: Callable[[], Any]) -> Any:
        """Run a call before the store has answered once. Raises StoreUnavailable unless the store refuses it."""
        try:
            return self._bounded(call)
        except Exception as error:
            if refuses(error):
                raise
            raise StoreUnavailable(reason_of(error)) from error

    def _call(self, call: Callable[[], Any], num_bytes: int = 0) -> Any:
        """Run a call. Raises StoreUnavailable when the store does not answer, or else what the store refuses it with.

        An error that may not be the request's fault counts as refused only if it comes twice, and the store answers
        another question in between: nothing may block all later records for ever.
        """
        for last in (False, True):
            try:
                return self._bounded(call, num_bytes)
            except Exception as error:
                if last or refuses(error):
                    raise
                self._probe(error)
        raise AssertionError

    def _probe(self, error: Exception) -> None:
        """Raises StoreUnavailable for `error` when the store does not answer now."""
        try:
            self._bounded(lambda: self.client.get_experiment(self.experiment_id))
        except Exception as other:
            if not refuses(other):
                raise StoreUnavailable(reason_of(error)) from error

    def _try(self, what: str, call: Callable[[], Any], num_bytes: int = 0) -> bool:
        """Run one call of an event; if it is refused, note that and go on."""
        try:
            self._call(call, num_bytes)
        except StoreUnavailable:
            raise
        except Exception as error:  # artifact stores raise errors of many libraries; all stay on record
            self.refused.append((what, reason_of(error)))
            return False
        return True

    def _inode(self) -> int:
        return self.path.stat().st_ino if self.path and self.path.is_file() else 0

    def check_file(self) -> None:
        """Raises StoreLost when the store's file was removed or replaced: SQLite goes on writing to the old one."""
        if self.inode and self._inode() != self.inode:
            raise StoreLost(f"{self.path} was removed or replaced while it was in use")

    def _artifact(self, what: str, call: Callable[[], Any], num_bytes: int = 0) -> None:
        """Store a file. After two in a row were refused slowly, none is tried for a minute: each could wait as long for
        the same error, and the end states of later trials behind it."""
        if self.num_slow >= 2 and time.monotonic() < self.pause_until:
            self.refused.append((what, self.slow_reason))
            return
        began = time.monotonic()
        if self._try(what, call, num_bytes):
            self.num_slow = 0
        elif time.monotonic() - began > SLOW_S:
            self.num_slow += 1
            self.pause_until, self.slow_reason = time.monotonic() + 60, self.refused[-1][1]

    # -------------------------------------------------------------------------------- experiment and runs

    def _experiment(self) -> str:
        """Id of the experiment: the one of its name, or of another name if the study's run lies there."""
        from mlflow.exceptions import MlflowException

        name = self.target.experiment
        found = self.client.get_experiment_by_name(name)
        if found and found.lifecycle_stage != "active":
            raise ValueError(deleted_experiment(name, found.experiment_id))
        if found and self._find("study", [found.experiment_id]):
            return found.experiment_id
        if (self.target.directory / "tracking.json").exists():  # the study has begun: has its experiment been renamed?
            others = [one.experiment_id for one in self.client.search_experiments(max_results=1000)]
            if elsewhere := self._find("study", others):
                return elsewhere[0].info.experiment_id
        if found:
            return found.experiment_id
        location = artifact_location() if self.path else None
        try:
            return self.client.create_experiment(name, location)
        except MlflowException as error:
            found = self.client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
            if not found:
                raise
            return found.experiment_id  # another study was faster

    def _find(self, key: str, experiments: list[str]) -> Any:
        """The run of a key in a list, if it is there."""
        wanted = f"tags.`vlm_tune.key` = '{self.target.study_id}/{key}'"
        return self.client.search_runs(experiments, wanted, max_results=1) if experiments else []

    def _run(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """The run of a key, made where there is none."""

        def find_or_make() -> str:
            if found := self._find(key, [self.experiment_id]):
                parent = tags.get("mlflow.parentRunId")
                if parent and found[0].data.tags.get("mlflow.parentRunId") != parent:  # that one was deleted
                    self.client.set_tag(found[0].info.run_id, "mlflow.parentRunId", parent)
                return found[0].info.run_id
            own = {"vlm_tune.key": f"{self.target.study_id}/{key}", "study": self.target.study, **tags}
            return self.client.create_run(self.experiment_id, self.when, own, name).info.run_id

        if key not in self.runs:
            self.runs[key] = self._call(find_or_make)
        return self.runs[key]

    def _parent(self) -> str:
        return self._run("study", self.target.study, {})

    def _child(self, number: int) -> str:
        if str(number) in self.runs:
            return self.runs[str(number)]
        parent = self._parent()
        shared = self._call(lambda: self.client.get_run(parent)).data.tags
        tags = {name: value for name, value in shared.items() if name.startswith("version_")}
        return self._run(str(number), f"trial {number}", {**tags, "mlflow.parentRunId": parent, "trial": str(number)})

    def missing(self, events: Sequence[Event], again: set[int]) -> set[int]:
        """Indices of the delivered events that must be delivered once more.

        These are all events of a run that the store does not hold as delivered (the run itself, its state, its epochs,
        the names of its parameters), and of a run with an event in `again`: its states must come in their order.
        """
        stored = self._open(self._stored_runs)
        by_run: dict[str, list[int]] = {}
        for index, event in enumerate(events):
            if isinstance(event, dict):
                by_run.setdefault(str(event.get("number", "study")), []).append(index)
        if events and "study" not in stored:
            return set(range(len(events)))
        found: set[int] = set()
        for key, indices in by_run.items():
            own = [events[index] for index in indices]
            if again & set(indices) or not self._open(partial(self._holds, stored.get(key), own)):
                found |= set(indices)
        return found | again

    def _stored_runs(self) -> dict[str, Any]:
        """The study's runs by their keys."""
        wanted = f"tags.`vlm_tune.key` LIKE '{self.target.study_id}/%'"
        found: dict[str, Any] = {}
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], wanted, max_results=1000, page_token=token)
            found |= {run.data.tags["vlm_tune.key"].rpartition("/")[2]: run for run in page}
            token = page.token
            if not token:
                return found

    def _holds(self, run: Any, events: Sequence[Event]) -> bool:
        """Whether a run holds what its events have delivered."""
        if run is None:
            return False
        params = {name for event in events if isinstance(event.get("params"), dict) for name in event["params"]}
        told = [event.get("epoch") for event in events if event.get("event") == "report"]
        epochs = {epoch for epoch in told if isinstance(epoch, int)}
        states = [
            IN_MLFLOW.get(str(event.get("state"))) if str(event["event"]).endswith("ended") else "RUNNING"
            for event in events
            if event.get("event") in ("session", "started", "ended", "study_ended")
        ]
        if not params <= set(run.data.params) or (states and run.info.status != states[-1]):
            return False
        return not epochs or epochs <= {m.value for m in self.client.get_metric_history(run.info.run_id, "epoch")}

    # -------------------------------------------------------------------------------- events

    def _on_session(self, event: Event) -> None:
        run = self._parent()
        self._try("state", lambda: self.client.update_run(run, status="RUNNING"))
        self._tags(run, event["tags"])
        self._params(run, event["params"])

    def _on_started(self, event: Event) -> None:
        run = self._child(event["number"])
        self._try("state", lambda: self.client.update_run(run, status="RUNNING"))
        self._params(run, event["params"])
        self._artifact("settings.json", lambda: self.client.log_dict(run, event["settings"], "settings.json"))

    def _on_report(self, event: Event) -> None:
        *steps, (step, found) = log_entries(event)
        first = {name: found[name] for name in (self.target.metric,) if name in found}  # what MLflow's plots begin with
        run = self._child(event["number"])
        if run not in self.epochs:
            told = self.epochs[run] = {}
            history = partial(self.client.get_metric_history, run, "epoch")
            self._try("epochs", lambda: told.update({metric.step: metric.timestamp for metric in history()}))
        # An epoch that the journal lost is trained again, to the same values: under the same time, MLflow keeps one.
        self.when = self.epochs[run].setdefault(step, self.when)
        self._metrics(run, [(step, first | found), *steps])

    def _on_ended(self, event: Event) -> None:
        run = self._child(event["number"])
        self._try("state", lambda: self.client.set_terminated(run, IN_MLFLOW[event["state"]], self.when))
        tags = {name: event[name] for name in ("error", "lane", "device")}
        self._tags(run, tags | {"end_state": event["state"], "notes": "; ".join(event["notes"])})
        self._metrics(run, [(event["step"], final_metrics(event))])
        if event["best"] is not None and event["state"] != "INTERRUPTED":
            self._metrics(self._parent(), [(event["num_ended"], {"best_so_far": event["best"]})])
        if event["applied"]:
            self._artifact("applied.json", lambda: self.client.log_dict(run, event["applied"], "applied.json"))
        if event["error"]:
            self._artifact("error.txt", lambda: self.client.log_text(run, event["error"], "error.txt"))

    def _on_confirmed(self, event: Event) -> None:
        self._metrics(self._child(event["number"]), [(event["run"], {"confirmed": event["value"]})])

    def _on_tested(self, event: Event) -> None:
        found = {f"test_{who}_{name}".replace(",", ""): score["value"] for who, scores in event["tests"].items()
                 for name, score in scores.items()}  # fmt: skip
        self._metrics(self._parent(), [(event["num_trials"], found)])

    def _on_study_ended(self, event: Event) -> None:
        run, directory = self._parent(), self.target.directory
        self._try("state", lambda: self.client.set_terminated(run, IN_MLFLOW[event["state"]], self.when))
        self._tags(run, {"end_state": event["state"], **event["tags"]})
        self._metrics(run, [(event["num_trials"], event["metrics"])])
        self._try("note", lambda: self.client.set_tag(run, "mlflow.note.content", note(directory)[:5000]))
        for name in event["artifacts"]:
            if path := self._file(name):
                folder = "pictures" if path.parent.name == "pictures" else None
                call = partial(self.client.log_artifact, run, str(path), folder)
                self._artifact(str(name), call, path.stat().st_size)
        if event["adapter"] and (adapter := self._file(event["adapter"])):
            self._model(run, adapter, event)

    def _file(self, name: object) -> Path | None:
        """A file or folder that an event names; None, which is noted, if it must not or cannot be sent."""
        try:
            path = inside(self.target.directory, name)
        except ValueError as error:
            self.refused.append((str(name), reason_of(error)))
            return None
        if path.exists():
            return path
        self.left_out.add(str(name))
        return None

    def _model(self, run: str, adapter: Path, event: Event) -> None:
        """Log the winner's adapter as a model."""
        from tune.tracking.registry import log_model

        num_bytes = sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file())
        call = partial(log_model, self.client, run, adapter, register=event["register"], tags=event["model_tags"])
        self._artifact("model", call, num_bytes)

    # -------------------------------------------------------------------------------- batches

    def _params(self, run: str, params: Mapping[str, Any]) -> None:
        """MLflow's parameters never change: what a later session raised is in study.json."""
        from mlflow.entities import Param

        texts = {name: str(value) for name, value in params.items()}
        if any(len(text) > PARAM_LENGTH for text in texts.values()):
            self._artifact("parameters.json", lambda: self.client.log_dict(run, texts, "parameters.json"))
        known = self._call(lambda: self.client.get_run(run)).data.params
        self._batch(
            run, "params", [Param(name, text[:PARAM_LENGTH]) for name, text in texts.items() if name not in known]
        )

    def _metrics(self, run: str, metrics: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Metrics by step."""
        from mlflow.entities import Metric

        found = []
        for step, values in metrics:
            for name, value in values.items():
                try:
                    found.append(Metric(name, float(value), self.when, step))
                except (TypeError, ValueError) as error:
                    self.refused.append((f"metric {name}", reason_of(error)))
        self._batch(run, "metrics", found)

    def _tags(self, run: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        texts = {name: str(value)[:5000] for name, value in tags.items() if value not in ("", None)}
        self._batch(run, "tags", [RunTag(name, text) for name, text in texts.items()])

    def _batch(self, run: str, what: str, entities: Sequence[Any]) -> None:
        """Log metrics, params or tags in as few calls as the store takes."""
        limit = 1000 if what == "metrics" else 100
        for first in range(0, len(entities), limit):
            self._part(run, what, entities[first : first + limit])

    def _part(self, run: str, what: str, part: Sequence[Any]) -> None:
        """Log one batch. MLflow refuses it whole for one bad entity: then its halves are tried."""
        parts: dict[str, Any] = {what: part}
        try:
            self._call(lambda: self.client.log_batch(run, **parts))
        except StoreUnavailable:
            raise
        except Exception as error:
            if len(part) == 1:
                self.refused.append((f"{what[:-1]} {part[0].key}", reason_of(error)))
            elif self._is_active(run):
                middle = len(part) // 2
                self._part(run, what, part[:middle])
                self._part(run, what, part[middle:])
            else:
                self.refused.append((what, reason_of(error)))

    def _is_active(self, run: str) -> bool:
        """Whether a run can be written to at all."""
        try:
            return self._call(lambda: self.client.get_run(run)).info.lifecycle_stage == "active"
        except StoreUnavailable:
            raise
        except Exception:  # that it is refused is on record already
            return False


def artifact_location() -> str | None:
    """Where an experiment of a local store keeps its artifacts; None: MLflow's own default.

    MLflow unquotes its default, so a working folder with a `%` in its name would get another one beside it.
    """
    folder = Path.cwd() / "mlruns"
    return (folder / f"{time.time_ns()}").as_uri() if "%" in str(folder) else None


def deleted_experiment(name: str, experiment_id: str) -> str:
    """The sentence about an experiment in MLflow's trash, which takes no records."""
    return (
        f"the MLflow experiment must be active, but {name!r} was deleted: restore it with "
        f"`mlflow experiments restore --experiment-id {experiment_id}`, or give another --experiment"
    )
