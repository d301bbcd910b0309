"""How the scores of candidate answers become probabilities and an answer.

Two separate steps. Vector scaling (Guo et al., arXiv:1706.04599, here with one temperature for all candidates) makes
the probabilities honest: a scale, and an offset for each candidate. Then the answer is chosen so that it is best for
the score that the user asks for, because no one choice serves all scores: by a rule, one more offset for each
candidate, or for an operating point by a threshold on the probability of the positive candidate. Both steps are fitted
on the validation part by `train_fn.scoring.fitting`.

Shapes: N samples, C candidates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

ARGMAX = "argmax"
SMALLEST = 1e-300  # probability whose logarithm is taken
AIMS = ("macro_f1", "accuracy", "balanced_accuracy", "quadratic_kappa", ARGMAX)


@dataclass(frozen=True)
class Decision:
    """From the scores of a task's candidates to probabilities and an answer."""

    aim: str = ARGMAX
    """What the rule is best for: one of AIMS, or an operating point such as sensitivity>=0.95. ARGMAX: nothing is
    fitted."""
    scale: float = 1.0
    offsets: tuple[float, ...] = ()
    """Added to the scaled log-probabilities, one for each candidate; empty: none."""
    rule: tuple[float, ...] = ()
    """Added to the log of the probabilities before the largest is chosen; empty: none."""
    positive: int | None = None
    """Index of the positive candidate, for `threshold`."""
    threshold: float | None = None
    """Probability from which the positive candidate is the answer; below it, the most probable of the others is."""

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities [N, C] from log-likelihoods [N, C]."""
        return softmax(self.scale * log_softmax(scores) + (np.array(self.offsets) if self.offsets else 0.0))

    def answers(self, probabilities: np.ndarray) -> np.ndarray:
        """Index of the chosen candidate [N] from `probabilities` [N, C]."""
        if self.positive is not None and self.threshold is not None:
            others = probabilities.copy()
            others[:, self.positive] = -1.0
            return np.where(probabilities[:, self.positive] >= self.threshold, self.positive, others.argmax(1))
        if not self.rule:
            return probabilities.argmax(1)
        return (np.log(np.maximum(probabilities, SMALLEST)) + np.array(self.rule)).argmax(1)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, C] of scores [N, C]."""
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities [N, C] of scores [N, C]."""
    return np.exp(log_softmax(scores))


def operating_point(aim: str) -> tuple[str, float] | None:
    """An aim such as sensitivity>=0.95, as name and value (above 0, below 1); None for anything else."""
    match = re.fullmatch(r"\s*(sensitivity|specificity)\s*>=\s*(0?\.\d+)\s*", aim)
    return (match[1], float(match[2])) if match and 0 < float(match[2]) < 1 else None


def is_aim(text: str) -> bool:
    """Whether answers can be chosen for this."""
    return text in AIMS or operating_point(text) is not None
