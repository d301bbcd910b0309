"""Which point a search tries next: a function of the study's settings and of its records so far.

The sampler of trial N is seeded with the study's seed and N, and sees an Optuna study made from the records. So a study
that goes on after a kill tries the same points as an undisturbed one, as long as the same trials have ended by then.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tune.config.samplers import discrete_points, make_sampler, trial_seed
from tune.config.space import SpaceError, first_points, load_space, searched_settings
from tune.config.space_check import TIMEOUT_S
from tune.plan.prepare import Study
from tune.records.optuna_study import as_optuna, distributions_json
from tune.records.trials import TrialRecord
from tune.search.point import Point
from tune.search.tried import Tried

MAX_ASKED = 10  # times that a sampler may repeat points before the space itself is asked for one that is left


def propose(
    study: Study,
    records: Mapping[int, TrialRecord],
    number: int,
    prior: Sequence[FrozenTrial] = (),
    grid: Sequence[dict[str, Any]] = (),
    added: tuple[str, dict[str, Any]] | None = None,
) -> Point | None:
    """The point of trial `number`: one that was not tried before or, when the space has no more, another seed of one
    that was. None when there is neither. Raises SpaceError.

    A point that the user has added and that was tried is another seed of itself. Where that cannot be, as for a point
    that failed, the search's own choice takes its place.

    Args:
        prior: trials of another study, from `tune.search.prior`.
        grid: all points of `--sampler grid`, from `grid_points`.
        added: a point that the user has added, and the file of its request. It comes after the first points.
    """
    settings = study.settings.study
    space, _ = load_space(settings.space)
    optuna_study = as_optuna(records, study.goals, prior)
    optuna_study.sampler = make_sampler(settings.sampler, trial_seed(settings.study_seed, number))
    tried = Tried(records.values())
    wanted = None if number < len(first_points(study.settings)) else added

    def ask(values: Mapping[str, Any]) -> Point:
        if values:
            optuna_study.enqueue_trial({k: v for k, v in values.items() if k not in study.settings.pinned})
        trial = optuna_study.ask()
        with time_limit(TIMEOUT_S):
            chosen, decided = searched_settings(study.settings, space, trial, number)
        request = wanted[0] if wanted else ""
        return Point(trial.params, distributions_json(trial.distributions), chosen, tuple(decided), request)

    repeated: list[Point] = []
    left: list[dict[str, Any]] | None = None
    for values in [wanted[1]] * MAX_ASKED if wanted else wishes(study, records, number, grid):
        point = ask(values)
        if point.settings not in tried:
            return point
        if not repeated and not wanted and settings.sampler != "grid":
            with time_limit(TIMEOUT_S):
                points = discrete_points(study.settings, number)
                left = None if points is None else [values for values, chosen in points if chosen not in tried]
        repeated.append(point)  # in `optuna_study` it stays a running trial, so that the sampler looks elsewhere
        if left == []:
            break
    if settings.sampler == "grid" and not wanted:
        return None
    if left:
        return ask(random.Random(trial_seed(settings.study_seed, number)).choice(left))
    # Should all that the sampler chose have failed.
    others = (ask(record.searched) for record in tried.sound()) if not wanted else ()
    for point in itertools.chain(repeated, others):
        if "seed" in (*study.settings.pinned, *point.decided):
            break
        if again := tried.another_seed(point.settings):
            return replace(point, settings=again[0], decided=(*point.decided, "seed"), repeats=again[1])
    instead = propose(study, records, number, prior, grid) if wanted else None
    return replace(instead, added=wanted[0]) if instead and wanted else None


def wishes(
    study: Study, records: Mapping[int, TrialRecord], number: int, grid: Sequence[dict[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """The values to ask for, one after another until a point is new. The sampler chooses those that are left out."""
    first = first_points(study.settings)
    given = [first[number]] if number < len(first) else []
    if study.settings.study.sampler == "grid":
        searched = [record.searched for record in records.values()]
        return itertools.chain(given, (point for point in grid if as_json(point) not in searched))
    return itertools.chain(given * MAX_ASKED, [{}] * MAX_ASKED)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End a space that does not return. Raises SpaceError. Python runs signal handlers in the main thread only, which
    is where Ray Tune asks its searcher."""

    def stop(*_: Any) -> None:
        raise SpaceError(f"must answer within {seconds:g} s, but does not: look for a loop without an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def recover_distributions(study: Study, records: Sequence[TrialRecord]) -> None:
    """Write the ranges of the trials that an older version began, whose journal has none."""
    for record in records:
        if record.searched and not record.distributions and (asked := ask_with(study, record.searched, record.number)):
            ranges = distributions_json(asked.distributions)
            record.apply(study.journal.write("distributions", number=record.number, distributions=ranges))


def ask_with(study: Study, searched: dict[str, Any], number: int = 0) -> optuna.trial.FixedTrial | None:
    """This study's space, asked with given values; None when it asks for other names or other ranges, or fails."""
    fixed = optuna.trial.FixedTrial(searched)
    try:
        space, _ = load_space(study.settings.study.space)
        with warnings.catch_warnings(), time_limit(TIMEOUT_S):
            warnings.simplefilter("error", UserWarning)  # a value outside its range only warns
            searched_settings(study.settings, space, fixed, number)
    except (ValueError, UserWarning):
        return None
    return fixed if fixed.params.keys() == searched.keys() else None


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as a journal gives them back."""
    return json.loads(json.dumps(values))
