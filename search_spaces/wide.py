"""The wide space: rank, scaling, learning rates, and whether the projector is trained, in ranges for any base.

The default space of earlier versions. `lora` searches what decides more.

`space(trial)` is define-by-run: it asks Optuna's trial for values and returns the settings they make. What it returns
reaches the trial; what it asks for is what Optuna models, so a rank and a ratio are asked where rank and alpha are set.
"""

from __future__ import annotations

from typing import Any

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {"lora_r": 64, "lora_alpha_ratio": 2.0, "learning_rate": 2e-4, "train_projector": False}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    # The guide advises 32 to 128. Down to 4 because on a few hundred images less capacity may generalise better (LoRA,
    # arXiv:2106.09685, finds 4 to 8 enough on many tasks). Powers of two: neighbours do the same.
    lora_r = trial.suggest_categorical("lora_r", [4, 8, 16, 32, 64, 128])
    # lora_alpha / lora_r multiplies the adapter's output. Asked as a ratio, since alpha alone means another strength at
    # every rank. 2 is the guide's, 1 neutral; 4 and 0.5 show on which side the data is.
    ratio = trial.suggest_categorical("lora_alpha_ratio", [0.5, 1.0, 2.0, 4.0])
    # From the lower end of the guide's advice (1e-4 to 5e-4) upwards: a few hundred images make few optimizer steps,
    # which reward a higher rate. On the nano base training collapses at about 5e-3.
    learning_rate = trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True)
    settings = {"lora_r": lora_r, "lora_alpha": ratio * lora_r, "learning_rate": learning_rate}
    settings["train_projector"] = trial.suggest_categorical("train_projector", [False, True])
    if settings["train_projector"]:
        # Pretrained full-rank weights usually want a lower rate than a fresh adapter (LLaVA-1.5's LoRA recipe gives its
        # projector a tenth of the adapter's); the upper end lets a study of few steps move it at all.
        settings["projector_learning_rate"] = trial.suggest_float("projector_learning_rate", 1e-5, 5e-3, log=True)
    return settings
