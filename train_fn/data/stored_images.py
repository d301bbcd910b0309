"""Images that a data set holds as bytes, written once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from train_fn.support.cache import cache_folder

# The first bytes of each format that `images` reads, but for TGA, which has no mark.
BEGINNINGS = (
    (rb"\x89PNG\r\n\x1a\n", ".png"),
    (rb"\xff\xd8\xff", ".jpg"),
    (rb"GIF8", ".gif"),
    (rb"BM", ".bmp"),
    (rb"II[*+]\0|MM\0[*+]", ".tif"),
    (rb"RIFF....WEBP", ".webp"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", ".jp2"),
    (rb"P[1-6]\s", ".ppm"),
    (rb"\0\0\x01\0", ".ico"),
    (rb"....ftypavi[fs]", ".avif"),
    (rb".{128}DICM", ".dcm"),
)


NAMES = ", ".join(suffix[1:].upper() for _, suffix in BEGINNINGS)


class BadImage(ValueError):
    """Bytes are no image of a format that is read, or cannot be written."""


def stored_images_folder() -> Path:
    """The folder of these images. Raises OSError, as `cache_folder`."""
    return cache_folder() / "images"


def store_image(content: bytes) -> Path:
    """The file of an image's bytes, named by their sha256.

    Raises:
        BadImage: the bytes are no image, or the cache cannot be written.
    """
    suffix = next((suffix for begin, suffix in BEGINNINGS if re.match(begin, content[:132], re.DOTALL)), "")
    if not suffix:
        raise BadImage(f"its {len(content):,} bytes begin with {content[:8]!r}, as no format that is read ({NAMES})")
    digest = hashlib.sha256(content).hexdigest()
    try:
        path = stored_images_folder() / digest[:2] / f"{digest}{suffix}"
        # Not flushed to the disk: after a power loss the size differs, or the study's own hash of its images.
        if not path.is_file() or path.stat().st_size != len(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(path)
    except OSError as error:
        raise BadImage(f"the cache cannot be written ({error.filename}: {error.strerror})") from error
    return path
