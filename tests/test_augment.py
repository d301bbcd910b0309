"""Augmentation: which pixels a variant has, which one is shown when, and that only training ever sees one."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train_fn.data import augment
from train_fn.data.augment import ITSELF, STRENGTHS, Variant, path_of, read_shown, shown_images, vary
from train_fn.data.order import epoch_order, epoch_variants
from train_fn.data.samples import Sample, Splits
from train_fn.data.splits_file import load_splits, save_splits
from train_fn.execution import Execution
from train_fn.jobs import EpochReport
from train_fn.model.base import Base, load_base
from train_fn.model.batches import image_features, num_tokens, process
from train_fn.model.features import FeatureStore
from train_fn.settings import AUGMENT, ImageOptions, TrialSettings
from train_fn.trial.applied import TrialFailed
from train_fn.trial.loop import Preempted, run_trial
from train_fn.trial.steps import micro_batches

NUMBERS = range(1, 25)
TRIAL = TrialSettings(
    num_train_epochs=2, lora_r=4, lora_alpha=8, learning_rate=1e-3, augment="medium", augment_variants=2, seed=3
)


def variant(number: int = 1, strength: str = "medium", allow_flips: bool = False, path: str = "") -> Variant:
    return Variant(path, strength, number, allow_flips)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


@pytest.fixture(scope="module")
def few(splits) -> Splits:
    """Fewer images, for trials of seconds."""
    return replace(splits, train=splits.train[:16], validation=splits.validation[:6], allow_flips=True)


@pytest.fixture(scope="module")
def phantom(splits) -> Image.Image:
    return read_shown(splits.train[0].image)


# ------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("size", [(1, 1), (2, 90), (333, 210), (700, 520)])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_variant_keeps_size_and_grey(phantom, size, strength) -> None:
    picture = phantom.resize(size)
    varied = vary(picture, variant(strength=strength, allow_flips=True))
    assert (varied.size, varied.mode) == (size, "RGB")
    red, green, blue = np.moveaxis(np.asarray(varied), -1, 0)
    assert np.array_equal(red, green) and np.array_equal(red, blue)


def test_a_variant_follows_from_pixels_number_strength_and_flips(phantom) -> None:
    other = phantom.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    first = [vary(phantom, variant(n, strength, path="a.png")) for strength in STRENGTHS for n in range(1, 5)]
    again = [vary(phantom, variant(n, strength, path="b.png")) for strength in STRENGTHS for n in range(1, 5)]
    assert first == again
    seen = [phantom, *first, vary(other, variant())]
    assert len({picture.tobytes() for picture in seen}) == len(seen) == 10


def likeness(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), two.ravel())[0, 1])


def test_flips_are_from_left_to_right_and_only_where_they_are_allowed() -> None:
    rows, columns = np.mgrid[:128, :160]
    picture = Image.fromarray((40 + rows / 2 + columns).astype(np.uint8)).convert("RGB")
    grey = pixels(picture)
    for allowed in (False, True):
        flipped = []
        for number in NUMBERS:
            varied = pixels(vary(picture, variant(number, "light", allowed)))
            same, mirrored = likeness(varied, grey), likeness(varied, grey[:, ::-1])
            assert max(same, mirrored) > 0.9
            # Downwards it becomes brighter, as in the image.
            assert varied[100:].mean() > varied[:28].mean()
            flipped.append(mirrored > same)
        assert (4 < sum(flipped) < 20) if allowed else not any(flipped)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_brightness_and_speckle_stay_within_the_strength_and_use_it(strength) -> None:
    most, flat = STRENGTHS[strength], Image.new("RGB", (120, 120), (120, 60, 90))
    varied = [pixels(vary(flat, variant(number, strength))) for number in range(60)]
    gains = np.array([values.mean(axis=(0, 1)) / (120, 60, 90) for values in varied])
    noise = np.array([(values.std(axis=(0, 1)) / values.mean(axis=(0, 1))).max() for values in varied])
    # The mean of this image lies at 76, so contrast moves its colours by up to 0.6 gains.
    assert np.abs(gains - 1).max() < 1.7 * most.gain + 0.01 and gains.min() < 1 - 0.8 * most.gain
    assert 0.8 * most.speckle < noise.max() < 1.1 * most.speckle
    noisy = [values for values in varied if values.std(axis=(0, 1)).min() > 4]  # more than rounding
    assert len(noisy) > 10  # one factor for all channels: they stay in the same proportion to each other
    assert all(likeness(values[..., 0], values[..., channel]) > 0.97 for values in noisy for channel in (1, 2))
    for values in varied:  # the corners are not black
        assert values[:10, :10].mean() == pytest.approx(values.mean(), rel=0.1)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_images_are_turned_by_no_more_than_the_strength(strength) -> None:
    line = np.zeros((201, 201), np.uint8)
    line[98:103] = 200
    picture, angles = Image.fromarray(line).convert("RGB"), []
    for number in range(60):
        varied = pixels(vary(picture, variant(number, strength)))[..., 0]
        left, right = (np.average(np.arange(201), weights=np.clip(varied[:, x] - 60, 0, None)) for x in (50, 150))
        angles.append(abs(np.degrees(np.arctan2(right - left, 100))))
    assert 0.8 * STRENGTHS[strength].degrees < max(angles) < STRENGTHS[strength].degrees + 0.5


def test_variants_come_after_window_and_frame(tmp_path) -> None:
    frames = [Image.fromarray((np.arange(4096).reshape(64, 64) * step).astype(np.uint16)) for step in (1, 4)]
    frames[0].save(tmp_path / "deep.tif", save_all=True, append_images=frames[1:])
    options, path = ImageOptions("0,16383", "2"), str(tmp_path / "deep.tif")
    plain = read_shown(path, options)
    assert plain.size == (64, 64) and pixels(plain).max() == 255
    assert read_shown(variant(path=path), options) == vary(plain, variant())


def test_the_strengths_are_those_of_the_setting() -> None:
    assert ("none", *STRENGTHS) == AUGMENT
    problems = TrialSettings(augment="strong", augment_variants=1).problems()
    assert len(problems) == 2 and "one of none, light, medium" in problems[0] and "from 2 to 64" in problems[1]


# ------------------------------------------------------------------------------------------------ which one is shown


def test_an_image_shows_each_variant_once_in_as_many_epochs() -> None:
    numbers = np.stack([epoch_variants(50, 2, 4, 7, epoch) for epoch in range(1, 9)])  # [8, 50, 2]
    for cycle in (numbers[:4], numbers[4:]):
        assert np.array_equal(np.sort(cycle, axis=0), np.broadcast_to(np.arange(4)[:, None, None], (4, 50, 2)))
    assert not np.array_equal(numbers[:4], numbers[4:])
    assert not np.array_equal(numbers[0], epoch_variants(50, 2, 4, 8, 1))
    assert np.bincount(numbers[0].ravel(), minlength=4).min() > 10
    assert (numbers[:, :, 0] != numbers[:, :, 1]).mean() > 0.6  # the images of a sample do not go together
    assert not np.array_equal(np.argsort(epoch_order(50, 50, 7, 1)[0]), numbers[0, :, 0])


def test_each_image_of_a_sample_is_varied_or_shown_as_it_is(few) -> None:
    pairs = tuple(Sample((f"{n}.png", f"{n}b.png")[: 1 + n % 2], "Which?", "this", 0) for n in range(40))
    splits = replace(few, train=pairs)
    assert shown_images(splits, replace(TRIAL, augment="none"), 1) == [sample.images for sample in pairs]
    shown = shown_images(splits, replace(TRIAL, augment_variants=4), 2)
    assert [tuple(map(path_of, its)) for its in shown] == [sample.images for sample in pairs]
    images = [image for its in shown for image in its]
    varied = [image for image in images if isinstance(image, Variant)]
    assert {(v.strength, v.allow_flips) for v in varied} == {("medium", True)}
    assert {v.number for v in varied} == {1, 2, 3} and 4 < len(images) - len(varied) < 30


def test_allow_flips_is_part_of_the_splits_file(few, tmp_path) -> None:
    for splits in (few, replace(few, allow_flips=False)):
        save_splits(splits, tmp_path / "splits.json")
        assert load_splits(tmp_path / "splits.json") == splits
    text = (tmp_path / "splits.json").read_text()
    (tmp_path / "splits.json").write_text(text.replace('"allow_flips"', '"of an earlier version"'))
    assert load_splits(tmp_path / "splits.json").allow_flips is False


# ------------------------------------------------------------------------------------------------ features


def test_features_of_variants_are_keyed_apart(few, monkeypatch) -> None:
    store, path = FeatureStore("key", 0), few.train[0].image
    shown = [path, *(Variant(path, s, n, f) for s in STRENGTHS for n in (1, 2) for f in (False, True))]
    names = {store.file(image).name for image in shown}
    monkeypatch.setattr(augment, "code_version", lambda: "another")
    names |= {store.file(image).name for image in shown}
    assert len(names) == 9 + 8
    monkeypatch.undo()
    copy = shutil.copy(path, Path(path).with_suffix(".copy.png"))
    assert store.file(shown[3]) == store.file(shown[3]._replace(path=str(copy)))  # type: ignore[union-attr]


@pytest.mark.parametrize("cached", [True, False])
def test_the_tower_and_the_processor_see_the_varied_pixels(base, few, tmp_path, monkeypatch, cached) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = load_base(replace(base.settings, feature_cache_gib=float(cached)), base.device)
    sample = few.train[0]
    varied = variant(2, path=sample.image, allow_flips=True)
    read_shown(varied).save(tmp_path / "varied.png")
    wanted = image_features(own, str(tmp_path / "varied.png"))
    plain = image_features(own, sample.image)
    for _ in (1, 2):  # computed, then from the cache
        assert torch.equal(image_features(own, varied), wanted) and not torch.equal(plain, wanted)
    ours, theirs = process(own, sample, [varied]), process(own, replace(sample, images=(f"{tmp_path}/varied.png",)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["pixel_values"], process(own, sample)["pixel_values"])


# ------------------------------------------------------------------------------------------------ in training


def train(base: Base, splits: Splits, settings: TrialSettings, **options) -> list[EpochReport]:
    reports: list[EpochReport] = []
    run_trial(base, splits, settings, lambda report: bool(reports.append(report)), **options)
    return reports


def numbers(reports: Iterable[EpochReport]) -> list:
    return [(report.metrics, report.log, report.applied) for report in reports]


@pytest.fixture(scope="module")
def cold(base, few, tmp_path_factory) -> tuple[list[EpochReport], list[str | Variant], Path]:
    """A trial on an empty cache: its reports, all images whose features were computed, and the cache."""
    home = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        computed: list[str | Variant] = []
        from train_fn.model import batches

        original = batches.compute_features
        patch.setattr(batches, "compute_features", lambda base, image: computed.append(image) or original(base, image))
        own = load_base(base.settings, base.device)
        return train(own, few, TRIAL), computed, home


def test_a_trial_shows_what_its_settings_ask_for_and_says_so(cold, few) -> None:
    reports, _, _ = cold
    for report in reports:
        assert report.applied["augment"] == "medium"
        shown = report.applied["images_shown"]
        assert shown.keys() == {ITSELF, "medium 1, flips allowed"} and sum(shown.values()) == len(few.train)
    first, second = (Counter(report.applied["images_shown"]) for report in reports)
    assert first + second == {ITSELF: 16, "medium 1, flips allowed": 16}


def test_only_what_is_shown_is_computed_and_validation_is_never_varied(cold, few) -> None:
    _, computed, _ = cold
    assert len(computed) == len(set(computed))
    varied = [image for image in computed if isinstance(image, Variant)]
    assert {image.path for image in varied} == {sample.image for sample in few.train} and len(varied) == 16
    assert {image for image in computed if isinstance(image, str)} == {s.image for s in few.train + few.validation}


def test_a_replay_gives_the_same_bits_from_a_full_cache_and_without_one(base, few, cold, monkeypatch) -> None:
    reports, _, home = cold
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert numbers(train(load_base(base.settings, base.device), few, TRIAL)) == numbers(reports)
    off = load_base(replace(base.settings, feature_cache_gib=0), base.device)
    assert numbers(train(off, few, TRIAL)) == numbers(reports)


def test_a_trial_without_augmentation_says_so(base, few, cold) -> None:
    (plain,) = train(base, few, replace(TRIAL, max_steps=1, augment="none"))
    assert plain.applied["augment"] == "none" and plain.applied["images_shown"] == {ITSELF: 16}
    assert plain.metrics["train_loss"] != cold[0][0].metrics["train_loss"]


def test_a_trial_that_is_stopped_computes_no_later_epochs_variants(base, few, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_trial(load_base(base.settings, base.device), few, TRIAL, lambda report: True)
    num_files = len(list(tmp_path.glob("vlm-tune/features/*/*.safetensors")))
    assert num_files == len(few.train) + len(few.validation)


def test_a_trial_that_goes_on_in_the_middle_of_an_epoch_shows_the_same(base, few, tmp_path) -> None:
    settings = replace(TRIAL, gradient_accumulation_steps=2, num_train_epochs=2)  # four steps an epoch
    whole = train(base, few, settings)
    steps = iter(range(1, 99))
    with pytest.raises(Preempted):
        train(base, few, settings, output=tmp_path, preempted=lambda: next(steps) == 6)
    assert numbers(train(base, few, settings, output=tmp_path)) == numbers(whole)


def test_images_that_are_not_varied_as_asked_fail_the_trial(base, few, monkeypatch) -> None:
    monkeypatch.setattr("train_fn.trial.loop.shown_images", lambda splits, *given: [s.images for s in splits.train])
    with pytest.raises(TrialFailed, match=r"images_shown should be .*'medium 1, flips allowed': .* but is {'itself': "):
        train(base, few, replace(TRIAL, max_steps=1))


def test_the_cut_into_micro_batches_decides_nothing(base, few) -> None:
    order, shown = epoch_order(16, 8, 3, 1), shown_images(few, TRIAL, 1)
    longest = max(num_tokens(base, sample) for sample in few.train)
    counts = []
    for way in (Execution(images=1), Execution(images=4), Execution(tokens=3 * longest)):
        fed: Counter[str] = Counter()
        parts = list(micro_batches(base, few.train, way, order, shown, fed))
        features = torch.cat([part.batch["vision_features"] for part in parts])
        counts.append((fed, features.double().sum(0)))
    assert all(fed == counts[0][0] and torch.allclose(total, counts[0][1]) for fed, total in counts)
    assert counts[0][0][ITSELF] < 16
