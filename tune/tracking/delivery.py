"""Delivery of the journal's events to MLflow, TensorBoard, W&B and object storage, in order, by threads of the driver.

Workers never talk to a tracking store, and the search never waits for one. tracking.json, beside the journal, records
what each store has received and refused. The rest is delivered later by the same study, by `--resume`, or by

    python -m tune.tracking sync STUDY

Delivering an event twice changes nothing, so a kill between a delivery and its record loses and duplicates nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.support.files import DamagedFile, read_json, write_json
from tune.config.uris import strip_credentials
from tune.records.journal import Event
from tune.tracking.calls import Refusal, StoreLost, StoreUnavailable, reason_of
from tune.tracking.mlflow_sink import MLflowSink
from tune.tracking.runs_view import runs_address
from tune.tracking.sinks import Sink, StorageSink, TensorBoardSink, WandbSink
from tune.tracking.target import Target, sync_command, target_of

FORMAT = 2  # of tracking.json
CLOSE_S = 60.0  # time limit of a study's end for its stores


@dataclass
class Delivery:
    """What a store has received of a study."""

    name: str
    """mlflow, tensorboard, wandb or storage."""
    key: str
    """Its key in tracking.json: a URI without credentials, or the name."""
    position: int = 0
    """Index of the first event that is not delivered yet."""
    again: list[int] = field(default_factory=list)
    """Indices of events to deliver again: the store has lost them, or refused some of their calls."""
    refused: dict[int, list[Refusal]] = field(default_factory=dict)
    """The refused calls, by the event's index."""
    sink: Sink | None = None
    experiment_id: str = ""
    """Of the experiment in MLflow; empty: not known yet."""
    unavailable: str = ""
    """Why the last attempt could not use the store; empty: it could."""

    @property
    def reasons(self) -> list[str]:
        """The refused calls, each reason once; reasons may differ in an id that is part of a path."""
        first: dict[str, str] = {}
        for calls in list(self.refused.values()):
            for call, reason in calls:
                first.setdefault(re.sub("[0-9a-f]{32}", "", reason), f"{call}: {reason}")
        return list(first.values())


def seq_of(events: Sequence[Event], index: int) -> int:
    """The number that identifies an event in tracking.json: its `seq`, or its index in an old journal."""
    event = events[index]
    seq = event.get("seq") if isinstance(event, dict) else None
    return seq if isinstance(seq, int) and not isinstance(seq, bool) else index


def index_of(events: Sequence[Event], seq: int) -> int:
    """Index of the first event whose `seq_of` is at least `seq`."""
    return bisect.bisect_left(range(len(events)), seq, key=lambda index: seq_of(events, index))


