"""Pixels equal to those of transformers, and images that are refused."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from train_fn.data.copies import read_thumbnails
from train_fn.data.images import image_problems, image_size, read_image

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)  # not square, so that a turn shows
KINDS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {}}


def save(path: Path, orientation: int, **options: object) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_transformers(tmp_path, kind, orientation) -> None:
    from transformers.image_utils import load_image

    path = str(save(tmp_path / f"a.{kind}", orientation, **KINDS[kind]))
    ours, theirs = read_image(path), load_image(path)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert image_size(path) == ours.size == ((50, 30) if orientation < 5 else (30, 50))


def with_exif_at_its_end(path: Path) -> Path:
    """A PNG with its orientation after its pixels, as some cameras' programs write it."""
    Image.fromarray(PIXELS).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])
    return path


def with_xmp(path: Path) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("make", [with_exif_at_its_end, with_xmp])
def test_orientations_in_unusual_places(tmp_path, make) -> None:
    from transformers.image_utils import load_image

    path = str(make(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(load_image(path)))
    assert image_size(path) == read_image(path).size == (30, 50)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path, monkeypatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert image_size(str(tmp_path / "a.png")) == (50, 30)


def test_a_turned_copy_is_the_same_picture(tmp_path) -> None:
    turned = Image.fromarray(np.rot90(PIXELS))  # with orientation 6 it is shown upright again
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(PIXELS).save(tmp_path / "upright.png")
    (one, two), sides = read_thumbnails(
        [str(tmp_path / name) for name in ("turned.png", "upright.png")], tmp_path / "c.json"
    )
    assert np.array_equal(one, two) and sides.tolist() == [30, 30]


# ------------------------------------------------------------------------------------------------ what is refused


def png(width: int, height: int, path: Path) -> Path:
    """A grey PNG of zeros, whatever its size: the file is small."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )  # fmt: skip
    return path


def animated(path: Path, **options: object) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one pixel wide": ("a.png", lambda path: png(99_999, 1, path), "sides of at most 65,535"),
    "as a column": ("a.png", lambda path: png(1, 70_000, path), "sides of at most 65,535"),
    "too many pixels": ("a.png", lambda path: png(9000, 6000, path), "at most 50,000,000 pixels, but has 9000 x 6000"),
    "an animation": ("a.gif", animated, "several frames"),
    "an animated PNG": ("a.png", animated, "several frames"),
    "an animated WebP": ("a.webp", animated, "several frames"),
    "a TIFF of two pages": ("a.tif", animated, "several frames or pages"),
    "16 bits": ("a.png", lambda path: Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(path), "8 bits"),
    "floats": ("a.tif", lambda path: Image.fromarray(np.ones((8, 8), np.float32)).save(path), "8 bits"),
    "a pipe": ("a.png", os.mkfifo, "existing file"),
    "a device": ("a.png", lambda path: path.symlink_to("/dev/zero"), "existing file"),
    "a folder": ("a.png", Path.mkdir, "existing file"),
    "text": ("a.png", lambda path: path.write_text("no image"), "decodable"),
}


@pytest.mark.parametrize(("name", "make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_header(tmp_path, monkeypatch, name, make, words) -> None:
    make(tmp_path / name)
    monkeypatch.setattr("train_fn.data.images.decode", lambda image: pytest.fail("decoded"))
    (problem,) = image_problems([str(tmp_path / name)]).values()
    assert words in problem and str(tmp_path / name) in problem


ACCEPTED: dict[str, Callable[[Path], object]] = {
    "CMYK": lambda path: Image.fromarray(PIXELS).convert("CMYK").save(path.with_suffix(".jpg")),
    "a palette": lambda path: Image.fromarray(PIXELS).quantize(16).save(path),
    "grey with alpha": lambda path: Image.fromarray(PIXELS).convert("LA").save(path),
    "black and white": lambda path: Image.fromarray(PIXELS).convert("1").save(path),
    "a GIF of one frame": lambda path: Image.fromarray(PIXELS).quantize(16).save(path, "GIF"),
    "a phone's two pictures": lambda path: Image.fromarray(PIXELS).save(
        path, "MPO", save_all=True, append_images=[Image.fromarray(PIXELS[::2])]
    ),
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_and_read_as_rgb(tmp_path, make) -> None:
    make(tmp_path / "a.png")
    (path,) = tmp_path.iterdir()
    assert image_problems([str(path)]) == {}
    assert read_image(str(path)).mode == "RGB" and read_image(str(path)).size == (50, 30)


def test_the_caller_sets_the_limit(tmp_path) -> None:
    path = str(png(100, 100, tmp_path / "a.png"))
    assert image_problems([path], 10_000) == {}
    (problem,) = image_problems([path], 9_999).values()
    assert "--max-image-pixels" in problem


def test_an_image_that_does_not_fit_the_memory_is_its_own_problem(tmp_path, monkeypatch) -> None:
    paths = [str(save(tmp_path / f"{number}.png", 1)) for number in range(3)]

    def decode(image: Image.Image) -> None:
        if image.filename == paths[1]:
            raise MemoryError

    monkeypatch.setattr("train_fn.data.images.decode", decode)
    (problem,) = image_problems(paths).values()
    assert "must fit the memory" in problem and paths[1] in problem


def test_after_a_while_only_headers_are_read(tmp_path, monkeypatch) -> None:
    good, cut = (str(save(tmp_path / name, 1)) for name in ("good.png", "cut.png"))
    Path(cut).write_bytes(Path(cut).read_bytes()[:-500])
    big = str(png(9000, 6000, tmp_path / "big.png"))
    logged: list[str] = []
    assert set(image_problems([good, cut, big], log=logged.append)) == {cut, big} and not logged
    assert set(image_problems([good, cut, big], log=logged.append, max_seconds=-1)) == {big}
    assert logged == ["Checked 2 of 3 images by their headers only, after -1 s"]
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    image_problems([good, cut, big], log=logged.append)
    assert "Checked 1 of 3 images" in logged


def test_a_study_takes_the_limit_from_its_settings(tmp_path) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare

    (tmp_path / "m.json").write_text('[{"image": "a.png", "text": "?", "answer": "yes", "label": 1}]')
    png(100, 100, tmp_path / "a.png")
    argv = ["--data", str(tmp_path / "m.json"), "--max-image-pixels", "5000", "--results", str(tmp_path / "r")]
    with pytest.raises(SettingsError, match="at most 5,000 pixels"):
        prepare(parse(argv), print)
    with pytest.raises(SettingsError, match="max-image-pixels"):
        parse(["--max-image-pixels", "10000000000"])
