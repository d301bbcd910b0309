"""How a worker computes a trial's steps. Time, memory and the last digits depend on it; what is learned does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One way to compute an optimizer step. Either `tokens` or `images` limits a forward pass; the other one is 0."""

    tokens: int = 0
    """Most tokens of one forward pass, padding included. A single longer sample goes through alone."""
    images: int = 0
    """Samples of one forward pass."""
    compiled: bool = False
    """Whether the language model's layers are compiled."""
    activation_budget: float = 1.0
    """Share of a compiled layer's activations that is kept for the backward pass; the rest is computed again."""
    gradient_checkpointing: bool = False
    """Whether only each layer's input is kept for the backward pass."""
