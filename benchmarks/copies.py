"""Which pairs count as near-copies: precision and recall on look-alikes and on copies made of them; time and memory.

    python benchmarks/copies.py [--busi FOLDER] [--images 300] [--growth]

Each set is made of drawn images that look alike (`benchmarks/lookalikes.py`), of scikit-learn's digits, or of BUSI, and
of copies of 20 of its images for each change. A pair is right if one image is a copy of the other, or both are copies
of a third. In BUSI the pairs with near hashes are copies by eye. Mirrored images are no copies and not in the sets.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(Path(__file__).resolve().parent))]

from benchmarks.lookalikes import CHANGES, DRAWN  # noqa: E402
from train_fn.data.copies import confirmed, copy_groups, near_pairs, perceptual_hashes, thumbnail  # noqa: E402

COPIES = 20  # of each set, for each change
MADE = [change for change in CHANGES if change != "mirrored"]
Check = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # thumbnails, sides, pairs -> whether each is right


def digits(scale: int) -> list[Image.Image]:
    from sklearn.datasets import load_digits

    images = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in load_digits().images]
    return [image.resize((8 * scale, 8 * scale), Image.Resampling.BICUBIC) for image in images]


def busi_images(folder: Path) -> list[Image.Image]:
    entries = json.loads((folder / "train_busi_breast_cancer.json").read_text())
    return [Image.open(folder / entry["image"]).convert("RGB") for entry in entries]


def image_sets(busi: Path | None, count: int) -> Iterable[tuple[str, list[Image.Image]]]:
    """Name and images of each set."""
    for number, (name, draw) in enumerate(DRAWN.items()):
        yield name, [draw(np.random.default_rng([7, number, index])) for index in range(count)]
    yield "digits of 8 x 8", digits(1)
    yield "digits, enlarged", digits(8)
    if busi:
        yield "BUSI", busi_images(busi)


def with_copies(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Thumbnails and shorter sides of the images and of their copies; the original of each (-1: it is one) and the
    change, as an index into `MADE`."""
    rng = np.random.default_rng(3)
    made = [(image, -1, -1) for image in images]
    for number, change in enumerate(MADE):
        for index in rng.permutation(len(images))[:COPIES].tolist():
            made.append((CHANGES[change](images[index], rng), index, number))
    pixels, sides, of, changes = zip(
        *((thumbnail(image), min(image.size), index, number) for image, index, number in made), strict=True
    )
    return np.array(pixels), np.array(sides), np.array(of), np.array(changes)


def measure(name: str, images: list[Image.Image], check: Check) -> tuple[str, np.ndarray]:
    """A row of the table of sets, and for each change how many of the copies are found [changes]."""
    pixels, sides, of, changes = with_copies(images)
    hashes = perceptual_hashes(pixels)
    groups = np.where(of >= 0, of, np.arange(len(of)))
    if name == "BUSI":
        originals = copy_groups(len(images), near_pairs(hashes[: len(images)]))
        groups = originals[groups]
    pairs = near_pairs(hashes)
    accepted = check(pixels, sides, pairs)
    cells = [name, str(len(of))]
    for chosen in (pairs, pairs[accepted]):
        right = groups[chosen[:, 0]] == groups[chosen[:, 1]]
        seen = set(map(tuple, chosen.tolist()))
        found = np.array([(int(of[copy]), int(copy)) in seen for copy in np.flatnonzero(of >= 0)])
        largest = np.bincount(copy_groups(len(of), chosen)).max()
        cells += [str((~right).sum()), f"{right.mean():.3f}", f"{found.mean():.2f}", str(largest)]
    by_change = np.array([found[changes[of >= 0] == number].sum() for number in range(len(MADE))])
    return " | ".join(cells), by_change


def growth(sizes: Iterable[int]) -> None:
    """Time and memory over the number of images, all of which share most of their structure."""
    from scipy.ndimage import gaussian_filter

    print("| images | pairs with near hashes | hashes and pairs, s | check, s | peak, GiB |\n|" + " --- |" * 5)
    for size in sizes:
        rng = np.random.default_rng(0)
        shared = gaussian_filter(rng.standard_normal((32, 32)), 4)
        own = gaussian_filter(rng.standard_normal((size, 32, 32)).astype(np.float32), (0, 1.5, 1.5))
        pixels = shared / shared.std() + 0.3 * own / own.std()
        pixels = (128 + 40 * pixels).clip(0, 255).astype(np.uint8)
        start = time.perf_counter()
        pairs = near_pairs(perceptual_hashes(pixels))
        paired = time.perf_counter()
        confirmed(pixels, np.full(size, 256), pairs)
        checked = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {size:,} | {len(pairs):,} | {paired - start:.1f} | {checked - paired:.1f} | {peak:.1f} |", flush=True)


def main(check: Check = confirmed) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--busi", type=Path, help="folder of BUSI and its manifest [no BUSI]")
    parser.add_argument("--images", type=int, default=300, help="images of each drawn set [300]")
    parser.add_argument("--growth", action="store_true", help="measure time and memory instead")
    options = parser.parse_args()
    if options.growth:
        growth((1_000, 10_000, 30_000))
        return
    print(
        "| set | images | hash: wrong | precision | recall | largest group "
        "| check: wrong | precision | recall | largest group |"
    )
    print("|" + " --- |" * 10)
    totals: dict[str, np.ndarray] = {}
    for name, images in image_sets(options.busi, options.images):
        row, by_change = measure(name, images, check)
        print(f"| {row} |", flush=True)
        if not name.startswith("digits"):
            kind = "BUSI" if name == "BUSI" else "drawn sets"
            totals[kind] = totals.get(kind, np.zeros(len(MADE))) + by_change
    print("\n| copies found | " + " | ".join(totals) + " |\n|" + " --- |" * (1 + len(totals)))
    shares = {"BUSI": COPIES, "drawn sets": COPIES * len(DRAWN)}
    for number, change in enumerate(MADE):
        print(f"| {change} | " + " | ".join(f"{totals[kind][number] / shares[kind]:.2f}" for kind in totals) + " |")


if __name__ == "__main__":
    main()