class Tracking:
    """Delivers the journal's events to each store, each in a thread of its own."""

    def __init__(self, target: Target, events: Sequence[Event], retry_s: float = 5.0) -> None:
        self.damage = ""  # what is wrong with tracking.json
        self._events = events  # the journal's own list: it grows
        self._target = target
        self._retry_s = retry_s
        self._path = target.directory / "tracking.json"
        self._stored: dict[str, Any] = {}  # of all stores, including those that this process does not use
        try:
            self._stored = read_deliveries(self._path, target)
        except (OSError, DamagedFile) as error:
            self.damage = f"{error}: every record is delivered again"
        self._deliveries = [self._read(name) for name in target.report_to]
        self._changed = threading.Condition()
        self._writing = threading.Lock()  # not `_changed`: `notify` must not wait for a disk
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(delivery,), daemon=True) for delivery in self._deliveries
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str) -> Delivery:
        """A store's delivery as tracking.json records it."""
        uris = {"mlflow": strip_credentials(self._target.uri), "storage": strip_credentials(self._target.storage_uri)}
        delivery = Delivery(name, uris.get(name, name))
        stored = self._stored.get(delivery.key, {"next": 0, "again": [], "refused": []})
        last = seq_of(self._events, len(self._events) - 1) if self._events else -1
        if stored["next"] > last + 1:
            self.damage = (
                f"{self._path} counts {stored['next']} records, but the journal has fewer: all are delivered again"
            )
            return delivery
        delivery.experiment_id = str(stored.get("experiment_id", ""))
        delivery.position = index_of(self._events, stored["next"])
        seqs = {seq_of(self._events, index): index for index in range(delivery.position)}
        delivery.again = sorted(seqs[seq] for seq in stored["again"] if seq in seqs)
        for entry in stored["refused"]:
            if entry["seq"] in seqs:
                delivery.refused.setdefault(seqs[entry["seq"]], []).append((entry["call"], entry["reason"]))
        return delivery

    def notify(self) -> None:
        """Wake the threads: the journal has new events."""
        with self._changed:
            self._changed.notify_all()

    @property
    def errors(self) -> list[str]:
        """The refused calls of all stores: one line for each reason."""
        return [f"{delivery.name}: {reason}" for delivery in self._deliveries for reason in delivery.reasons]

    def close(self, timeout_s: float = CLOSE_S) -> dict[str, int]:
        """Wait until each store has received everything or has failed once more, at most `timeout_s` seconds.

        Returns the number of events that each store still lacks, in whole or in part.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return {delivery.name: count for delivery in self._deliveries if (count := self._waiting(delivery))}

    def reason(self, name: str) -> str:
        """Why a store's records wait."""
        delivery = next(delivery for delivery in self._deliveries if delivery.name == name)
        refused = delivery.reasons
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        texts = [delivery.unavailable] if delivery.unavailable else []
        texts += [f"refused: {'; '.join(refused[:3])}{more}"] if refused else []
        return ", ".join(texts) or "it cannot be reached: no answer in time"

    def notes(self, timeout_s: float = CLOSE_S) -> list[str]:
        """`close`, and a sentence for each store that still waits for records."""
        notes = [self.damage] if self.damage else []
        for name, count in self.close(timeout_s).items():
            notes.append(
                f"{name}: {count} records wait, {self.reason(name)} (waited {timeout_s:g} s at most). "
                f"Deliver them with {sync_command(self._target)}"
            )
        return notes + self.missing_files

    @property
    def runs_address(self) -> str:
        """The address of the study's trials in MLflow's pages; empty: not known."""
        uri = strip_credentials(self._target.uri)
        ids = [delivery.experiment_id for delivery in self._deliveries if delivery.name == "mlflow"]
        return runs_address(uri, ids[0], self._target.study_id) if ids else ""

    @property
    def missing_files(self) -> list[str]:
        """A sentence for each store about files that the study's folder no longer holds."""
        return [
            f"{delivery.name} was not sent {', '.join(names)}: the study's folder does not hold it"
            for delivery in self._deliveries
            if (names := sorted(getattr(delivery.sink, "missing_files", ())))
        ]

    def _waiting(self, delivery: Delivery) -> int:
        with self._changed:
            partly = set(delivery.again) | set(delivery.refused)
            return len(self._events) - delivery.position + len(partly)

    def _run(self, delivery: Delivery) -> None:
        while True:
            closing = self._closing
            done = self._deliver(delivery)
            if closing:
                return
            with self._changed:
                if done and delivery.position == len(self._events) and not self._closing:
                    self._changed.wait(self._retry_s)
                elif not done:
                    self._changed.wait_for(lambda: self._closing, self._retry_s)

    def _deliver(self, delivery: Delivery) -> bool:
        """Deliver everything that a store lacks. Returns False if the store cannot be used now."""
        try:
            if delivery.sink is None:
                self._open(delivery)
            assert delivery.sink
            while delivery.again or delivery.position < len(self._events):
                index = delivery.again[0] if delivery.again else delivery.position
                try:
                    refused = delivery.sink.deliver(self._events[index])
                except StoreUnavailable:
                    raise
                except Exception as error:  # a store, or a damaged event, must not end a study; it is recorded
                    refused = [("event", reason_of(error))]
                self._record(delivery, index, refused)
            if isinstance(delivery.sink, MLflowSink):
                delivery.sink.store.check_file()
        except StoreLost as error:
            with self._changed:
                delivery.again = list(range(delivery.position))
            delivery.unavailable = f"its records are gone: {reason_of(error)}"
            return False
        except StoreUnavailable as error:
            delivery.unavailable = f"it cannot be reached: {reason_of(error)}"
            return False
        except Exception as error:  # it cannot be opened, for whatever reason; all of its records wait
            delivery.unavailable = f"it cannot be used: {reason_of(error)}"
            return False
        delivery.unavailable = ""
        return True

    def _open(self, delivery: Delivery) -> None:
        """Open a store, and reconcile it with what was delivered."""
        sink = SINKS[delivery.name](self._target)
        again = set(delivery.again) | set(delivery.refused)
        if isinstance(sink, MLflowSink):
            again = sink.store.missing(self._events[: delivery.position], again)
            delivery.experiment_id = sink.store.experiment_id
        with self._changed:
            delivery.again = sorted(again)
        delivery.sink = sink

    def _record(self, delivery: Delivery, index: int, refused: list[Refusal]) -> None:
        """Record in tracking.json that an event was delivered, and which of its calls were refused."""
        with self._changed:
            delivery.refused.pop(index, None)
            if refused:
                delivery.refused[index] = refused
            if delivery.again and delivery.again[0] == index:
                delivery.again.pop(0)
            else:
                delivery.position = index + 1
        # If the disk is full, events are delivered again after a kill.
        with self._writing, contextlib.suppress(OSError):
            self._stored[delivery.key] = self._to_dict(delivery)
            write_json(self._path, {"format": FORMAT, "study_id": self._target.study_id, "stores": self._stored})

    def _to_dict(self, delivery: Delivery) -> dict[str, Any]:
        """A store's entry in tracking.json."""
        position = delivery.position
        return {
            "next": seq_of(self._events, position - 1) + 1 if position else 0,
            "again": [seq_of(self._events, index) for index in delivery.again],
            "refused": [
                {"seq": seq_of(self._events, index), "call": call, "reason": reason}
                for index, calls in delivery.refused.items()
                for call, reason in calls
            ],
        } | ({"experiment_id": delivery.experiment_id} if delivery.experiment_id else {})


