"""Breast-ultrasound phantoms: small synthetic B-mode images of three classes, for runs without any data.

Physics, simplified. A resolution cell that holds many scatterers sums many random phasors, so the field is complex
Gaussian and its envelope Rayleigh distributed: fully developed speckle (Burckhardt, "Speckle in ultrasound B-mode
scans", IEEE Trans. Sonics Ultrason. 25(1), 1978; the same statistics as in Goodman's work on laser speckle). Here
white complex noise, scaled by the local echogenicity, is blurred by a point-spread function; its envelope is averaged
over a few independent looks, as compounding scanners do, and log-compressed.

Appearance. The words are those of the ACR BI-RADS ultrasound lexicon: shape, orientation, margin, echo pattern and
posterior features. Benign masses tend to be oval, parallel to the skin and circumscribed, malignant ones irregular,
not parallel and not circumscribed. The tables below are made up for this generator, not epidemiology: classes
overlap, contrast is sometimes low and fat lobules mimic masses, so that no reader can be right every time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d

CLASSES = ("Normal", "Benign", "Malignant")
CLASS_SHARES = (0.17, 0.56, 0.27)  # as in BUSI (Al-Dhabyani et al., Data in Brief 28:104863, 2020)
QUESTION = (
    "Carefully examine the image to determine the diagnostic result for breast cancer. "
    "Please answer 'Normal', 'Benign', or 'Malignant'."
)
SIZE = 128  # pixels, height and width

# attribute -> value -> (weight in benign, weight in malignant masses)
MASS_ATTRIBUTES: dict[str, dict[str, tuple[float, float]]] = {
    "shape": {"oval": (0.82, 0.32), "irregular": (0.18, 0.68)},
    "orientation": {"parallel": (0.80, 0.45), "vertical": (0.20, 0.55)},
    "margin": {
        "circumscribed": (0.62, 0.18),
        "indistinct": (0.16, 0.27),
        "microlobulated": (0.14, 0.22),
        "spiculated": (0.08, 0.33),
    },
    "echo": {
        "anechoic": (0.24, 0.06),
        "hypoechoic": (0.50, 0.72),
        "isoechoic": (0.16, 0.16),
        "hyperechoic": (0.10, 0.06),
    },
    "posterior": {"enhancement": (0.42, 0.16), "none": (0.42, 0.38), "shadow": (0.16, 0.46)},
    "size": {"small": (0.40, 0.25), "medium": (0.38, 0.40), "large": (0.22, 0.35)},
}
MASS_RADIUS = {"small": (0.07, 0.10), "medium": (0.11, 0.15), "large": (0.16, 0.22)}  # share of the image width
MASS_CONTRAST_DB = {
    "anechoic": (-32, -22),
    "hypoechoic": (-16, -8),
    "isoechoic": (-6, -3),
    "hyperechoic": (5, 9),
}


def draw_attributes(rng: np.random.Generator, label: int | None) -> dict[str, str]:
    """Draw the attributes of an image: `{"lesion": "no"}`, or "yes" with one value for each key of `MASS_ATTRIBUTES`.

    `label` is 0/1/2 = Normal/Benign/Malignant. None draws every attribute uniformly and independently (a mass in
    three of four images), so that such images teach nothing about the classes.
    """
    if label == 0 or (label is None and rng.random() < 0.25):
        return {"lesion": "no"}
    attributes = {"lesion": "yes"}
    for name, values in MASS_ATTRIBUTES.items():
        weights = np.array([1.0 if label is None else weight[label - 1] for weight in values.values()])
        attributes[name] = str(rng.choice(list(values), p=weights / weights.sum()))
    return attributes


def render(rng: np.random.Generator, attributes: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one B-mode image with these attributes; returns image uint8 [H, W] and mass mask bool [H, W]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    echo_db, (top, bottom) = _tissue_db(rng, y, x)
    for _ in range(rng.poisson(1.0)):  # fat lobules: the mimics
        rho = _ellipse(y - rng.uniform(top, bottom), x - rng.uniform(0, 1), rng.uniform(0.04, 0.12), rng.uniform(1, 3))
        echo_db -= rng.uniform(2, 8) / (1 + np.exp((rho - 1) / 0.12))
    mask = np.zeros((SIZE, SIZE), bool)
    if attributes["lesion"] == "yes":
        echo_db, mask = _add_mass(rng, echo_db, attributes, y, x, top, bottom)
    return _b_mode(rng, echo_db), mask


def phantom(rng: np.random.Generator, label: int) -> tuple[np.ndarray, dict[str, str], np.ndarray]:
    """One phantom of class `label` (0/1/2): image uint8 [H, W], its attributes, mass mask bool [H, W]."""
    if label not in range(len(CLASSES)):
        raise ValueError(f"`label` must be 0, 1 or 2 (Normal, Benign, Malignant), but got {label!r}")
    attributes = draw_attributes(rng, label)
    image, mask = render(rng, attributes)
    return image, attributes, mask


def generate(directory: Path, num_images: int, seed: int) -> Path:
    """Write `num_images` phantoms and their manifest `phantoms.json` to `directory`. Returns the manifest's path.

    Image paths in the manifest are relative to `directory`. Classes occur in `CLASS_SHARES`, shuffled, so that neither
    name nor order shows the class. Everything is written to a sibling directory and renamed at the end: a killed run
    leaves no incomplete set. An existing set is kept.

    Raises:
        ValueError: `directory` holds a set made with other arguments.
    """
    directory = Path(directory)
    manifest, recipe_path = directory / "phantoms.json", directory / "recipe.json"
    recipe = {"num_images": num_images, "seed": seed, "size": SIZE}
    if not manifest.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            partial.chmod(0o755)  # mkdtemp's 0700 would keep a colleague's or a worker's account out
            _write(partial, recipe)
            os.rename(partial, directory)
        except OSError:
            if not manifest.exists():  # otherwise another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    found = json.loads(recipe_path.read_text()) if recipe_path.exists() else None
    if found != recipe:
        raise ValueError(f"`{directory}` must hold phantoms of {recipe}, but got {found}; name another directory")
    return manifest


def _write(directory: Path, recipe: dict[str, int]) -> None:
    num_images, seed = recipe["num_images"], recipe["seed"]
    edges = np.round(np.cumsum(CLASS_SHARES) * num_images)
    labels = np.searchsorted(edges, np.arange(num_images), side="right")
    np.random.default_rng(seed).shuffle(labels)
    (directory / "images").mkdir()

    def draw(index: int, label: int) -> dict[str, str | int]:
        image, _, _ = phantom(np.random.default_rng([seed, index]), label)
        name = f"images/{index:05d}.png"
        Image.fromarray(image).save(directory / name)
        return {"image": name, "text": QUESTION, "answer": CLASSES[label], "label": label}

    threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1))  # NumPy and SciPy release Python's lock
    try:
        records = list(threads.map(draw, range(num_images), labels.tolist()))
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, do not draw the rest
    (directory / "recipe.json").write_text(json.dumps(recipe) + "\n")
    (directory / "phantoms.json").write_text(json.dumps(records, indent=1) + "\n")


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect", truncate=3)
    return noise / noise.std()


def _ellipse(dy: np.ndarray, dx: np.ndarray, radius: float, width_to_height: float) -> np.ndarray:
    """Distance from the centre, 1 on an ellipse of the area of a circle of `radius`. [H, W]"""
    return np.hypot(dy * np.sqrt(width_to_height), dx / np.sqrt(width_to_height)) / radius


def _tissue_db(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Echogenicity of skin, fat, gland and muscle in dB [H, W], and the depths between which masses lie."""
    depths = np.array([rng.uniform(0.03, 0.07), rng.uniform(0.12, 0.32), rng.uniform(0.62, 0.88)])
    bends = np.stack([rng.uniform(0.005, 0.03) * _smooth_noise(rng, (SIZE,), 14) for _ in depths])
    fibres = _smooth_noise(rng, (SIZE, SIZE), (1.5, rng.uniform(4, 9)))
    septa = np.exp(-((_smooth_noise(rng, (SIZE, SIZE), (4, 12)) / 0.15) ** 2))
    skin = 6.0
    fat = rng.uniform(-9, -4) + 6 * septa
    gland = rng.uniform(-2, 5) + rng.uniform(1, 6) * fibres + rng.uniform(0, 5) * septa
    muscle = rng.uniform(-9, -3) + rng.uniform(2, 4) * fibres
    echo_db = np.full_like(y, skin)
    for depth, bend, texture in zip(depths, bends, (fat, gland, muscle), strict=True):
        beyond = 1 / (1 + np.exp(-(y - depth - bend) / 0.008))
        fascia = np.exp(-(((y - depth - bend) / 0.012) ** 2))
        echo_db = echo_db * (1 - beyond) + texture * beyond + rng.uniform(0, 7) * fascia
    # The attenuation that gain compensation leaves, and the stripes below dense tissue.
    stripes = gaussian_filter1d(rng.standard_normal(SIZE), 5) * rng.uniform(0, 12)
    return echo_db - rng.uniform(0, 22) * y + stripes * y, (depths[1] + 0.02, max(depths[2], depths[1] + 0.3) - 0.05)


