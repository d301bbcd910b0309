"""A space for `benchmarks/search.py`: half of its points fail, so that a better search can show itself."""

from __future__ import annotations

from typing import Any

GUIDE = {"lora_r": 64, "lora_alpha_ratio": 2.0, "learning_rate": 2e-4, "train_projector": False}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    lora_r = trial.suggest_categorical("lora_r", [4, 8, 16, 32, 64, 128])
    ratio = trial.suggest_categorical("lora_alpha_ratio", [0.5, 1.0, 2.0, 4.0])
    # Three decades: too low to learn in few steps at one end, collapse at the other.
    learning_rate = trial.suggest_float("learning_rate", 3e-5, 1e-1, log=True)
    train_projector = trial.suggest_categorical("train_projector", [False, True])
    settings = {"lora_r": lora_r, "lora_alpha": ratio * lora_r, "learning_rate": learning_rate}
    if train_projector:
        settings["projector_learning_rate"] = trial.suggest_float("projector_learning_rate", 1e-5, 1e-2, log=True)
    return settings | {"train_projector": train_projector}
