"""Optuna's samplers, as a study asks for them."""

from __future__ import annotations

import warnings
from typing import Any

import optuna


class GridSampler(optuna.samplers.BruteForceSampler):
    """Every point once, in random order, also of a space with conditions; `settings.Pinned` makes ranges discrete."""

    exhausted = False

    def after_trial(self, *told: Any) -> None:
        try:
            super().after_trial(*told)
        except RuntimeError:  # it calls Study.stop, which only a study that runs its own objective knows
            self.exhausted = True


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded."""
    samplers = optuna.samplers
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental; they have been stable for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        kinds = {
            "random": samplers.RandomSampler,
            "gp": samplers.GPSampler,
            "cmaes": samplers.CmaEsSampler,
            "qmc": samplers.QMCSampler,
            "nsga2": samplers.NSGAIISampler,
            "grid": GridSampler,
        }
        return kinds[name](seed=seed)