def read_deliveries(path: Path, target: Target) -> dict[str, Any]:
    """The stores in tracking.json by their keys; empty if there is no such file.

    Raises OSError, or DamagedFile if its content is wrong or belongs to another study.
    """
    if not path.exists():
        return {}
    content = read_json(path, dict, "remove it")
    if "format" not in content:  # of the first version: counts by the store's name
        if not all(map(is_count, content.values())):
            raise DamagedFile(f"{path} must hold counts, but does not: remove it")
        keys = {"mlflow": target.study_uri, "storage": strip_credentials(target.storage_uri)}
        return {keys.get(name, name): {"next": value, "again": [], "refused": []} for name, value in content.items()}
    if content["format"] != FORMAT:
        raise DamagedFile(
            f"{path} must have format {FORMAT}, but has {content['format']!r}: use the version that wrote it"
        )
    if content.get("study_id") != target.study_id:
        raise DamagedFile(f"{path} must be of this study, but is of {content.get('study_id')!r}: remove it")
    stores = content.get("stores")
    if not isinstance(stores, dict) or not all(map(is_store, stores.values())):
        raise DamagedFile(f"{path} must hold next, again and refused for each store, but does not: remove it")
    return stores


def stored_runs_address(directory: Path, plan: Mapping[str, Any]) -> str:
    """`Tracking.runs_address` as tracking.json has it: for a process that delivers nothing. Empty, too, if that file or
    the plan is damaged.

    Args:
        plan: the content of plan.json.
    """
    try:
        target = target_of(directory, plan)
        stores = read_deliveries(directory / "tracking.json", target)
    except (OSError, DamagedFile):
        return ""
    uri = strip_credentials(target.uri)
    return runs_address(uri, str(stores.get(uri, {}).get("experiment_id", "")), target.study_id)


def is_count(value: object) -> bool:
    """Whether a value read from JSON is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_store(entry: Any) -> bool:
    """Whether a value read from JSON is a store's entry in tracking.json."""
    try:
        texts = [text for refusal in entry["refused"] for text in (refusal["call"], refusal["reason"])]
        counts = [entry["next"], *entry["again"], *(refusal["seq"] for refusal in entry["refused"])]
    except (TypeError, LookupError):
        return False
    return all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)


SINKS: dict[str, Callable[[Target], Sink]] = {
    "mlflow": MLflowSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "storage": StorageSink,
}
