"""Pixels equal to those of transformers, and images that are refused."""

from __future__ import annotations

import ast
import inspect
import io
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
from train_fn.data.images import AS_USUAL, image_facts, image_problems, image_size, read_image
from train_fn.settings import ImageOptions

ROOT = Path(__file__).parents[1]
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
    ours, theirs = read_image(path, AS_USUAL), load_image(path)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert image_size(path, AS_USUAL) == ours.size == ((50, 30) if orientation < 5 else (30, 50))


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
    assert np.array_equal(np.asarray(read_image(path, AS_USUAL)), np.asarray(load_image(path)))
    assert image_size(path, AS_USUAL) == read_image(path, AS_USUAL).size == (30, 50)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path, monkeypatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *args: pytest.fail("decoded"))
    assert image_size(str(tmp_path / "a.png"), AS_USUAL) == (50, 30)


def test_no_reader_forgets_the_options() -> None:
    """The defaults are for people: a study, an adapter and `inspect` have options of their own."""
    from train_fn.data import copies, images, manifest, splitting

    names = {
        images: ("read_image", "image_size", "image_problems"),
        copies: ("read_thumbnails", "copy_pairs"),
        splitting: ("SplitRules",),
        manifest: ("unreadable_images",),
    }
    signatures = {n: inspect.signature(getattr(module, n)) for module, its in names.items() for n in its}
    called = []
    for file in [*(ROOT / "train_fn").rglob("*.py"), *(ROOT / "tune").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func).split(".")[-1]) in signatures:
                given = signatures[name].bind_partial(*node.args, **{str(k.arg): k.value for k in node.keywords})
                assert given.arguments.keys() & {"options", "images"}, f"{file}:{node.lineno}: {ast.unparse(node)}"
                called.append(name)
    assert set(called) == set(signatures)


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_counted(tmp_path, orientation) -> None:
    for kind, options in KINDS.items():
        facts = image_facts(str(save(tmp_path / f"a.{kind}", orientation, **options)))
        assert facts.turned == (orientation > 1) and facts.frames == 1 and facts.mode == "RGB"
        assert facts.size == ((50, 30) if orientation < 5 else (30, 50))


# ------------------------------------------------------------------------------------------------ transparency


def layered(path: Path, mode: str = "RGBA", **options: object) -> str:
    """An image of three columns: red that is opaque, half transparent, and transparent."""
    pixels = np.full((6, 3, 4), (200, 0, 0, 255), np.uint8)
    pixels[:, :, 3] = 255, 128, 0
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return str(path)


def test_transparent_pixels_are_white(tmp_path) -> None:
    for name in ("a.png", "a.webp", "a.tif", "a.jp2"):
        options = {"lossless": True} if name == "a.webp" else {}
        (row, *_) = np.asarray(read_image(layered(tmp_path / name, **options), AS_USUAL)).tolist()
        assert row == [[200, 0, 0], [227, 127, 127], [255, 255, 255]], name
    (row, *_) = np.asarray(read_image(layered(tmp_path / "la.png", "LA"), AS_USUAL)).tolist()
    assert row[0] == [60, 60, 60] and row[2] == [255, 255, 255]


def test_a_transparent_colour_of_a_palette_is_white(tmp_path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]] * 3, np.uint8), "P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=0)
        row = np.asarray(read_image(str(tmp_path / name), AS_USUAL))[0].tolist()
        assert row == [[255, 255, 255], [200, 0, 0], [0, 0, 200]], name
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))  # an opacity for each colour
    row = np.asarray(read_image(str(tmp_path / "a.png"), AS_USUAL))[0].tolist()
    assert row == [[255, 255, 255], [227, 127, 127], [0, 0, 200]]


