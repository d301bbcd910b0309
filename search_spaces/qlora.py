"""The QLoRA space, for `--use-qlora`: adapters on a base in 4 bit.

The adapter also has to make up for what rounding to 4 bit has lost, so it is put on all linear layers, with a rank that
is not small (QLoRA, arXiv:2305.14314, finds the layers to matter and the rank hardly).
"""

from __future__ import annotations

from typing import Any

from search_spaces import lora

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {**lora.GUIDE, "lora_dropout": 0.05}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    rate = lora.usual_rate(trial)
    # QLoRA: 2e-4 up to 13 B parameters, 1e-4 above, with a scale that is an eighth of ours (alpha 16 at rank 64). So
    # the usual rate's range, and lower by a factor of two.
    learning_rate = trial.suggest_float("learning_rate", rate / 10, 4 * rate, log=True)
    lora_r = trial.suggest_categorical("lora_r", [16, 64])
    return {
        "learning_rate": learning_rate,
        # QLoRA trains with batches of 16 up to 13 B, and larger ones above. As in the LoRA space.
        "gradient_accumulation_steps": lora.accumulation_steps(trial, (4, 8, 16, 32)),
        "lora_r": lora_r,
        "lora_alpha": lora.lora_alpha(trial, lora_r),
        # QLoRA: 0.1 helps up to 13 B, 0.05 above; 0 for comparison.
        "lora_dropout": trial.suggest_categorical("lora_dropout", [0.0, 0.05, 0.1]),
        # As in the LoRA space.
        "num_train_epochs": trial.suggest_int("num_train_epochs", 2, 4),
        **lora.projector(trial),
    }
