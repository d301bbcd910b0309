"""Manifests, splits and the order of images."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from entries import answers_of, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train_fn.data.copies import copy_pairs
from train_fn.data.dealing import split_indices
from train_fn.data.manifest import read_manifest, unreadable_images
from train_fn.data.order import epoch_order
from train_fn.data.samples import PARTS, Sample, Splits, class_weights, closed_set
from train_fn.data.splits_file import load_splits, save_splits
from train_fn.data.splitting import UNEVEN, SplitRules, fold_splits, make_splits


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
    return read_manifest(path, folder).problems


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
    assert answers_of(entries) == (("Normal", "Benign", "Malignant"), [])


def test_contradictions_are_named() -> None:
    entries = [entry(answer="Benign", label=1)] * 9 + [entry(answer="Malignant", label=2)] * 9
    _, problems = answers_of([*entries, entry(answer="Malignant", label=1)])
    assert len(problems) == 2 and "label 1" in problems[0] and "'Malignant'" in problems[1]


@pytest.mark.parametrize(
    "variants",
    [
        ("Benign", "Benign ", "benign"),
        ("Benign tumour", "Benign  tumour"),
        ("Malignität", "Malignita\u0308t"),  # composed and decomposed
        ("Ｂenign", "Benign"),  # full width
        ("Benign", "Benign\u200b"),  # a space without width
        ("STRASSE", "Straße"),
    ],
)
def test_answers_that_differ_in_how_they_are_written_are_refused(variants) -> None:
    answers = [*variants, "Normal"] * 6
    candidates, (problem,) = answers_of([entry(answer=answer, label=answer) for answer in answers])
    assert candidates == () and "must be written alike" in problem and "make them equal" in problem
    assert all(f"{answer!r} (6x)" in problem for answer in variants) and "Normal" not in problem


def test_many_variants_of_few_answers_are_not_an_open_set() -> None:
    answers = [f"{' ' * spaces}{answer}" for answer in ("Normal", "Benign") for spaces in range(15)] * 2
    assert len(answers_of([entry(answer=answer, label=answer) for answer in answers])[1]) == 2


def test_open_answers_may_differ_in_case_and_spaces() -> None:
    answers = [f"text {number}" for number in range(30)] + ["Text 1", "text 2 "]
    assert answers_of([entry(answer=answer, label=answer) for answer in answers]) == ((), [])


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d"])
@pytest.mark.parametrize("key", ["text", "answer", "label"])
def test_characters_that_no_tokenizer_accepts(folder, key, text) -> None:
    (problem,) = read(folder, [entry() | {key: text}])
    assert f"must hold Unicode text, but {key}=" in problem


def test_open_answers_are_no_closed_set() -> None:
    assert answers_of([entry(answer=f"text {n}", label=n) for n in range(30)]) == ((), [])


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


SIXTY = {"train": 0.6, "validation": 0.2, "test": 0.2}


def test_groups_are_dealt_fairly() -> None:
    """Every part gets its share of images in groups, whatever their size: also of the largest group."""
    sizes = np.repeat([1, 2, 3, 6, 20], [400, 80, 30, 10, 3])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    size_of = sizes[groups]
    labels = np.random.default_rng(0).choice(3, len(sizes), p=[0.2, 0.5, 0.3])[groups]
    shares, largest = [], Counter()
    for seed in range(100):
        parts = split_indices(labels.tolist(), SIXTY, seed, groups.tolist())
        shares.append([[(size_of[parts[name]] == size).mean() for size in (1, 2, 3, 6, 20)] for name in parts])
        largest.update(name for name in parts if groups[-1] in groups[parts[name]])
        counts = [np.bincount(labels[parts[name]], minlength=3) for name in parts]
        total = np.bincount(labels, minlength=3)
        assert all(np.abs(its - share * total).max() <= 1 for its, share in zip(counts, SIXTY.values(), strict=True))
    overall = [(size_of == size).mean() for size in (1, 2, 3, 6, 20)]
    assert np.abs(np.mean(shares, 0) - overall).max() < 0.03
    assert 40 < largest["train"] < 80 and min(largest["validation"], largest["test"]) > 8


def test_parts_of_patients_have_their_sizes() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), rng.integers(1, 31, 60))
        labels = rng.choice(2, 60)[groups]
        parts = split_indices(labels.tolist(), SIXTY, seed, groups.tolist())
        missed = [abs(len(parts[name]) / len(groups) / share - 1) for name, share in SIXTY.items()]
        assert max(missed) < UNEVEN / 2
        large = [np.bincount(groups)[groups[parts[name]]].mean() for name in SIXTY]
        assert min(large) > 0.7 * max(large)


def test_every_part_gets_a_label_with_three_groups() -> None:
    sizes = [30, 30, 5, 5, 5, 9, 1, 1]
    groups, labels = np.repeat(np.arange(8), sizes), np.repeat([0, 0, 1, 1, 1, 2, 2, 2], sizes)
    for seed in range(20):
        parts = split_indices([*labels.tolist(), *[0] * 90], SIXTY, seed, [*groups.tolist(), *range(8, 98)])
        assert all({0, 1, 2} <= {int(labels[i]) if i < len(labels) else 0 for i in its} for its in parts.values())


def test_units_are_known_after_the_split_and_used_by_folds(tmp_path: Path) -> None:
    images = [noise(tmp_path, f"{n}.png", n) for n in range(36)]
    images.append(str(tmp_path / "again.png"))
    Image.open(images[0]).save(images[-1])
    data = [
        Sample((image,), "?", "ab"[n % 2], n % 2, group=f"patient {n // 2}" if n < 12 else "")
        for n, image in enumerate(images)
    ]
    rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0)
    splits, _, problems = make_splits(data, None, None, rules, hash_cache=tmp_path / "cache.json")
    assert not problems
    unit = {sample.image: sample.unit for sample in splits.samples}
    assert unit[images[0]] == unit[images[1]] == unit[images[-1]] != unit[images[2]] == unit[images[3]]
    assert len(set(unit.values())) == 37 - 7 and min(unit.values()) >= 0
    old = Splits(*([replace(s, unit=-1) for s in getattr(splits, part)] for part in PARTS), splits.tasks)
    folds = fold_splits(old, 4, rules)
    for image in images:
        Path(image).unlink()  # folds by units read no image
    assert [
        [(s.image, s.unit) for s in fold.validation] for fold in fold_splits(splits, 4, rules)
    ] == [[(s.image, unit[s.image]) for s in fold.validation] for fold in folds]  # fmt: skip


def noise(folder: Path, name: str, seed: int) -> str:
    """An image that resembles no other."""
    path = folder / name
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32), np.uint8)).save(path)
    return str(path)


def test_parts_of_the_user_stay_as_they_are(tmp_path: Path) -> None:
    entries = [entry(noise(tmp_path, f"{n}.png", n), a, a) for n, a in enumerate(["no", "yes"] * 30)]
    test = [entry(noise(tmp_path, f"t{n}.png", 100 + n), a, a) for n, a in enumerate(["no", "yes"] * 5)]
    test[0]["image"] = entries[0]["image"]
    splits, report, problems = split(
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
    _, _, problems = split(
        entries, None, None, val_fraction=0.2, test_fraction=0.2, seed=0, hash_cache=tmp_path / "cache.json"
    )
    assert len(problems) == 2 and all("'Bening'" in problem for problem in problems)


def test_class_weights_have_mean_one_over_the_images() -> None:
    counts = [10, 30, 60]
    weights = class_weights(counts)
    assert np.isclose(np.dot(counts, weights), 100)
    assert np.allclose(np.multiply(counts, weights), 100 / 3)


def test_a_unit_shares_its_weight() -> None:
    """Class 0: 6 samples, of which 3 are one patient; class 1: 2 samples, one of the same patient."""
    labels, units = [0, 0, 0, 0, 0, 0, 1, 1], [7, 7, 7, 2, 3, -1, 7, -1]
    train = tuple(
        Sample((f"{n}.png",), "?", "ab"[k], k, unit=u) for n, (k, u) in enumerate(zip(labels, units, strict=True))
    )
    tasks = closed_set(["a", "b"])
    weights = Splits(train, (), (), tasks).sample_weights()
    assert weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1, 1, 2, 2])
    apart = Splits(tuple(replace(sample, unit=-1) for sample in train), (), (), tasks)
    assert apart.sample_weights() == [class_weights([6, 2])[label] for label in labels]


def test_epoch_order_covers_all_images_in_full_batches() -> None:
    order = epoch_order(50, 16, seed=3, epoch=1)
    assert order.shape == (4, 16)
    assert sorted(order.ravel()[:50]) == list(range(50))
    assert (order == epoch_order(50, 16, 3, 1)).all() and (order != epoch_order(50, 16, 3, 2)).any()


# ------------------------------------------------------------------------------------------------ any manifest

VALID = [entry(), entry(answer="Normal", label=0)] * 3
WRONG_VALUES = st.one_of(
    st.none(), st.booleans(), st.floats(), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(), st.none())
)
BLANK = st.text(" \t\n\r\u2003", max_size=3)
NO_SUCH_IMAGE = st.text(min_size=1).filter(lambda text: text.strip() and text != "a.png").map("none/".__add__)


@st.composite
def faulty_entries(draw: st.DrawFn) -> tuple[object, list[str]]:
    """An entry with one or several faults, and the words that its problems must contain."""
    kind = draw(st.sampled_from(["no object", "fields"]))
    if kind == "no object":
        return draw(
            st.one_of(WRONG_VALUES.filter(lambda value: not isinstance(value, dict)), st.text(), st.integers())
        ), []
    faults = draw(
        st.dictionaries(st.sampled_from(["image", "text", "answer", "label"]),
                        st.sampled_from(["missing", "type", "blank", "outside", "nowhere"]), min_size=1)
    )  # fmt: skip
    made = entry()
    for key, fault in faults.items():
        if fault == "missing":
            del made[key]
        elif fault == "type":
            made[key] = draw(WRONG_VALUES if key == "label" else st.one_of(WRONG_VALUES, st.integers()))
        elif fault == "blank" or key != "image":
            made[key] = draw(BLANK)
        else:
            made[key] = "../outside.png" if fault == "outside" else draw(NO_SUCH_IMAGE)
    return made, sorted(faults)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.dictionaries(st.integers(0, 11), faulty_entries(), min_size=1, max_size=5))
def test_every_fault_of_any_manifest_is_named(folder: Path, places: dict[int, tuple[object, list[str]]]) -> None:
    entries: list[object] = list(VALID * 2)
    for number, (faulty, _) in places.items():
        entries[number] = faulty
    path = folder / "m.json"
    path.write_text(json.dumps(entries))
    reading = read_manifest(path, folder)
    valid, problems = reading.samples, reading.problems
    assert len(valid) == len(entries) - len(places)
    for number, (_, named) in places.items():
        its = [problem for problem in problems if re.match(rf"m\.json entry {number}\b", problem)]
        assert its and all(any(name in problem for problem in its) for name in named)
    assert all(int(problem.split()[2].strip(":")) in places for problem in problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(
    st.binary(),
    st.integers(1, len(json.dumps(VALID)) - 1).map(lambda end: json.dumps(VALID).encode()[:end]),
    st.recursive(WRONG_VALUES | st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)).map(
        lambda value: json.dumps(value).encode()),
    st.sampled_from(["utf-16", "utf-32"]).map(json.dumps(VALID).encode),
))  # fmt: skip
def test_a_file_that_is_no_manifest_is_named(folder: Path, content: bytes) -> None:
    (folder / "m.json").write_bytes(content)
    reading = read_manifest(folder / "m.json", folder)
    valid, problems = reading.samples, reading.problems
    assert not valid and problems and all("m.json" in problem for problem in problems)


STRAYS = st.tuples(st.sampled_from(["Normal", "Benign", "Malignant"]), st.sampled_from([0, 1, 2, "1", ""]))


@settings(deadline=None)
@given(strays=st.lists(STRAYS, min_size=1, max_size=5))
def test_any_contradiction_of_answers_and_labels_is_named(strays: list[tuple[str, object]]) -> None:
    labels = {"Normal": 0, "Benign": 1, "Malignant": 2}
    entries = [entry(answer=answer, label=label) for answer, label in labels.items()] * 5
    candidates, problems = answers_of(entries + [entry(answer=answer, label=label) for answer, label in strays])
    wrong = [(answer, label) for answer, label in strays if label != labels[answer]]
    for answer, label in wrong:
        assert any(f"answer {answer!r} goes with" in problem and repr(label) in problem for problem in problems)
    assert bool(problems) == bool(wrong) and sorted(candidates) == sorted(labels)


@pytest.fixture(scope="module")
def different_images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """No two of them near-copies."""
    folder = tmp_path_factory.mktemp("different")
    paths = [noise(folder, f"{n}.png", n) for n in range(12)]
    assert not len(copy_pairs(paths, cache=folder / "cache.json"))
    return paths


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_splits_are_disjoint_and_covering_and_keep_copies_together(different_images, data) -> None:
    """All entries have one question, and the spaces after it are their number. Entries of one image are copies."""
    numbers = itertools.count()
    drawn = st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["no", "yes"])), min_size=1, max_size=40)
    parts = {"data": data.draw(drawn)}
    for name in ("validation", "test"):
        parts[name] = data.draw(st.none() | drawn)
    treatment = data.draw(st.sampled_from(["keep", "drop", "train"]))
    made = {
        name: [
            {**entry(different_images[n], answer, answer), "text": "What is it?" + " " * next(numbers)}
            for n, answer in part
        ]
        for name, part in parts.items()
        if part is not None
    }
    splits, report, problems = split(
        made["data"], made.get("validation"), made.get("test"), contradictions=treatment,
        val_fraction=0.2, test_fraction=0.3, seed=data.draw(st.integers(0, 3)),
        hash_cache=Path(different_images[0]).with_name("cache.json"),
    )  # fmt: skip
    found = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    answers: dict[str, set[str]] = {}
    for given_entry in (e for part in made.values() for e in part):
        answers.setdefault(given_entry["image"], set()).add(given_entry["answer"])
    mixed = {image for image, its in answers.items() if len(its) > 1}

    pool = {e["text"] for e in made["data"] if treatment != "drop" or e["image"] not in mixed}
    for name in ("validation", "test"):
        if name in made:
            assert [sample.question for sample in found[name]] == [e["text"] for e in made[name]]
    dealt = [sample for name, part in found.items() if name not in made for sample in part]
    assert sorted(sample.question for sample in dealt) == sorted(pool)
    assert report.num_left_out == len(made["data"]) - len(pool)
    homes: dict[str, set[str]] = {}
    for name in found.keys() - made.keys():
        for sample in found[name]:
            homes.setdefault(sample.image, set()).add(name)
    assert all(len(its) == 1 for its in homes.values())
    assert treatment != "train" or all(homes.get(image, {"train"}) == {"train"} for image in mixed)

    images = {name: {sample.image for sample in part} for name, part in found.items()}
    clean = [n for n, sample in enumerate(found["test"]) if sample.image not in images["train"] | images["validation"]]
    assert report.test_clean == tuple(clean) and report.leaked["test"] == len(found["test"]) - len(clean)
    assert report.leaked["validation"] == sum(sample.image in images["train"] for sample in found["validation"])
    assert problems or all(found.values())
    if not problems and splits.candidates:
        assert all({sample.answer for sample in part} == set(splits.candidates) for part in found.values())
