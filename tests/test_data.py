"""Manifests, splits and the order of images."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_fn.data import (
    answer_set,
    class_weights,
    epoch_order,
    load_splits,
    make_splits,
    micro_batches,
    read_manifest,
    save_splits,
    split_indices,
    unreadable_images,
)


def entry(image: str = "a.png", answer: str = "Benign", label: object = 1) -> dict:
    return {"image": image, "text": "What is it?", "answer": answer, "label": label}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("L", (8, 8)).save(root / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "outside.png")
    return root


def read(folder: Path, content: object) -> list[str]:
    path = folder / "m.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_manifest(path, folder)[1]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([], "empty list"),
        ({}, "dict"),
        (b"[1,", "JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "JSON"),
        ([3], "is 3"),
        ([{"image": "a.png"}], "lacks answer, label, text"),
        ([entry(image="")], "image=''"),
        ([entry(answer=" ")], "answer=' '"),
        ([entry(label=None)], "label=None"),
        ([entry(label=True)], "label=True"),
        ([entry(image="b.png")], "b.png"),
        ([entry(image="../outside.png")], "under the image root"),
        ([entry(image="/etc/hostname")], "under the image root"),
    ],
)
def test_bad_manifest(folder: Path, content: object, word: str) -> None:
    problems = read(folder, content)
    assert len(problems) == 1 and word in problems[0]


def test_links_cannot_leave_the_root(folder: Path) -> None:
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    assert "under the image root" in read(folder, [entry("link.png")])[0]


def test_all_entries_are_checked_and_long_lists_are_cut(folder: Path) -> None:
    problems = read(folder, [entry("a.png"), *[entry(f"{n}.png") for n in range(30)]])
    assert len(problems) == 21 and problems[-1] == "... and 10 more like these"


def test_unreadable_images(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    problems = unreadable_images([str(path) for path in sorted(tmp_path.iterdir())])
    assert [Path(problem.split()[1]).name for problem in problems] == ["bomb.png", "cut.png", "text.png"]


def test_answers_in_the_order_of_their_labels() -> None:
    entries = [entry(answer=a, label=n) for n, a in enumerate(["Normal", "Benign", "Malignant"])] * 3
    assert answer_set(entries) == (("Normal", "Benign", "Malignant"), [])


def test_contradictions_are_named() -> None:
    entries = [entry(answer="Benign", label=1)] * 9 + [entry(answer="Malignant", label=2)] * 9
    _, problems = answer_set([*entries, entry(answer="Malignant", label=1)])
    assert len(problems) == 2 and "label 1" in problems[0] and "'Malignant'" in problems[1]


def test_open_answers_are_no_closed_set() -> None:
    assert answer_set([entry(answer=f"text {n}", label=n) for n in range(30)]) == ((), [])


@pytest.mark.parametrize("seed", range(20))
def test_split_is_a_stratified_partition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, rng.integers(30, 300), p=[0.17, 0.56, 0.27]).tolist()
    fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
    parts = split_indices(labels, fractions, seed)
    assert sorted(index for part in parts.values() for index in part) == list(range(len(labels)))
    sizes = Counter(labels)
    for name, fraction in fractions.items():
        for label, count in Counter(labels[index] for index in parts[name]).items():
            assert abs(count - fraction * sizes[label]) <= 1.5
    assert parts == split_indices(labels, fractions, seed)
    assert parts != split_indices(labels, fractions, seed + 1)


def noise(folder: Path, name: str, seed: int) -> str:
    """An image that resembles no other."""
    path = folder / name
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32), np.uint8)).save(path)
    return str(path)


def test_given_parts_are_kept_whole(tmp_path: Path) -> None:
    entries = [entry(noise(tmp_path, f"{n}.png", n), a, a) for n, a in enumerate(["no", "yes"] * 30)]
    test = [entry(noise(tmp_path, f"t{n}.png", 100 + n), a, a) for n, a in enumerate(["no", "yes"] * 5)]
    test[0]["image"] = entries[0]["image"]
    splits, report, problems = make_splits(
        entries, None, test, val_fraction=0.25, test_fraction=0.2, seed=0, hash_cache=tmp_path / "cache.json"
    )
    assert not problems
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [44, 16, 10]
    assert report.leaked == {"validation": 0, "test": 1} and report.test_clean == tuple(range(1, 10))
    save_splits(splits, tmp_path / "s.json")
    assert load_splits(tmp_path / "s.json") == splits


def test_a_rare_answer_is_refused(tmp_path: Path) -> None:
    entries = [entry(noise(tmp_path, f"{n}.png", n), "no", 0) for n in range(30)]
    entries.append(entry(noise(tmp_path, "x.png", 30), "Bening", 7))
    _, _, problems = make_splits(
        entries, None, None, val_fraction=0.2, test_fraction=0.2, seed=0, hash_cache=tmp_path / "cache.json"
    )
    assert len(problems) == 2 and all("'Bening'" in problem for problem in problems)


def test_class_weights_have_mean_one_over_the_images() -> None:
    counts = [10, 30, 60]
    weights = class_weights(counts)
    assert np.isclose(np.dot(counts, weights), 100)
    assert np.allclose(np.multiply(counts, weights), 100 / 3)


def test_epoch_order_covers_all_images_in_full_batches() -> None:
    order = epoch_order(50, 16, seed=3, epoch=1)
    assert order.shape == (4, 16)
    assert sorted(order.ravel()[:50]) == list(range(50))
    assert (order == epoch_order(50, 16, 3, 1)).all() and (order != epoch_order(50, 16, 3, 2)).any()


def test_micro_batches_share_out_each_step() -> None:
    step = np.arange(16)
    shares = [np.concatenate(list(micro_batches(step, 2, rank, 2))) for rank in range(2)]
    assert sorted(np.concatenate(shares)) == list(range(16))
    assert all(len(share) == 8 for share in shares)
