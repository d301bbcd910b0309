"""Asks a search space as Optuna will, before anything starts: its first points, the ends of its ranges, and a few
points of the study's own sampler.

A space of the user's own is a program that may raise, loop or end the process, so a child process asks it:

    python -m tune.config.space_check

reads pickled settings from its standard input and writes the problems to its standard output, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, TrialSettings, broken_rule
from tune.config.settings import Settings
from tune.config.space import SpaceError, is_own, load_space, read_space, searched_settings

TIMEOUT_S = 60.0  # for all that the child does, the imports of the user's file included
NUM_ASKED = 20  # points of the sampler: more than the ten that TPE and GP draw at random


def check_apart(settings: Settings) -> list[str]:
    """What is wrong with a space, asked in a process of its own."""
    where = f"`--space` {settings.study.space!r}"
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    # Files, not pipes: a process that the space leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer:
        asked.write(pickle.dumps(settings))
        asked.seek(0)
        command = [sys.executable, "-P", "-m", "tune.config.space_check"]
        try:
            code = subprocess.run(command, stdin=asked, stdout=answer, env=environment, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            return [f"{where} must answer within {TIMEOUT_S:g} s, but does not: look for a loop without an end"]
        answer.seek(0)
        try:
            return json.loads(answer.read())
        except ValueError:
            return [f"{where} must return settings, but ended the process that asked it (exit code {code}): mend it"]


def main() -> None:
    """Answer `check_apart`."""
    settings = pickle.load(sys.stdin.buffer)
    answer = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what the space prints is no answer
    os.write(answer, json.dumps(problems_of_space(settings)).encode())
    os._exit(0)  # whatever threads the space has started


def problems_of_space(settings: Settings) -> list[str]:
    """What is wrong with a space, asked through Optuna's own trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = f"`--space` {settings.study.space!r}"
    try:
        space, guide = load_space(settings.study.space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    points = [(f"{where}: GUIDE", guide, 0), (where, {}, 0), (where, {}, -1)]
    points[1:1] = [(f"`--first-points` point {number}", point, 0) for number, point in enumerate(settings.first_points)]
    # A grid's points lie inside the ranges; the ranges themselves are asked for here.
    plain = dataclasses.replace(settings, study=dataclasses.replace(settings.study, sampler="random"))
    study = optuna.create_study()
    found: list[str] = []
    for name, values, end in points:
        if text := unusable_values(values):
            found.append(f"{name} {text}")
            continue
        study.sampler = make_corner(values, end)
        trial = study.ask()
        found += ask(plain, space, trial, where, again=True)
        found += [
            f"{name}: {parameter} must be {words(range_)}, but got {SHOWN.repr(values[parameter])}: change it"
            for parameter, range_ in trial.distributions.items()
            if parameter in values and not contains(range_, values[parameter])
        ]
        stray = sorted(set(values) - set(trial.params) - set(settings.pinned))
        if stray and not found:  # a space that has failed has not asked for all
            found.append(f"{name} must name what the space asks for, but has {', '.join(stray)}: mend its name")
        study.tell(trial, float(trial.number))
    if not found and is_own(settings.study.space):
        found = ask_sampler(settings, space, study, where)
    return list(dict.fromkeys(found))


def ask_sampler(settings: Settings, space: Callable[[Any], Any], study: Any, where: str) -> list[str]:
    """What is wrong with the points that the study's own sampler chooses."""
    import optuna

    from tune.config.samplers import grid_points, make_sampler

    if settings.study.sampler == "grid":
        try:
            points = grid_points(settings)[:NUM_ASKED]
        except SpaceError as error:
            return [f"{where} {error}"]
        asked = (ask(settings, space, optuna.trial.FixedTrial(point, n), where) for n, point in enumerate(points))
        return next(filter(None, asked), [])
    for number in range(NUM_ASKED):
        study.sampler = make_sampler(settings.study.sampler, settings.study.study_seed + number)
        trial = study.ask()
        if found := ask(settings, space, trial, where):
            return found
        study.tell(trial, float(7 * number % 11))
    return []


def ask(settings: Settings, space: Callable[[Any], Any], trial: Any, where: str, again: bool = False) -> list[str]:
    """What is wrong with one point of a space. again: the same values must make the same settings a second time."""
    import optuna

    found = []
    number = trial.number % max(1, settings.study.trials)  # a space may choose by it, and knows those of the study
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            chosen, _ = searched_settings(settings, space, trial, number)
            if again:
                fixed = optuna.trial.FixedTrial(trial.params, number)
                if searched_settings(settings, space, fixed, number)[0] != chosen:
                    found.append(f"{where} must return the same settings for the same values, but does not: mend it")
        except SpaceError as error:
            found.append(f"{where} {error}")
    # The one warning of this class: a second range under a name that has one.
    found += [f"{where}: {w.message}: ask under a second name" for w in caught if w.category is RuntimeWarning]
    for name, range_ in trial.distributions.items():
        if text := unusable_range(range_):
            found.append(f"{where} must ask for {name!r} among {text}, but asks for {words(range_)}: mend it")
    return found


def make_corner(values: dict[str, Any], end: int) -> Any:
    """A sampler that chooses the given values where they are inside their range, else an end of it: 0 or -1."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    class Corner(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if param_name in values and contains(param_distribution, values[param_name]):
                return values[param_name]
            if isinstance(param_distribution, CategoricalDistribution):
                return param_distribution.choices[end]
            return (param_distribution.low, param_distribution.high)[end]

    return Corner()


def contains(range_: Any, value: Any) -> bool:
    """Whether a value lies inside an Optuna distribution."""
    import optuna

    try:
        optuna.trial.create_trial(params={"value": value}, distributions={"value": range_}, value=0.0)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True


def corners(settings: Settings) -> list[TrialSettings]:
    """The trials of a space's guide and of both ends of its ranges. Raises SpaceError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, guide = load_space(settings.study.space)
    study = optuna.create_study()
    found = []
    for values, end in ((guide, 0), ({}, 0), ({}, -1)):
        study.sampler = make_corner(values, end)
        found.append(TrialSettings(**searched_settings(settings, space, study.ask())[0]))
    return found


def unusable_values(values: dict[Any, Any]) -> str:
    """Why a point cannot be stored by Optuna, or nothing."""
    if not all(isinstance(name, str) for name in values):
        return f"must have texts as names, but has {SHOWN.repr(list(values))}: mend them"
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        return f"must hold plain values, but {error}: give numbers, texts, true or false"
    return ""


def unusable_range(range_: Any) -> str:
    """What Optuna's storage takes instead of a distribution's choices or ends, or nothing."""
    ends = getattr(range_, "choices", None) or (range_.low, range_.high)
    if not all(end is None or isinstance(end, bool | int | float | str) for end in ends):
        return "numbers, texts, True, False and None (make lists inside the space, from such a choice)"
    if any(isinstance(end, int | float) and not math.isfinite(end) for end in ends):
        return "finite numbers"
    texts = [broken_rule(end, str, None) for end in ends if isinstance(end, str)]
    return "texts on one line, without control characters" if any(texts) else ""


def words(range_: Any) -> str:
    """An Optuna distribution in words."""
    if hasattr(range_, "choices"):
        return f"one of {', '.join(SHOWN.repr(choice) for choice in range_.choices)}"
    steps = f" in steps of {range_.step:g}" if range_.step not in (None, 1) else ""
    return f"between {range_.low:g} and {range_.high:g}{steps}"


if __name__ == "__main__":
    main()


def check_space(settings: Settings) -> list[str]:
    """Whether Optuna can search the space, and its first points and both ends of its ranges can be trained."""
    from tune.config.space_check import check_apart, problems_of_space

    if not is_own(settings.study.space):
        return problems_of_space(settings)
    try:
        read_space(settings.study.space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    return check_apart(settings)
