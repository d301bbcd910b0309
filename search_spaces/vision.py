"""The default space, and what else of the model may be trained."""

from __future__ import annotations

from typing import Any

from search_spaces import lora

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {**lora.GUIDE}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    return {**lora.space(trial)}
