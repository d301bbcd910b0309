"""Checks a search space before anything starts: its first points, the ends of its ranges, and a few points of the
study's own sampler, through Optuna's own trials.

A user's own space is a program that may raise, loop or end the process, so a child process runs it:

    python -m tune.config.space_check
"""

from __future__ import annotations

import contextlib
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

MAX_WHOLE = 2**53  # Optuna computes whole numbers as floats
SECOND_RANGE = "Inconsistent parameter values for distribution"  # Optuna's warning: a second range under the same name
TIMEOUT_S = 60.0  # for all that the child does, the imports of the user's file included
NUM_ASKED = 20  # points of the sampler: more than the ten that TPE and GP draw at random
NUM_RANDOM = 200  # points of a space with continuous ranges: they miss a branch of one point in 40 in 0.6 % of cases
NUM_LISTED = 1000  # points up to which a discrete space is asked for each one


def check_space(settings: Settings) -> list[str]:
    """Problems of a study's space: of its file, its first points, the ends of its ranges and its sampler's points."""
    if not is_own(settings.study.space):
        return problems_of_space(settings)
    try:
        read_space(settings.study.space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    return check_apart(settings)


def problems_of_space(settings: Settings) -> list[str]:
    """Problems of a space that show when Optuna's own trials ask it."""
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
    plain = with_study(settings, sampler="random")
    study = optuna.create_study()
    problems: list[str] = []
    for name, values, end in points:
        if text := unusable_values(values):
            problems.append(f"{name} {text}")
            continue
        study.sampler = make_corner(values, end)
        trial = study.ask()
        problems += ask(plain, space, trial, where, again=True)
        problems += [
            f"{name}: {parameter} must be {words(range_)}, but got {SHOWN.repr(values[parameter])}: change it"
            for parameter, range_ in trial.distributions.items()
            if parameter in values and not contains(range_, values[parameter])
        ]
        stray = sorted(set(values) - set(trial.params) - set(settings.pinned))
        if stray and values is guide:  # it also names what the space asks for with --search-alpha only
            opened, trial = with_study(plain, search_alpha=True), study.ask()
            with contextlib.suppress(SpaceError):
                searched_settings(opened, space, trial)
            stray = [name for name in stray if name not in trial.params]
        if stray and not problems:  # a space that has failed has not asked for all
            problems.append(f"{name} must name what the space asks for, but has {', '.join(stray)}: fix its name")
        study.tell(trial, float(trial.number))
    if not problems and is_own(settings.study.space):
        problems = ask_widely(plain, space, study, where) or ask_sampler(settings, space, study, where)
    return list(dict.fromkeys(problems))


def with_study(settings: Settings, **changes: Any) -> Settings:
    """The settings with some of the search's changed."""
    return dataclasses.replace(settings, study=dataclasses.replace(settings.study, **changes))


def ask_widely(settings: Settings, space: Callable[[Any], Any], study: Any, where: str) -> list[str]:
    """What is wrong with any point of a discrete space, or with random points of another one."""
    import optuna

    from tune.config.samplers import discrete_points

    try:
        points = discrete_points(settings, 0, NUM_LISTED + 1)
    except SpaceError as error:
        return [f"{where} {error}"]
    random = optuna.samplers.RandomSampler(seed=settings.study.study_seed)
    samplers = [random] * NUM_RANDOM
    if points and len(points) <= NUM_LISTED:
        samplers = [make_corner(values, 0) for values, _ in points]
    for study.sampler in samplers:
        trial = study.ask()
        if problems := ask(settings, space, trial, where, again=True):
            return problems
        study.tell(trial, float(7 * trial.number % 11))
    return []


def ask_sampler(settings: Settings, space: Callable[[Any], Any], study: Any, where: str) -> list[str]:
    """What is wrong with the points that the study's own sampler chooses."""
    import optuna

    from tune.config.samplers import grid_points, make_sampler, trial_seed

    if settings.study.sampler == "grid":
        try:
            points = grid_points(settings)[:NUM_ASKED]
        except SpaceError as error:
            return [f"{where} {error}"]
        asked = (ask(settings, space, optuna.trial.FixedTrial(point, n), where) for n, point in enumerate(points))
        return next(filter(None, asked), [])
    for number in range(NUM_ASKED):
        study.sampler = make_sampler(settings.study.sampler, trial_seed(settings.study.study_seed, number))
        trial = study.ask()
        if problems := ask(settings, space, trial, where):
            return problems
        study.tell(trial, float(7 * number % 11))
    return []


def ask(settings: Settings, space: Callable[[Any], Any], trial: Any, where: str, again: bool = False) -> list[str]:
    """Problems of one point of a space. again: check that the same values give the same settings a second time."""
    import optuna

    problems = []
    number = trial.number % max(1, settings.study.trials)  # a space may use it, and expects those of the study
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            chosen, _ = searched_settings(settings, space, trial, number)
            if again:
                fixed = optuna.trial.FixedTrial(trial.params, number)
                if searched_settings(settings, space, fixed, number)[0] != chosen:
                    problems.append(f"{where} must return the same settings for the same values, but does not: fix it")
        except SpaceError as error:
            problems.append(f"{where} {error}")
    problems += [f"{where}: {w.message}: ask under a second name" for w in caught if SECOND_RANGE in str(w.message)]
    for name, range_ in trial.distributions.items():
        if text := unusable_range(range_):
            problems.append(f"{where} must ask for {name!r} among {text}, but asks for {words(range_)}: fix it")
    return problems


def corners(settings: Settings) -> list[TrialSettings]:
    """The trials at a space's guide and at both ends of its ranges. Raises SpaceError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, guide = load_space(settings.study.space)
    study = optuna.create_study()
    trials = []
    for values, end in ((guide, 0), ({}, 0), ({}, -1)):
        study.sampler = make_corner(values, end)
        trials.append(searched_settings(settings, space, study.ask())[0])
    return trials


def make_corner(values: dict[str, Any], end: int) -> Any:
    """A sampler that chooses `values` where their range contains them, else an end of it: 0 (low) or -1 (high)."""
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

    if isinstance(value, bool) and not hasattr(range_, "choices"):
        return False
    try:
        optuna.trial.create_trial(params={"value": value}, distributions={"value": range_}, value=0.0)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True


def unusable_values(values: dict[Any, Any]) -> str:
    """Why Optuna cannot store a point, or ""."""
    if not all(isinstance(name, str) for name in values):
        return f"must have texts as names, but has {SHOWN.repr(list(values))}: fix them"
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        return f"must hold plain values, but {error}: give numbers, texts, true or false"
    return ""


def unusable_range(range_: Any) -> str:
    """What a distribution's choices or ends must be so that Optuna can store them, or "" if they are."""
    ends = getattr(range_, "choices", None) or (range_.low, range_.high)
    if not hasattr(range_, "choices") and max(map(abs, ends)) > MAX_WHOLE and isinstance(range_.low, int):
        return f"whole numbers from {-MAX_WHOLE:,} to {MAX_WHOLE:,}"
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


def check_apart(settings: Settings) -> list[str]:
    """`problems_of_space` in a child process."""
    where = f"`--space` {settings.study.space!r}"
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    # Files, not pipes: a process that the space starts and leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer:
        asked.write(pickle.dumps(settings))
        asked.seek(0)
        command = [sys.executable, "-P", "-m", "tune.config.space_check"]
        try:
            code = subprocess.run(command, stdin=asked, stdout=answer, env=environment, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            return [f"{where} must answer within {TIMEOUT_S:g} s, but does not: look for an endless loop"]
        answer.seek(0)
        try:
            return json.loads(answer.read())
        except ValueError:
            return [f"{where} must return settings, but ended the process that called it (exit code {code}): fix it"]


def main() -> None:
    """The child process of `check_apart`: pickled settings on standard input, problems as JSON on standard output."""
    settings = pickle.load(sys.stdin.buffer)
    answer = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what the space prints is not the answer
    os.write(answer, json.dumps(problems_of_space(settings)).encode())
    os._exit(0)  # whatever threads the space has started


if __name__ == "__main__":
    main()
