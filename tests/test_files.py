"""Files that survive a full disk and a power loss."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from train_fn.support.files import (
    DamagedFile,
    check_sums,
    copy_folder,
    read_checked,
    read_json,
    write_checked,
    write_file,
    write_json,
    write_sums,
)


def refuse(content: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left"):
        full.setattr(os, "fsync", refuse)
        write_file(path, '{"a"', ": 2}")
    assert os.listdir(tmp_path) == ["plan.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_every_flipped_byte_of_a_checked_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_checked(path, b"some state")
    assert read_checked(path) == b"some state"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedFile):
            read_checked(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            read_checked(path)


@pytest.mark.parametrize("content", ["", "{", "\0\0\0", "[1, 2]", "3", '"text"', "null", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=r"plan\.json must"):
        read_json(path, dict)


def test_a_folder_that_cannot_be_copied_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter").write_text("the last copy")
    with pytest.raises(FileNotFoundError):
        copy_folder(tmp_path / "gone", tmp_path / "best")
    assert (tmp_path / "best" / "adapter").read_text() == "the last copy"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "adapter").write_text("new")
    copy_folder(tmp_path / "new", tmp_path / "best")
    assert (tmp_path / "best" / "adapter").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["best", "new"]


def test_sums_name_the_file_that_has_changed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.write_text("outside")
    for name in ("task.json", "a file", "sub/b"):
        (folder / name).write_text(name)
    check_sums(folder)  # without sums, nothing is known
    write_sums(folder)
    check_sums(folder)
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder).returncode == 0
    for name in ("task.json", "a file", "sub/b"):
        (folder / name).write_text("changed")
        with pytest.raises(DamagedFile, match=name):
            check_sums(folder)
        (folder / name).write_text(name)
    sums = (folder / "SHA256SUMS").read_text()
    digest = sums.split()[0]
    elsewhere = [f"{digest}  {name}\n" for name in ("../outside", "/etc/passwd", "\0", "sub")]
    for damaged in ("\0", "x" + sums, sums.replace("sub/b", "sub/c"), *elsewhere):
        (folder / "SHA256SUMS").write_text(damaged)
        with pytest.raises(DamagedFile, match="must be as SHA256SUMS"):
            check_sums(folder)
