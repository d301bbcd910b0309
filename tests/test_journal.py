"""The journal: damaged lines are left out and noted, all others are kept."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest

from tune.records.journal import Journal, read_events, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of six events."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("session", params={}, tags={})
    for number in range(5):
        journal.write("confirmed", number=number, run=1, value=0.1 * number)
    return journal.path


def numbers(path: Path) -> list[int]:
    return [event["number"] for event in read_events(path) if event["event"] == "confirmed"]


def change_line(path: Path, number: int, *new: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number : number + 1] = new
    path.write_bytes(b"\n".join(lines))


def test_events_are_numbered_and_read_back(path: Path) -> None:
    content = read_journal(path)
    assert [event["seq"] for event in content.events] == list(range(6))
    assert content.notes() == [] and content.next_seq == 6


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_last_line_that_was_cut_off_is_dropped_without_a_note(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_journal(path).cut_off and read_journal(path).notes() == []
    journal = Journal(path)
    journal.write("confirmed", number=7, run=1, value=0.0)
    assert numbers(path) == [0, 1, 2, 3, 7] and Journal(path).notes == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"{}", b"null", b"[" * 9999, b'{"event": "confirmed"', b"\0" * 80, b"\xff", b'{"event": "ended", "time": 1}'],
    ids=["empty", "object", "null", "deep", "torn", "zeros", "bytes", "foreign"],
)  # fmt: skip
def test_a_damaged_line_is_left_out_and_noted(path: Path, damage: bytes) -> None:
    change_line(path, 2, damage)
    assert numbers(path) == [0, 2, 3, 4]
    (note,) = read_journal(path).notes()
    assert "1 damaged line (3) left out" in note and "missing" not in note
    assert Journal(path).write("confirmed", number=9, run=1, value=0.0)["seq"] == 6
    assert read_journal(path).notes() == [note]


def test_flipped_bits_lost_lines_and_doubled_lines_are_noted(path: Path) -> None:
    whole = path.read_bytes().split(b"\n")
    rng = random.Random(0)
    for place in rng.sample(range(len(whole[3])), 40):
        flipped = whole[3][:place] + bytes([whole[3][place] ^ 1]) + whole[3][place + 1 :]
        if flipped.count(b"\n"):
            continue
        path.write_bytes(b"\n".join([*whole[:3], flipped, *whole[4:]]))
        assert numbers(path) == [0, 1, 3, 4] and read_journal(path).notes()
    path.write_bytes(b"\n".join([*whole[:3], *whole[4:]]))
    assert numbers(path) == [0, 1, 3, 4] and "1 event missing" in read_journal(path).notes()[0]
    path.write_bytes(b"\n".join([*whole[:3], whole[2], *whole[3:]]))
    assert numbers(path) == [0, 1, 2, 3, 4] and "1 doubled line left out" in read_journal(path).notes()[0]


def test_the_sequence_number_of_a_damaged_last_line_is_not_used_again(path: Path) -> None:
    change_line(path, 5, b"damaged")
    journal = Journal(path)
    assert journal.write("confirmed", number=8, run=1, value=0.0)["seq"] == 6
    assert numbers(path) == [0, 1, 2, 3, 8] and "missing" not in Journal(path).notes[0]


def test_a_journal_of_the_first_version_is_read_and_goes_on_with_checksums(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    old = [{"event": "confirmed", "time": 1.0, "number": n, "run": 1, "value": 0.5} for n in range(3)]
    path.write_text("".join(json.dumps(event) + "\n" for event in old))
    journal = Journal(path)
    assert journal.notes == [] and [event["seq"] for event in journal.events] == [0, 1, 2]
    journal.write("confirmed", number=3, run=1, value=0.5)
    assert numbers(path) == [0, 1, 2, 3]
    journal.write("confirmed", number=4, run=1, value=0.5)
    change_line(path, 4, json.dumps(old[0]).encode())  # after the first checksum, none may lack one
    assert numbers(path) == [0, 1, 2, 3]


def test_an_empty_or_missing_journal_is_no_error(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none") == []
    (tmp_path / "empty").touch()
    assert read_journal(tmp_path / "empty").notes() == []


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_short_write_on_a_full_disk_leaves_no_half_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """write() writes a part without an error, and only the next call raises that the disk is full."""
    journal, write, calls = Journal(path), os.write, []

    def short(file: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) == 1 and taken:
            return write(file, content[:taken])
        if len(calls) == 2 or (not taken and len(calls) == 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(os, "write", short)
    monkeypatch.setattr("train_fn.support.storage.time.sleep", lambda seconds: None)
    journal.write("confirmed", number=5, run=1, value=0.5)
    assert numbers(path) == [0, 1, 2, 3, 4, 5] and read_journal(path).notes() == []
