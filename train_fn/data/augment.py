"""Augmentation: variants of training images, each a little turned, brighter or darker, and noisier than the image.

An image has a few fixed variants instead of a new one in each epoch. So the vision features of a variant can be cached,
and all trials share them. A variant depends on the image's pixels, its own number, the strength, and whether flips are
allowed, and on nothing else: it is the same in every trial, on every worker and in a replay. Number 0 is the image
itself. The model must read unvaried images in the end, and their features are in the cache anyway.

A variant has the size of its image, so it has as many tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from train_fn.data.images import AS_USUAL, read_image
from train_fn.data.order import epoch_variants
from train_fn.data.samples import Sample, Splits
from train_fn.settings import ImageOptions, TrialSettings

ITSELF = "itself"  # label of an image that is shown as it is
# Resolution cells along the longer side, at one grain each. A transducer resolves 100 to 200 over its depth, and noise
# in single pixels of a large image would be gone once the image is scaled down for the model.
GRAINS = 256
ROWS = 256  # of an image at a time: their brightness takes four times the memory


class Strength(NamedTuple):
    """The largest changes. Each variant draws its own, uniformly between these and their opposites."""

    degrees: float
    """Rotation to either side."""
    gain: float
    """Brightness and contrast are multiplied by a number between 1 - gain and 1 + gain."""
    speckle: float
    """Standard deviation of the noise, as a share of the brightness; from 0."""


# medium: rotation of elongated 2-D images, brightness and contrast as in nnU-Net (nnUNetTrainer.py: 15 degrees, 0.75 to
# 1.25); speckle as MATLAB's imnoise and its usual variance of 0.05. light: about a third to a half of that, with
# scikit-image's usual variance of 0.01. Turning the image, brightness and contrast are among what helps breast
# ultrasound (arXiv:2403.09828), and what helps natural images helps ultrasound, too (arXiv:2501.13193).
STRENGTHS = {"light": Strength(5, 0.1, 0.1), "medium": Strength(15, 0.25, 0.22)}


class Variant(NamedTuple):
    """A variant of the image file at `path`. Where a path is expected for an image itself, this is one of a variant."""

    path: str
    strength: str
    number: int
    """From 1."""
    allow_flips: bool

    @property
    def label(self) -> str:
        """What is shown, without the path: "light 2", or "light 2, flips allowed"."""
        return f"{self.strength} {self.number}{', flips allowed' * self.allow_flips}"

    @property
    def key(self) -> str:
        """All that the pixels depend on beside the image, for a file's name. The cache's key has Pillow's version."""
        return f"{self.strength}-{self.number}{'-flips' * self.allow_flips}-{code_version()}"


@functools.cache
def code_version() -> str:
    """A hash of this file and of the version of NumPy, whose generators may change."""
    return hashlib.sha256(Path(__file__).read_bytes() + np.__version__.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ which variant


def shown_images(splits: Splits, settings: TrialSettings, epoch: int) -> list[tuple[str | Variant, ...]]:
    """What each training sample shows in an epoch (from 1) in the place of each of its images [S]."""
    if settings.augment == "none":
        return [sample.images for sample in splits.train]

    def shown(path: str, number: int) -> str | Variant:
        return Variant(path, settings.augment, number, splits.allow_flips) if number else path

    numbers = variant_numbers(splits.train, settings, epoch)
    return [tuple(map(shown, sample.images, its)) for sample, its in zip(splits.train, numbers, strict=True)]


def variant_numbers(samples: Sequence[Sample], settings: TrialSettings, epoch: int) -> list[list[int]]:
    """The number of the variant of each image of each sample in an epoch; those of samples with fewer images than
    others are longer than needed."""
    most = max(len(sample.images) for sample in samples)
    return epoch_variants(len(samples), most, settings.augment_variants, settings.seed, epoch).tolist()


def label_of(image: str | Variant) -> str:
    """The variant that is shown, in words."""
    return ITSELF if isinstance(image, str) else image.label


def path_of(image: str | Variant) -> str:
    """The image's file."""
    return image if isinstance(image, str) else image.path


# ------------------------------------------------------------------------------------------------ pixels


def read_shown(image: str | Variant, options: ImageOptions = AS_USUAL) -> Image.Image:
    """The pixels of an image or of a variant as RGB, upright. Raises as `read_image`."""
    picture = read_image(path_of(image), options)
    return picture if isinstance(image, str) else vary(picture, image)


def vary(picture: Image.Image, variant: Variant) -> Image.Image:
    """A variant of an RGB image, of the same size. Grey images stay grey.

    An image may be flipped from left to right, never from top to bottom: in ultrasound, down is depth. Shadows and
    enhancement lie below what causes them, and the beam is weaker there.
    """
    most = STRENGTHS[variant.strength]
    content = hashlib.sha256(repr((picture.size, variant.number)).encode() + picture.tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(content[:16], "big"))
    # The same draws for each strength: light and medium variants of one number differ in degree only.
    turn, brighter, harder, coin, speckle = rng.uniform(-1, 1, 5)
    if variant.allow_flips and coin > 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mean = float(np.asarray(picture.convert("L")).mean())
    turned = picture.rotate(turn * most.degrees, Image.Resampling.BICUBIC, fillcolor=border_colour(picture))
    levels = np.arange(256, dtype=np.float32)
    levels = ((levels - mean) * (1 + harder * most.gain) + mean) * (1 + brighter * most.gain)
    grains = speckle_field(picture.size, abs(speckle) * most.speckle, rng)
    pixels = np.array(turned)  # [H, W, 3]
    for top in range(0, len(pixels), ROWS):
        rows = slice(top, top + ROWS)
        varied = levels[pixels[rows]] * grains[rows, :, None]  # one factor for all channels: colours keep their hue
        pixels[rows] = np.clip(varied + 0.5, 0, 255)
    return Image.fromarray(pixels)


def border_colour(picture: Image.Image) -> tuple[int, ...]:
    """The colour for the corners of a turned image: the median of its border, which is the frame's black in most
    ultrasound images. Mirrored tissue could look like a finding."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(value) for value in np.median(border, axis=0))


def speckle_field(size: tuple[int, int], deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Factors for the brightness of each pixel [H, W], around 1: speckle multiplies (Loupas et al. 1989).

    Args:
        size: width and height.
        deviation: standard deviation of a grain.
    """
    scale = min(1.0, GRAINS / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    grains = 1 + deviation * rng.standard_normal((height, width), dtype=np.float32)
    return np.asarray(Image.fromarray(grains.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
