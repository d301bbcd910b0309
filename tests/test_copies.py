"""Near-copies: what counts as one, and that none stands on two sides of a split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from train_fn.copies import (
    copy_groups,
    copy_pairs,
    hash_images,
    leaking_samples,
    near_pairs,
    perceptual_hashes,
    read_thumbnails,
    thumbnail,
)
from train_fn.data import make_splits, read_manifest, split_indices
from train_fn.phantoms import phantom


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(phantom(np.random.default_rng(1), 1)[0])


def perceptual_hash(image: Image.Image) -> int:
    return int(perceptual_hashes(thumbnail(image)[None])[0])


def marked(image: Image.Image) -> Image.Image:
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    draw.line((50, 60, 80, 60), fill=255)  # calipers
    draw.text((4, 4), "R", fill=255)
    return copy


@pytest.mark.parametrize(
    "change",
    [
        marked,
        lambda image: image.resize((200, 200)),
        lambda image: image.resize((90, 70)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        lambda image: image.convert("RGB").quantize(16).convert("L"),
    ],
    ids=["marks", "larger", "smaller", "brighter", "quantised"],
)
def test_a_changed_copy_is_near(image, change) -> None:
    assert (perceptual_hash(image) ^ perceptual_hash(change(image))).bit_count() <= 8


def test_other_images_are_far() -> None:
    rng = np.random.default_rng(0)
    hashes = np.array([perceptual_hash(Image.fromarray(phantom(rng, n % 3)[0])) for n in range(60)], dtype=np.uint64)
    assert len(near_pairs(hashes)) < 5


def test_pairs_equal_the_plain_double_loop() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    hashes[100:150] = hashes[:50] ^ (np.uint64(1) << rng.integers(0, 63, 50, dtype=np.uint64))
    plain = [
        (i, j) for i in range(300) for j in range(i + 1, 300) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 8
    ]
    assert len(plain) >= 50
    assert sorted(map(tuple, near_pairs(hashes).tolist())) == plain


def test_copies_of_copies_are_one_group() -> None:
    groups = copy_groups(6, np.array([[0, 1], [1, 4], [2, 3]]))
    assert groups[0] == groups[1] == groups[4] and groups[2] == groups[3]
    assert len(set(groups.tolist())) == 3


def test_hashes_are_kept_by_content(tmp_path, image) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    image.save(first)
    second.write_bytes(first.read_bytes())
    cache = tmp_path / "cache.json"
    one, two = hash_images([str(first), str(second)], cache)
    assert one == two == perceptual_hash(image)
    ((content, (side, encoded)),) = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({content: [7, encoded]}))
    assert read_thumbnails([str(second)], cache)[1].tolist() == [7] != [side]
    cache.write_text("broken")
    assert hash_images([str(first)], cache)[0] == one


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_grouping_gives_disjoint_covering_group_pure_parts(data) -> None:
    size = data.draw(st.integers(1, 120))
    labels = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.integers(0, size), min_size=size, max_size=size))
    fractions = data.draw(st.sampled_from([(0.6, 0.2, 0.2), (0.8, 0.2, 0.0), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0)]))
    named = dict(zip(("train", "validation", "test"), fractions, strict=True))
    parts = split_indices(labels, named, data.draw(st.integers(0, 5)), groups)
    assert sorted(index for part in parts.values() for index in part) == list(range(size))
    home = {index: name for name, part in parts.items() for index in part}
    by_group: dict[int, set[str]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, set()).add(home[index])
    assert all(len(names) == 1 for names in by_group.values())
    assert all(not part for name, part in parts.items() if named[name] == 0)


@pytest.mark.parametrize("treatment", ["keep", "drop", "train"])
def test_contradictions_are_reported_and_treated(tmp_path, treatment) -> None:
    entries = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        Image.fromarray(phantom(np.random.default_rng(number), number % 2 + 1)[0]).save(path)
        answer = ("no", "yes")[number % 2]
        entries.append({"image": str(path), "text": "?", "answer": answer, "label": answer})
    entries.append(entries[0] | {"answer": "yes", "label": "yes"})
    splits, report, problems = make_splits(
        entries, None, None, val_fraction=0.2, test_fraction=0.2, seed=0, contradictions=treatment,
        hash_cache=tmp_path / "cache.json",
    )  # fmt: skip
    assert not problems
    assert len(report.contradictions) == 1 and len(report.contradictions[0]) >= 2
    homes = [name for name in ("train", "validation", "test") for sample in getattr(splits, name)
             if sample.image == entries[0]["image"]]  # fmt: skip
    if treatment == "drop":
        assert homes == [] and report.num_left_out >= 2
    else:
        assert len(homes) == 2 and len(set(homes)) == 1 and report.num_left_out == 0
        assert treatment == "keep" or homes == ["train", "train"]


def test_busi_is_split_without_leaks_for_twenty_seeds(busi, tmp_path) -> None:
    manifest, root = busi
    entries, _ = read_manifest(manifest, root)
    for seed in range(20):
        splits, report, problems = make_splits(
            entries, None, None, val_fraction=0.2, test_fraction=0.2, seed=seed, hash_cache=tmp_path / "cache.json"
        )
        assert not problems and report.leaked == {"validation": 0, "test": 0}
        parts = [splits.train, splits.validation, splits.test]
        images = [sample.image for part in parts for sample in part]
        number = np.repeat([0, 1, 2], [len(part) for part in parts])
        pairs = copy_pairs(images, cache=tmp_path / "cache.json")
        for of, into in ((2, [0, 1]), (1, [0, 2])):
            assert not len(leaking_samples(number, np.arange(len(images)), pairs, of, into))
        assert [splits.class_counts(name) for name in ("validation", "test")] == [[21, 71, 34]] * 2
    assert report.num_pairs == 135  # as many as the hash alone proposes
    assert report.num_grouped > 150 and report.leaked_if_random > 0.25 and len(report.contradictions) >= 5


def test_leaking_samples() -> None:
    pairs = np.array([[0, 1], [2, 3]])
    assert leaking_samples(np.array([0, 2, 2, 2]), np.arange(4), pairs, 2, [0, 1]).tolist() == [1]
    again = np.array([0, 1, 1, 2])  # the second image is asked about twice
    assert leaking_samples(np.array([-1, 0, 2, 2]), again, pairs[:1], 2, [0, 1]).tolist() == [2]


def test_cached_hash_file_may_be_missing(tmp_path: Path, image) -> None:
    path = tmp_path / "a.png"
    image.save(path)
    assert hash_images([str(path)], tmp_path / "nowhere" / "cache.json")[0] == perceptual_hash(image)
