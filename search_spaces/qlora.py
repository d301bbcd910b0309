"""The QLoRA space, for `--use-qlora`: adapters on a base in 4 bit.

The adapter also has to make up for what rounding to 4 bit has lost, so it is put on all linear layers, with a rank that
is not small (QLoRA, arXiv:2305.14314, finds the layers to matter and the rank hardly).
"""

from __future__ import annotations

from typing import Any

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {"lora_r": 64, "lora_alpha_ratio": 2.0, "learning_rate": 2e-4, "lora_dropout": 0.05, "train_projector": False}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    lora_r = trial.suggest_categorical("lora_r", [16, 32, 64, 128])
    # QLoRA itself trained with alpha 16 at rank 64, a ratio of 0.25; the guide's is 2.
    ratio = trial.suggest_categorical("lora_alpha_ratio", [0.25, 0.5, 1.0, 2.0])
    settings = {
        "lora_r": lora_r,
        "lora_alpha": ratio * lora_r,
        # QLoRA: 2e-4 up to 13 B parameters, 1e-4 above. Both ways around that.
        "learning_rate": trial.suggest_float("learning_rate", 5e-5, 2e-3, log=True),
        # QLoRA: 0.1 helps up to 13 B, 0.05 above; 0 for comparison.
        "lora_dropout": trial.suggest_categorical("lora_dropout", [0.0, 0.05, 0.1]),
        "train_projector": trial.suggest_categorical("train_projector", [False, True]),
    }
    if settings["train_projector"]:
        # As in the LoRA space: usually below the adapter's rate.
        settings["projector_learning_rate"] = trial.suggest_float("projector_learning_rate", 1e-5, 2e-3, log=True)
    return settings
