"""Near-copies among images: pairs, groups, and the samples that a split leaks.

Small medical sets are full of copies of one frame: with and without calipers, cropped again, neighbours in a film loop.
With a copy on both sides of a split, the test score is higher than on new patients.

A pair of near-copies is proposed by perceptual hashes and confirmed by the correlation of two thumbnails.

Shapes: N images, M pairs, S samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from train_fn.data.images import AS_USUAL, read_image
from train_fn.settings import ImageOptions
from train_fn.support.cache import cache_folder, read_cache, write_cache
from train_fn.support.files import file_hash

# Of the 64 bits of a hash, how many may differ between copies. On BUSI, pairs that differ in up to 8 bits are copies by
# eye. From 10 bits on, false ones are proposed, too; they are not confirmed. Unrelated images differ in about 32 bits.
MAX_DISTANCE = 8
# Near hashes mean the same coarse structure, which any two right eyes or any two sevens have, too. So what an image
# shares with its lookalikes, the images of the set that correlate most with it, is removed. The rest is compared at two
# scales: the whole, and the detail. A pair is confirmed if the whole correlates MIN_CORRELATION and the detail at
# least that less DETAIL_LESS, or if the detail alone correlates DETAIL_ALONE more. On BUSI all 135 pairs are confirmed;
# benchmarks/README.md has the figures of other sets.
MIN_CORRELATION = 0.65
DETAIL_LESS, DETAIL_ALONE = 0.20, 0.05
NUM_LOOKALIKES = 40
MIN_IMAGES = 20  # in a smaller set nothing can be called shared
SAMPLE = 5_000  # images of a large set among which lookalikes are searched
# Frames of a long film have no lookalikes but each other. So a pair whose unchanged thumbnails correlate
# SAME_CORRELATION, and their detail SAME_DETAIL, is confirmed as well.
SAME_CORRELATION, SAME_DETAIL = 0.98, 0.8
FRAMES_CORRELATION = 0.95  # of neighbours in a film
# A cropped copy is found by comparing these shares of height and width of the two images, and a moved one by moving one
# of them by at most MAX_SHIFT pixels of its thumbnail.
CROPS = ((0.95, 1.0), (1.0, 0.95), (0.9, 1.0), (1.0, 0.9))
MAX_SHIFT = 3
WORTH_CROPPING = 0.2
NOISE = 3.0  # grey levels; weaker detail counts less
# Images smaller than SMALL_SIDE, or with less contrast than MIN_CONTRAST grey levels, are copies only if they differ by
# at most MAX_LEVELS grey levels.
SMALL_SIDE = 32
MIN_CONTRAST = 3.0
MAX_LEVELS = 3
BLOCK = 2**23  # entries of the distance matrix held at once
PAIRS_AT_ONCE = 4_000
ROWS_AT_ONCE = 1_000
CACHE = "thumbnails-2.json"
SHEET_COLUMNS, SHEET_SIDE, CAPTION = 6, 160, 14  # pixels of a contact sheet


# ------------------------------------------------------------------------------------------------ thumbnails, hashes


def thumbnail(image: Image.Image) -> np.ndarray:
    """Grey levels [32, 32] uint8 of an upright image."""
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS))


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
    """What the cache keeps of an upright image: its shorter side and its thumbnail."""
    return [min(image.size), base64.b64encode(thumbnail(image).tobytes()).decode()]


def cache_key(path: str, options: ImageOptions) -> str:
    """Names what the cache keeps of an image: the file's content, and how it is read."""
    return file_hash(path) + ("" if options == AS_USUAL else f" {options}")


