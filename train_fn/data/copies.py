"""Near-copies among images: pairs, groups, and the samples that a split leaks.

Small medical sets are full of copies of one frame: with and without calipers, cropped again, neighbours in a film loop.
With a copy on both sides of a split, the test score is higher than on new patients.

A pair of near-copies is proposed by perceptual hashes and confirmed by the correlation of two thumbnails.

Shapes: N images, M pairs, S samples.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train_fn.data.images import upright
from train_fn.support.cache import cache_folder, read_cache, write_cache
from train_fn.support.files import file_hash

# Of the 64 bits of a hash, how many may differ between copies. On BUSI, pairs that differ in up to 8 bits are copies by
# eye, and false ones begin at 10; two unrelated images differ in about 32.
MAX_DISTANCE = 8
# Near hashes mean the same coarse structure, which any two right eyes or any two sevens have, too. So the structure
# that all images of the set share is removed, and a pair is confirmed if the rest correlates this much. On BUSI all 135
# pairs do; of 4,378 pairs among 450 different drawn eye-grounds 62 do.
# Unchanged thumbnails that correlate SAME_CORRELATION are confirmed as well.
MIN_CORRELATION = 0.65
SAME_CORRELATION = 0.98
FRAMES_CORRELATION = 0.95  # of neighbours in a film
MAX_COMPONENTS = 5  # principal components that count as shared structure: one for every IMAGES_PER_COMPONENT images
IMAGES_PER_COMPONENT = 25
MIN_IMAGES = 20  # a smaller set has no structure that could be called shared
# Images smaller than SMALL_SIDE, or with less contrast than MIN_CONTRAST grey levels, are copies only if they differ by
# at most MAX_LEVELS grey levels.
SMALL_SIDE = 32
MIN_CONTRAST = 3.0
MAX_LEVELS = 3
BLOCK = 2**26  # entries of the distance matrix held at once
PAIRS_AT_ONCE = 20_000
CACHE = "thumbnails-1.json"


# ------------------------------------------------------------------------------------------------ thumbnails, hashes


def thumbnail(image: Image.Image) -> np.ndarray:
    """Grey levels [32, 32] uint8 of the upright image."""
    return np.asarray(upright(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS))


def perceptual_hashes(pixels: np.ndarray) -> np.ndarray:
    """Hashes [N] uint64 of the coarse structure of thumbnails [N, 32, 32] (pHash, Zauner 2010).

    The 64 bits are the signs of the 8 x 8 lowest DCT coefficients around their median. Scaling, compression, small
    marks and brightness change few of them.
    """
    low = (DCT @ pixels.astype(np.float64) @ DCT.T).reshape(-1, 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)  # without the mean brightness, which dwarfs the rest
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix [size, size]."""
    rows, columns = np.mgrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * rows * (2 * columns + 1) / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


DCT = dct_matrix(32)[:8]


def thumbnail_entry(image: Image.Image) -> list[Any]:
    """What the cache keeps of an image: its shorter side and its thumbnail."""
    return [min(image.size), base64.b64encode(thumbnail(image).tobytes()).decode()]


def read_thumbnails(paths: Sequence[str], cache: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails [N, 32, 32] uint8 and the shorter side [N] of each image, from the cache where a file of the same
    content was seen before."""
    cache = cache or cache_folder() / CACHE
    cached = read_cache(cache)

    def one(path: str) -> tuple[str, list[Any]]:
        content = file_hash(path)
        if content not in cached:
            with Image.open(path) as image:
                return content, thumbnail_entry(image)
        return content, cached[content]

    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(one, paths))
    if fresh := {content: value for content, value in entries if content not in cached}:
        write_cache(cache, cached | fresh)
    pixels = b"".join(base64.b64decode(encoded) for _, (_, encoded) in entries)
    sides = np.array([side for _, (side, _) in entries], dtype=np.int64)
    return np.frombuffer(pixels, np.uint8).reshape(-1, 32, 32), sides


# ------------------------------------------------------------------------------------------------ pairs


def copy_pairs(paths: Sequence[str], max_distance: int = MAX_DISTANCE, cache: Path | None = None) -> np.ndarray:
    """All pairs of near-copies among different images: indices [M, 2], the first below the second.

    Args:
        max_distance: bits in which the hashes of copies may differ; -1: no image counts as a copy.
        cache: file with cached thumbnails. Not given: the user's cache.
    """
    if max_distance < 0 or not paths:
        return np.empty((0, 2), dtype=np.int64)
    pixels, sides = read_thumbnails(paths, cache)
    pairs = near_pairs(perceptual_hashes(pixels), max_distance)
    return pairs[confirmed(pixels, sides, pairs)]


def confirmed(pixels: np.ndarray, sides: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether [M] each pair with near hashes is a pair of copies; see `MIN_CORRELATION`.

    Args:
        pixels: thumbnails [N, 32, 32].
        sides: the images' shorter sides [N].
        pairs: indices [M, 2].
    """
    grey = pixels.reshape(len(pixels), -1).astype(np.float32)
    featureless = (sides < SMALL_SIDE) | (grey.std(1) < MIN_CONTRAST)
    whole = unit_length(grey - grey.mean(1, keepdims=True))
    unchanged = correlations(whole, pairs)
    num_alike = np.bincount(pairs[unchanged >= FRAMES_CORRELATION].ravel(), minlength=len(pixels))
    own = own_structure(whole, 1 / (1 + num_alike))
    equal = np.array([np.abs(grey[one] - grey[two]).max() <= MAX_LEVELS for one, two in pairs], dtype=bool)
    alike = (correlations(own, pairs) >= MIN_CORRELATION) | (unchanged >= SAME_CORRELATION)
    return equal | (alike & ~featureless[pairs].any(1))


def unit_length(images: np.ndarray) -> np.ndarray:
    """Images [N, pixels] scaled to length 1."""
    return images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-6)


def correlations(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Correlation [M] of each pair [M, 2] of images [N, pixels] of mean 0 and length 1."""
    blocks = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    values = [np.einsum("mp,mp->m", images[block[:, 0]], images[block[:, 1]]) for block in blocks]
    return np.concatenate(values) if values else np.zeros(0)


def own_structure(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The images [N, pixels], of mean 0 and length 1, without the structure that they share: the set's mean and its
    first principal components. Scaled to length 1 again.

    Args:
        weights: weight of each image [N] in mean and components. Each frame of a film weighs little: otherwise the
            film itself would be the shared structure.
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
    return unit_length(own)


def near_pairs(hashes: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """All pairs of hashes that are near each other: indices [M, 2], the first below the second."""
    pairs = []
    block = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), block):
        rows = hashes[start : start + block]
        near = np.bitwise_count(rows[:, None] ^ hashes[None, start:]) <= max_distance
        first, second = np.nonzero(near)
        pairs.append(np.stack([first + start, second + start], 1)[first < second])
    return np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)


# ------------------------------------------------------------------------------------------------ groups, leaks


def copy_groups(num_images: int, pairs: np.ndarray) -> np.ndarray:
    """Group number [N] of each image; copies of copies are in one group."""
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
