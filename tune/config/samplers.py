"""How points are chosen: Optuna's samplers by name, and the grid.

Only samplers whose choice depends on nothing but their seed and the trials so far: a study that goes on after a kill
makes a new one. CMA-ES, NSGA-II and quasi-random sequences keep a state of their own beside the trials.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna

from train_fn.settings import TrialSettings
from tune.config.settings import Settings
from tune.config.space import SpaceError, load_space, searched_settings

MAX_GRID = 100_000  # points
MAX_LISTED = 10_000  # points of a discrete space of which one is taken when the sampler repeats itself


def trial_seed(study_seed: int, number: int) -> int:
    """The seed of one trial's sampler. Not the sum of both: then studies with seeds 3 and 4 would draw the same points,
    one trial apart."""
    return int(np.random.SeedSequence((study_seed, number)).generate_state(1)[0])


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded. A grid's points come from `grid_points`; what a first point leaves open is
    drawn at random."""
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental; they have been stable for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        return (optuna.samplers.GPSampler if name == "gp" else optuna.samplers.RandomSampler)(seed=seed)


class Continuous(Exception):
    """A space asks for a range whose points cannot be listed."""


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

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self.suggest_categorical(name, range(int(low), int(high) + 1, int(step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if not step:
            raise Continuous(name)
        # As Optuna computes them.
        return self.suggest_categorical(
            name, [low + n * step for n in range(math.floor((high - low) / step + 1e-8) + 1)]
        )


def points_of(settings: Settings, number: int = 0) -> Iterator[tuple[dict[str, Any], TrialSettings]]:
    """Every point of a space of choices, each with its settings.

    Args:
        number: the trial's, which a space may use.

    Raises:
        SpaceError: the space cannot be asked.
        Continuous: it asks for a range without steps.
    """
    space, _ = load_space(settings.study.space)
    path: list[int] | None = []
    while path is not None:
        walk = GridWalk(path)
        chosen, _ = searched_settings(settings, space, walk, number)
        yield walk.chosen, chosen
        # Like an odometer: the last question with a choice left takes its next one.
        turn = [n for n, index in enumerate(walk.taken) if index + 1 < walk.num_choices[n]]
        path = [*walk.taken[: turn[-1]], walk.taken[turn[-1]] + 1] if turn else None


def discrete_points(
    settings: Settings, number: int, most: int = MAX_LISTED
) -> list[tuple[dict[str, Any], TrialSettings]] | None:
    """The first points, at most `most`, of a space without continuous ranges; None for any other. Raises SpaceError."""
    try:
        return list(itertools.islice(points_of(settings, number), most))
    except Continuous:
        return None


def grid_points(settings: Settings) -> list[dict[str, Any]]:
    """Every point of the study's space, ranges taken at a few points (see `space.Pinned`), in a fixed random order.

    Raises SpaceError when the space cannot be asked, or has more than `MAX_GRID` points.
    """
    points = [values for values, _ in itertools.islice(points_of(settings), MAX_GRID + 1)]
    if len(points) > MAX_GRID:
        raise SpaceError(f"must have at most {MAX_GRID:,} grid points, but has more: pin settings, or take tpe")
    random.Random(settings.study.study_seed).shuffle(points)
    return points
