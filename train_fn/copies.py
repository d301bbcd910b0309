"""Near-copies among images: perceptual hashes, groups, and what a split leaks.

Small medical sets are full of copies of one frame: with and without calipers, cropped again, neighbours in a film loop.
A copy on both sides of a split makes a test score that no new patient will confirm.

Shapes: N images.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Of the 64 bits of a hash, how many may differ between copies. On BUSI pairs up to 8 apart are copies by eye, and
# false ones begin at 10; two unrelated images differ in about 32.
MAX_DISTANCE = 8
BLOCK = 2**26  # entries of the distance matrix held at once


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix [size, size]."""
    rows, columns = np.mgrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * rows * (2 * columns + 1) / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


DCT = dct_matrix(32)[:8]


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of an image's coarse structure: the signs of its 8 x 8 lowest DCT coefficients around their median
    (pHash, Zauner 2010). Scaling, compression, small marks and brightness hardly change them."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (DCT @ pixels @ DCT.T).ravel()
    bits = low > np.median(low[1:])  # without the mean brightness, which dwarfs the rest
    return int(np.packbits(bits).view(">u8")[0])


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_known(cache: Path) -> dict[str, Any]:
    """What a cache file remembers; nothing when it is not there or not whole."""
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}


def write_known(cache: Path, known: dict[str, Any]) -> None:
    """Remember it, written aside and renamed. A cache that cannot be written only costs the next study its time."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known))
        partial.replace(cache)


def cache_folder() -> Path:
    """The folder of what is kept between studies: `vlm-tune` in the user's cache. A user without a home gets a private
    folder among the temporary files.

    Raises:
        OSError: that private folder cannot be made, or belongs to somebody else.
    """
    if os.path.isabs(given := os.environ.get("XDG_CACHE_HOME", "")):  # the XDG standard ignores relative paths
        return Path(given) / "vlm-tune"
    try:
        return Path.home() / ".cache" / "vlm-tune"
    except RuntimeError:  # no HOME, and no entry in the password file
        folder = Path(tempfile.gettempdir()) / f"vlm-tune-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            why = "the cache must be the user's own: set XDG_CACHE_HOME"
            raise PermissionError(errno.EPERM, why, str(folder)) from None
        return folder


def default_cache() -> Path:
    """Where perceptual hashes are kept between studies."""
    return cache_folder() / "phash.json"


def hash_images(paths: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Perceptual hashes [N] uint64, looked up by the files' content before they are computed."""
    cache = cache or default_cache()
    known = read_known(cache)

    def one(path: str) -> tuple[str, int]:
        content = file_hash(path)
        if content not in known:
            with Image.open(path) as image:
                return content, perceptual_hash(image)
        return content, known[content]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, paths))
    if fresh := {content: value for content, value in found if content not in known}:
        write_known(cache, known | fresh)
    return np.array([value for _, value in found], dtype=np.uint64)


def near_pairs(hashes: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """All pairs of near-copies as [M, 2] indices, first below second."""
    pairs = []
    block = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), block):
        rows = hashes[start : start + block]
        near = np.bitwise_count(rows[:, None] ^ hashes[None, start:]) <= max_distance
        first, second = np.nonzero(near)
        pairs.append(np.stack([first + start, second + start], 1)[first < second])
    return np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)


def copy_groups(num_images: int, pairs: np.ndarray) -> np.ndarray:
    """Group number [N] of each image: copies of copies belong together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(num_images, num_images))
    return connected_components(graph, directed=False)[1]


def leaking_images(parts: np.ndarray, pairs: np.ndarray, of: int, into: Sequence[int]) -> set[int]:
    """The images of the part `of` with a near-copy in one of the parts `into`; `parts` [N] is each image's part."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    return set(both[(parts[both[:, 0]] == of) & np.isin(parts[both[:, 1]], into), 0].tolist())


def num_leaked(parts: np.ndarray, pairs: np.ndarray, of: int, into: Sequence[int]) -> int:
    """How many they are."""
    return len(leaking_images(parts, pairs, of, into))
