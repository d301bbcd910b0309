"""Near-copies: which pairs count, and that no group is divided by a split."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from entries import as_entry, split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageOps

from train_fn.data.copies import (
    MAX_DISTANCE,
    MIN_CORRELATION,
    confirmed,
    contact_sheet,
    copy_groups,
    copy_pairs,
    largest_groups,
    leaking_samples,
    near_pairs,
    perceptual_hashes,
    read_thumbnails,
    thumbnail,
)
from train_fn.data.dealing import split_indices
from train_fn.data.manifest import read_manifest
from train_fn.data.phantoms import phantom
from tune.config.settings import DataSettings


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(phantom(np.random.default_rng(1), 1)[0])


def perceptual_hash(image: Image.Image) -> int:
    return int(perceptual_hashes(thumbnail(image)[None])[0])


def hash_images(paths: list[str], cache: Path) -> np.ndarray:
    return perceptual_hashes(read_thumbnails(paths, cache)[0])


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
    splits, report, problems = split(
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
    entries = list(map(as_entry, read_manifest(manifest, root).samples))
    shares, contradictions = [], np.zeros(3)
    for seed in range(20):
        splits, report, problems = split(
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
        shares.append([np.isin(np.flatnonzero(number == part), pairs).mean() for part in range(3)])
        part_of = dict(zip(images, number.tolist(), strict=True))
        for group in report.contradictions:
            contradictions[part_of[group[0].rpartition(": ")[0]]] += 1
    # Every part is a sample of the data: 214 of 630 images have a copy.
    assert np.abs(np.array(shares) - 214 / 630).max() < 0.05 and np.abs(np.mean(shares, 0) - 214 / 630).max() < 0.02
    assert np.allclose(contradictions / contradictions.sum(), [0.6, 0.2, 0.2], atol=0.1)
    assert report.num_pairs == 135  # equal to the number of pairs with near hashes
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


# ------------------------------------------------------------------------------------------------ lookalikes


def eye_ground(number: int, size: int = 96) -> Image.Image:
    """A right eye's: a disc on black with its own colour, vessels and spots, all at about the same place."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    radius, x, y = size * rng.uniform(0.43, 0.48), size / 2 + rng.uniform(-2, 2), size / 2 + rng.uniform(-2, 2)
    base = (int(rng.uniform(130, 210)), int(rng.uniform(50, 95)), int(rng.uniform(15, 45)))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=base)
    disc_x, disc_y = x + radius * rng.uniform(0.35, 0.5), y + radius * rng.uniform(-0.12, 0.12)
    for _ in range(10):
        at_x, at_y, angle = disc_x, disc_y, rng.uniform(0, 2 * np.pi)
        while (at_x - x) ** 2 + (at_y - y) ** 2 < radius**2:
            to_x, to_y = at_x + 3 * np.cos(angle), at_y + 3 * np.sin(angle)
            draw.line([at_x, at_y, to_x, to_y], fill=tuple(value // 2 for value in base), width=int(rng.integers(1, 3)))
            at_x, at_y, angle = to_x, to_y, angle + rng.normal(0, 0.18)
    draw.ellipse([disc_x - 6, disc_y - 6, disc_x + 6, disc_y + 6], fill=(240, 200, 130))
    return image


def saved(folder: Path, images: list[Image.Image]) -> list[str]:
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(images))]


def test_eyes_are_alike_but_their_copies_are_found(tmp_path) -> None:
    eyes = [eye_ground(number) for number in range(120)]
    copies = [ImageEnhance.Brightness(marked(eye)).enhance(1.1).resize((130, 130)) for eye in eyes[:10]]
    paths = saved(tmp_path, eyes + copies)
    by_hash = near_pairs(hash_images(paths, tmp_path / "cache.json"))
    found = set(map(tuple, copy_pairs(paths, cache=tmp_path / "cache.json").tolist()))
    assert len(by_hash) > 100  # the hash alone joins most of them into one group
    assert {(number, 120 + number) for number in range(10)} <= found and len(found) <= 20


def test_tiny_images_are_copies_only_when_they_are_equal(tmp_path) -> None:
    """Eight pixels show little of a written seven: two people's look alike."""
    rng = np.random.default_rng(0)
    seven = np.zeros((8, 8))
    seven[1, 1:7], seven[range(2, 8), [6, 5, 5, 4, 4, 3]] = 200, 200
    digits = [Image.fromarray((seven + rng.uniform(0, 50, (8, 8))).astype(np.uint8)) for _ in range(40)]
    paths = saved(tmp_path, [*digits, digits[3]])
    assert len(near_pairs(hash_images(paths, tmp_path / "cache.json"))) > 20
    assert copy_pairs(paths, cache=tmp_path / "cache.json").tolist() == [[3, 40]]


