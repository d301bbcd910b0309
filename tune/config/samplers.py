"""How points are chosen: Optuna's samplers by name, and the grid.

Only samplers whose choice depends on nothing but their seed and the trials so far: a study that goes on after a kill
makes a new one. CMA-ES, NSGA-II and quasi-random sequences keep a state of their own beside the trials.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import optuna

from tune.config.settings import Settings
from tune.config.space import SpaceError, load_space, searched_settings

MAX_GRID = 100_000  # points


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded. A grid's points come from `grid_points`; what a first point leaves open is
    drawn at random."""
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental; they have been stable for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        return (optuna.samplers.GPSampler if name == "gp" else optuna.samplers.RandomSampler)(seed=seed)


class GridWalk(optuna.trial.FixedTrial):
    """An Optuna trial that takes one path through a space of choices.

    path: index of the choice at each question; the first choice where it ends.
    """

    def __init__(self, path: list[int]) -> None:
        super().__init__({})
        self.path = path
        self.taken: list[int] = []
        self.num_choices: list[int] = []
        self.chosen: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        if name not in self.chosen:
            index = self.path[len(self.taken)] if len(self.taken) < len(self.path) else 0
            self.taken.append(index)
            self.num_choices.append(len(choices))
            self.chosen[name] = choices[index]
        return self.chosen[name]


def grid_points(settings: Settings) -> list[dict[str, Any]]:
    """Every point of the study's space, ranges taken at a few points (see `space.Pinned`), in a fixed random order.

    Raises SpaceError when the space cannot be asked, or has more than `MAX_GRID` points.
    """
    space, _ = load_space(settings.study.space)
    points: list[dict[str, Any]] = []
    path: list[int] | None = []
    while path is not None:
        walk = GridWalk(path)
        searched_settings(settings, space, walk)
        points.append(walk.chosen)
        if len(points) > MAX_GRID:
            raise SpaceError(f"must have at most {MAX_GRID:,} grid points, but has more: pin settings, or take tpe")
        # Like an odometer: the last question with a choice left takes its next one.
        turn = [n for n, index in enumerate(walk.taken) if index + 1 < walk.num_choices[n]]
        path = [*walk.taken[: turn[-1]], walk.taken[turn[-1]] + 1] if turn else None
    random.Random(settings.study.study_seed).shuffle(points)
    return points
