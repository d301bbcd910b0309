"""Images on disk: which are accepted, and how their pixels are read.

A camera stores an image in the orientation of its sensor, and in EXIF how to turn it. transformers, datasets and all
viewers turn it, and so does this module. Pixels are those of `transformers.image_utils.load_image`, but for two kinds
that it reads wrongly: greys of more than 8 bits, which it clips at 255, get a window (`greys`); and transparent pixels,
whose hidden colours it shows, are put on white, as browsers and Qwen's own `qwen_vl_utils` do.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from train_fn.data.dicom import NotReadable, is_dicom, read_header, read_pixels
from train_fn.data.greys import as_grey, auto_limits
from train_fn.settings import ImageOptions

# For some others, such as EPS, Pillow runs other programs. Others are no pictures of one scene (PSD's layers), or rare.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM", "ICO", "AVIF")
TGA = ".tga"  # this format has no mark, so damaged files of others could pass for it: it goes by its suffix
WHITE_IS_0 = 0  # TIFF's PhotometricInterpretation
MAX_PIXELS = 50_000_000  # decoded 0.2 GiB; mammograms and camera pictures have fewer
PILLOWS_LIMIT = 178_956_970  # Pillow opens no image with more
MAX_SIDE = 65_535  # of a JPEG
LARGE = 10_000_000  # images with more pixels are decoded one at a time
MAX_FRAME_PIXELS = 5_000_000_000  # of all frames up to the one that is used: a minute
MAX_CHECK_S = 600.0  # after this time the remaining images are checked by their headers only
PROGRESS_S = 10.0  # between two lines of progress
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a PNG with an orientation holds one of these
AS_USUAL = ImageOptions()
READING = "upright, transparent on white, window of greys"  # part of the keys of caches: change it with the pixels


@dataclass(frozen=True)
class ImageFacts:
    """What a file's header says."""

    format: str
    """Pillow's name, or DICOM."""
    mode: str
    """Pillow's mode, or for DICOM the photometric interpretation and its bits."""
    size: tuple[int, int]
    """Width and height in pixels, upright. Of the first frame."""
    turned: bool
    """Whether EXIF turns or mirrors the image."""
    frames: int
    """Frames or pages."""


# ------------------------------------------------------------------------------------------------ reading


def read_image(path: str, options: ImageOptions = AS_USUAL) -> Image.Image:
    """The decoded image as RGB, upright.

    Raises:
        ValueError: the options do not say which frame, or it does not exist.
        Exception: decoders raise anything for damaged bytes.
    """
    if is_dicom(path):
        header = read_header(path)
        frame = frame_index(header.frames, options)
        return Image.fromarray(read_pixels(path, header, frame, options.limits)).convert("RGB")
    with open_image(path) as image:
        seek_frame(image, options)
        return picture(image, options)


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """The image file in a format that is accepted, opened by Pillow and not decoded."""
    formats = (*FORMATS, "TGA") if path.lower().endswith(TGA) else FORMATS
    # Opened here: of a path, Pillow would map an uncompressed TIFF into memory, and one that EXIF turns by 90 degrees
    # would be read with its height as its width.
    with open(path, "rb") as file, Image.open(file, formats=formats) as image:
        yield image


def num_frames(image: Image.Image) -> int:
    """Frames or pages of an image file."""
    # A phone's JPEG ("MPO") holds depth or brightness after the picture.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def frame_index(num_frames: int, options: ImageOptions) -> int:
    """Index of the frame that is used. Raises ValueError if the options do not say which, or it does not exist."""
    if problem := frame_problem(num_frames, options):
        raise ValueError(problem)
    if num_frames == 1 or options.frames == "first":
        return 0
    return (num_frames - 1) // 2 if options.frames == "middle" else int(options.frames) - 1


