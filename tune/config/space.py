"""Search spaces: reading their source, and the trial settings of one point."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, TrialSettings, matching
from train_fn.support.files import read_json
from tune.config.settings import Settings, flag

SHIPPED = Path(__file__).resolve().parents[2] / "search_spaces"
MAX_FILE = 10_000_000  # bytes of a space or of first points


class SpaceError(ValueError):
    """A search space cannot be used. The message follows the space's name: "asks for ...", "must return ..."."""


def is_own(space: str) -> bool:
    """Whether a space is a user's Python file, not a module of search_spaces/."""
    return space.endswith(".py")


def read_space(space: str) -> bytes:
    """The source of a space, read once a process: the code that runs is the code whose hash was compared.

    Raises:
        SpaceError: there is no such space, or it cannot be read.
    """
    shipped = shipped_spaces()
    if not is_own(space) and space not in shipped:
        raise SpaceError(f"must be one of {', '.join(shipped)} or a Python file, but got {SHOWN.repr(space)}: check it")
    return read_source(os.path.abspath(space) if is_own(space) else str(SHIPPED / f"{space}.py"))


def shipped_spaces() -> list[str]:
    """The names of the modules of search_spaces/."""
    return sorted(path.stem for path in SHIPPED.glob("[a-z]*.py"))


@functools.cache
def read_source(path: str) -> bytes:
    """The content of a Python file. Raises SpaceError."""
    if not os.path.isfile(path):
        raise SpaceError(f"must be an existing Python file, but got {SHOWN.repr(path)}: check the path")
    try:
        with open(path, "rb") as file:
            source = file.read(MAX_FILE + 1)
    except OSError as error:
        raise SpaceError(f"must be readable, but {path!r}: {error.strerror}: change its permissions") from error
    if len(source) > MAX_FILE:
        raise SpaceError(f"must have at most {MAX_FILE:,} bytes, but {path!r} has more: give the right file")
    return source


def space_hash(space: str) -> str:
    """sha256 of the file that defines a space, and of the modules of search_spaces/ that it uses, directly or through
    one of these. Raises SpaceError."""
    sources, unread = {space: read_space(space)}, [space]
    while unread:
        source = sources[unread.pop()]
        words = set(re.findall(rb"\w+", source)) if b"search_spaces" in source else set()
        used = [name for name in shipped_spaces() if name.encode() in words and name not in sources]
        sources |= {name: read_space(name) for name in used}
        unread += used
    others = [sources[name] for name in sorted(sources) if name != space]
    return hashlib.sha256(sources[space] + b"".join(others)).hexdigest()


def load_space(name: str) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """`space` and `GUIDE` of a module of search_spaces/ or of a Python file. Raises SpaceError."""
    return run_source(name, os.path.abspath(name), read_space(name))


