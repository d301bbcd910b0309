"""Near-copies among images: thumbnails, perceptual hashes, groups, and what a split leaks.

Small medical sets are full of copies of one frame: with and without calipers, cropped again, neighbours in a film loop.
A copy on both sides of a split makes a test score that no new patient will confirm.

Shapes: N images.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train_fn.data.images import upright
from train_fn.support.files import file_hash

# Of the 64 bits of a hash, how many may differ between copies. On BUSI pairs up to 8 apart are copies by eye, and
# false ones begin at 10; two unrelated images differ in about 32.
MAX_DISTANCE = 8
# The hash says that two images have the same coarse structure; so have any two right eyes or any two sevens. A pair is
# confirmed when what is left of both images, without the structure that all images of the set share, correlates this
# much. On BUSI all 135 pairs do; of 4,378 pairs among 450 different drawn eye-grounds 62 do.
# Thumbnails that correlate SAME_CORRELATION as they are count as well.
MIN_CORRELATION = 0.65
SAME_CORRELATION = 0.98
FRAMES_CORRELATION = 0.95  # of neighbours in a film
MAX_COMPONENTS = 5  # directions of the set's shared structure, beside its mean: one for every IMAGES_PER_COMPONENT
IMAGES_PER_COMPONENT = 25
MIN_IMAGES = 20  # a smaller set tells nothing of what it shares
SMALL_SIDE = 32  # images smaller than this, or with less contrast than MIN_CONTRAST grey levels, are copies only when
MIN_CONTRAST = 3.0  # they are equal to MAX_LEVELS grey levels
MAX_LEVELS = 3
BLOCK = 2**26  # entries of the distance matrix held at once
PAIRS_AT_ONCE = 20_000
CACHE = "thumbnails-1.json"


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix [size, size]."""
    rows, columns = np.mgrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * rows * (2 * columns + 1) / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


DCT = dct_matrix(32)[:8]


def thumbnail(image: Image.Image) -> np.ndarray:
    """Grey levels [32, 32] uint8 of the upright image."""
    return np.asarray(upright(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS))


def perceptual_hashes(pixels: np.ndarray) -> np.ndarray:
    """64 bits [N] uint64 of the coarse structure of thumbnails [N, 32, 32]: the signs of the 8 x 8 lowest DCT
    coefficients around their median (pHash, Zauner 2010). Scaling, compression, small marks and brightness change them
    little."""
    low = (DCT @ pixels.astype(np.float64) @ DCT.T).reshape(-1, 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)  # without the mean brightness, which dwarfs the rest
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


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
    """Where thumbnails are kept between studies."""
    return cache_folder() / CACHE


def read_thumbnails(paths: Sequence[str], cache: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails [N, 32, 32] uint8 and the shorter side [N] of each image, looked up by the files' content before they
    are computed."""
    cache = cache or default_cache()
    known = read_known(cache)

    def one(path: str) -> tuple[str, list[Any]]:
        content = file_hash(path)
        if content not in known:
            with Image.open(path) as image:
                return content, [min(image.size), base64.b64encode(thumbnail(image).tobytes()).decode()]
        return content, known[content]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, paths))
    if fresh := {content: value for content, value in found if content not in known}:
        write_known(cache, known | fresh)
    pixels = b"".join(base64.b64decode(encoded) for _, (_, encoded) in found)
    sides = np.array([side for _, (side, _) in found], dtype=np.int64)
    return np.frombuffer(pixels, np.uint8).reshape(-1, 32, 32), sides


def hash_images(paths: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Perceptual hashes [N] uint64 of images."""
    return perceptual_hashes(read_thumbnails(paths, cache)[0])


def copy_pairs(paths: Sequence[str], max_distance: int = MAX_DISTANCE, cache: Path | None = None) -> np.ndarray:
    """All pairs of near-copies among different images, as [M, 2] indices, first below second.

    Args:
        max_distance: bits in which the hashes of copies may differ; -1: there are no copies.
        cache: file of thumbnails that are known. Not given: the user's cache.
    """
    if max_distance < 0 or not paths:
        return np.empty((0, 2), dtype=np.int64)
    pixels, sides = read_thumbnails(paths, cache)
    pairs = near_pairs(perceptual_hashes(pixels), max_distance)
    return pairs[confirmed(pixels, sides, pairs)]


def confirmed(pixels: np.ndarray, sides: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether [M] each pair that the hash proposes is one of copies; see `MIN_CORRELATION`.

    Args:
        pixels: thumbnails [N, 32, 32].
        sides: the images' shorter sides [N].
        pairs: indices [M, 2].
    """
    grey = pixels.reshape(len(pixels), -1).astype(np.float32)
    plain = (sides < SMALL_SIDE) | (grey.std(1) < MIN_CONTRAST)
    whole = grey - grey.mean(1, keepdims=True)
    whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-6)
    as_they_are = correlations(whole, pairs)
    num_alike = np.bincount(pairs[as_they_are >= FRAMES_CORRELATION].ravel(), minlength=len(pixels))
    own = own_structure(whole, 1 / (1 + num_alike))
    equal = np.array([np.abs(grey[one] - grey[two]).max() <= MAX_LEVELS for one, two in pairs], dtype=bool)
    alike = (correlations(own, pairs) >= MIN_CORRELATION) | (as_they_are >= SAME_CORRELATION)
    return equal | (alike & ~plain[pairs].any(1))


def correlations(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Correlation [M] of each pair [M, 2] of images [N, pixels] of mean 0 and length 1."""
    blocks = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    found = [np.einsum("mp,mp->m", images[block[:, 0]], images[block[:, 1]]) for block in blocks]
    return np.concatenate(found) if found else np.zeros(0)


def own_structure(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each of the images [N, pixels], of mean 0 and length 1, does not share with the set: without the set's mean
    and its first principal components, scaled to length 1 again.

    Args:
        weights: what each image [N] counts. Frames of one film count little each: else the film would be what is
            shared.
    """
    from scipy.linalg import eigh

    count = weights.sum()
    if count < MIN_IMAGES:
        return images
    sample = np.random.default_rng(0).permutation(len(images))[:2000]
    shares = (weights[sample] / weights[sample].sum()).astype(np.float32)
    mean = shares @ images[sample]
    own = images - mean
    if components := min(MAX_COMPONENTS, int(count) // IMAGES_PER_COMPONENT):
        size = images.shape[1]
        covariance = (own[sample] * shares[:, None]).T @ own[sample]
        _, shared = eigh(covariance, subset_by_index=[size - components, size - 1])
        own -= (own @ shared) @ shared.T
    return own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-6)


def near_pairs(hashes: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """All pairs of hashes that are near each other as [M, 2] indices, first below second."""
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


def leaking_samples(
    parts: np.ndarray, images: np.ndarray, pairs: np.ndarray, of: int, into: Sequence[int]
) -> np.ndarray:
    """Indices of the samples in the part `of` whose image, or a near-copy of it, is also in one of the parts `into`.

    Args:
        parts: each sample's part [S]; -1: none.
        images: each sample's image [S], as an index.
        pairs: near-copies among the images [M, 2].
    """
    shape = (int(images.max(initial=-1)) + 1, int(max(parts.max(initial=0), of, *into)) + 1)
    there = np.zeros(shape, dtype=bool)  # whether an image is in a part
    used = parts >= 0
    there[images[used], parts[used]] = True
    near = there.copy()
    np.logical_or.at(near, pairs[:, 0], there[pairs[:, 1]])
    np.logical_or.at(near, pairs[:, 1], there[pairs[:, 0]])
    return np.flatnonzero((parts == of) & near[images][:, list(into)].any(1))