def read_thumbnails(
    paths: Sequence[str], cache: Path | None = None, options: ImageOptions = AS_USUAL
) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails [N, 32, 32] uint8 and the shorter side [N] of each image, from the cache where a file of the same
    content was seen before."""
    cache = cache or cache_folder() / CACHE
    cached = read_cache(cache)

    def one(path: str) -> tuple[str, list[Any]]:
        content = cache_key(path, options)
        if content not in cached:
            return content, thumbnail_entry(read_image(path, options))
        return content, cached[content]

    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(one, paths))
    if fresh := {content: value for content, value in entries if content not in cached}:
        write_cache(cache, cached | fresh)
    pixels = b"".join(base64.b64decode(encoded) for _, (_, encoded) in entries)
    sides = np.array([side for _, (side, _) in entries], dtype=np.int64)
    return np.frombuffer(pixels, np.uint8).reshape(-1, 32, 32), sides


# ------------------------------------------------------------------------------------------------ pairs


def copy_pairs(
    paths: Sequence[str],
    max_distance: int = MAX_DISTANCE,
    cache: Path | None = None,
    min_correlation: float = MIN_CORRELATION,
    options: ImageOptions = AS_USUAL,
) -> np.ndarray:
    """All pairs of near-copies among different images: indices [M, 2], the first below the second.

    A mirrored image is no copy: sides have a meaning, and the two halves of a body look alike.

    Args:
        max_distance: bits in which the hashes of copies may differ; -1: no image counts as a copy.
        cache: file with cached thumbnails. Not given: the user's cache.
        min_correlation: see `MIN_CORRELATION`.
        options: how images are read.
    """
    if max_distance < 0 or not paths:
        return np.empty((0, 2), dtype=np.int64)
    pixels, sides = read_thumbnails(paths, cache, options)
    pairs = near_pairs(perceptual_hashes(pixels), max_distance)
    return pairs[confirmed(pixels, sides, pairs, min_correlation)]


def confirmed(
    pixels: np.ndarray, sides: np.ndarray, pairs: np.ndarray, min_correlation: float = MIN_CORRELATION
) -> np.ndarray:
    """Whether [M] each pair with near hashes is a pair of copies; see `MIN_CORRELATION`.

    Args:
        pixels: thumbnails [N, 32, 32].
        sides: the images' shorter sides [N].
        pairs: indices [M, 2].
    """
    if not len(pairs):
        return np.zeros(0, dtype=bool)
    sample = np.random.default_rng(0).permutation(len(pixels))[:SAMPLE]
    used = np.union1d(pairs, sample)
    pixels, sides = pixels[used], sides[used]
    pairs, sample = np.searchsorted(used, pairs), np.searchsorted(used, sample)
    levels = np.concatenate([np.abs(p[:, 0] - p[:, 1]).max((1, 2)) for p in blocks(pixels.astype(np.int16), pairs)])
    featureless = (sides < SMALL_SIDE) | (pixels.std((1, 2)) < MIN_CONTRAST)
    whole, detail = unit_length(pixels.astype(np.float32)), unit_length(local_detail(pixels))
    unchanged = correlations(whole, pairs)
    shared = shared_structure(whole, pairs, unchanged, sample)
    fine = aligned_correlations(unit_length(detail - shared(detail)), pairs)
    coarse = correlations(unit_length(whole - shared(whole)), pairs)
    alike = (coarse >= min_correlation) & (fine >= min_correlation - DETAIL_LESS)
    alike |= fine >= min_correlation + DETAIL_ALONE
    same = np.flatnonzero(unchanged >= max(SAME_CORRELATION, min_correlation))
    alike[same] |= aligned_correlations(detail, pairs[same]) >= max(SAME_DETAIL, min_correlation)
    return (levels <= MAX_LEVELS) | (alike & ~featureless[pairs].any(1))


def blocks(images: np.ndarray, pairs: np.ndarray) -> Iterator[np.ndarray]:
    """The images [m, 2, ...] of a few thousand pairs after the other."""
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        yield images[pairs[start : start + PAIRS_AT_ONCE]]


def unit_length(images: np.ndarray) -> np.ndarray:
    """Images [N, 32, 32] with mean 0, scaled to length 1."""
    centred = images - images.mean((1, 2), keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=(1, 2), keepdims=True), 1e-6)


def local_detail(pixels: np.ndarray) -> np.ndarray:
    """Detail [N, 32, 32] of thumbnails, about equally strong everywhere: a faint vessel counts like a bright edge."""
    from scipy.ndimage import gaussian_filter

    fine = pixels.astype(np.float32)
    fine -= gaussian_filter(fine, (0, 1, 1), mode="nearest")
    return fine / np.sqrt(gaussian_filter(fine * fine, (0, 2, 2), mode="nearest") + NOISE**2)


def correlations(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Correlation [M] of each pair [M, 2] of images [N, 32, 32] of mean 0 and length 1."""
    values = [np.einsum("mhw,mhw->m", block[:, 0], block[:, 1]) for block in blocks(images, pairs)]
    return np.concatenate(values) if values else np.zeros(0)