def test_nearly_uniform_images_are_copies_only_when_they_are_equal(tmp_path) -> None:
    black = [Image.new("L", (64, 64), 0) for _ in range(3)]
    for number, image in enumerate(black[1:], 1):
        ImageDraw.Draw(image).point((10 * number, 20), 255)  # a spot in another place
    grey = [Image.new("L", (64, 64), level) for level in (0, 40, 120)]
    paths = saved(tmp_path, black + grey)
    assert copy_pairs(paths, cache=tmp_path / "cache.json").tolist() == [[0, 3]]


def test_copies_are_found_in_any_small_set_and_among_frames_of_one_film(tmp_path, image) -> None:
    other = Image.fromarray(phantom(np.random.default_rng(5), 2)[0])
    paths = saved(tmp_path, [image, marked(image), other])
    assert copy_pairs(paths[:2]).tolist() == copy_pairs(paths).tolist() == [[0, 1]]
    pixels, rng = np.asarray(image, float), np.random.default_rng(0)
    frames = [np.roll(pixels, step // 4, 0) + rng.normal(0, 8, pixels.shape) for step in range(30)]
    film = [Image.fromarray(frame.clip(0, 255).astype(np.uint8)) for frame in frames]
    others = [Image.fromarray(phantom(np.random.default_rng(number), number % 3)[0]) for number in range(10, 40)]
    pairs = copy_pairs(saved(tmp_path, film + others), cache=tmp_path / "cache.json")
    assert np.bincount(copy_groups(60, pairs)).tolist() == [30] + [1] * 30


def test_the_caller_sets_the_distance(tmp_path, image) -> None:
    paths = saved(tmp_path, [image, image, marked(image)])
    assert len(copy_pairs(paths)) == 3 and len(copy_pairs(paths, -1)) == 0
    assert copy_pairs(paths, 0).tolist()[0] == [0, 1]


def test_written_digits_are_hardly_ever_copies_however_much_they_are_enlarged() -> None:
    """Real handwriting of 8 x 8 pixels, enlarged: as near as two images can be that are no copies."""
    from sklearn.datasets import load_digits

    digits = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in load_digits().images]
    digits = [digit.resize((64, 64), Image.Resampling.BICUBIC) for digit in digits]
    pixels = np.array([thumbnail(image) for image in [*digits, *(digit.resize((40, 40)) for digit in digits[:10])]])
    pairs = near_pairs(perceptual_hashes(pixels))
    found = pairs[confirmed(pixels, np.full(len(pixels), 40), pairs)]
    assert {(number, 1797 + number) for number in range(10)} <= set(map(tuple, found.tolist()))
    assert len(pairs) > 1400 and len(found) < 250
    assert np.bincount(copy_groups(len(pixels), pairs)).max() > 100  # a group of look-alikes by hashes alone
    assert np.bincount(copy_groups(len(pixels), found)).max() <= 10


def test_moved_and_cropped_copies_are_found_among_lookalikes(tmp_path) -> None:
    eyes = [eye_ground(number, 128) for number in range(100)]
    moved = [ImageChops.offset(eye, 4, 0) for eye in eyes[:10]]  # one pixel of the thumbnail
    cropped = [eye.crop((3, 3, 125, 125)) for eye in eyes[10:20]]
    paths = saved(tmp_path, [*eyes, *moved, *cropped])
    found = set(map(tuple, copy_pairs(paths, 16, tmp_path / "cache.json").tolist()))
    assert {(number, 100 + number) for number in range(20)} <= found and len(found) <= 22


def test_a_mirrored_image_is_no_copy(tmp_path, image) -> None:
    assert len(copy_pairs(saved(tmp_path, [image, ImageOps.mirror(image)]))) == 0


def test_the_caller_sets_the_correlation(tmp_path, image) -> None:
    blurred = image.resize((20, 20)).resize(image.size)
    paths = saved(tmp_path, [image, image, blurred])
    found = [len(copy_pairs(paths, 16, None, least)) for least in (0.3, MIN_CORRELATION, 1.0)]
    assert found == [3, 3, 1]
    frames = saved(tmp_path, [image, image.point(lambda level: level + 5 * (level > 120))])
    assert [len(copy_pairs(frames, 16, None, least)) for least in (MIN_CORRELATION, 1.0)] == [1, 0]
    assert DataSettings().copies_correlation == MIN_CORRELATION and DataSettings().copies_distance == MAX_DISTANCE


# ------------------------------------------------------------------------------------------------ groups, pictures


def test_the_largest_groups_come_first_and_single_images_are_none() -> None:
    groups = np.array([4, 1, 4, 2, 7, 1, 4])
    assert [group.tolist() for group in largest_groups(groups)] == [[0, 2, 6], [1, 5]]
    assert [group.tolist() for group in largest_groups(groups, 1)] == [[0, 2, 6]]
    assert largest_groups(np.arange(3)) == largest_groups(np.zeros(0, dtype=int)) == []


def test_a_contact_sheet_shows_each_image_upright(tmp_path) -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "gray"]
    paths = saved(tmp_path, [Image.new("RGB", (400, 400), colour) for colour in colours])
    half = Image.new("RGB", (400, 200), "red")
    half.paste("blue", (200, 0, 400, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: red above blue
    half.save(tmp_path / "turned.png", exif=exif)
    sheet = Image.open(io.BytesIO(contact_sheet([*paths, str(tmp_path / "turned.png")])))
    assert (sheet.format, sheet.size) == ("PNG", (6 * 160, 2 * 174))
    centres = [sheet.getpixel((160 * (index % 6) + 80, 174 * (index // 6) + 92)) for index in range(7)]
    assert centres == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    assert [sheet.getpixel((160 + 40, 174 + at)) for at in (40, 130)] == [(255, 0, 0), (0, 0, 255)]
    assert sheet.crop((0, 0, 160, 14)).getcolors() != [(160 * 14, (255, 255, 255))]  # the number
    assert Image.open(io.BytesIO(contact_sheet(paths, most=3))).size == (3 * 160, 174)


# ------------------------------------------------------------------------------------------------ several questions


def test_two_questions_about_an_image_are_no_contradiction(tmp_path) -> None:
    images = [Image.fromarray(phantom(np.random.default_rng(number), number % 3)[0]) for number in range(24)]
    paths = saved(tmp_path, [*images, marked(images[1])])
    asked = [("Is a mass visible?", lambda kind: kind > 0), ("Is it malignant?", lambda kind: kind == 2)]
    entries = [
        {"image": path, "text": text, "answer": ("no", "yes")[holds(number % 3)], "label": holds(number % 3)}
        for number, path in enumerate(paths)
        for text, holds in asked
    ]
    entries[-1] |= {"answer": "yes", "label": True}  # the copy is no image of a cancer
    options = {"val_fraction": 0.2, "test_fraction": 0.2, "seed": 0, "hash_cache": tmp_path / "cache.json"}
    _, sound, _ = split(entries[:48], None, None, contradictions="drop", **options)
    assert (sound.contradictions, sound.num_left_out, sound.num_images, sound.num_grouped) == ((), 0, 24, 0)
    assert sound.leaked == {"validation": 0, "test": 0} and sound.leaked_if_random == 0
    splits, report, _ = split(entries, None, None, contradictions="drop", **options)
    assert len(report.contradictions) == 1 and report.num_left_out == 4 and report.num_images == 25
    parts = [{sample.image for sample in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 23
    unlike = [dict(entry) for entry in entries[:48]]
    unlike[1]["text"] = unlike[0]["text"] = "is a mass  visible?"  # one question, written twice
    unlike[0] |= {"answer": "yes", "label": True}
    assert len(split(unlike, None, None, **options)[1].contradictions) == 1


def test_a_large_group_is_reported(tmp_path, image) -> None:
    others = [Image.fromarray(phantom(np.random.default_rng(number), number % 3)[0]) for number in range(12)]
    paths = saved(tmp_path, [*others, *[image.rotate(0.1 * step) for step in range(12)]])
    entries = [{"image": path, "text": "?", "answer": "yn"[n % 2], "label": n % 2} for n, path in enumerate(paths)]
    options = {"val_fraction": 0.2, "test_fraction": 0.2, "seed": 0, "hash_cache": tmp_path / "cache.json"}
    _, report, _ = split(entries, None, None, **options)
    assert report.largest_group >= 12
    assert any("one group" in text and "--copies-distance" in text for text in report.sentences())
    splits, report, _ = split(entries, None, None, copies_distance=-1, **options)
    assert (report.num_pairs, len(splits.validation), len(splits.test)) == (0, 4, 4)
    assert not any("one group" in text for text in report.sentences())
