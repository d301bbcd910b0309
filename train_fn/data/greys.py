"""Windows: grey values of more than 8 bits as grey levels of 8."""

from __future__ import annotations

from typing import Any

import numpy as np

# Share of the pixels, in percent, that `auto_limits` leaves out at either end. One hot pixel, or a mark burned in at
# 65,535, would press all the rest of a 12-bit picture into 16 grey levels.
TAIL_PERCENT = 0.1


def auto_limits(values: np.ndarray) -> tuple[float, float]:
    """The values that become black and white: the range without its darkest and brightest 0.1% of pixels.

    Where that leaves one value only (small bright marks on an even ground), it is the full range. Pixels that are not
    finite do not count.

    Raises:
        ValueError: no pixel is finite.
    """
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    if not finite.size:
        raise ValueError("none of its pixels is a finite number")
    low = np.percentile(finite, TAIL_PERCENT, method="lower")
    high = np.percentile(finite, 100 - TAIL_PERCENT, method="higher")
    if low == high:
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def as_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any shape as uint8: up to `low` 0, from `high` 255, between them linear. NaN becomes 0."""
    if not low < high:
        return np.where(values > low, 255, 0).astype(np.uint8)
    # float32 has 24 bits for the digits of a number.
    exact = values.dtype.itemsize > 2 and values.dtype != np.float32
    with np.errstate(all="ignore"):  # inf and NaN are handled below
        scaled: Any = values.astype(np.float64 if exact else np.float32)
        scaled -= low
        scaled *= 255 / (high - low)
        np.nan_to_num(scaled, copy=False, nan=0, posinf=255, neginf=0)
        return (scaled.clip(0, 255, out=scaled) + 0.5).astype(np.uint8)