def aligned_correlations(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The largest correlation [M] of each pair over shifts and, if that is at least WORTH_CROPPING, over `CROPS`."""
    from scipy import fft

    shifts = np.arange(-MAX_SHIFT, MAX_SHIFT + 1)

    def largest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Over all shifts, of the spectra of two stacks of images."""
        return fft.irfft2(first * second.conj(), workers=-1)[:, shifts[:, None], shifts].max((1, 2))

    spectra = fft.rfft2(images, workers=-1)
    values = np.concatenate([np.zeros(0), *(largest(block[:, 0], block[:, 1]) for block in blocks(spectra, pairs))])
    worth = np.flatnonzero(values >= WORTH_CROPPING)
    start = 0
    for block in blocks(images, pairs[worth]):
        chosen = worth[start : (start := start + len(block))]
        for crop in CROPS:
            first, second = (fft.rfft2(unit_length(enlarged(block[:, i], crop[i])), workers=-1) for i in (0, 1))
            values[chosen] = np.maximum(values[chosen], largest(first, second))
    return values


def enlarged(images: np.ndarray, share: float) -> np.ndarray:
    """The middle of images [N, size, size], a share of height and width, enlarged to their size."""
    size = images.shape[-1]
    at = (np.arange(size) - (size - 1) / 2) * share + (size - 1) / 2
    low = np.minimum(at.astype(int), size - 2)
    weight = (at - low).astype(np.float32)
    rows = images[:, low] * (1 - weight)[:, None] + images[:, low + 1] * weight[:, None]
    return rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight


def shared_structure(
    whole: np.ndarray, pairs: np.ndarray, unchanged: np.ndarray, sample: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of each image's lookalikes, as a function of any form of the images [N, 32, 32]. Nothing in a small set.

    Args:
        whole: images [N, 32, 32] of mean 0 and length 1.
        unchanged: correlation of each of the pairs.
        sample: indices of the images that can be lookalikes.
    """
    from scipy.sparse import csr_array

    count = min(NUM_LOOKALIKES, len(sample) - 1)
    if len(sample) < MIN_IMAGES:
        return np.zeros_like
    # Each frame of a film weighs little: otherwise the film itself would be the shared structure.
    weights = 1 / (1 + np.bincount(pairs[unchanged >= FRAMES_CORRELATION].ravel(), minlength=len(whole)))
    flat = whole.reshape(len(whole), -1)
    rows = np.unique(pairs)
    chosen = np.empty((len(rows), count), dtype=np.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        alike = flat[block] @ flat[sample].T
        alike[block[:, None] == sample] = -2  # no image is its own lookalike
        chosen[start : start + ROWS_AT_ONCE] = sample[np.argpartition(alike, -count, 1)[:, -count:]]
    shares = weights[chosen] / weights[chosen].sum(1, keepdims=True)
    matrix = csr_array(
        (shares.ravel().astype(np.float32), (np.repeat(rows, count), chosen.ravel())), (len(whole), len(whole))
    )
    return lambda images: (matrix @ images.reshape(len(images), -1)).reshape(images.shape)


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


def largest_groups(groups: np.ndarray, most: int = 5) -> list[np.ndarray]:
    """The images, as indices, of each of the largest groups, the largest first. A single image is no group.

    Args:
        groups: group number of each image [N].
        most: the most groups to return.
    """
    numbers, sizes = np.unique(groups, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:most]
    return [np.flatnonzero(groups == numbers[index]) for index in order if sizes[index] > 1]


def contact_sheet(paths: Sequence[str], most: int = 12, options: ImageOptions = AS_USUAL) -> bytes:
    """The first `most` images side by side, as PNG: upright, six in a row, numbered from 1, without their names.

    options: how images are read.
    """
    shown = paths[:most]
    columns = min(len(shown), SHEET_COLUMNS)
    height = SHEET_SIDE + CAPTION
    sheet = Image.new("RGB", (max(1, columns * SHEET_SIDE), max(1, -(-len(shown) // SHEET_COLUMNS) * height)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, path in enumerate(shown):
        left, top = index % SHEET_COLUMNS * SHEET_SIDE, index // SHEET_COLUMNS * height
        draw.text((left + 4, top + 1), str(index + 1), fill="black")
        image = read_image(path, options)
        image.thumbnail((SHEET_SIDE - 4, SHEET_SIDE - 4))
        sheet.paste(image, (left + 2, top + CAPTION))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


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
