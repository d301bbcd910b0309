"""For `benchmarks/copies.py`: drawn images that look alike and are no copies, and changes that make copies.

Every drawing takes a generator and returns one image. Two drawings share what two patients, two pages or two codes
share: the outline, the layout, the frame. All else is random.
"""

from __future__ import annotations

import io
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from scipy.ndimage import gaussian_filter

SIZE = 192  # pixels, height and width


def noise(rng: np.random.Generator, sigma: float, size: int = SIZE) -> np.ndarray:
    """Smooth noise [size, size] of standard deviation 1."""
    values = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="reflect")
    return values / values.std()


def grid(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [size, size], from -1 to 1."""
    y, x = np.mgrid[:size, :size]
    return 2 * y / (size - 1) - 1, 2 * x / (size - 1) - 1


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def blob(y: np.ndarray, x: np.ndarray, height: float, width: float, softness: float = 0.1) -> np.ndarray:
    """1 inside an ellipse around the origin, 0 outside."""
    return 1 / (1 + np.exp(((np.hypot(y / height, x / width) - 1) / softness).clip(-30, 30)))


# ------------------------------------------------------------------------------------------------ what looks alike


def eye_ground(rng: np.random.Generator) -> Image.Image:
    """Right eyes: disc, optic disc, vessels, spots."""
    image = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    radius = SIZE * rng.uniform(0.43, 0.48)
    x, y = SIZE / 2 + rng.uniform(-4, 4, 2)
    red, green, blue = rng.uniform(130, 210), rng.uniform(50, 95), rng.uniform(15, 45)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(int(red), int(green), int(blue)))
    disc_x, disc_y = x + radius * rng.uniform(0.35, 0.5), y + radius * rng.uniform(-0.12, 0.12)
    for _ in range(10):
        at, angle = (disc_x, disc_y), rng.uniform(0, 2 * np.pi)
        width = int(rng.integers(1, 4))
        while np.hypot(at[0] - x, at[1] - y) < radius:
            to = at[0] + 3 * np.cos(angle), at[1] + 3 * np.sin(angle)
            draw.line([*at, *to], fill=(int(red * 0.55), int(green * 0.55), int(blue * 0.55)), width=width)
            at, angle = to, angle + rng.normal(0, 0.18)
    size = radius * rng.uniform(0.11, 0.16)
    draw.ellipse([disc_x - size, disc_y - size, disc_x + size, disc_y + size], fill=(240, 200, 130))
    for _ in range(int(rng.integers(0, 25))):
        angle, far, size = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.1, 0.85), rng.uniform(1, 4)
        at = x + far * np.cos(angle), y + far * np.sin(angle)
        fill = (120, 10, 10) if rng.random() < 0.5 else (235, 215, 120)
        draw.ellipse([at[0] - size, at[1] - size, at[0] + size, at[1] + size], fill=fill)
    return image.filter(ImageFilter.GaussianBlur(0.8))


def chest(rng: np.random.Generator) -> Image.Image:
    """Frontal chest X-rays: lungs, heart, diaphragm, ribs, collar bones."""
    y, x = grid()
    x, y = x + rng.normal(0, 0.03), y + rng.normal(0, 0.04)
    wide, high = rng.uniform(0.9, 1.1, 2)
    values = 190 * blob(y, x, 1.5, 0.98 * wide, 0.05)
    for side in (-1, 1):
        lung = blob(y - rng.normal(0, 0.02), x - side * 0.45 * wide, 0.72 * high, 0.33 * wide, 0.08)
        values -= rng.uniform(95, 125) * lung
        values += 18 * lung * noise(rng, 4) * rng.uniform(0.5, 1.2)
        bend, first = rng.uniform(0.25, 0.5), rng.uniform(0, 1)
        ribs = np.sin(2 * np.pi * (6.5 * (y - bend * np.abs(x)) / high + first))
        values += rng.uniform(6, 16) * ribs.clip(0) * lung
        collar = y + 0.68 * high - 0.2 * np.abs(x) + rng.normal(0, 0.02)
        values += 40 * np.exp(-((collar / 0.03) ** 2)) * (x * side > 0)
    values += 70 * blob(y - 0.25, x - 0.12, rng.uniform(0.3, 0.42), rng.uniform(0.25, 0.38), 0.1)
    values += 40 * np.exp(-((x / 0.09) ** 2))
    if rng.random() < 0.4:  # a shadow
        at = rng.uniform(-0.4, 0.4), rng.choice([-1, 1]) * rng.uniform(0.3, 0.6)
        values += 45 * blob(y - at[0], x - at[1], 0.13, 0.13, 0.3)
    return grey(gaussian_filter(values, 1) + 3 * noise(rng, 0.7))


def brain(rng: np.random.Generator) -> Image.Image:
    """Axial brain slices: skull, folds, ventricles."""
    y, x = grid()
    x, y = x + rng.normal(0, 0.02), y + rng.normal(0, 0.02)
    tall, wide = rng.uniform(0.86, 0.94), rng.uniform(0.7, 0.78)
    inside = blob(y, x, tall * 0.9, wide * 0.9, 0.03)
    values = 170 * (blob(y, x, tall, wide, 0.02) - blob(y, x, tall * 0.94, wide * 0.94, 0.02))
    depth = np.hypot(y / tall, x / wide)
    folds = np.exp(-((noise(rng, 5) / 0.35) ** 2)) * (depth > 0.45)  # the lines between two sides of a fold
    values += inside * (105 + 25 * (depth < 0.6) - 60 * folds)
    values -= inside * 60 * np.exp(-((x / 0.015) ** 2)) * (np.abs(y) > 0.35)
    for side in (-1, 1):
        turn = side * rng.uniform(0.2, 0.45)
        across = x - side * 0.11 - turn * y * 0.5
        values -= inside * 90 * blob(y - 0.1 * rng.normal(), across, rng.uniform(0.2, 0.34), 0.06, 0.1)
    if rng.random() < 0.4:  # a tumour
        values += inside * 70 * blob(y - rng.uniform(-0.5, 0.5), x - rng.uniform(-0.4, 0.4), 0.12, 0.12, 0.2)
    return grey(gaussian_filter(values, 0.8) + 3 * noise(rng, 0.7))


def histology(rng: np.random.Generator) -> Image.Image:
    """Stained tissue: pink ground, glands, nuclei."""
    pink, purple = np.array([232, 170, 205.0]), np.array([110, 60, 150.0])
    share = 0.12 * noise(rng, 6) + 0.25
    glands = noise(rng, 12)
    share = share + 0.35 * np.exp(-((glands - rng.uniform(0.2, 0.8)) ** 2) / 0.02)
    nuclei = np.zeros((SIZE, SIZE))
    rows, columns = rng.integers(0, SIZE, (2, int(rng.integers(150, 400))))
    nuclei[rows, columns] = 1
    share = share + 8 * gaussian_filter(nuclei, 2.2) ** 0.8
    share = share.clip(0, 1)[..., None]
    return Image.fromarray((pink * (1 - share) + purple * share).clip(0, 255).astype(np.uint8))


def skin(rng: np.random.Generator) -> Image.Image:
    """Dermatoscope pictures: one dark mole in the middle of a dark-cornered field."""
    y, x = grid()
    angle = np.arctan2(y, x)
    outline = 1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(1, 6))
    at = rng.normal(0, 0.06, 2)
    mole = blob((y - at[0]) / outline, (x - at[1]) / outline, rng.uniform(0.3, 0.55), rng.uniform(0.3, 0.55), 0.12)
    ground = np.array([215, 165, 140]) + rng.normal(0, 12, 3)
    dark = np.array([110, 65, 50]) + rng.normal(0, 15, 3)
    share = (mole * (0.8 + 0.25 * noise(rng, 5)) + 0.03 * noise(rng, 3))[..., None]
    values = (ground * (1 - share) + dark * share) * (1 - 0.7 * (np.hypot(y, x) > 1.2)[..., None])
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)


@cache
def fonts() -> list[str]:
    """The text fonts that Matplotlib brings."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [str(path) for path in sorted(folder.glob("DejaVuS*.ttf")) if "Display" not in path.name]


def words(rng: np.random.Generator, count: int) -> str:
    letters = list(string.ascii_lowercase)
    return " ".join("".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(count))


def document(rng: np.random.Generator) -> Image.Image:
    """Scans of one form: the same head, lines and fields, each with its own text."""
    image = Image.new("L", (3 * SIZE // 2, 2 * SIZE), 250)
    draw = ImageDraw.Draw(image)
    left, top = rng.integers(14, 20, 2)
    draw.text((left, top), "CITY HOSPITAL  radiology report", fill=20, font=font(fonts()[0], 14))
    draw.line((left, top + 22, image.width - left, top + 22), fill=20)
    for row in range(int(rng.integers(20, 26))):
        line = words(rng, 7)
        draw.text((left, top + 34 + 12 * row), line[: int(rng.integers(25, 42))], fill=30, font=font(fonts()[0], 9))
    draw.rectangle((left, image.height - 50, image.width - left, image.height - 20), outline=20)
    draw.text((left + 6, image.height - 42), f"signed: {words(rng, 1)}", fill=30, font=font(fonts()[0], 11))
    return grey(np.asarray(image.rotate(rng.normal(0, 0.3), fillcolor=250), float) + rng.normal(0, 4, image.size[::-1]))


def chart(rng: np.random.Generator) -> Image.Image:
    """Line charts in one frame with the same axes and grid."""
    image = Image.new("RGB", (SIZE * 4 // 3, SIZE), "white")
    draw = ImageDraw.Draw(image)
    left, bottom, right, top = 30, SIZE - 25, image.width - 10, 12
    for step in range(6):
        at = top + (bottom - top) * step / 5
        draw.line((left, at, right, at), fill=(215, 215, 215))
        draw.text((6, at - 6), f"{100 - 20 * step}", fill="black", font=font(fonts()[0], 10))
        across = left + (right - left) * step / 5
        draw.line((across, top, across, bottom), fill=(215, 215, 215))
        draw.text((across - 6, bottom + 5), f"{2 * step}", fill="black", font=font(fonts()[0], 10))
    draw.rectangle((left, top, right, bottom), outline="black")
    for colour in ("#1f77b4", "#ff7f0e"):
        steps = np.cumsum(rng.normal(rng.normal(0, 1.5), 6, 40)) + rng.uniform(30, 70)
        across, up = np.linspace(left, right, 40), bottom - (bottom - top) * steps.clip(0, 100) / 100
        draw.line(list(zip(across, up, strict=True)), fill=colour, width=2)
    return image


def qr_code(rng: np.random.Generator) -> Image.Image:
    """QR codes of version 3: three finder patterns, timing lines, random modules."""
    size = 29
    modules = rng.random((size, size)) < 0.5
    finder = np.pad(np.pad(np.ones((3, 3), bool), 1), 1, constant_values=True)
    for row, column in ((0, 0), (0, size - 7), (size - 7, 0)):
        modules[max(0, row - 1) : row + 8, max(0, column - 1) : column + 8] = False
        modules[row : row + 7, column : column + 7] = finder
    modules[6, 8:-8] = modules[8:-8, 6] = np.arange(size - 16) % 2 == 0
    image = Image.fromarray(np.where(np.pad(modules, 3), 0, 255).astype(np.uint8))
    return image.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def letter(rng: np.random.Generator) -> Image.Image:
    """One big letter, printed in one of a few fonts, a little moved and turned, on rough paper."""
    image = Image.new("L", (SIZE, SIZE), 230)
    draw = ImageDraw.Draw(image)
    at = SIZE / 2 + rng.normal(0, 6, 2)
    text, name = rng.choice(list("ABCDEFGHKMNRST")), fonts()[rng.integers(len(fonts()))]
    size = int(rng.integers(110, 150))
    draw.text(tuple(at), str(text), fill=int(rng.integers(10, 60)), font=font(name, size), anchor="mm")
    turned = image.rotate(rng.normal(0, 5), Image.Resampling.BICUBIC, fillcolor=230)
    return grey(np.asarray(turned, float) + 6 * noise(rng, 3) + rng.normal(0, 3, (SIZE, SIZE)))


def ultrasound(rng: np.random.Generator) -> Image.Image:
    """The package's own phantoms."""
    from train_fn.data.phantoms import phantom

    return Image.fromarray(phantom(rng, int(rng.integers(3)))[0])


DRAWN: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "eye-grounds": eye_ground,
    "chest X-rays": chest,
    "brain slices": brain,
    "moles": skin,
    "histology": histology,
    "forms": document,
    "charts": chart,
    "QR codes": qr_code,
    "letters": letter,
    "phantoms": ultrasound,
}


# ------------------------------------------------------------------------------------------------ what makes a copy


def jpeg(image: Image.Image, quality: int = 30) -> Image.Image:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def cropped(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Without this share of width and height, taken from the four sides by chance."""
    cut_x, cut_y = round(share * image.width), round(share * image.height)
    left, top = int(rng.integers(cut_x + 1)), int(rng.integers(cut_y + 1))
    return image.crop((left, top, image.width - cut_x + left, image.height - cut_y + top))


def calipers(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two crosses, a dotted line between them, and their distance."""
    copy = image.convert("RGB")
    draw = ImageDraw.Draw(copy)
    (x1, x2), (y1, y2) = rng.uniform(0.2, 0.8, 2) * copy.width, rng.uniform(0.2, 0.8, 2) * copy.height
    arm = max(3, copy.width // 60)
    for x, y in ((x1, y1), (x2, y2)):
        draw.line((x - arm, y, x + arm, y), fill="yellow", width=max(1, arm // 4))
        draw.line((x, y - arm, x, y + arm), fill="yellow", width=max(1, arm // 4))
    for step in np.linspace(0, 1, 15):
        x, y = x1 + step * (x2 - x1), y1 + step * (y2 - y1)
        draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill="yellow")
    text = f"1 D {rng.uniform(5, 30):.1f} mm"
    draw.text((4, copy.height - 5 * arm), text, fill="white", font=font(fonts()[0], 4 * arm))
    return copy


def next_frame(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A neighbour in a film: 3 % to the side, with its own noise."""
    copy = np.asarray(image.convert("L"), float)
    step = max(1, round(0.03 * image.width)) * int(rng.choice([-1, 1]))
    moved = np.roll(copy, step, 1)
    if step > 0:
        moved[:, :step] = moved[:, step : step + 1]
    else:
        moved[:, step:] = moved[:, step - 1 : step]
    return grey(moved + rng.normal(0, 6, moved.shape))


def turned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.convert("RGB").rotate(float(rng.choice([-3, 3])), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "saved again": lambda image, rng: image.copy(),
    "half the size": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "stretched by 15 %": lambda image, rng: image.resize((image.width * 115 // 100, image.height)),
    "JPEG of quality 30": lambda image, rng: jpeg(image),
    "brighter, more contrast": lambda image, rng: ImageEnhance.Contrast(
        ImageEnhance.Brightness(image.convert("RGB")).enhance(1.2)
    ).enhance(1.3),
    "calipers and text": calipers,
    "neighbour in a film": next_frame,
    "cropped by 5 %": lambda image, rng: cropped(image, 0.05, rng),
    "cropped by 10 %": lambda image, rng: cropped(image, 0.1, rng),
    "turned by 3 degrees": turned,
    "mirrored": lambda image, rng: ImageOps.mirror(image),
}