def seek_frame(image: Image.Image, options: ImageOptions) -> None:
    """Go to the frame that is used. Raises ValueError, as `frame_index`."""
    if frame := frame_index(num_frames(image), options):
        image.seek(frame)


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned by its EXIF orientation, as in `transformers.image_utils.load_image`."""
    return ImageOps.exif_transpose(image)


def picture(image: Image.Image, options: ImageOptions) -> Image.Image:
    """The image as RGB, upright."""
    white_is_0 = False
    if image.format == "TIFF":  # Pillow inverts greys of 8 bits only
        white_is_0 = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_0  # type: ignore[attr-defined]
    image = upright(image)
    if is_deep(image.mode):
        values = np.asarray(image)
        grey = as_grey(values, *(options.limits or auto_limits(values)))
        return Image.fromarray(255 - grey if white_is_0 else grey).convert("RGB")
    return on_white(image) if image.has_transparency_data else image.convert("RGB")


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode is a grey of more than 8 bits (I, I;16, I;16B, F)."""
    return mode[0] in "IF"


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB, on white."""
    layer = image.convert("RGBA")
    least, most = layer.getchannel("A").getextrema()
    if most == 0 or least == 255:  # some programs leave the alpha channel at 0 and mean a visible picture
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


# ------------------------------------------------------------------------------------------------ headers


def image_size(path: str, options: ImageOptions = AS_USUAL) -> tuple[int, int]:
    """Width and height in pixels of the upright image, from the file's header."""
    if is_dicom(path):
        return read_header(path).size
    with open_image(path) as image:
        if image.format == "TIFF":  # its pages may differ
            seek_frame(image, options)
        return upright_size(image, path)


def image_facts(path: str) -> ImageFacts:
    """What the file's header says. Nothing is decoded, but for a PNG with EXIF after its pixels."""
    if is_dicom(path):
        header = read_header(path)
        return ImageFacts("DICOM", f"{header.kind} {header.bits} bit", header.size, False, header.frames)
    with open_image(path) as image:
        return opened_facts(image, path)


def opened_facts(image: Image.Image, path: str) -> ImageFacts:
    """The facts of an opened image."""
    facts = str(image.format), image.mode, upright_size(image, path)
    return ImageFacts(*facts, orientation(image, path) in range(2, 9), num_frames(image))


def upright_size(image: Image.Image, path: str) -> tuple[int, int]:
    """Width and height of an opened image, upright."""
    width, height = image.size
    # Pillow has turned a TIFF already.
    return (height, width) if image.format != "TIFF" and orientation(image, path) in TURNED else (width, height)


def orientation(image: Image.Image, path: str) -> int:
    """The EXIF orientation of an opened image, 1 to 8."""
    # In a PNG, EXIF may come after the pixels, and Pillow would decode those first.
    if image.format == "PNG" and not any(mark in Path(path).read_bytes() for mark in PNG_MARKS):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


# ------------------------------------------------------------------------------------------------ checks


