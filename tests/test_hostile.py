"""Hostile manifests and images: each gets one clear answer, soon (`pytest -s` shows both)."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_fn.data.manifest import read_manifest, unreadable_images

pytestmark = pytest.mark.timeout(60)
MOST_SECONDS = 20  # on a busy machine; alone, each takes well under one second, those of 100 MB up to four


def answer(manifest: Path, root: Path) -> str:
    """The first problem that a study would report, or ""."""
    started = time.perf_counter()
    reading = read_manifest(manifest, root)
    problems = reading.problems or unreadable_images([sample.image for sample in reading.samples])
    seconds = time.perf_counter() - started
    assert seconds < MOST_SECONDS and all(len(problem) < 1000 for problem in problems)
    first = problems[0].replace(str(root.parent), "") if problems else ""
    print(f"{first or 'accepted'} ({seconds:.2f} s)")
    return first


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (root / "good.png", tmp_path / "outside" / "x.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    return root


# ------------------------------------------------------------------------------------------------ images


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(root: Path) -> str:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(bytes(10**6)))
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + content + png_chunk(b"IEND", b""))
    return "bomb.png"


def written(name: str, content: bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(content)
        return name

    return make


def linked(target: str, image: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        os.symlink(target, root / "link")
        return image

    return make


def truncated(root: Path) -> str:
    (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:-2000])
    return "cut.png"


def gif(root: Path) -> str:
    Image.new("L", (8, 8)).save(root / "gif.png", "GIF")
    return "gif.png"


def pipe(root: Path) -> str:
    os.mkfifo(root / "pipe.png")
    return "pipe.png"


def sixteen_bits(root: Path) -> str:
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(root / "deep.png")
    return "deep.png"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
OUTSIDE, MISSING = "must lie under the image root", "must be an existing file under the image root"
IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a good image": (lambda root: "good.png", ""),
    "a detour that ends inside": (lambda root: "folder/../good.png", ""),
    "a link that ends inside": (linked("good.png", "link"), ""),
    "a GIF named .png": (gif, ""),
    "traversal": (lambda root: "../outside/x.png", OUTSIDE),
    "traversal to nowhere": (lambda root: "../x.png", MISSING),
    "absolute path outside": (lambda root: str(root.parent / "outside" / "x.png"), OUTSIDE),
    "link to a file outside": (linked("../outside/x.png", "link"), OUTSIDE),
    "link to a folder outside": (linked("../outside", "link/x.png"), OUTSIDE),
    "link to itself": (linked("link", "link"), MISSING),
    "link to a device": (linked("/dev/zero", "link"), MISSING),
    "device": (lambda root: "/dev/zero", MISSING),
    "pipe": (pipe, MISSING),
    "folder": (lambda root: "folder", MISSING),
    "file used as a folder": (lambda root: "good.png/x.png", MISSING),
    "NUL byte": (lambda root: "good.png\0", MISSING),
    "half of a character": (lambda root: "\ud800.png", MISSING),
    "long name": (lambda root: "x" * 300 + ".png", MISSING),
    "path of a megabyte": (lambda root: "x/" * 500_000, MISSING),
    "number": (lambda root: 3, "image=3"),
    "null": (lambda root: None, "image=None"),
    "object": (lambda root: {"path": "good.png"}, "image={"),
    "list 900 deep": (lambda root: json.loads("[" * 900 + "]" * 900), "image=[[["),
    "bomb": (bomb, "could be decompression bomb"),
    "truncated": (truncated, "must be decodable: image file is truncated"),
    "text named .png": (written("text.png", b"no image"), "must be decodable: cannot identify"),
    "empty file": (written("empty.png", b""), "must be decodable: cannot identify"),
    "PostScript, a program": (written("eps.png", POSTSCRIPT), "must be decodable: cannot identify"),
    "16 bits, which are read by a window": (sixteen_bits, ""),
}


@pytest.mark.parametrize(("make", "words"), IMAGES.values(), ids=IMAGES)
def test_a_hostile_image_gets_one_clear_answer(root: Path, make: Callable[[Path], object], words: str) -> None:
    manifest = root / "m.json"
    manifest.write_text(json.dumps([{"image": make(root), "text": "?", "answer": "yes", "label": 1}]))
    problem = answer(manifest, root)
    assert words in problem and bool(words) == bool(problem)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "/"])
def test_an_image_that_is_no_file_is_refused(root: Path, path: str) -> None:
    os.mkfifo(root / "pipe")
    (problem,) = unreadable_images([str(root / path)])
    assert "must be an existing file" in problem


# ------------------------------------------------------------------------------------------------ manifests

ENTRY = b'{"image": "good.png", "text": "?", "answer": "yes", "label": 1}'
MANIFESTS: dict[str, tuple[bytes, str]] = {
    "with a byte-order mark": (b"\xef\xbb\xbf[" + ENTRY + b"]", ""),
    "empty": (b"", "must be JSON"),
    "cut": (b"[" + ENTRY[:-9], "must be JSON"),
    "image": (b"\x89PNG\r\n\x1a\n", "must be UTF-8"),
    "UTF-16": (json.dumps([1]).encode("utf-16"), "must be UTF-8"),
    "NUL bytes": (bytes(100), "must be JSON"),
    "list 100,000 deep": (b"[" * 100_000, "must be JSON"),
    "closed list 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "must be JSON"),
    "objects 100,000 deep": (b'[{"image":' * 50_000, "must be JSON"),
    "number of 5,000 digits": (b"[" + b"9" * 5_000 + b"]", "must be JSON"),
    "not a number": (b'[{"image": "good.png", "text": "?", "answer": "yes", "label": NaN}]', "label=nan"),
    "object": (ENTRY, "holds a dict"),
    "text": (b'"good.png"', "holds a str"),
    "null": (b"null", "holds a NoneType"),
    "empty list": (b"[]", "holds an empty list"),
    "list of lists": (b"[[]]", "entry 0 must be an object"),
}


@pytest.mark.parametrize(("content", "words"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest_gets_one_clear_answer(root: Path, content: bytes, words: str) -> None:
    (root / "m.json").write_bytes(content)
    problem = answer(root / "m.json", root)
    assert words in problem and bool(words) == bool(problem)


HUNDRED_MB: dict[str, tuple[Callable[[], bytes], str]] = {
    "garbage": (lambda: np.random.default_rng(0).bytes(10**8), "must be UTF-8"),
    "garbage that is text": (lambda: b"x" * 10**8, "must be JSON"),
    "one text, no list": (lambda: b'{"data": "' + b"x" * 10**8 + b'"}', "holds a dict"),
    "one text in a list": (lambda: b'["' + b"x" * 10**8 + b'"]', "entry 0 must be an object"),
    "one answer": (lambda: b"[" + ENTRY.replace(b"yes", b"x" * 10**8) + b"]", ""),
    "a million texts": (
        lambda: b"[" + b",".join([b'"' + b"x" * 97 + b'"'] * 10**6) + b"]",
        "entry 0 must be an object",
    ),
    "fifty million numbers": (lambda: b"[" + b"1," * (5 * 10**7 - 1) + b"1]", "at most 1,000,000 entries"),
}


@pytest.mark.parametrize(("make", "words"), HUNDRED_MB.values(), ids=HUNDRED_MB)
def test_a_manifest_of_100_mb_gets_an_answer_soon(root: Path, make: Callable[[], bytes], words: str) -> None:
    (root / "m.json").write_bytes(make())
    problem = answer(root / "m.json", root)
    assert words in problem and bool(words) == bool(problem)


def test_a_manifest_that_is_no_file_is_refused(root: Path) -> None:
    os.mkfifo(root / "pipe")
    os.symlink("/dev/zero", root / "zero")
    for path in ("/dev/zero", root / "pipe", root / "zero", root / "folder", root / "none.json", "x\0", "x" * 300):
        assert "must be an existing file" in answer(Path(path), root)


@pytest.mark.parametrize("image_root", ["none", "good.png", "x\0", "x" * 5000, "/dev/null"])
def test_an_image_root_that_is_no_folder_is_refused(root: Path, image_root: str) -> None:
    (root / "m.json").write_bytes(b"[" + ENTRY + b"]")
    assert "must be a folder" in read_manifest(root / "m.json", root / image_root).problems[0]


def test_problems_of_entries_and_of_images_are_reported_together(tmp_path: Path) -> None:
    from tune.config.cli import parse
    from tune.config.paths import SettingsError
    from tune.plan.prepare import prepare

    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    images = ("gone.png", "cut.png", "whole.png")
    entries = [{"image": image, "text": "?", "answer": "yes", "label": 1} for image in images]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    with pytest.raises(SettingsError) as refused:
        prepare(parse(["--data", str(tmp_path / "m.json"), "--results", str(tmp_path / "results")]), print)
    missing, unreadable = refused.value.problems
    assert "entry 0" in missing and "gone.png" in missing
    assert "cut.png" in unreadable and "decodable" in unreadable
