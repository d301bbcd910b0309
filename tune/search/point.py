"""One point of the search space. Without Optuna: Tune's process of a trial receives it and would import it in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train_fn.settings import TrialSettings


@dataclass(frozen=True)
class Point:
    """One point of the search space."""

    searched: dict[str, Any]
    """The values that the sampler chose, by the names under which the space asks for them."""
    distributions: dict[str, str]
    """Their ranges, as Optuna's JSON."""
    settings: TrialSettings
    decided: tuple[str, ...]
    """The settings that the space decides; the others are the command line's."""
    added: str = ""
    """The file of the user's request for this point; empty: the search has chosen it."""
    repeats: int | None = None
    """The trial of which this is another seed. None: the point was not tried before."""
