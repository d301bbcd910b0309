"""Sinks for a study's events beside MLflow: TensorBoard, W&B, object storage.

An event makes several calls to a store. A refused call costs that call only: `deliver` returns it with its reason, and
`tune.tracking.delivery` records it. The end state of a run is always the first call.
"""

from __future__ import annotations

from typing import Any, Protocol

from train_fn.support.storage import Storage
from tune.records.end_state import IN_WANDB
from tune.records.journal import Event
from tune.tracking.calls import Refusal, StoreUnavailable, log_entries, reason_of
from tune.tracking.target import Target, inside


class Sink(Protocol):
    """A store that receives events, all from one thread."""

    def deliver(self, event: Event) -> list[Refusal]:
        """Write one event; a second delivery changes nothing.

        Returns the refused calls. Raises StoreUnavailable if a retry may succeed.
        """


class TensorBoardSink:
    """Writes TensorBoard event files to `trials/0007/runs/`, where the fine-tuning guide's monitoring reads them."""

    def __init__(self, target: Target) -> None:
        self.directory = target.directory
        self.writers: dict[int, Any] = {}

    def deliver(self, event: Event) -> list[Refusal]:
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
        return []

    def _writer(self, number: int) -> Any:
        from tensorboardX import SummaryWriter

        if number not in self.writers:
            folder = inside(self.directory, f"trials/{number:04d}/runs", content=False)
            folder.mkdir(parents=True, exist_ok=True)
            self.writers[number] = SummaryWriter(str(folder))
        return self.writers[number]


class WandbSink:
    """Writes a W&B run per trial, grouped by study. WANDB_MODE=offline keeps them on disk."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.runs: dict[int, Any] = {}

    def deliver(self, event: Event) -> list[Refusal]:
        if event["event"] == "started":
            self._run(event["number"]).config.update(event["params"], allow_val_change=True)
        elif event["event"] == "report":
            for step, metrics in log_entries(event):
                self._run(event["number"]).log(metrics, step=step)
        elif event["event"] == "ended":
            run = self._run(event["number"])
            run.summary.update({"end_state": event["state"], "error": event["error"]})
            run.finish(exit_code=IN_WANDB[event["state"]])
            del self.runs[event["number"]]
        return []

    def _run(self, number: int) -> Any:
        import wandb

        if number not in self.runs:
            # Without this folder W&B would write to the system's temporary one and only log a warning.
            inside(self.target.directory, "wandb", content=False).mkdir(exist_ok=True)
            self.runs[number] = wandb.init(
                project=self.target.experiment,
                group=self.target.study,
                dir=str(self.target.directory),
                name=f"trial {number}",
                id=f"{self.target.study_id}-{number}",  # so that a resumed study finds it
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True),
            )
        return self.runs[number]


class StorageSink:
    """Copies the study's files to object storage (`--storage`). Each trial copies its own from its node."""

    def __init__(self, target: Target) -> None:
        self.storage = Storage(target.directory, target.storage_uri)
        self.may_write = target.may_write

    def deliver(self, event: Event) -> list[Refusal]:
        names = {
            "session": ["splits.json", "journal.jsonl", "plan.json"],
            "report": [],  # a lost report is reported again from the trial's saved state
            "study_ended": ["journal.jsonl", "study.json", "report.html", "pictures", "best_adapter"],
        }.get(event["event"], ["journal.jsonl"])
        refused: list[Refusal] = []
        for name in names:
            try:
                if not self.may_write():
                    raise StoreUnavailable("another machine runs the study")
                path = inside(self.storage.directory, name)
                if path.exists():
                    self.storage.push(path)
            except OSError as error:
                raise StoreUnavailable(str(error)) from error
            except ValueError as error:
                refused.append((name, reason_of(error)))
        return refused
