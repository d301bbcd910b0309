"""The default space, and what else of the model may be trained: its vision tower, its projector by an adapter, and on
varied images.

Trials that train the tower cost more: its features are not cached, but computed in every step.
"""

from __future__ import annotations

from typing import Any

from search_spaces import lora

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {**lora.GUIDE, "train_vision": "none", "augment": "none"}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    settings = lora.space(trial)
    if settings["train_projector"]:
        # An adapter has far fewer weights than the projector itself, of which a few hundred images can fit too many.
        settings["projector_lora"] = trial.suggest_categorical("projector_lora", [False, True])
    settings["train_vision"] = trial.suggest_categorical("train_vision", ["none", "lora"])
    if settings["train_vision"] == "lora":
        # Around a fifth of the language model's: LLaVA-OneVision (arXiv:2408.03326) trains its tower at that. Up to the
        # language model's own, because an adapter can be removed from a tower that it spoils, and few steps reward it.
        rate = lora.usual_rate(trial)
        settings["vision_learning_rate"] = trial.suggest_float("vision_learning_rate", rate / 25, rate, log=True)
    settings["augment"] = trial.suggest_categorical("augment", ["none", "light", "medium"])
    return settings
