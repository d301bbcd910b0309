"""What a search space may know of the base: the width and the type of its language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_fn.nano import CHECKPOINT as NANO
from train_fn.support.files import DamagedFile, read_json

# A config.json leaves out what its transformers class sets itself: 4,096 in those of Llama, Mistral and Qwen.
USUAL_WIDTH = 4096
PARTS = ("text_config", "llm_config", "language_config")  # where a config.json keeps its language model


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """The base's language model, as a space sees it in `trial.base`."""

    model_type: str = ""
    """Its type in config.json, such as qwen3; empty if it is not known."""
    hidden_size: int = USUAL_WIDTH
    learning_rate: float = 5e-4
    """The rate at which LoRA usually trains a model of this width best, from `usual_rate`."""

    @classmethod
    def of(cls, model_type: str = "", hidden_size: int = USUAL_WIDTH) -> BaseShape:
        """The shape with its learning rate."""
        return cls(model_type=model_type, hidden_size=hidden_size, learning_rate=usual_rate(model_type, hidden_size))

    @classmethod
    def from_dict(cls, values: Any) -> BaseShape:
        """The shape from plan.json. Raises ValueError."""
        shape = cls(**values) if isinstance(values, dict) and values.keys() == asdict(cls()).keys() else None
        if (
            shape is None
            or type(shape.hidden_size) is not int
            or type(shape.model_type) is not str
            or type(shape.learning_rate) is not float
            or not (shape.hidden_size > 0 and 0 < shape.learning_rate < 1)
        ):
            raise ValueError("must hold model_type, hidden_size and learning_rate")
        return shape


def usual_rate(model_type: str, hidden_size: int) -> float:
    """Peak learning rate at which LoRA usually trains a model of this width best.

    Thinking Machines' fit to their sweeps ("LoRA Without Regret", thinkingmachines.ai/blog/lora, 2025, and the
    tinker-cookbook's hyperparam_utils): 5e-5 x 10 x (2000 / width)^p with p 0.781 for Llama and 0.0775 for Qwen, which
    also stands for all others here. It was fitted from 1 B to 70 B parameters, so widths count from 1,024 to 16,384
    only. Their later sweep (the same file) found 3e-4 to 1e-3 best for 26 of 27 models.
    """
    power = 0.781 if "llama" in model_type.lower() else 0.0775
    return 5e-4 * (2000 / min(max(1024, hidden_size), 16_384)) ** power


def read_base_shape(model: str) -> BaseShape:
    """The shape of the base that `--model` names, from its config.json; the usual one where there is none."""
    folder = NANO if model == "nano" else Path(model)
    try:
        if not (folder / "config.json").is_file():  # a pipe could be read for ever
            return BaseShape.of()
        config = read_json(folder / "config.json", dict, "download the model again")
    except (OSError, DamagedFile):  # `tune.config.rules` reports it
        return BaseShape.of()
    inner = language_config(config)
    model_type, width = (inner.get(name, config.get(name)) for name in ("model_type", "hidden_size"))
    usable = isinstance(width, int) and not isinstance(width, bool) and width > 0
    return BaseShape.of(model_type if isinstance(model_type, str) else "", width if usable else USUAL_WIDTH)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model; empty if it has none."""
    return next((config[part] for part in PARTS if isinstance(config.get(part), dict)), {})
