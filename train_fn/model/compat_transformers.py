"""What transformers offers no public way for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int] | None:
    """How many tokens images of these widths and heights get, without preparing them; None if the processor cannot
    tell. No public name has this number; vLLM asks the same method."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    return count(image_sizes=[[height, width] for width, height in sizes]).num_image_tokens if count else None