@functools.cache
def run_source(name: str, path: str, source: bytes) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """`space` and `GUIDE` that a source defines. An import would prefer a compiled file beside the source."""
    module = types.ModuleType(f"space_{Path(name).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        raise SpaceError(f"{name!r} must be importable, but raised {type(error).__name__}: {error}: fix it") from error
    space, guide = getattr(module, "space", None), getattr(module, "GUIDE", None)
    if not callable(space) or not isinstance(guide, dict):
        raise SpaceError(f"must define a function `space` and a dict `GUIDE`, but {name!r} does not: see search_spaces")
    return space, guide


GRID_POINTS = 4  # of a range, its ends among them
NAME_OF_PARAMETER = matching(r"(?!\.)[\w.: -]{1,250}", "letters, digits, `_`, `.`, `:`, `-` and spaces, at most 250")


class Pinned:
    """An Optuna trial, under its number in this study, in which some parameters have been decided on the command line:
    they are not asked for. With `--sampler grid`, ranges are asked for at a few points only, and at those of the
    `first` ones.

    It also offers what a space may know of its study:

    base: type, width and usual learning rate of the base's language model (`BaseShape`).
    workers: workers per trial, which must be able to share the global batch.
    pinned: the trial settings that the command line gives, by name. They stay, whatever the space returns.
    search_alpha: whether `--search-alpha` was given.
    """

    def __init__(self, trial: Any, settings: Settings, number: int, first: Sequence[dict[str, Any]] = ()) -> None:
        self._trial = trial
        self._first = first
        self.number = number
        self.base = settings.base
        self.workers = max(1, settings.study.workers_per_trial)
        self.pinned = settings.pinned_values
        self.search_alpha = settings.study.search_alpha
        self.failed: Exception | None = None
        """What Optuna raised that is no fault of the space, such as an error of its storage."""
        if settings.study.sampler == "grid":
            self.suggest_float = self._suggest_from_grid(float)
            self.suggest_int = self._suggest_from_grid(int)

    def _suggest_from_grid(self, kind: type) -> Callable[..., Any]:
        def suggest(name: str, low: float, high: float, *, log: bool = False, **_: Any) -> Any:
            if name in self.pinned:
                return self.pinned[name]
            shares = [step / (GRID_POINTS - 1) for step in range(GRID_POINTS)]
            points = [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
            choices = {float(f"{point:.6g}") if kind is float else round(point) for point in points}
            choices |= {kind(point[name]) for point in self._first if name in point}
            return self._ask(self._trial.suggest_categorical, name, sorted(choices))

        return suggest

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._trial, name)
        if not name.startswith("suggest_"):
            return attribute

        def suggest(name: str, *args: Any, **options: Any) -> Any:
            return self.pinned[name] if name in self.pinned else self._ask(attribute, name, *args, **options)

        return suggest

    def _ask(self, suggest: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        if not isinstance(name, str) or not NAME_OF_PARAMETER.holds(name):
            raise SpaceError(
                f"must ask under names of {NAME_OF_PARAMETER.words}, but asks for {SHOWN.repr(name)}: rename it"
            )
        if suggest.__name__ == "suggest_categorical" and (text := unusable_choices(*args, **options)):
            raise SpaceError(f"must ask for {name!r} among {text}: fix it")
        try:
            return suggest(name, *args, **options)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise SpaceError(
                f"must ask for {name!r} as Optuna allows, but Optuna says {str(error).rstrip('.')!r}: fix its choices "
                f"or range, or ask under a second name"
            ) from error
        except Exception as error:
            self.failed = error
            raise


def unusable_choices(choices: Any = (), *_: Any, **__: Any) -> str:
    """Why a study could not ask for these choices again, or "". Optuna takes anything that it can make a tuple from."""
    if not isinstance(choices, list | tuple | range):
        return f"a list or tuple of choices, whose order stays, but asks for one of {SHOWN.repr(choices)}"
    if any(choice in choices[:n] for n, choice in enumerate(choices)):
        return f"different choices, but asks for one of {SHOWN.repr(choices)}"
    return ""


def searched_settings(
    settings: Settings, space: Callable[[Any], dict[str, Any]], trial: Any, number: int = 0
) -> tuple[TrialSettings, list[str]]:
    """The trial settings of one point of the space.

    Returns:
        The settings: the command line's, with those that the space returns over them; and the names of the latter.

    Raises:
        SpaceError: the space raises, its settings cannot be trained, or it computes a pinned setting from others.
    """
    asking = Pinned(trial, settings, number, first_points(settings) if settings.study.sampler == "grid" else ())
    pinned, workers = dict(asking.pinned), asking.workers
    reported = settings.trial.problems(workers)  # by `check`: those of the command line
    try:
        chosen = space(asking)
        if not isinstance(chosen, dict):
            raise SpaceError(f"must return a dict of settings, but returned {SHOWN.repr(chosen)}: see search_spaces")
        clash = [name for name in pinned if name in chosen and chosen[name] != pinned[name]]
        point = TrialSettings.from_dict(dataclasses.asdict(settings.trial) | chosen)
        problems = [text for text in point.problems(workers) if text not in reported]
    except SpaceError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        if error is asking.failed:
            raise
        raise SpaceError(f"must return settings, but raised {type(error).__name__}: {error}: fix it") from error
    if clash:
        options = ", ".join(map(flag, clash))
        raise SpaceError(f"computes {options} from what it searches: leave the option out, or use another space")
    if problems:
        raise SpaceError(f"must return settings that can be trained: {'; '.join(problems)}")
    return point, sorted(chosen)


def read_points(path: str) -> list[dict[str, Any]]:
    """The points of --first-points. Raises ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"must be an existing file, but got {SHOWN.repr(path)}: check the path")
    try:
        if (size := Path(path).stat().st_size) > MAX_FILE:
            raise ValueError(f"must have at most {MAX_FILE:,} bytes, but {path!r} has {size:,}: leave points out")
        points = read_json(Path(path), list, "give a JSON list of objects")
    except OSError as error:
        raise ValueError(f"must be readable, but {path!r}: {error.strerror}: change its permissions") from error
    if not all(isinstance(point, dict) for point in points):
        raise ValueError(f"must be a JSON list of objects, but {path!r} holds something else: see --help")
    return points


def first_points(settings: Settings) -> list[dict[str, Any]]:
    """The points that a search begins with: the space's guide, and those of --first-points. Raises SpaceError."""
    return [load_space(settings.study.space)[1], *settings.first_points]
