"""Distributed LoRA tuning of vision-language models. From Python: `tune.api`; from a shell: `tune.run`."""

__version__ = "0.1.0"  # pyproject.toml reads it