@pytest.mark.parametrize("alpha", [0, 255])
def test_an_alpha_channel_that_says_nothing_changes_nothing(tmp_path, alpha) -> None:
    from transformers.image_utils import load_image

    Image.fromarray(np.dstack([PIXELS, np.full((30, 50), alpha, np.uint8)])).save(tmp_path / "a.png")
    read = read_image(str(tmp_path / "a.png"), AS_USUAL)
    assert np.array_equal(np.asarray(read), PIXELS) and read == load_image(str(tmp_path / "a.png"))


MODES = {"1": "png", "L": "png", "P": "png", "CMYK": "jpg", "YCbCr": "tif", "LAB": "tif"}


@pytest.mark.parametrize(("mode", "kind"), MODES.items())
def test_pixels_of_every_mode_of_8_bits_are_those_of_transformers(tmp_path, mode, kind) -> None:
    from PIL import ImageCms
    from transformers.image_utils import load_image

    path = str(tmp_path / f"a.{kind}")
    image = Image.fromarray(PIXELS)
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    image.convert(mode).save(path)
    assert image_facts(path).mode == mode and image_problems([path]) == {}
    ours, theirs = read_image(path, AS_USUAL), load_image(path)
    # Not the images themselves: of LAB, Pillow adds a profile with the present second.
    assert ours.mode == theirs.mode and np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_lab_is_read_in_its_colours(tmp_path) -> None:
    lab = np.full((4, 4, 3), (136, 81 - 256, 70), np.int16).astype(np.uint8)  # sRGB's red, as L* 53, a* 81, b* 70
    Image.fromarray(lab, "LAB").save(tmp_path / "a.tif")
    assert np.abs(np.asarray(read_image(str(tmp_path / "a.tif"), AS_USUAL)).astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("name", ["a.jp2", "a.j2k", "a.ppm", "a.tga", "a.avif", "a.bmp", "a.ico"])
def test_other_formats(tmp_path, name) -> None:
    from train_fn.data.folders import IMAGE_SUFFIXES
    from train_fn.data.stored_images import store_image

    path = tmp_path / name
    Image.fromarray(np.tile(PIXELS, (2, 2, 1))[:48, :48]).save(path)
    with Image.open(path) as image:
        assert read_image(str(path), AS_USUAL) == image.convert("RGB") and image.size == (48, 48)
    assert image_problems([str(path)]) == {} and path.suffix in IMAGE_SUFFIXES
    if path.suffix != ".tga":
        assert store_image(path.read_bytes()).read_bytes() == path.read_bytes()


def test_damaged_bytes_are_no_tga(tmp_path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.tga")
    (tmp_path / "a.tga").rename(tmp_path / "a.jpg")
    assert "decodable" in image_problems([str(tmp_path / "a.jpg")])[str(tmp_path / "a.jpg")]


# ------------------------------------------------------------------------------------------------ greys of 16 bits


def greys(path: Path, options: ImageOptions = AS_USUAL) -> list[int]:
    """The grey levels of an image's first row. All three channels are equal."""
    assert image_problems([str(path)], options=options) == {}
    pixels = np.asarray(read_image(str(path), options))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


DEEP = {
    "a 16-bit PNG": ("a.png", np.uint16, {}),
    "a 16-bit TIFF": ("a.tif", np.uint16, {}),
    "a big-endian TIFF": ("a.tif", np.dtype(">u2"), {}),
    "a 32-bit TIFF": ("a.tif", np.int32, {}),
    "a float TIFF": ("a.tif", np.float32, {}),
    "a 16-bit PGM": ("a.pgm", np.int32, {}),
    "a 16-bit JPEG 2000": ("a.jp2", np.uint16, {}),
}


@pytest.mark.parametrize(("name", "kind", "options"), DEEP.values(), ids=DEEP)
def test_deep_greys_get_a_window(tmp_path, name, kind, options) -> None:
    values = np.array([[100, 1100, 2100, 3100, 4100]] * 5, kind)
    image = Image.fromarray(values.astype(np.uint16) if name != "a.pgm" else values)
    image = Image.frombytes("I;16B", (5, 5), values.tobytes()) if kind == np.dtype(">u2") else image
    if kind in (np.int32, np.float32):
        image = Image.fromarray(values)
    image.save(tmp_path / name, **options)
    assert image_facts(str(tmp_path / name)).mode[0] in "IF"
    assert greys(tmp_path / name) == [0, 64, 128, 191, 255]  # from the least to the greatest
    assert greys(tmp_path / name, ImageOptions("1100,3100")) == [0, 0, 128, 255, 255]
    assert greys(tmp_path / name, ImageOptions("0,65535")) == [0, 4, 8, 12, 16]


def test_a_turned_deep_grey(tmp_path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
        read = np.asarray(read_image(str(tmp_path / name), ImageOptions("0,255")))[..., 0]
        assert np.array_equal(read, np.rot90(values, -1)), name


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_a_turned_tiff_without_compression(tmp_path, mode) -> None:
    """Pillow, and so transformers, reads it with its height as its width."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "a.tif", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    assert np.array_equal(read_image(str(tmp_path / "a.tif"), AS_USUAL), upright)


def test_a_tiff_whose_white_is_0(tmp_path) -> None:
    Image.fromarray(np.array([[0, 2000, 4000]] * 3, np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert greys(tmp_path / "a.tif") == [255, 127, 0]


def saved(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_one_hot_pixel_does_not_decide_the_window(tmp_path) -> None:
    values = np.linspace(0, 3000, 2500).astype(np.uint16).reshape(50, 50)
    values[-1, -1] = 65_535
    grey = np.asarray(read_image(str(saved(tmp_path / "a.png", values)), AS_USUAL))[..., 0]
    assert len(np.unique(grey)) == 256 and abs(int(grey[25, 0]) - 128) <= 1


def test_small_marks_on_an_even_ground_stay(tmp_path) -> None:
    values = np.full((50, 50), 1000, np.uint16)
    values[10, 10:12] = 1500, 2000
    grey = np.asarray(read_image(str(saved(tmp_path / "a.png", values)), AS_USUAL))[..., 0]
    assert grey[10, 9:13].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("value", [0, 7, 65_535])
def test_a_constant_image_is_black(tmp_path, value) -> None:
    assert greys(saved(tmp_path / "a.png", np.full((5, 5), value, np.uint16))) == [0] * 5


def test_pixels_that_are_no_numbers(tmp_path) -> None:
    values = np.array([[np.nan, -np.inf, 1, 2, np.inf]] * 3, np.float32)
    assert greys(saved(tmp_path / "a.tif", values)) == [0, 0, 0, 255, 255]
    (problem,) = image_problems([str(saved(tmp_path / "b.tif", values[:, :1]))]).values()
    assert "b.tif" in problem and "finite" in problem


def test_auto_leaves_images_of_8_bits_alone_and_a_given_window_refuses_them(tmp_path) -> None:
    values = np.array([[50, 60, 70]] * 3, np.uint8)
    path = saved(tmp_path / "a.png", values)
    assert greys(path) == [50, 60, 70]
    (problem,) = image_problems([str(path)], options=ImageOptions("0,4095")).values()
    assert "more than 8 bits for --window 0,4095, but is L" in problem and str(path) in problem


# ------------------------------------------------------------------------------------------------ frames


def test_the_frame_is_chosen(tmp_path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 20, 30, 40)]
    paths = [str(tmp_path / name) for name in ("a.gif", "a.tif", "a.png")]
    for path in paths:
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert image_facts(path).frames == 4
        for choice, level in (("first", 10), ("middle", 20), ("3", 30), ("4", 40)):
            assert read_image(path, ImageOptions(frames=choice)).getpixel((0, 0)) == (level,) * 3
        for choice in ("", "5"):
            with pytest.raises(ValueError, match="--frames"):
                read_image(path, ImageOptions(frames=choice))
    Image.fromarray(PIXELS).save(tmp_path / "single.png")
    said: list[str] = []
    everything = [*paths, str(tmp_path / "single.png")]
    assert image_problems(everything, log=said.append, options=ImageOptions(frames="3")) == {}
    assert said == ["Using frame 3 of each of the 3 images that hold several"]
    problems = image_problems(everything, options=ImageOptions(frames="5"))
    assert problems.keys() == set(paths) and all("must have frame 5" in text for text in problems.values())


def test_pages_of_a_tiff_have_their_own_sizes(tmp_path) -> None:
    path = str(tmp_path / "a.tif")
    large = Image.new("L", (90, 60))
    Image.fromarray(PIXELS).save(path, save_all=True, append_images=[large])
    second = ImageOptions(frames="2")
    assert image_size(path, second) == read_image(path, second).size == (90, 60)
    (problem,) = image_problems([path], 2000, options=second).values()
    assert "90 x 60" in problem


def test_a_frame_that_takes_minutes_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("train_fn.data.images.MAX_FRAME_PIXELS", 2000)
    path = str(tmp_path / "a.gif")
    animated(Path(path))
    assert image_problems([path], options=ImageOptions(frames="2")) == {}
    monkeypatch.setattr("train_fn.data.images.MAX_FRAME_PIXELS", 1000)
    assert "near its beginning" in image_problems([path], options=ImageOptions(frames="2"))[path]


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
    "a pipe": ("a.png", os.mkfifo, "existing file"),
    "a device": ("a.png", lambda path: path.symlink_to("/dev/zero"), "existing file"),
    "a folder": ("a.png", Path.mkdir, "existing file"),
    "text": ("a.png", lambda path: path.write_text("no image"), "decodable"),
}


@pytest.mark.parametrize(("name", "make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_header(tmp_path, monkeypatch, name, make, words) -> None:
    make(tmp_path / name)
    monkeypatch.setattr("train_fn.data.images.decode", lambda *args: pytest.fail("decoded"))
    (problem,) = image_problems([str(tmp_path / name)]).values()
    assert words in problem and str(tmp_path / name) in problem


def test_headers_that_promise_more_than_the_file_holds(tmp_path) -> None:
    content = io.BytesIO()
    Image.new("RGBA", (9000, 9000)).save(content, "PNG")
    entry = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, content.tell(), 22)
    files = {
        "an icon of 16 x 16.ico": (entry + content.getvalue(), "but has 9000 x 9000"),
        "60,000 x 60,000.pgm": (b"P5 60000 60000 65535\n" + bytes(100), "exceeds limit"),
        "7,000 x 7,000.pgm": (b"P5 7000 7000 65535\n" + bytes(100), "truncated"),
    }
    for name, (written, words) in files.items():
        (tmp_path / name).write_bytes(written)
        assert words in image_problems([str(tmp_path / name)])[str(tmp_path / name)], name


def test_a_tiff_whose_pages_never_end(tmp_path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(PIXELS).save(path)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack("<I", content[4:8])
    (entries,) = struct.unpack("<H", content[first : first + 2])
    after = first + 2 + 12 * entries
    content[after : after + 4] = content[4:8]  # the next page is this one
    path.write_bytes(content)
    assert image_facts(str(path)).frames == 1 and image_problems([str(path)]) == {}


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
    assert read_image(str(path), AS_USUAL).mode == "RGB" and read_image(str(path), AS_USUAL).size == (50, 30)


def test_the_caller_sets_the_limit(tmp_path) -> None:
    path = str(png(100, 100, tmp_path / "a.png"))
    assert image_problems([path], 10_000) == {}
    (problem,) = image_problems([path], 9_999).values()
    assert "--max-image-pixels" in problem


def test_an_image_that_does_not_fit_the_memory_is_its_own_problem(tmp_path, monkeypatch) -> None:
    paths = [str(save(tmp_path / f"{number}.png", 1)) for number in range(3)]

    def decode(image: Image.Image, options: object) -> None:
        if image.fp.name == paths[1]:
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
