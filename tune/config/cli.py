"""The command line, derived from the settings: words -> values -> a study's stored settings -> rules."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from train_fn.settings import SHOWN, ModelSettings, TrialSettings, broken_rule, broken_rules, convert, field_docs, rules
from tune.config.base_shape import read_base_shape
from tune.config.download import locate_study
from tune.config.paths import SettingsError, program
from tune.config.rules import check
from tune.config.settings import BASIC, GROUPS, Settings, flag, show
from tune.config.space import read_points
from tune.config.spelling import hint
from tune.config.stored import resumed_values

FIELDS = {field.name: (group, field) for group in GROUPS for field in dataclasses.fields(group)}
# An empty value means "every module may get an adapter", and on --resume "no longer".
MAY_BE_EMPTY = ("lora_exclude_patterns",)
MAY_BE_EMPTY_ON_RESUME = ("stop_when", "require", "register")
DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}")  # text programs turn two dashes into a long one
TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")
TEXTS = tuple[str, ...]
COMMANDS = ("resume", "show", "replay")  # each names a study that exists


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line. Raises SettingsError with all of its problems."""
    settings, problems = parse_all(argv)
    if problems:
        raise SettingsError(problems)
    return settings


def parse_all(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings of a command line, and its problems. A value that cannot be used leaves its setting at the default.

    Raises:
        SettingsError: as `locate_study` and `resumed_values`.
    """
    problems: list[str] = []
    values = read_values(read_words(argv, problems), problems)
    pinned = tuple(field.name for field in dataclasses.fields(TrialSettings) if field.name in values)
    points = base = None
    num_unread = len(problems)
    command = chosen_command(values, problems)
    if command:
        directory = locate_study(command, values, problems)  # downloads it from object storage
        if directory and command != "show":
            values, pinned, points, base = resumed_values(values, directory, problems)
    if points is None and values.get("first_points"):
        try:
            points = read_points(values["first_points"])
        except ValueError as error:
            problems.append(f"`--first-points` {error}")
    base = base or read_base_shape(values.get("model", ModelSettings.model))
    settings = Settings.of(values, pinned, points or (), base)
    problems += broken_rules(settings.command, flag).values()
    if not command or len(problems) == num_unread:  # else the rest is not the study's
        problems += check(settings)
    return settings, problems


def is_switch(group: type, name: str) -> bool:
    """Whether an option stands alone: --name or --no-name."""
    return rules(group)[name][0] in (bool, bool | None)


def read_words(argv: Sequence[str], problems: list[str]) -> dict[str, str | bool]:
    """The text of each option in a command line, by field name; a switch gives True or False.

    `--lora_r` is the same as `--lora-r`, since the guide writes its options with underscores. The last of several wins.
    Prints the help and exits for `--help` and `--help-all`.
    """
    fields = {flag(name): field for name, (_, field) in FIELDS.items()}
    switches = {flag(name) for name, (group, _) in FIELDS.items() if is_switch(group, name)}
    texts: dict[str, str | bool] = {}
    words, before = list(argv), ""
    while words:
        word = words.pop(0)
        option, equals, text = word.partition("=")
        option = option.replace("_", "-") if word.startswith("--") else option
        positive = "--" + option.removeprefix("--no-")
        if word in ("-h", "--help", "--help-all"):
            build_parser(everything=word == "--help-all").print_help()
            sys.exit(0)
        elif option in switches or (option.startswith("--no-") and positive in switches):
            if equals:
                problems.append(f"`{option}` must stand alone, but got {SHOWN.repr(text)}: leave the value out")
            texts[fields[option if option in switches else positive].name] = option in switches
        elif option in fields:
            # What begins with one minus is a value (-loss, -1); what begins with two is the next option.
            if not equals and words and not words[0].startswith("--") and words[0] != "-h":
                equals, text = "=", words.pop(0)
            if equals:
                texts[fields[option].name] = text
            else:
                problems.append(f"`{option}` must be followed by a value, but got none: see --help-all")
        elif word.startswith(DASHES):
            problems.append(f"options must be known ones, but got {SHOWN.repr(word)}: {hint(option, FIELDS)}")
            if not equals and words and not words[0].startswith(DASHES):
                words.pop(0)  # its value
        elif before in switches and word.lower() in TRUTH:
            problems.append(f"`{before}` must stand alone, but got {SHOWN.repr(word)}: leave the value out")
        else:
            several = before in fields and rules(FIELDS[fields[before].name][0])[fields[before].name][0] == TEXTS
            fix = f"give {before} its values with commas" if several else hint(word, FIELDS)
            problems.append(f"every value must follow an option, but got {SHOWN.repr(word)}: {fix}")
            continue
        before = option
    return texts


def read_values(texts: dict[str, str | bool], problems: list[str]) -> dict[str, Any]:
    """The options' values in their fields' types, by field name."""
    may_be_empty = MAY_BE_EMPTY + (MAY_BE_EMPTY_ON_RESUME if texts.get("resume") else ())
    values: dict[str, Any] = {}
    for name, text in texts.items():
        group, field = FIELDS[name]
        kind, rule = rules(group)[name]
        try:
            values[name] = text if isinstance(text, bool) else convert(text, kind)
        except (ValueError, OverflowError):
            fix = "leave it out" if field.default is None else f"the default is {show(field.default)}"
            problems.append(f"`{flag(name)}` {broken_rule(text, kind, rule)}, but got {SHOWN.repr(text)}: {fix}")
            continue
        if values[name] in ("", ()) and name not in may_be_empty:
            problems.append(f"`{flag(name)}` must not be empty, but got {text!r}: leave it out, or give a value")
    return values


def chosen_command(values: dict[str, Any], problems: list[str]) -> str:
    """The one of COMMANDS that a command line gives; "" for a new study."""
    commands = [name for name in COMMANDS if values.get(name)]
    if len(commands) > 1:
        problems.append(f"one thing at a time, but got {' and '.join(map(flag, commands))}: keep one")
    for name in ("trial", "run"):
        if name in values and not values.get("replay"):
            problems.append(f"`--{name}` goes with --replay, but got {values[name]} alone: add --replay STUDY")
    return commands[0] if len(commands) == 1 else ""


# ------------------------------------------------------------------------------------------------ help


def build_parser(everything: bool) -> argparse.ArgumentParser:
    """The help of the basic options, or of all, in groups. It parses nothing: `parse` reports all problems at once."""
    rest = len(FIELDS) - len(BASIC)
    parser = argparse.ArgumentParser(
        usage=f"{shlex.join(program())} [--model FOLDER|ID --data MANIFEST] [OPTION]...",
        description="Search the LoRA configuration of a vision-language model on a small labelled image set.",
        epilog="" if everything else f"--help-all shows the other {rest} options, by group.",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=80),
    )
    for group in GROUPS:
        docs = field_docs(group)
        section = parser.add_argument_group((group.__doc__ or "").partition(".")[0])
        for field in dataclasses.fields(group):
            if not everything and field.name not in BASIC:
                continue
            options: dict[str, Any] = {"metavar": ""}
            if is_switch(group, field.name):  # the basic ones are all off
                options = {"action": argparse.BooleanOptionalAction if everything else "store_true"}
            default = "" if field.default in ("", None, ()) or field.default is False else f" [{show(field.default)}]"
            section.add_argument(flag(field.name), help=(docs[field.name] + default).replace("%", "%%"), **options)
    return parser
