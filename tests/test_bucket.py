"""A study on object storage: the newer copy wins, copies that differ are refused, and one machine runs the study."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from train_fn.support.storage import Storage
from tune.records import bucket
from tune.records.bucket import LEASE_S, Lease, refresh
from tune.records.journal import Journal, read_events

OTHER = {"token": "t", "host": "node7", "boot": "another", "pid": 5}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A study's folder and its copy; a folder stands for the bucket."""
    monkeypatch.setattr(bucket, "SETTLE_S", 0.0)
    monkeypatch.setattr(bucket, "RENEW_S", 0.05)
    (tmp_path / "there").mkdir()
    return Storage(tmp_path / "here" / "s", f"file://{tmp_path}/there/s")


def make(folder: Path, num_events: int, plan: str = "{}") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "journal.jsonl")
    for run in range(num_events):
        journal.write("confirmed", number=0, run=run, value=0.0)
    (folder / "plan.json").write_text(plan)
    (folder / "splits.json").write_text("{}")


def copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_missing_copy_is_downloaded(storage: Storage, tmp_path: Path) -> None:
    make(tmp_path / "there" / "s", 3)
    assert refresh(storage) == []
    assert len(read_events(storage.directory / "journal.jsonl")) == 3


@pytest.mark.parametrize("cut", [0, 7])
def test_an_older_copy_and_what_was_made_from_it_are_replaced(storage: Storage, tmp_path: Path, cut: int) -> None:
    make(storage.directory, 2)
    copy(storage.directory, tmp_path / "there" / "s")
    make(tmp_path / "there" / "s", 2, plan='{"trials": 40}')
    (storage.directory / "optuna.db").write_text("of the older copy")
    journal = storage.directory / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[: -cut or None])
    assert refresh(storage) == []
    assert len(read_events(journal)) == 4 and not (storage.directory / "optuna.db").exists()
    assert (storage.directory / "plan.json").read_text() == '{"trials": 40}'


def test_a_newer_copy_stays(storage: Storage, tmp_path: Path) -> None:
    make(storage.directory, 2)
    copy(storage.directory, tmp_path / "there" / "s")
    make(storage.directory, 2)
    assert refresh(storage) == [] and len(read_events(storage.directory / "journal.jsonl")) == 4


def test_copies_that_have_gone_on_apart_are_refused_and_kept(storage: Storage, tmp_path: Path) -> None:
    make(storage.directory, 2)
    copy(storage.directory, tmp_path / "there" / "s")
    make(tmp_path / "there" / "s", 1)
    make(storage.directory, 2)
    before = (storage.directory / "journal.jsonl").read_bytes()
    (problem,) = refresh(storage)
    assert "gone on apart" in problem and (storage.directory / "journal.jsonl").read_bytes() == before


def test_an_empty_storage_leaves_the_local_study_alone(storage: Storage) -> None:
    make(storage.directory, 2)
    assert refresh(storage) == [] and refresh(Storage(storage.directory)) == []


def test_only_one_machine_holds_the_lease(storage: Storage) -> None:
    first, second = Lease(storage), Lease(storage)
    assert first.acquire() == "" and first.ours()
    problem = second.acquire()
    assert f"(process {os.getpid()}) runs s" in problem and not second.ours()
    first.release()
    assert second.acquire() == ""
    second.release()
    assert storage.read(storage.directory / "lease.json") is None


@pytest.mark.parametrize(
    ("held", "free"),
    [
        (OTHER | {"renewed_at": 0.0}, False),
        (OTHER | {"renewed_at": 9e9}, False),
        (OTHER | {"renewed_at": -LEASE_S - 1.0}, True),
        (OTHER | {"renewed_at": 0.0, "boot": bucket.boot(), "pid": 2**22 + 1}, True),
        (OTHER | {"renewed_at": "never"}, True),
        ({"token": 3}, True),
        ([], True),
    ],
)
def test_a_lease_is_free_when_it_has_run_out_or_its_process_has_ended(
    storage: Storage, held: object, free: bool
) -> None:
    if isinstance(held, dict) and isinstance(held.get("renewed_at"), float):
        held = held | {"renewed_at": time.time() + held["renewed_at"]}
    storage.write(storage.directory / "lease.json", json.dumps(held).encode())
    lease = Lease(storage)
    problem = lease.acquire()
    assert (problem == "") == free and ("node7" in problem) != free
    lease.release()


def test_a_process_that_lost_its_lease_stops_and_leaves_the_new_one(storage: Storage) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # other tests leave handlers of Ray's behind
    lease = Lease(storage)
    assert lease.acquire() == ""
    content = json.dumps(OTHER | {"renewed_at": time.time()}).encode()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):  # a renewal on its way may write once more
            storage.write(storage.directory / "lease.json", content)
            time.sleep(0.1)
    assert lease.lost and not lease.ours()
    lease.release()
    assert storage.read(storage.directory / "lease.json") == content
    signal.signal(signal.SIGINT, before)


def test_without_object_storage_there_is_no_lease(tmp_path: Path) -> None:
    lease = Lease(Storage(tmp_path))
    assert lease.acquire() == "" and lease.ours()
    lease.release()
    assert list(tmp_path.iterdir()) == []
