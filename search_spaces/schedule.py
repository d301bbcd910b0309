"""The schedule space: how long, in which steps and with how much brake, at the guide's adapter."""

from __future__ import annotations

from typing import Any

from search_spaces import lora

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.01,
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 8,
    "lora_dropout": 0.05,
}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    return {
        "learning_rate": lora.learning_rate(trial),
        # Decay to zero settles the last epochs; constant shows whether that is needed.
        "lr_scheduler_type": trial.suggest_categorical(
            "lr_scheduler_type", ["cosine", "linear", "constant_with_warmup"]
        ),
        # Up to a fifth: with some 70 steps in all, 3 % are two steps.
        "warmup_ratio": trial.suggest_float("warmup_ratio", 0.0, 0.2),
        # AdamW's decay hardly matters at a few hundred steps; zero to ten times the guide's tells.
        "weight_decay": trial.suggest_categorical("weight_decay", [0.0, 0.01, 0.1]),
        # More passes cost in proportion and overfit small sets; up to 6 at twice the guide's price.
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 6),
        # 4 to 16 images a step: smaller batches make more steps of the same images.
        "gradient_accumulation_steps": lora.accumulation_steps(trial, (4, 8, 16)),
        "lora_dropout": trial.suggest_categorical("lora_dropout", [0.0, 0.05, 0.1, 0.2]),
    }
