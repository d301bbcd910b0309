"""The default space: learning rate, global batch, rank, epochs, and the projector with a rate of its own.

Rate and global batch decide most, the rank decides little, and alpha is the rate once more (arXiv:2602.04998,
2602.06204, 2602.09492). With the rate tuned, LoRA and nine of its variants end within 1 to 2 % of each other (the first
of these, which searched rate, batch, rank and duration). So alpha is searched with `--search-alpha`, or in the space
`wide`.

`space(trial)` is define-by-run: it asks Optuna's trial for values and returns the settings they make. What it returns
reaches the trial; what it asks for is what Optuna models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# The fine-tuning guide's own values, in the names that are asked for: always the first trial.
GUIDE = {
    "learning_rate": 2e-4,
    "gradient_accumulation_steps": 8,
    "lora_r": 64,
    "lora_alpha_ratio": 2.0,
    "num_train_epochs": 3,
    "train_projector": False,
}


def space(trial: Any) -> dict[str, Any]:
    """The settings of one trial."""
    rate = learning_rate(trial)
    # 4 to 32 images a step. Small batches make more steps of the same images, and LoRA loses by large ones ("LoRA
    # Without Regret"), at any rank; 32 is twice the guide's.
    accumulation = accumulation_steps(trial, (4, 8, 16, 32))
    # Coarse, since neighbours do the same. Ranks of 4 to 8 are enough on many tasks (LoRA, arXiv:2106.09685), and a few
    # hundred images fill no larger adapter; 64 is the guide's.
    lora_r = trial.suggest_categorical("lora_r", [4, 16, 64])
    return {
        "learning_rate": rate,
        "gradient_accumulation_steps": accumulation,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha(trial, lora_r),
        # `--select best` keeps the best epoch of a longer trial, whose schedule falls more slowly. Around the guide's
        # 3, so that a study costs what it costs at 3. The space `schedule` goes further.
        "num_train_epochs": trial.suggest_int("num_train_epochs", 2, 4),
        **projector(trial),
    }


def usual_rate(trial: Any) -> float:
    """The learning rate at which LoRA usually trains a base of this width best: 5e-4 x (2000 / width)^p ("LoRA Without
    Regret", thinkingmachines.ai/blog/lora; see `tune/config/base_shape.py`). 5e-4 outside a study."""
    return trial.base.learning_rate if hasattr(trial, "base") else 5e-4


def learning_rate(trial: Any) -> float:
    """The peak learning rate, from 1e-4 to 3e-3 for most bases.

    Below the usual rate, because that was measured with an alpha of 32: for ranks above 16, twice the rank is a larger
    scale. The guide advises 1e-4 to 5e-4. Above it, because for ranks below 16 it is a smaller scale, and because a few
    hundred images make few steps, which reward a higher rate (below 100 steps 1.5 times as high, "LoRA Without
    Regret"). On the nano base training collapses at about 5e-3.
    """
    rate = usual_rate(trial)
    return trial.suggest_float("learning_rate", min(rate / 5, 2e-4), 6 * rate, log=True)


def accumulation_steps(trial: Any, batches: Sequence[int]) -> int:
    """The gradient_accumulation_steps for one of several global batches of so many images, rounded up to what the
    trial's workers can share; the guide's 8 is always one of the choices."""
    micro_batch = getattr(trial, "pinned", {}).get("per_device_train_batch_size")
    workers = getattr(trial, "workers", 1)
    unit = micro_batch * workers if micro_batch else math.lcm(2, workers)  # images
    rounded = {-(-batch // unit) * unit // (micro_batch or 2) for batch in batches}
    return trial.suggest_categorical("gradient_accumulation_steps", sorted(rounded | {8}))


def lora_alpha(trial: Any, lora_r: int) -> float:
    """Twice the rank, as in the guide: lora_alpha / lora_r multiplies an adapter's output, and is then the same at
    every rank. With `--search-alpha` a searched ratio; with `--lora-alpha` the user's."""
    ratio = GUIDE["lora_alpha_ratio"]
    if getattr(trial, "search_alpha", False):
        ratio = trial.suggest_categorical("lora_alpha_ratio", [0.5, 1.0, 2.0, 4.0])
    elif "lora_alpha" in getattr(trial, "pinned", {}):
        return trial.pinned["lora_alpha"]
    return ratio * lora_r


def projector(trial: Any) -> dict[str, Any]:
    """Whether the projector is trained, and at which rate."""
    if not trial.suggest_categorical("train_projector", [False, True]):
        return {"train_projector": False}
    # Pretrained full-rank weights usually want a lower rate than a fresh adapter: full fine-tuning a tenth of LoRA's
    # ("LoRA Without Regret"), and LLaVA-1.5's LoRA recipe gives its projector a tenth, too. A factor of 5 below that
    # and, as a study of few steps has to move it at all, 30 above.
    rate = usual_rate(trial) / 10
    searched = trial.suggest_float("projector_learning_rate", rate / 5, 30 * rate, log=True)
    return {"train_projector": True, "projector_learning_rate": searched}