def _add_mass(rng, echo_db, attributes, y, x, top, bottom) -> tuple[np.ndarray, np.ndarray]:
    """Add a mass and its effect on the tissue behind it to the echogenicity map. Returns map and mask."""
    radius = rng.uniform(*MASS_RADIUS[attributes["size"]])
    stretch = rng.uniform(1.2, 2.0)
    width_to_height = stretch if attributes["orientation"] == "parallel" else 1 / stretch
    half_height = radius / np.sqrt(width_to_height)
    centre_y = rng.uniform(min(top + half_height / 2, 0.5), max(bottom - half_height / 2, 0.52))
    centre_x = rng.uniform(0.18, 0.82)
    dy, dx = y - centre_y, x - centre_x
    angle, (a, b, c) = np.arctan2(dy, dx), rng.uniform(0, 2 * np.pi, 3)
    outline = 1 + 0.04 * np.cos(2 * angle + a) + rng.uniform(0, 0.08) * np.cos(3 * angle + b)
    if attributes["shape"] == "irregular":
        outline += rng.uniform(0.12, 0.25) * np.cos(3 * angle + c) + rng.uniform(0.1, 0.2) * np.cos(5 * angle + a)
    if attributes["margin"] == "microlobulated":
        outline += rng.uniform(0.08, 0.14) * np.cos(rng.integers(8, 12) * angle + b)
    if attributes["margin"] == "spiculated":
        outline += rng.uniform(0.4, 0.9) * np.abs(np.cos(rng.integers(3, 6) * angle + c)) ** 12
    rho = _ellipse(dy, dx, radius, width_to_height) / np.maximum(outline, 0.3)
    softness = rng.uniform(0.15, 0.3) if attributes["margin"] == "indistinct" else rng.uniform(0.02, 0.06)
    inside = 1 / (1 + np.exp(np.clip((rho - 1) / softness, -30, 30)))
    mask = rho < 1

    behind = np.cumsum(mask, 0) / (2 * half_height * SIZE)  # thickness of mass above each point [H, W]
    behind = gaussian_filter1d(np.where(mask, 0, np.minimum(behind, 1)), 2, axis=1)
    strength = {"enhancement": rng.uniform(4, 9), "none": 0.0, "shadow": -rng.uniform(7, 18)}[attributes["posterior"]]
    visibility = rng.uniform(0.25, 0.6) if rng.random() < 0.12 else 1.0  # poor contrast, e.g. a dense breast
    contrast = rng.uniform(*MASS_CONTRAST_DB[attributes["echo"]]) * visibility
    interior = echo_db[mask].mean() + contrast + rng.uniform(0.5, 1.5) * _smooth_noise(rng, y.shape, 3)
    return echo_db * (1 - inside) + interior * inside + strength * visibility * behind, mask


def _b_mode(rng: np.random.Generator, echo_db: np.ndarray) -> np.ndarray:
    """Speckle and log compression: echogenicity in dB [H, W] to image uint8 [H, W]."""
    amplitude, num_looks = 10 ** (echo_db / 20), rng.integers(1, 5)
    spread = (rng.uniform(0.5, 1.0), rng.uniform(0.7, 1.6))  # pixels; resolution is finer in depth than across
    envelope = np.zeros_like(echo_db)
    for _ in range(num_looks):
        real, imaginary = (gaussian_filter(rng.standard_normal(echo_db.shape) * amplitude, spread) for _ in range(2))
        envelope += np.hypot(real, imaginary)
    level_db = 20 * np.log10(envelope / np.median(envelope) + 1e-4)
    dynamic_range_db, offset = rng.uniform(40, 60), rng.uniform(0.3, 0.6)
    return np.clip(255 * (level_db / dynamic_range_db + offset), 0, 255).astype(np.uint8)