def image_problems(
    paths: Iterable[str],
    max_pixels: int = MAX_PIXELS,
    log: Callable[[str], None] = lambda text: None,
    max_seconds: float = MAX_CHECK_S,
    options: ImageOptions = AS_USUAL,
    seen: Callable[[str, Image.Image], object] = lambda path, image: None,
) -> dict[str, str]:
    """The problem of every image that cannot be used, by path.

    Every image is decoded to the last row, unless its header shows too many pixels.

    Args:
        max_pixels: the most pixels an image may have; at most `PILLOWS_LIMIT`.
        log: called with a line of progress every 10 s, and with the number of images with several frames.
        max_seconds: time after which the remaining images are checked by their headers only.
        seen: called in several threads with each file of Pillow's formats that was decoded without a problem, at the
            frame that is used, not turned yet.
    """
    different = sorted(set(paths))
    started, one_large = time.monotonic(), threading.Lock()
    by_header: list[str] = []
    of_several: list[str] = []

    def check(path: str) -> str:
        if not os.path.isfile(path):  # reading a pipe or a device could block for ever
            return f"image {path} must be an existing file: check the path"
        try:
            if problem := check_open(path):
                return f"image {path} {problem}"
        except NotReadable as error:
            return f"image {path} {error}"
        except MemoryError:
            return f"image {path} must fit the memory, but {Path(path).stat().st_size:,} bytes do not: scale it down"
        except Exception as error:  # decoders raise anything for damaged bytes
            return f"image {path} must be decodable: {error}; replace it or take its entry out"
        return ""

    def check_open(path: str) -> str:
        if is_dicom(path):
            header = read_header(path)
            size, frames = header.size, header.frames
            problem = header_problem(size, header.kind.startswith("MONO"), header.kind, frames, max_pixels, options)
            if not problem:
                note(path, frames)
                within_limits(path, size, lambda: read_image(path, options))
            return problem
        with open_image(path) as image:
            for _ in range(2):  # the header of the file, then that of the frame
                frames = num_frames(image)
                problem = header_problem(image.size, is_deep(image.mode), image.mode, frames, max_pixels, options)
                if problem or frames == 1:
                    break
                seek_frame(image, options)
            if not problem:
                note(path, frames)
                within_limits(path, image.size, lambda: use(path, image))
            return problem

    def use(path: str, image: Image.Image) -> None:
        decode(image, options)
        seen(path, image)

    def note(path: str, frames: int) -> None:
        if frames > 1:
            of_several.append(path)

    def within_limits(path: str, size: tuple[int, int], decoding: Callable[[], object]) -> None:
        if time.monotonic() - started > max_seconds:
            by_header.append(path)
        elif size[0] * size[1] < LARGE:
            decoding()
        else:
            with one_large:
                decoding()

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
    if by_header:
        log(f"Checked {len(by_header):,} of {len(different):,} images by their headers only, after {max_seconds:.0f} s")
    if of_several:
        log(f"Using frame {options.frames} of each of the {len(of_several):,} images that hold several")
    return problems


def header_problem(
    size: tuple[int, int], takes_window: bool, mode: str, num_frames: int, max_pixels: int, options: ImageOptions
) -> str:
    """Why an image cannot be used, by its header; "" if it can.

    Args:
        size: width and height.
        takes_window: whether the pixels are greys that a window applies to.
    """
    pixels, shown = size[0] * size[1], f"{size[0]} x {size[1]}"
    if pixels > max_pixels:
        return (
            f"must have at most {max_pixels:,} pixels, but has {shown}: scale it down, or give a larger "
            f"--max-image-pixels"
        )
    if max(size) > MAX_SIDE:
        return f"must have sides of at most {MAX_SIDE:,} pixels, but has {shown}: cut it up"
    if options.limits and not takes_window:
        return (
            f"must have grey values of more than 8 bits for --window {options.window}, but is {mode}: leave the window "
            f"out, or take the image's entry out"
        )
    if problem := frame_problem(num_frames, options):
        return problem
    if num_frames > 1 and frame_index(num_frames, options) * pixels > MAX_FRAME_PIXELS:
        return f"must have its frame near its beginning, but has {num_frames:,} of {shown}: save the frame as a file"
    return ""


def frame_problem(num_frames: int, options: ImageOptions) -> str:
    """Why the options choose no frame of a file with so many; "" if they do."""
    if num_frames > 1 and not options.frames:
        return (
            f"must hold one picture, but holds several frames or pages ({num_frames:,}): choose one with --frames "
            f"(first, middle or a number), or save the right one as a file"
        )
    if num_frames > 1 and options.frames.isdigit() and int(options.frames) > num_frames:
        return f"must have frame {options.frames}, as --frames says, but has {num_frames:,}: choose another"
    return ""


def decode(image: Image.Image, options: ImageOptions) -> None:
    """Decode an image to the last row, and its EXIF. Raises ValueError if its pixels are not what the header says."""
    size = image.size
    image.load()
    image.getexif()
    if image.size != size:
        raise ValueError(f"its header says {size[0]} x {size[1]}, but it holds {image.width} x {image.height}")
    if is_deep(image.mode):
        picture(image, options)
