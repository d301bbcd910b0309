"""`--window` and `--frames` reach every reader of images, and an adapter keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from train_fn.data.copies import copy_pairs, read_thumbnails
from train_fn.data.images import AS_USUAL, read_image
from train_fn.data.phantoms import phantom
from train_fn.data.samples import Sample, Splits, closed_set
from train_fn.model.adapters import read_task
from train_fn.model.base import load_base
from train_fn.model.batches import image_features, num_patches, process
from train_fn.settings import ImageOptions, ModelSettings, TrialSettings
from train_fn.trial.lora import adapted

SETTINGS = ModelSettings(window="0,65535", frames="2", feature_cache_gib=0)
QUESTION = "What does this image show?"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """16-bit files of two pages, the second one a picture; and the pictures as 8-bit files."""
    folder = tmp_path_factory.mktemp("scans")
    pairs = []
    for number in range(4):
        picture = phantom(np.random.default_rng(number), number % 3)[0]
        grey = np.asarray(Image.fromarray(picture).convert("L"))[: 100 + number] // 2
        deep, plain = folder / f"{number}.tif", folder / f"{number}.png"
        Image.new("I;16", (9, 7)).save(
            deep, save_all=True, append_images=[Image.fromarray(grey.astype(np.uint16) * 257)]
        )
        Image.fromarray(grey).save(plain)
        pairs.append((str(deep), str(plain)))
    return pairs


def test_the_pictures_are_equal(scans) -> None:
    for deep, plain in scans:
        read = read_image(deep, SETTINGS.image_options)
        assert np.array_equal(read, read_image(plain, AS_USUAL))
        assert not np.array_equal(read, read_image(deep, ImageOptions(frames="2")))  # by its own range: brighter


def test_training_reads_them_so(scans, base) -> None:
    own = load_base(SETTINGS, torch.device("cpu"))
    plain = replace(base, settings=replace(base.settings, feature_cache_gib=0))
    for deep, picture in scans:
        inputs = process(own, Sample((deep,), QUESTION, ""))
        expected = process(plain, Sample((picture,), QUESTION, ""))
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert num_patches(own, deep) == num_patches(plain, picture)
        assert torch.equal(image_features(own, deep), image_features(plain, picture))


def test_features_are_kept_apart() -> None:
    settings = [
        ModelSettings(),
        ModelSettings(window="0,255"),
        ModelSettings(window="0,65535"),
        ModelSettings(frames="1"),
    ]
    assert len({load_base(one, torch.device("cpu")).features.directory for one in settings}) == 4


def test_thumbnails_are_kept_apart(scans, tmp_path) -> None:
    (deep, plain), cache = scans[0], tmp_path / "cache.json"
    brighter, _ = read_thumbnails([deep], cache, ImageOptions(frames="2"))
    for _ in range(2):
        pixels, sides = read_thumbnails([deep, plain], cache, SETTINGS.image_options)
        assert np.array_equal(pixels[0], pixels[1]) and sides.tolist() == [100, 100]
    assert brighter.mean() > pixels.mean() * 1.5
    assert copy_pairs([deep, plain], cache=cache, options=SETTINGS.image_options).tolist() == [[0, 1]]


def test_a_study_reads_them_so(scans, tmp_path) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare

    entries = [
        {"image": image, "text": QUESTION, "answer": answer, "label": label}
        for number in range(12)
        for label, answer in enumerate(("yes", "no"))
        for image in [str(tmp_path / f"{number}-{label}.tif")]
    ]
    for number, entry in enumerate(entries):
        grey = np.random.default_rng(number).integers(0, 5000, (40, 40)).astype(np.uint16)
        Image.fromarray(grey).save(entry["image"], save_all=True, append_images=[Image.fromarray(grey + 1)])
    (tmp_path / "m.json").write_text(json.dumps(entries))
    argv = ["--data", str(tmp_path / "m.json"), "--results", str(tmp_path / "r"), "--name", "s", "--window", "0,5000"]
    with pytest.raises(SettingsError, match="several frames or pages"):
        prepare(parse(argv), print)
    said: list[str] = []
    study = prepare(parse([*argv, "--frames", "2"]), said.append)
    assert "Using frame 2 of each of the 24 images that hold several" in said
    assert study.settings.model.image_options == ImageOptions("0,5000", "2")
    assert study.plan["settings"]["model"]["window"] == "0,5000"


@pytest.mark.parametrize(
    "words", [("--window", "5"), ("--window", "9,3"), ("--window", "a,b"), ("--window", "0,inf"), ("--frames", "0")]
)
def test_options_that_are_no_window_or_frame(words) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError

    with pytest.raises(SettingsError, match=words[0]):
        parse(words)


def test_the_adapter_keeps_them(scans, base, tmp_path, capsys) -> None:
    from train_fn.predict import main
    from train_fn.pyfunc_model import AdapterModel
    from train_fn.trial.adapter_files import save_adapter
    from train_fn.trial.outputs import save_task

    sample = Sample((scans[0][0],), QUESTION, "yes", 0)
    splits = Splits((sample,), (sample,), (sample,), closed_set(("yes", "no")))
    trial = TrialSettings(lora_r=4, lora_alpha=8)
    folders: dict[str, Path] = {}
    for name, settings in (("own", SETTINGS), ("plain", ModelSettings(feature_cache_gib=0))):
        folders[name] = tmp_path / name
        torch.manual_seed(0)
        with adapted(base, trial) as model:
            save_adapter(base, model, trial, folders[name])
        save_task(replace(base, settings=settings), splits, folders[name])
        assert read_task(folders[name]).model.image_options == settings.image_options
    deep, plain = ([pair[side] for pair in scans] for side in (0, 1))
    assert main(["--adapter", str(folders["own"]), "--no-generate", *deep]) == 0
    own = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["--adapter", str(folders["plain"]), "--no-generate", *plain]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["probabilities"] for line in own] == [line["probabilities"] for line in expected]
    assert main(["--adapter", str(folders["own"]), *plain]) == 2
    assert "more than 8 bits for --window 0,65535" in capsys.readouterr().err
    served = AdapterModel()
    served.load_context(SimpleNamespace(artifacts={"adapter": str(folders["own"])}))
    import pandas as pd

    table = served.predict(None, pd.DataFrame({"image": deep}))
    served.held.close()
    assert table["yes"].tolist() == [line["probabilities"]["yes"] for line in expected]
