"""Vision features on disk: equal numbers from any cache, no stale or incomplete entries, within the size limit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
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
from torch.multiprocessing.spawn import ProcessExitedException

from train_fn.data.samples import Sample
from train_fn.model.base import Base, load_base
from train_fn.model.batches import BatchFailed, answer_losses, collate, image_features, num_patches, process
from train_fn.model.features import CLAIM_S, FeatureStore, features_key, start_time
from train_fn.model.preparation import prepare_features
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import attached, lora_config

HOST = socket.gethostname()
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


# ------------------------------------------------------------------------------------------------ shared work


def prepare(rank: int, images: Sequence[str], folder: Path) -> None:
    """Prepare the features of images in a process of its own, and note how many the tower computed."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
    base = load_base(NANO, CPU)
    seen, ready = tower_calls(base), folder / f"ready-{rank}"
    ready.touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.001)
    prepare_features(base, images)
    (folder / f"computed-{rank}").write_text(str(len(seen)))


def hold_claim(rank: int, store: FeatureStore, image: str) -> None:
    assert store.claim(image, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def claims(cache: Path) -> list[Path]:
    return list(cache.glob("*/*.claim"))


def test_two_processes_share_the_images(splits, cache, tmp_path) -> None:
    images = [sample.image for sample in splits.train + splits.validation]
    run_ranks(prepare, (images, tmp_path))
    computed = [int((tmp_path / f"computed-{rank}").read_text()) for rank in (0, 1)]
    assert sum(computed) == len(images) == len(list(cache.glob("*/*.safetensors")))
    assert min(computed) > 0
    assert not claims(cache)


def test_preparing_changes_no_bit_of_a_trial_and_costs_little_once_done(base, splits, cache, monkeypatch) -> None:
    def trial(fresh: Base) -> list:
        reports: list = []
        run_trial(fresh, splits, TRIAL, lambda report: bool(reports.append(report)))
        return [(report.metrics, report.log) for report in reports]

    prepared = load_base(NANO, CPU)
    seen = tower_calls(prepared)
    first = trial(prepared)
    assert len(seen) == len({sample.image for sample in splits.train + splits.validation})
    looked: list[str] = []
    find = FeatureStore.find
    monkeypatch.setattr(
        FeatureStore, "find", lambda self, image, shape: looked.append(image) or find(self, image, shape)
    )
    prepare_features(prepared, [sample.image for sample in splits.train + splits.validation])
    assert not looked
    shutil.rmtree(cache)
    monkeypatch.setattr("train_fn.trial.loop.prepare_features", lambda *given: None)
    assert trial(load_base(NANO, CPU)) == first


def test_a_trial_of_few_steps_prepares_its_own_images_only(base, splits) -> None:
    fresh = load_base(NANO, CPU)
    seen = tower_calls(fresh)
    trained = replace(TRIAL, max_steps=1)
    run_trial(fresh, splits, trained, lambda report: False)
    assert len(seen) == trained.global_batch_size + len(splits.validation) < len(splits.train + splits.validation)


def test_the_claim_of_a_killed_process_is_taken_over(images, cache) -> None:
    base = load_base(NANO, CPU)
    seen = tower_calls(base)
    with pytest.raises(ProcessExitedException):
        run_ranks(hold_claim, (base.features, images[0]), 1)
    assert len(claims(cache)) == 1
    started = time.monotonic()
    prepare_features(base, images)
    assert time.monotonic() - started < CLAIM_S / 2
    assert len(seen) == 4 and len(list(cache.glob("*/*.safetensors"))) == 4 and not claims(cache)


@pytest.mark.parametrize("holder", ["being written", "on another host", "living"])
def test_a_claim_is_waited_for_until_it_is_old(images, cache, monkeypatch, holder) -> None:
    living = f"{os.getppid()} {start_time(os.getppid())} {HOST}"
    owner = {"being written": "", "on another host": "1 0 another-host", "living": living}[holder]
    base = load_base(NANO, CPU)
    assert base.features
    claim = base.features.file(images[0]).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    claim.write_text(owner)
    assert not base.features.claim(images[0], 1)
    monkeypatch.setattr("train_fn.model.features.CLAIM_S", 0.5)
    started, seen = time.monotonic(), tower_calls(base)
    image_features(base, images[0])
    assert time.monotonic() - started > 0.2 and len(seen) == 1 and not claims(cache)


def test_a_claim_of_a_reused_process_number_is_void(images, cache) -> None:
    base = load_base(NANO, CPU)
    assert base.features and base.features.claim(images[0], 1)
    assert not base.features.claim(images[0], 1)
    (claim,) = claims(cache)
    claim.write_text(f"{os.getpid()} 1 {HOST}")  # as of a process that started just after the machine
    assert base.features.claim(images[0], 1)


def test_features_of_another_process_are_taken_without_computing(images, monkeypatch) -> None:
    wanted = image_features(load_base(NANO, CPU), images[0]).clone()
    base = load_base(NANO, CPU)
    assert base.features
    file, seen = base.features.file(images[0]), tower_calls(base)
    hidden = file.with_suffix(".hidden")
    file.rename(hidden)
    file.with_suffix(".claim").write_text("")
    timer = threading.Timer(0.2, hidden.rename, [file])  # the other process writes it
    timer.start()
    assert torch.equal(image_features(base, images[0]), wanted) and not seen
    timer.join()


def test_a_cache_that_is_too_small_is_filled_and_no_more_computed(splits, cache) -> None:
    images = [sample.image for sample in splits.train]
    image_features(load_base(NANO, CPU), images[0])
    (file,) = cache.glob("*/*")
    size = file.stat().st_size
    shutil.rmtree(cache)
    base = load_base(replace(NANO, feature_cache_gib=3.5 * size / 2**30), CPU)
    seen = tower_calls(base)
    prepare_features(base, images)
    assert len(seen) == len(list(cache.glob("*/*.safetensors"))) == 3
    prepare_features(base, images)
    assert len(seen) == 3 and not claims(cache)


def test_a_cache_that_cannot_be_written_is_not_prepared(images, cache, monkeypatch) -> None:
    first = load_base(NANO, CPU)
    image_features(first, images[0])

    def refuses(path: Path, *given: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("train_fn.model.features.open", refuses, raising=False)
    base = load_base(NANO, CPU)
    seen = tower_calls(base)
    with pytest.warns(UserWarning, match="in memory only") as told:
        prepare_features(base, images)
        assert len(seen) <= 1
        assert torch.equal(image_features(base, images[0]), image_features(first, images[0]))
        for image in images:
            image_features(base, image)
    assert len(told) == 1 and len(seen) == 3


def test_an_image_that_cannot_be_read_is_named_and_its_claim_released(images, cache) -> None:
    base = load_base(NANO, CPU)
    num_patches(base, images[2])
    Path(images[2]).write_bytes(b"no image")
    with pytest.raises(BatchFailed, match=f"but not {images[2]}: "):
        prepare_features(base, images)
    assert not claims(cache)


def test_a_preempted_process_prepares_no_more(images) -> None:
    base = load_base(NANO, CPU)
    seen = tower_calls(base)
    prepare_features(base, images, lambda: len(seen) == 2)
    assert len(seen) == 2
