"""MLflow: writes events to a run per study and a child run per trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tune.records.control import sentence
from tune.records.end_state import IN_MLFLOW
from tune.records.journal import Event
from tune.tracking.calls import SLOW_S, Refusal, StoreUnavailable, final_metrics, log_entries, reason_of, trial_params
from tune.tracking.mlflow_store import MLflowStore
from tune.tracking.note import study_note
from tune.tracking.runs_view import datasets, experiment_tags
from tune.tracking.target import Target, inside

PARAM_LENGTH = 500  # of a parameter's text in MLflow; the whole text is in an artifact


class MLflowSink:
    """Writes each event to its run. A call that is refused is recorded, and the event's other calls are made."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.store = MLflowStore(target)
        self.client = self.store.client
        self.refused: list[Refusal] = []  # calls of the current event
        self.missing_files: set[str] = set()  # named by events, but not in the study's folder
        self.num_slow = 0  # files in a row that were refused slowly
        self.pause_until = 0.0
        self.slow_reason = ""
        self.epochs: dict[str, dict[int, int]] = {}  # ms at which a run's epochs were recorded, by optimizer step
        self.timestamp = 0  # ms of the current event: a run that is recorded late did not start late

    def deliver(self, event: Event) -> list[Refusal]:
        self.store.check_file()
        self.refused = []
        self.timestamp = int(event["time"] * 1000)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler:
            handler(event)
        return self.refused

    # -------------------------------------------------------------------------------- events

    def _parent(self) -> str:
        return self.store.run("study", self.target.study, {}, self.timestamp)

    def _child(self, number: int) -> str:
        if str(number) in self.store.run_ids:
            return self.store.run_ids[str(number)]
        parent = self._parent()
        study = self.store.call(lambda: self.client.get_run(parent))
        tags = {name: value for name, value in study.data.tags.items() if name == "versions"}
        tags |= {"mlflow.parentRunId": parent, "trial": str(number)}
        run = self.store.run(str(number), f"trial {number}", tags, self.timestamp)
        seen = [data for data in study.inputs.dataset_inputs if all(tag.value != "test" for tag in data.tags)]
        if seen:
            self._try("datasets", lambda: self.client.log_inputs(run, seen))
        return run

    def _on_session(self, event: Event) -> None:
        run = self._parent()
        self._try("state", lambda: self.client.update_run(run, status="RUNNING"))
        versions = {name: text for name, text in event["tags"].items() if name.startswith("version_")}
        text = ", ".join(f"{name.removeprefix('version_')} {text}" for name, text in versions.items())
        others = {name: text for name, text in event["tags"].items() if name not in versions}
        self._tags(run, others | {"versions": text})
        self._params(run, event["params"])
        if inputs := datasets(self.target, event["tags"], event["params"]):
            self._try("datasets", lambda: self.client.log_inputs(run, inputs))
        self._view(())

    def _view(self, searched: Iterable[str]) -> None:
        """Bring the study's saved view, and the experiment's kind and description, up to date."""
        parent, experiment = self._parent(), self.store.experiment_id

        def update() -> None:
            tags = self.client.get_experiment(experiment).tags
            for name, text in experiment_tags(tags, self.target, parent, searched, self.timestamp).items():
                self.client.set_experiment_tag(experiment, name, text)

        self._try("view", update)

    def _on_started(self, event: Event) -> None:
        run = self._child(event["number"])
        self._try("state", lambda: self.client.update_run(run, status="RUNNING"))
        self._params(run, trial_params(event))
        self._view(event.get("searched", ()))
        if "repeats" in event:
            self._tags(run, {"repeats": str(event["repeats"])})
        self._artifact("settings.json", lambda: self.client.log_dict(run, event["settings"], "settings.json"))

    def _on_report(self, event: Event) -> None:
        *steps, (step, metrics) = log_entries(event)
        goal = {name: metrics[name] for name in (self.target.metric,) if name in metrics}  # MLflow plots the first one
        run = self._child(event["number"])
        if run not in self.epochs:
            times = self.epochs[run] = {}
            history = partial(self.client.get_metric_history, run, "epoch")
            self._try("epochs", lambda: times.update({metric.step: metric.timestamp for metric in history()}))
        # An epoch that the journal lost is trained again, to the same values: under the same time, MLflow keeps one.
        self.timestamp = self.epochs[run].setdefault(step, self.timestamp)
        self._metrics(run, [(step, goal | metrics), *steps])

    def _on_ended(self, event: Event) -> None:
        run = self._child(event["number"])
        self._try("state", lambda: self.client.set_terminated(run, IN_MLFLOW[event["state"]], self.timestamp))
        tags = {name: event[name] for name in ("error", "lane", "device")}
        self._tags(run, tags | {"end_state": event["state"], "notes": "; ".join(event["notes"])})
        self._metrics(run, [(event["step"], final_metrics(event))])
        if event["best"] is not None and event["state"] != "INTERRUPTED":
            self._metrics(self._parent(), [(event["num_ended"], {"best_so_far": event["best"]})])
        if event["applied"]:
            self._artifact("applied.json", lambda: self.client.log_dict(run, event["applied"], "applied.json"))
        if event["error"]:
            self._artifact("error.txt", lambda: self.client.log_text(run, event["error"], "error.txt"))

    def _on_control(self, event: Event) -> None:
        self._tags(self._parent(), {f"control_{event['seq']:06}": sentence(event)})

    def _on_confirmed(self, event: Event) -> None:
        self._metrics(self._child(event["number"]), [(event["run"], {"confirmed": event["value"]})])

    def _on_tested(self, event: Event) -> None:
        metrics = {
            f"test_{who}_{name}".replace(",", ""): score["value"]
            for who, scores in event["tests"].items()
            for name, score in scores.items()
        }
        self._metrics(self._parent(), [(event["num_trials"], metrics)])

    def _on_study_ended(self, event: Event) -> None:
        run, directory = self._parent(), self.target.directory
        self._try("state", lambda: self.client.set_terminated(run, IN_MLFLOW[event["state"]], self.timestamp))
        self._tags(run, {"end_state": event["state"], **event["tags"]})
        self._metrics(run, [(event["num_trials"], event["metrics"])])
        self._try("note", lambda: self.client.set_tag(run, "mlflow.note.content", study_note(directory)[:5000]))
        for name in event["artifacts"]:
            if path := self._file(name):
                folder = "pictures" if path.parent.name == "pictures" else None
                call = partial(self.client.log_artifact, run, str(path), folder)
                self._artifact(str(name), call, path.stat().st_size)
        if event["adapter"] and (adapter := self._file(event["adapter"])):
            from tune.tracking.registry import log_model

            num_bytes = sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file())
            options = {"register": event["register"], "tags": event["model_tags"]}
            self._artifact("model", lambda: log_model(self.client, run, adapter, **options), num_bytes)

    def _file(self, name: object) -> Path | None:
        """The path of a file or folder of an event; None if it is missing or must not be sent, which is recorded."""
        try:
            path = inside(self.target.directory, name)
        except ValueError as error:
            self.refused.append((str(name), reason_of(error)))
            return None
        if path.exists():
            return path
        self.missing_files.add(str(name))
        return None

    # -------------------------------------------------------------------------------- calls that may be refused

    def _try(self, what: str, call: Callable[[], Any], num_bytes: int = 0) -> bool:
        """Make one call of an event. Returns False, and records the refusal, if the store refuses it."""
        try:
            self.store.call(call, num_bytes)
        except StoreUnavailable:
            raise
        except Exception as error:  # artifact stores raise errors of many libraries; all are recorded
            self.refused.append((what, reason_of(error)))
            return False
        return True

    def _artifact(self, what: str, call: Callable[[], Any], num_bytes: int = 0) -> None:
        """Store a file.

        After two files in a row were refused slowly, none is tried for a minute: each could wait as long for the same
        error, and delay the end states of later trials.
        """
        if self.num_slow >= 2 and time.monotonic() < self.pause_until:
            self.refused.append((what, self.slow_reason))
            return
        began = time.monotonic()
        if self._try(what, call, num_bytes):
            self.num_slow = 0
        elif time.monotonic() - began > SLOW_S:
            self.num_slow += 1
            self.pause_until, self.slow_reason = time.monotonic() + 60, self.refused[-1][1]

    def _params(self, run: str, params: Mapping[str, Any]) -> None:
        """Log the parameters that the run lacks. MLflow never changes one: values that a resumed study raised are in
        study.json."""
        from mlflow.entities import Param

        texts = {name: str(value) for name, value in params.items()}
        if any(len(text) > PARAM_LENGTH for text in texts.values()):
            self._artifact("parameters.json", lambda: self.client.log_dict(run, texts, "parameters.json"))
        stored = self.store.call(lambda: self.client.get_run(run)).data.params
        new = [Param(name, text[:PARAM_LENGTH]) for name, text in texts.items() if name not in stored]
        self._batch(run, "params", new)

    def _metrics(self, run: str, metrics: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics, given by optimizer step."""
        from mlflow.entities import Metric

        entities = []
        for step, values in metrics:
            for name, value in values.items():
                try:
                    entities.append(Metric(name, float(value), self.timestamp, step))
                except (TypeError, ValueError) as error:
                    self.refused.append((f"metric {name}", reason_of(error)))
        self._batch(run, "metrics", entities)

    def _tags(self, run: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        texts = {name: str(value)[:5000] for name, value in tags.items() if value not in ("", None)}
        self._batch(run, "tags", [RunTag(name, text) for name, text in texts.items()])

    def _batch(self, run: str, what: str, entities: Sequence[Any]) -> None:
        """Log metrics, params or tags. MLflow refuses a whole batch for one bad entity: then each is logged alone."""
        limit = 1000 if what == "metrics" else 100
        for first in range(0, len(entities), limit):
            batch = entities[first : first + limit]
            num_refused = len(self.refused)
            if self._try(what, self._log(run, what, batch)) or not self._is_active(run):
                continue
            del self.refused[num_refused:]
            for entity in batch:
                self._try(f"{what[:-1]} {entity.key}", self._log(run, what, [entity]))

    def _log(self, run: str, what: str, entities: Sequence[Any]) -> Callable[[], Any]:
        options: dict[str, Any] = {what: entities}
        return partial(self.client.log_batch, run, **options)

    def _is_active(self, run: str) -> bool:
        """Whether a run accepts records."""
        try:
            return self.store.call(lambda: self.client.get_run(run)).info.lifecycle_stage == "active"
        except StoreUnavailable:
            raise
        except Exception:  # the refusal is recorded already
            return False
