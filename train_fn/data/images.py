"""Images on disk: which are accepted, and how their pixels are read.

A camera stores an image in the orientation of its sensor, and in EXIF how to turn it. transformers, datasets and all
viewers turn it, and so does this module.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # for some others, such as EPS, Pillow runs other programs
MAX_PIXELS = 50_000_000  # decoded 0.2 GiB; mammograms and camera pictures have fewer
PILLOWS_LIMIT = 178_956_970  # Pillow opens no image with more
MAX_SIDE = 65_535  # of a JPEG
LARGE = 10_000_000  # images with more pixels are decoded one at a time
MAX_CHECK_S = 600.0  # after this time the remaining images are checked by their headers only
PROGRESS_S = 10.0  # between two lines of progress
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a PNG with an orientation holds one of these


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned by its EXIF orientation, as in `transformers.image_utils.load_image`."""
    return ImageOps.exif_transpose(image)


def read_image(path: str) -> Image.Image:
    """The decoded image as RGB, upright."""
    with Image.open(path, formats=FORMATS) as image:
        return upright(image).convert("RGB")


def image_size(path: str) -> tuple[int, int]:
    """Width and height in pixels of the upright image, from the file's header."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned it already
            return width, height
        # In a PNG, EXIF may come after the pixels, and Pillow would decode those first.
        if image.format == "PNG" and not any(mark in Path(path).read_bytes() for mark in PNG_MARKS):
            return width, height
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (height, width) if turned else (width, height)


def image_problems(
    paths: Iterable[str],
    max_pixels: int = MAX_PIXELS,
    log: Callable[[str], None] = lambda text: None,
    max_seconds: float = MAX_CHECK_S,
    seen: Callable[[str, Image.Image], object] = lambda path, image: None,
) -> dict[str, str]:
    """The problem of every image that cannot be used, by path.

    Every image is decoded to the last row, unless its header shows too many pixels.

    Args:
        max_pixels: the most pixels an image may have; at most `PILLOWS_LIMIT`.
        log: called with a line of progress every 10 s.
        max_seconds: time after which the remaining images are checked by their headers only.
        seen: called in several threads with each file that was decoded without a problem, not turned yet.
    """
    different = sorted(set(paths))
    started, one_large, by_header = time.monotonic(), threading.Lock(), [0]

    def check(path: str) -> str:
        if not os.path.isfile(path):  # reading a pipe or a device could block for ever
            return f"image {path} must be an existing file: check the path"
        try:
            with Image.open(path, formats=FORMATS) as image:
                if problem := header_problem(image, max_pixels):
                    return f"image {path} {problem}"
                if time.monotonic() - started > max_seconds:
                    by_header[0] += 1
                elif image.width * image.height < LARGE:
                    decode(image)
                    seen(path, image)
                else:
                    with one_large:
                        decode(image)
                        seen(path, image)
        except MemoryError:
            return f"image {path} must fit the memory, but {Path(path).stat().st_size:,} bytes do not: scale it down"
        except Exception as error:  # decoders raise anything for damaged bytes
            return f"image {path} must be decodable: {error}; replace it or take its entry out"
        return ""

    problems: dict[str, str] = {}
    logged = started
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")  # `header_problem` is clearer than Pillow's warnings
        for number, (path, problem) in enumerate(zip(different, pool.map(check, different), strict=True), 1):
            if problem:
                problems[path] = problem
            if time.monotonic() - logged > PROGRESS_S:
                logged = time.monotonic()
                log(f"Checked {number:,} of {len(different):,} images")
    if by_header[0]:
        log(f"Checked {by_header[0]:,} of {len(different):,} images by their headers only, after {max_seconds:.0f} s")
    return problems


def header_problem(image: Image.Image, max_pixels: int) -> str:
    """Why an image cannot be used, by its header; "" if it can."""
    if image.width * image.height > max_pixels:
        return (
            f"must have at most {max_pixels:,} pixels, but has {image.width} x {image.height}: scale it down, or give "
            f"a larger --max-image-pixels"
        )
    if max(image.size) > MAX_SIDE:
        return f"must have sides of at most {MAX_SIDE:,} pixels, but has {image.width} x {image.height}: cut it up"
    if image.mode[0] in "IF":  # Pillow clips such pixels at 255: most images would turn white
        return f"must have 8 bits a channel, but has Pillow's mode {image.mode}: convert it"
    # A phone's JPEG ("MPO") holds depth or brightness after the picture.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "must hold one picture, but holds several frames or pages: save the right one as a file"
    return ""


def decode(image: Image.Image) -> None:
    """Decode an image to the last row, and its EXIF."""
    image.load()
    image.getexif()
