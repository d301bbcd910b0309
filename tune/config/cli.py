"""The command line, derived from the settings."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, TrialSettings, broken_rule, broken_rules, rules
from tune.config.paths import SettingsError, study_directory
from tune.config.rules import check
from tune.config.settings import GROUPS, Settings, flag, show
from tune.config.space import read_points
from tune.config.stored import fetch, refresh_stored, resumed_values
from tune.config.uris import strip_credentials

# Empty, these say "every module may get an adapter"; on --resume, the others say "no longer".
EMPTY = ("lora_exclude_patterns",)
EMPTY_ON_RESUME = ("stop_when", "require", "register")


def field_docs(group: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


def build_parser() -> argparse.ArgumentParser:
    """Every field of every group as a flag. Values stay text: `parse` converts them, to report all faults at once."""
    parser = argparse.ArgumentParser(
        prog="python tune/run.py",
        description="Search the LoRA configuration of a vision-language model on a small labelled image set.",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    for group in GROUPS:
        docs = field_docs(group)
        section = parser.add_argument_group((group.__doc__ or "").splitlines()[0].rstrip("."))
        for field in dataclasses.fields(group):
            switch = isinstance(field.default, bool)
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if switch else {"metavar": ""}
            default = "" if field.default in ("", None) else f" [{show(field.default)}]".replace("%", "%%")
            section.add_argument(
                flag(field.name),
                dest=field.name,
                default=argparse.SUPPRESS,
                help=docs[field.name].replace("%", "%%") + default,
                **options,
            )
    return parser


def convert(text: str, kind: Any) -> Any:
    """A flag's text as its field's type. Raises ValueError."""
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return (float if kind == float | None else kind)(text)


def read_words(argv: Sequence[str], problems: list[str]) -> dict[str, str | bool]:
    """The text of each option that a command line gives, by field name; a switch gives True or False.

    `--lora_r` is the same as `--lora-r`, since the guide writes its options with underscores. The last of several wins.
    """
    fields = {flag(field.name): field for group in GROUPS for field in dataclasses.fields(group)}
    switches = {option for option, field in fields.items() if isinstance(field.default, bool)}
    given: dict[str, str | bool] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, text = word.partition("=")
        option = option.replace("_", "-") if word.startswith("--") else option
        positive = "--" + option.removeprefix("--no-")
        if word in ("-h", "--help"):
            build_parser().print_help()
            sys.exit(0)
        elif option in switches or (option.startswith("--no-") and positive in switches):
            if equals:
                problems.append(f"`{option}` must stand alone, but got {SHOWN.repr(text)}: leave the value out")
            given[fields[option if option in switches else positive].name] = option in switches
        elif option in fields:
            # What begins with one minus is a value (-loss, -1); what begins with two is the next option.
            if not equals and words and not words[0].startswith("--") and words[0] != "-h":
                equals, text = "=", words.pop(0)
            if equals:
                given[fields[option].name] = text
            else:
                problems.append(f"`{option}` must be followed by a value, but got none: see --help")
        elif word.startswith("-"):
            near = difflib.get_close_matches(option[:100], fields, n=1)
            fix = f"did you mean {near[0]}?" if near else "see --help"
            problems.append(f"options must be known ones, but got {SHOWN.repr(word)}: {fix}")
            if not equals and words and not words[0].startswith("-"):
                words.pop(0)  # its value
        else:
            problems.append(f"every value must follow an option, but got {SHOWN.repr(word)}: see --help")
    return given


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line. Raises SettingsError with everything that is wrong with it."""
    problems: list[str] = []
    given = read_words(argv, problems)
    fields = {field.name: (group, field) for group in GROUPS for field in dataclasses.fields(group)}
    empty = EMPTY + (EMPTY_ON_RESUME if given.get("resume") else ())
    values: dict[str, Any] = {}
    for name, text in given.items():
        group, field = fields[name]
        kind, rule = rules(group)[name]
        try:
            values[name] = text if isinstance(text, bool) else convert(text, kind)
        except (ValueError, OverflowError):
            text_rule = broken_rule(text, kind, rule)
            fix = "leave it out" if field.default is None else f"the default is {show(field.default)}"
            problems.append(f"`{flag(name)}` {text_rule}, but got {SHOWN.repr(text)}: {fix}")
            continue
        if values[name] in ("", ()) and name not in empty:
            problems.append(f"`{flag(name)}` must not be empty, but got {text!r}: leave it out, or give a value")
    pinned = tuple(field.name for field in dataclasses.fields(TrialSettings) if field.name in values)
    points: list[dict[str, Any]] | None = None
    commands = [name for name in ("resume", "show", "replay") if values.get(name)]
    if len(commands) > 1:
        problems.append(f"one thing at a time, but got {' and '.join(map(flag, commands))}: keep one")
    elif commands:
        command, place = commands[0], values[commands[0]]
        refused = len(problems)
        if "://" in place:
            values[command] = fetch(flag(command), place, Path(values.get("results", "results")), problems)
        directory = study_directory(values[command], values.get("results", "results"))
        if directory is None and len(problems) == refused:
            problems.append(
                f"`{flag(command)}` must name a study, but got {SHOWN.repr(strip_credentials(place))}: give its name "
                f"(and --results), its folder, in which plan.json lies, or its address on object storage"
            )
        elif directory and command != "show":
            if command == "resume" and "://" not in place:
                problems += refresh_stored(directory)
            values, pinned, points = resumed_values(values, directory, problems)
    if "trial" in given and not values.get("replay"):
        problems.append(f"`--trial` goes with --replay, but got {SHOWN.repr(given['trial'])} alone: add --replay STUDY")
    groups = [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in GROUPS
    ]
    settings = Settings(*groups, pinned)  # type: ignore[call-arg, arg-type]  # in the order of GROUPS
    if settings.study.first_points and points is None:
        try:
            points = read_points(settings.study.first_points)
        except ValueError as error:
            problems.append(f"`--first-points` {error}")
    settings = dataclasses.replace(settings, first_points=tuple(points or ()))
    problems += broken_rules(settings.command, flag).values()
    problems += [] if problems and commands else check(settings)
    if problems:
        raise SettingsError(problems)
    return settings
