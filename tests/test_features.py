"""Vision features on disk: equal numbers from any cache, no stale or incomplete entries, within the size limit."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from train_fn.data.samples import Sample
from train_fn.model.base import Base, load_base
from train_fn.model.batches import answer_losses, collate, image_features, num_patches, process
from train_fn.model.features import FeatureStore, features_key
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import attached, lora_config

FIXTURES = os.environ.get("HULUMED_FIXTURES", "")
NANO = ModelSettings()
HULUMED = ModelSettings(model=f"{FIXTURES}/checkpoint")
MODELS = [
    pytest.param(NANO, id="nano"),
    pytest.param(HULUMED, id="hulumed", marks=pytest.mark.skipif(not FIXTURES, reason="no HULUMED_FIXTURES")),
]
TRIAL = TrialSettings(num_train_epochs=1, lora_r=4, learning_rate=1e-3, train_projector=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; the folder of the features in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlm-tune" / "features"


@pytest.fixture
def images(splits, tmp_path) -> list[str]:
    """Images of several shapes."""
    whole = Image.open(splits.train[0].image)
    for size in ((112, 112), (96, 200), (333, 210), (30, 41)):
        whole.resize(size).save(tmp_path / f"{size[0]}.png")
    return sorted(map(str, tmp_path.glob("*.png")))


def fill(rank: int, settings: ModelSettings, images: Sequence[str], cache_home: str) -> None:
    os.environ["XDG_CACHE_HOME"] = cache_home
    base = load_base(settings, CPU)
    for image in images if rank == 0 else images[::-1]:
        image_features(base, image)


def key(base: Base) -> str:
    tower, config = base.model.get_submodule(base.vision_tower), base.model.config.vision_config
    return features_key(tower, config, base.processor.image_processor, base.device, base.settings.image_options)


def tower_calls(base: Base) -> list[int]:
    """Grows by the patches of every image that the tower sees."""
    seen: list[int] = []
    tower = base.model.get_submodule(base.vision_tower)
    tower.register_forward_hook(lambda module, given, output: seen.append(len(output.last_hidden_state)))
    return seen


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("settings", MODELS)
def test_a_trial_is_the_same_to_the_last_bit(base, splits, settings, cache, monkeypatch, tmp_path) -> None:
    def trial(gib: float) -> tuple[dict, int]:
        fresh = load_base(replace(settings, feature_cache_gib=gib), CPU)
        seen, reports = tower_calls(fresh), []
        run_trial(fresh, splits, TRIAL, lambda report: bool(reports.append(report)))
        return reports[-1].metrics, len(seen)

    images = [sample.image for sample in splits.train + splits.validation]
    off, num_off = trial(0)
    assert num_off == 32 + len(splits.validation) and not cache.exists()
    cold, num_cold = trial(4)
    warm, num_warm = trial(4)
    others = tmp_path / "others" / "vlm-tune" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "others"))
    run_ranks(fill, (settings, images, str(tmp_path / "others")))  # at once, from both ends
    filled, num_filled = trial(4)
    assert off == cold == warm == filled
    assert 0 < num_cold <= len(images) and num_warm == num_filled == 0
    ours, theirs = ({file.name: file for file in folder.glob("*/*")} for folder in (cache, others))
    assert len(theirs) == len(images) and all(name.endswith(".safetensors") for name in theirs)
    assert ours.keys() <= theirs.keys()
    assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in ours)


@pytest.mark.parametrize("settings", MODELS)
def test_features_do_not_depend_on_the_batch(splits, settings) -> None:
    base = load_base(replace(settings, feature_cache_gib=0), CPU)
    samples = splits.train[:5]
    together = collate(base, samples, with_answers=False)["vision_features"]
    alone = [collate(base, [sample], with_answers=False)["vision_features"] for sample in samples]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("settings", MODELS)
def test_patches_and_prompts_are_the_processors(settings, images) -> None:
    base = load_base(settings, CPU)
    assert len(images) == 4
    for image in images:
        assert num_patches(base, image) == len(image_features(base, image))
        sample = Sample((image,), "Normal or not?", "Normal", 0)
        ours, theirs = collate(base, [sample], with_answers=False), process(base, sample)
        assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "attention_mask"))


# ------------------------------------------------------------------------------------------------ what an entry is of


def test_the_key_is_of_tower_processor_and_format() -> None:
    base = load_base(NANO, CPU)
    keys = [key(base)]
    for part in (base.projector, base.language_model):
        next(base.model.get_submodule(part).parameters()).data += 1
    assert key(base) == keys[0]
    next(base.model.get_submodule(base.vision_tower).parameters()).data[0] += 1e-3
    keys.append(key(base))
    for changed in (replace(NANO, max_image_tokens=32), replace(NANO, dtype="bfloat16")):
        keys.append(key(load_base(changed, CPU)))
    torch.set_num_threads(2)  # other sums, at real widths
    keys.append(key(base))
    torch.set_num_threads(1)
    assert len(set(keys)) == 5


@pytest.mark.skipif(not FIXTURES, reason="no HULUMED_FIXTURES")
def test_upright_images_have_a_key_of_their_own() -> None:
    assert key(load_base(HULUMED, CPU)) != key(load_base(replace(HULUMED, upright_images=True), CPU))


def test_changed_content_under_the_same_path_is_noticed(images) -> None:
    first = image_features(load_base(NANO, CPU), images[0])
    copy = images[0] + ".copy.png"
    shutil.copy(images[0], copy)
    base = load_base(NANO, CPU)
    seen = tower_calls(base)
    assert torch.equal(image_features(base, copy), first) and not seen  # the same content under another path
    shutil.copy(images[1], images[0])
    base = load_base(NANO, CPU)
    assert torch.equal(image_features(base, images[0]), image_features(base, images[1]))


def test_a_changed_tower_bypasses_the_cache(splits) -> None:
    base = load_base(NANO, CPU)
    samples = splits.train[:2]
    wanted = answer_losses(base, collate(base, samples, with_answers=True))
    weight = next(base.model.get_submodule(base.vision_tower).parameters())
    weight.requires_grad_(True)
    batch = collate(base, samples, with_answers=True)
    assert "vision_features" not in batch
    losses = answer_losses(base, batch)
    losses.mean().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert torch.allclose(losses, wanted, atol=1e-5)
    weight.requires_grad_(False)
    assert base.takes_features
    weight.data, loaded = weight.data.clone(), weight.data  # as when trained weights replace them
    assert not base.takes_features
    weight.data = loaded
    config = lora_config(base, TRIAL)
    config.target_modules, config.inference_mode = rf"{base.vision_tower}\..*q_proj", True
    with attached(base, config):  # an adapter that is only scored
        assert not base.takes_features
    assert base.takes_features


# ------------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("damage", ["empty", "cut", "not safetensors", "another shape", "another name"])
def test_a_damaged_entry_is_written_again(base, images, cache, damage) -> None:
    wanted = image_features(load_base(NANO, CPU), images[0])
    (file,) = cache.glob("*/*")
    if damage == "another shape":
        save_file({"features": torch.zeros(3, 4)}, file)
    elif damage == "another name":
        save_file({"other": wanted}, file)
    else:
        file.write_bytes({"empty": b"", "cut": file.read_bytes()[:-9], "not safetensors": b"\xff" * 99}[damage])
    assert torch.equal(image_features(load_base(NANO, CPU), images[0]), wanted)
    assert torch.equal(load_file(file)["features"], wanted)


def test_the_size_limit_holds_and_the_least_recently_used_goes_first(images, cache, monkeypatch) -> None:
    features = torch.zeros(50, 128)
    written = features.nbytes + 100  # with the header
    monkeypatch.setattr("train_fn.model.features.WRITES_PER_COUNT", 1)
    old = FeatureStore("old", 10 * written)
    for image in images:
        old.keep(image, features)
    names = {image: old.file(image).name for image in images}
    long_ago = time.time() - 10_000
    for age, image in enumerate(images):
        os.utime(old.file(image), (long_ago - age, long_ago - age))
    assert old.find(images[3], (50, 128)) is not None  # used just now

    new = FeatureStore("new", 4 * written)
    new.keep(images[0], features)
    new.keep(images[1], features)
    assert {file.name for file in cache.glob("old/*")} == {names[images[0]], names[images[3]]}
    new.keep(images[2], features)
    assert {file.name for file in cache.glob("old/*")} == {names[images[3]]}
    new.keep(images[3], features)  # all remaining files are in use
    assert sorted(file.name for file in cache.glob("new/*")) == sorted(names[image] for image in images[:3])
    assert new.find(images[3], (50, 128)) is None
    assert sum(file.stat().st_size for file in cache.glob("*/*")) <= 4 * written


def test_a_cache_that_cannot_be_written_becomes_memory_with_one_warning(images, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    base = load_base(NANO, CPU)
    seen = tower_calls(base)
    with pytest.warns(UserWarning, match="in memory only") as told:
        first = [image_features(base, image) for image in images]
    assert len(told) == 1
    assert len(seen) == 4
    assert all(torch.equal(image_features(base, image), one) for image, one in zip(images, first, strict=True))
    assert len(seen) == 4


def test_a_disk_that_fills_up_leaves_no_partial_file(images, cache, monkeypatch) -> None:
    base = load_base(NANO, CPU)
    image_features(base, images[0])
    write_bytes = Path.write_bytes

    def fills_up(self: Path, data: bytes) -> int:
        write_bytes(self, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.warns(UserWarning, match="No space left"):
        wanted = image_features(base, images[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_features(base, images[2])
    assert len(list(cache.glob("*/*"))) == 1
    assert torch.equal(image_features(base, images[1]), wanted)
    seen = tower_calls(base)
    assert torch.equal(image_features(base, images[0]), image_features(load_base(NANO, CPU), images[0])) and not seen
