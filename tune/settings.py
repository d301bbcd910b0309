"""The settings of a study, the command line derived from them, and every check that needs neither Ray nor torch."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from train_fn.copies import cache_folder
from train_fn.files import DamagedFile, read_json, unwritable, write_file
from train_fn.metrics import MODES
from train_fn.settings import (
    MAX_SEED,
    PATH,
    SHOWN,
    ModelSettings,
    Range,
    TextRule,
    TrialSettings,
    broken_rule,
    broken_rules,
    matching,
    one_of,
    rules,
)
from train_fn.storage import Storage
from tune.bucket import refresh
from tune.plan import PARTS, read_plan
from tune.uris import scrub, strip_credentials

SCHEDULERS = ("asha", "median", "none")
SAMPLERS = ("tpe", "random", "gp", "cmaes", "qmc", "grid", "nsga2")
COSTS = {"trainable_params": "min", "train_s": "min"}  # goals beside the metrics: what a trial costs
# What may change when a study goes on: how it is run and shown, and these, upwards only.
FREE = ("results", "hang_timeout", "lanes", "lanes_per_gpu", "device", "verbose", "profile", "trace", "report_to",
        "stop_when", "confirm", "confirm_seeds", "folds", "require", "register")  # fmt: skip
BUDGETS = ("trials", "time_budget", "gpu_hours", "max_failures")
REPORT_TO = ("mlflow", "tensorboard", "wandb")
# Empty, these say "every module may get an adapter"; on --resume, the others say "no longer".
EMPTY = ("lora_exclude_patterns",)
EMPTY_ON_RESUME = ("stop_when", "require", "register")
MAX_SECONDS = 10**6 * 3600
MAX_FILE = 10_000_000  # bytes of a space or of first points

# Text rules. A folder name of at most 200 bytes leaves room for what is written beside it under other names.
NAME = TextRule(
    "a plain folder name of at most 200 bytes: no slash, no `-`, `.` or space at its beginning, no space at its end",
    lambda text: re.fullmatch(r"(?![-. ])[^/\\]+(?<! )", text) is not None and len(text.encode()) <= 200,
)
RESULTS = TextRule(f"{PATH.words}, and no address", lambda text: PATH.holds(text) and "://" not in text)
STORAGE = matching("(s3|gs)://[^/]+(/.*)?", "an address that begins with s3://BUCKET or gs://BUCKET")
MLFLOW_URI = matching(
    r"[A-Za-z][\w.+-]*:.+|databricks(-uc)?",
    "the address of a store, such as http://HOST:5000 or sqlite:////FOLDER/mlflow.db",
)
# MLflow's own rules (mlflow.utils.validation).
EXPERIMENT = matching(".{1,500}", "a name of at most 500 characters")
MODEL_NAME = matching(r"(?!\.)[^/:]{1,250}", "a name of at most 250 characters, no `/` or `:`, no `.` at its beginning")


class SettingsError(Exception):
    """The command line or what it names is wrong; holds every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [scrub(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def user_paths() -> Iterator[None]:
    """Turn what the operating system says of a file or folder into a SettingsError. Other errors pass."""
    try:
        os.getcwd()  # every relative path needs it
        yield
    except OSError as error:
        if error.errno is None:  # a library's own error
            raise
        what = "the working folder or a disk" if error.filename is None else repr(error.filename)
        text = f"{what} must be usable, but {error.strerror}: mend it, or choose another place"
        raise SettingsError([text]) from error
    except UnicodeEncodeError as error:
        what = repr(error.object[error.start : error.end])
        raise SettingsError([f"every name must be UTF-8, but one has {what}: rename the file or folder"]) from error


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The labelled images."""

    data: Annotated[str, PATH] = "phantoms"
    """Manifest: a JSON list of {"image", "text", "answer", "label"}. phantoms: generated ultrasound phantoms."""
    image_root: Annotated[str, PATH] = ""
    """Folder from which the manifest's image paths start. Not given: the manifest's own folder."""
    val_data: Annotated[str, PATH] = ""
    """Manifest of validation images. Not given: a stratified share of --data."""
    test_data: Annotated[str, PATH] = ""
    """Manifest of test images. Not given: a stratified share of --data."""
    val_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Share of --data that validation gets when --val-data is not given."""
    test_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Share of --data that the test gets when --test-data is not given."""
    contradictions: Annotated[str, one_of(("keep", "drop", "train"))] = "keep"
    """What becomes of near-copies with different answers: keep, drop (leave them out), or train (only there)."""
    copies_distance: Annotated[int, Range(-1, 16)] = 8
    """Bits of 64 in which the perceptual hashes of near-copies may differ. -1: no image counts as a copy of another."""
    max_image_pixels: Annotated[int, Range(1, 178_956_970)] = 50_000_000  # Pillow's own limit
    """Most pixels that an image may have, checked before it is decoded."""
    split_seed: Annotated[int, Range(0, MAX_SEED)] = 0
    """Seed of the split (and of the phantoms)."""
    positive_label: str = ""
    """Answer whose sensitivity and specificity are reported. Not given: Malignant, where it occurs."""
    num_phantoms: Annotated[int, Range(30, 100_000)] = 240
    """Images to generate for --data phantoms."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The search."""

    trials: Annotated[int, Range(1, 100_000)] = 20
    """Trials to run. The first is always the guide's own settings."""
    time_budget: str = ""
    """Wall time after which no trial goes on, such as 90m, 2h or 30s: those that run then can be resumed."""
    gpu_hours: Annotated[float, Range(0, 10**6)] = 0.0
    """Hours of GPU time (of CPU workers where there is none), summed over all trials, after which none goes on. 0: no
    limit."""
    max_failures: Annotated[int, Range(0, 100_000)] = 0
    """Failed trials at which the study ends. 0: no limit."""
    stop_when: str = ""
    """Ends the search when a completed trial reaches this validation score, such as auroc>=0.9."""
    space: Annotated[str, PATH] = "lora"
    """Search space: a module of search_spaces/ or a Python file with `space(trial)` and `GUIDE`."""
    scheduler: Annotated[str, one_of(SCHEDULERS)] = "asha"
    """Early stopping by epoch: asha (arXiv:1810.05934; goes on with the better third at epochs 1, 3, 9, ...), median
    (stops what is below the median), or none. The guide's trial always runs to its end."""
    grace_period: Annotated[int, Range(1, 10_000)] = 1
    """Epochs that every trial gets before it may be stopped."""
    confirm: Annotated[int, Range(0, 1000)] = 0
    """After the search, train this many of the best trials, and the guide's, again over fresh seeds, and choose the
    winner by the mean. 0: the best single score wins."""
    confirm_seeds: Annotated[int, Range(1, 1000)] = 3
    """Seeds of the confirmation."""
    folds: Annotated[int, Range(0, 1000)] = 0
    """Confirm over this many folds of training and validation images instead of seeds (near-copies stay together)."""
    require: tuple[str, ...] = ()
    """Rules that the winner must keep on validation, such as sensitivity>=0.9; several with commas."""
    sampler: Annotated[str, one_of(SAMPLERS)] = "tpe"
    """How points are chosen: tpe, random, gp, cmaes, qmc, grid (ranges at four points each), or nsga2."""
    first_points: Annotated[str, PATH] = ""
    """JSON list of points to try right after the guide's: objects of the names that the space asks for."""
    warm_start: Annotated[str, PATH] = ""
    """A study (name or folder) whose completed trials the sampler starts from, as far as they fit the space."""
    metric: tuple[str, ...] = ()
    """Validation metric to tune on. Not given: auroc, or loss where there is no small closed set of answers. Several
    with commas give a Pareto front, the first decides in the end; trainable_params and train_s are goals too. A minus
    before a name: less is better. With several goals every trial runs to its end."""
    workers_per_trial: Annotated[int, Range(1, 4096)] = 1
    """Worker processes (one GPU each, or CPU cores) that train one trial together under ZeRO."""
    lanes: Annotated[int, Range(0, 4096)] = 0
    """Trials trained side by side. 0: as many as GPUs (or cores) and workers per trial allow."""
    lanes_per_gpu: Annotated[int, Range(1, 64)] = 1
    """Lanes that share a GPU, where a trial has one worker: what a small model or micro-batch leaves idle, another
    trial uses."""
    hang_timeout: Annotated[float, Range(1, 10**6)] = 600.0
    """Seconds without a sign of life after which a worker is taken for frozen: it is ended, and its trial goes on from
    the last checkpoint. Collectives wait as long."""
    device: Annotated[str, one_of(("auto", "gpu", "cpu"))] = "auto"
    """gpu, cpu, or auto: GPUs if the cluster has one now. An autoscaling cluster starts without: say gpu there, and
    how many lanes."""
    study_seed: Annotated[int, Range(0, MAX_SEED)] = 0
    """Seed of the search."""
    results: Annotated[str, RESULTS] = "results"
    """Folder for studies: splits, adapters, study.json."""
    name: Annotated[str, NAME] = ""
    """Name of the study. Not given: date and time."""
    storage: Annotated[str, STORAGE] = ""
    """Object storage (s3://bucket/prefix or gs://) to which the study's folder is copied as it grows, for nodes that
    share no folder. Not given: --results is a folder that all nodes see."""
    experiment: Annotated[str, EXPERIMENT] = "vlm-tune"
    """MLflow experiment."""
    mlflow_uri: Annotated[str, MLFLOW_URI] = ""
    """MLflow's store or server. Not given: MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    register: Annotated[str, MODEL_NAME] = ""
    """Register the winner as a version of the MLflow model of this name."""
    report_to: Annotated[tuple[str, ...], one_of(REPORT_TO)] = ("mlflow",)
    """Where to record: mlflow, tensorboard (event files in each trial's runs/), wandb; several with commas."""
    verbose: bool = False
    """Show what Ray and the workers print."""
    profile: bool = False
    """Measure where each trial's time goes: data, encoder, forward, backward, optimizer, communication, and so on."""
    trace: bool = False
    """Write a torch profiler trace of optimizer steps 4 to 6 of each trial (trace.json.gz in its folder)."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to do with a study that exists (its name, or its folder)."""

    resume: Annotated[str, PATH] = ""
    """Go on with this study after a kill, or with a larger --trials or other budget. Its settings stay."""
    show: Annotated[str, PATH] = ""
    """Print the table and the paths of this study, also while it runs."""
    replay: Annotated[str, PATH] = ""
    """Train one trial of this study again (--trial) and compare its metrics."""
    trial: Annotated[int, Range(0, 10**6)] = 0
    """Number of the trial to --replay."""
    doctor: bool = False
    """Check machines, model, data and storage for these settings, and start no study."""


GROUPS: tuple[type, ...] = (StudySettings, ModelSettings, DataSettings, TrialSettings, Command)


@dataclass(frozen=True)
class Settings:
    """All settings of a command line; `pinned` holds the trial settings that were given, which the search leaves be."""

    study: StudySettings
    model: ModelSettings
    data: DataSettings
    trial: TrialSettings
    command: Command
    pinned: tuple[str, ...]
    first_points: tuple[dict[str, Any], ...] = ()
    """The points of --first-points: read once, since a study that goes on elsewhere has no such file."""

    def to_dict(self) -> dict[str, Any]:
        """What `stored_settings` reads back."""
        return {part: dataclasses.asdict(getattr(self, part)) for part in PARTS} | {"pinned": self.pinned}


# ------------------------------------------------------------------------------------------------ command line


def field_docs(group: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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


def is_file(path: str | Path) -> bool:
    """Whether a path that a user gives is a regular file; what cannot be looked at is none."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Whether a path that a user gives is a folder; what cannot be looked at is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def fetch(option: str, uri: str, results: Path, problems: list[str]) -> str:
    """The name of a study that lies on object storage, its files fetched into `results` unless newer ones are there."""
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    shown = strip_credentials(uri)
    where = f"`{option}` must name a study on object storage, such as s3://BUCKET/PREFIX/STUDY, but got {shown!r}"
    if shown != uri:
        problems.append(f"{where} with a key or password: leave them to AWS_ACCESS_KEY_ID and the like")
    elif not STORAGE.holds(uri) or uri.count("/") < 3 or not NAME.holds(name):
        problems.append(f"{where}: mend the address")
    if problems:
        return name
    storage = Storage(results.absolute() / name, uri)
    try:
        problems += refresh(storage)
    except (OSError, ValueError) as error:
        problems.append(f"{where}, which cannot be fetched ({error}): check the address, your keys and --results")
        return name
    if not is_file(storage.directory / "plan.json"):
        problems.append(f"{where}, where no plan.json lies: check the address")
    return name


def refresh_stored(directory: Path) -> list[str]:
    """Bring a study's folder up to date with its copy on object storage, if it has one. Returns problems."""
    place = stored_settings(directory)[1].get("storage", "")
    try:
        return refresh(Storage.under(place, directory.resolve()))
    except (OSError, ValueError) as error:
        return [f"the study's copy on {place} must be readable, but {error}: check your keys and the network"]


def study_directory(name: str, results: str) -> Path | None:
    """The folder of a study that was begun, by its name under `results` or by its path."""
    return next((folder for folder in (Path(results) / name, Path(name)) if is_file(folder / "plan.json")), None)


def part_label(part: str) -> Callable[[str], str]:
    """How a message names a setting in plan.json."""
    return lambda name: f"settings.{part}.{name}"


def stored_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study's plan, and the settings in it by field. A setting that an older version did not know is not among them.
    Raises SettingsError."""
    path = directory / "plan.json"
    try:
        plan = read_plan(directory)
    except OSError as error:
        raise SettingsError([f"the study's plan must be readable, but {path}: {error.strerror}"]) from error
    except DamagedFile as error:
        raise SettingsError([str(error)]) from error
    fix = "put it back from a copy, or go on with the version that wrote it"
    stored = plan["settings"]
    problems: list[str] = []
    values: dict[str, Any] = {}
    for part, group in zip(PARTS, GROUPS, strict=False):
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in stored[part].items()}
        names = [field.name for field in dataclasses.fields(group)]
        if unknown := [name for name in found if name not in names]:
            problems.append(f"{path} must hold known settings, but has {SHOWN.repr(unknown)}: {fix}")
        found = {name: value for name, value in found.items() if name in names}
        problems += [f"{path}: {text}" for text in broken_rules(group(**found), part_label(part), fix).values()]
        values |= found
    pinned = stored.get("pinned")
    known = [field.name for field in dataclasses.fields(TrialSettings)]
    if not isinstance(pinned, list) or not all(name in known for name in pinned):
        problems.append(f"{path} must hold a list of settings as settings.pinned, but has {SHOWN.repr(pinned)}: {fix}")
    points = plan.get("first_points", [])
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        problems.append(f"{path} must hold a list of objects as first_points, but has {SHOWN.repr(points)}: {fix}")
    if problems:
        raise SettingsError(problems)
    return plan, values


def resumed_values(
    given: dict[str, Any], directory: Path, problems: list[str]
) -> tuple[dict[str, Any], tuple[str, ...], list[dict[str, Any]] | None]:
    """The stored settings of a study with those of the command line over them, which of them are pinned, and the first
    points, or None when an older version has not stored them. Adds a problem for every setting that must not change.

    Raises:
        SettingsError: plan.json cannot be read.
    """
    plan, stored = stored_settings(directory)
    defaults = {field.name: field.default for group in GROUPS for field in dataclasses.fields(group)}
    values = stored | {"results": str(directory.parent)}
    for name, value in given.items():
        old = values.get(name, defaults[name])
        if name in BUDGETS:
            try:
                before, now = (seconds(limit) if name == "time_budget" else limit for limit in (old, value))
            except ValueError:
                continue  # `check` reports it
            if (before and now and now < before) or (before == 0 and now and name != "trials"):
                was = old or "none"
                problems.append(f"`{flag(name)}` must not fall when a study goes on, but {was} became {value}")
        elif name not in (*FREE, "space", "resume", "replay", "trial") and old != value:
            problems.append(
                f"`{flag(name)}` must stay what the study was begun with, {show(old)!r}, but got {show(value)!r}: "
                f"leave it out, or begin a new study"
            )
    problems += check_trust(plan, values.get("space", defaults["space"]), given.get("space", ""))
    values |= given
    if is_own(given.get("space", "")):
        values["space"] = str(Path(given["space"]).absolute())
    return values, tuple(plan["settings"]["pinned"]), plan.get("first_points")


def seconds(text: str) -> float:
    """A duration such as 30s, 90m or 2h in seconds; empty: 0. Raises ValueError."""
    if not text:
        return 0.0
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    found = float(text[:-1]) * unit if unit else float(text)
    if not 0 < found <= MAX_SECONDS:
        raise ValueError(f"must be a time above 0 and at most {MAX_SECONDS // 3600:,} h")
    return found


def comparison(text: str) -> tuple[str, str, float]:
    """A rule such as sensitivity>=0.9 as (metric, ">=" or "<=", value). Raises ValueError."""
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*", text)
    if not found or found[1] not in MODES:
        raise ValueError(f"must be METRIC>=X or METRIC<=X with one of {', '.join(MODES)}")
    name, sign, value = found[1], found[2], float(found[3])
    most = float("inf") if name == "loss" else 1.0
    if not (0 <= value <= most and value < float("inf")):
        reach = "at least 0" if name == "loss" else "from 0 to 1"
        raise ValueError(f"must compare with a value that {name} can have ({reach})")
    return name, sign, value


def holds(rule: tuple[str, str, float], metrics: dict[str, float]) -> bool:
    """Whether metrics keep a `comparison`."""
    name, sign, value = rule
    found = metrics.get(name, float("nan"))
    return found >= value if sign == ">=" else found <= value


def goal(text: str) -> tuple[str, str]:
    """A --metric such as auroc or -trainable_params as its name and "max" or "min". Raises ValueError."""
    name = text.removeprefix("-")
    if name not in MODES and name not in COSTS:
        raise ValueError(f"must be one of {', '.join([*MODES, *COSTS])}")
    return name, "min" if text.startswith("-") else {**MODES, **COSTS}[name]


# ------------------------------------------------------------------------------------------------ rules


def check(settings: Settings) -> list[str]:
    """Every broken rule that can be told without reading data, GPUs or the model's weights."""
    study, data, model = settings.study, settings.data, settings.model
    goes_on = settings.command.resume or settings.command.replay  # its manifest has been read, and is not needed again
    found: list[str] = []
    given = {**vars(study), **vars(data), **vars(model)}
    given |= {name: strip_credentials(given[name]) for name in ("storage", "mlflow_uri")}
    shown = dataclasses.replace(study, storage=given["storage"], mlflow_uri=given["mlflow_uri"])
    broken: dict[str, str] = {}
    for part in (shown, model, data):
        broken |= broken_rules(part, flag)
    found += broken.values()

    def rule(name: str, holds: object, text: str, fix: str) -> None:
        if name not in broken and not holds:
            found.append(f"`{flag(name)}` {text}, but got {SHOWN.repr(given[name])}: {fix}")

    alone = study.lanes_per_gpu == 1 or study.workers_per_trial == 1
    rule("lanes_per_gpu", alone, "must be 1 for trials of several workers, which need a GPU each", "leave one out")
    rule("folds", study.folds == 0 or study.folds >= 2, "must be at least 2", "0 confirms over seeds")
    rule("folds", not study.folds or study.confirm > 0, "needs --confirm", "add --confirm 3")
    readers: list[tuple[str, Callable[[str], Any], tuple[str, ...]]] = [
        ("metric", goal, study.metric),
        ("require", comparison, study.require),
        ("stop_when", comparison, (study.stop_when,) if study.stop_when else ()),
        ("time_budget", seconds, (study.time_budget,)),
    ]
    for name, read, texts in readers:
        for text in () if name in broken else texts:
            try:
                read(text)
            except ValueError as error:
                why = str(error) if str(error).startswith("must") else "must be a number"
                if name == "time_budget":
                    why += ", such as 90m, 2h or 30s"
                found.append(f"`{flag(name)}` {why}, but got {SHOWN.repr(text)}: see --help")
    names = [text.removeprefix("-") for text in study.metric]
    rule("metric", len(set(names)) == len(names), "must name each goal only once", "leave one out")
    several = len(study.metric) > 1
    rule("sampler", not (several and study.sampler == "cmaes"), "knows one goal only", "take tpe or nsga2")
    if study.warm_start and not goes_on:
        begun = study_directory(study.warm_start, study.results)
        rule("warm_start", begun, "must name a study", "give its name or its folder")
    rule("report_to", study.report_to, "must name a place", f"choose from {', '.join(REPORT_TO)}")
    for name, needed in (("report_to", "wandb"), ("sampler", "cmaes")):
        if needed in getattr(study, name) and importlib.util.find_spec(needed) is None:
            found.append(f"`{flag(name)}` {needed} needs the package {needed}: pip install {needed}")
    if not broken.keys() & {"val_fraction", "test_fraction"} and data.val_fraction + data.test_fraction >= 1:
        found.append(
            f"`--val-fraction` and `--test-fraction` must leave images to train on, but together are "
            f"{data.val_fraction + data.test_fraction:g}: lower one"
        )
    asked = [name for name in ("bf16", "fp16") if getattr(model, name)]
    if "dtype" not in broken and len(asked) + (model.dtype != "auto") > 1:
        found.append(
            f"`--bf16`, `--fp16` and `--dtype` must not contradict each other, but got {', '.join(map(flag, asked))} "
            f"and --dtype {model.dtype}: keep one"
        )
    # Others see command lines, and settings are written down.
    for name, fix in (("storage", "leave them to AWS_ACCESS_KEY_ID and the like"),
                      ("mlflow_uri", "give the whole address as MLFLOW_TRACKING_URI instead")):  # fmt: skip
        rule(name, given[name] == getattr(study, name), "must hold no key or password", fix)
    if data.data == "phantoms":
        for name in ("image_root", "val_data", "test_data"):
            rule(name, not given[name], "goes with --data", "give --data MANIFEST, or leave it out")
    for name in ("data", "val_data", "test_data"):
        if given[name] and not (name == "data" and data.data == "phantoms") and not goes_on:
            rule(name, is_file(given[name]), "must be an existing manifest", "check the path")
    if data.image_root and not goes_on:
        rule("image_root", is_folder(data.image_root), "must be a folder", "check the path")
    if not (settings.command.show or settings.command.doctor) and "results" not in broken:
        found += check_writable(Path(study.results))
    if model.model != "nano" and "model" not in broken:
        found += check_model_directory(Path(model.model))
    found += settings.trial.problems(max(1, study.workers_per_trial), flag)
    return found + ([] if {"space", "workers_per_trial"} & broken.keys() else check_space(settings))


def check_writable(results: Path) -> list[str]:
    """Whether files can be made in --results, or where that folder will be made."""
    if (found := unwritable(results.absolute())) is None:
        return []
    what = f"{str(results)!r}: {found[1]}"
    return [f"`--results` must be a folder in which files can be made, but {what}: choose another folder"]


def check_model_directory(directory: Path) -> list[str]:
    """What can be told of a base model's directory without transformers."""
    where = f"`--model` {str(directory)!r}"
    if not is_file(directory / "config.json"):
        return [f"{where} must be a model directory with a config.json: give the folder of the base model, or nano"]
    try:
        config = read_json(directory / "config.json", dict, "fetch the model again")
    except OSError as error:
        return [f"{where} must be readable, but its config.json: {error.strerror}: change its permissions"]
    except DamagedFile as error:
        return [f"{where}: {error}"]
    found = []
    if not isinstance(config.get("model_type"), str):
        found.append(f"{where}: config.json must name a model_type: fetch the model again")
    if not list(directory.glob("*.safetensors")):
        found.append(f"{where} must hold its weights as *.safetensors: convert them (pickled weights are not read)")
    return found


# ------------------------------------------------------------------------------------------------ search spaces


class SpaceError(ValueError):
    """A search space cannot be used; the message goes on from the space's name: "asks for ...", "must return ..."."""


def is_own(space: str) -> bool:
    """Whether a space is a Python file of the user, and none of search_spaces/."""
    return space.endswith(".py")


def read_space(space: str) -> bytes:
    """The source of a space. One process reads it once, so what runs is what was compared. Raises SpaceError."""
    folder = Path(__file__).resolve().parents[1] / "search_spaces"
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if not is_own(space) and space not in known:
        raise SpaceError(f"must be one of {', '.join(known)} or a Python file, but got {SHOWN.repr(space)}: check it")
    return read_source(os.path.abspath(space) if is_own(space) else str(folder / f"{space}.py"))


@functools.cache
def read_source(path: str) -> bytes:
    """The content of a Python file. Raises SpaceError."""
    if not is_file(path):
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
    """sha256 of the file that defines a space. Raises SpaceError."""
    return hashlib.sha256(read_space(space)).hexdigest()


def load_space(name: str) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """`space` and `GUIDE` of a module of search_spaces/ or of a Python file. Raises SpaceError."""
    return run_source(name, os.path.abspath(name), read_space(name))


@functools.cache
def run_source(name: str, path: str, source: bytes) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """`space` and `GUIDE` that a source defines. Not by an import, which would prefer a compiled file beside it."""
    module = types.ModuleType(f"space_{Path(name).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a user's own file: whatever it raises is what they must mend
        raise SpaceError(f"{name!r} must be importable, but raised {type(error).__name__}: {error}: mend it") from error
    space, guide = getattr(module, "space", None), getattr(module, "GUIDE", None)
    if not callable(space) or not isinstance(guide, dict):
        raise SpaceError(f"must define a function `space` and a dict `GUIDE`, but {name!r} does not: see search_spaces")
    return space, guide


def remembered(digest: str) -> Path:
    """The mark that this user has begun a study with a space of this hash, on this machine."""
    return cache_folder() / "spaces" / digest


def remember_space(space: str) -> None:
    """Leave that mark for a user's own space. Raises OSError."""
    if is_own(space):
        mark = remembered(space_hash(space))
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_file(mark, b"")


def check_trust(plan: dict[str, Any], stored: str, given: str) -> list[str]:
    """Whether the space of a study that goes on may run.

    A study's folder, plan.json with it, may come from somebody else, and a space is a program. Its file must have the
    hash that the plan names; and the user must have begun a study with a file of that hash on this machine, or name the
    file on the command line.

    Args:
        stored: the space that the plan names.
        given: --space.
    """
    if not given and not is_own(stored):
        return []
    space = given or stored
    try:
        digest = space_hash(space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    if digest != plan.get("space_hash"):
        return [
            f"`--space` must have the content that the study was begun with (sha256 "
            f"{SHOWN.repr(plan.get('space_hash'))}), but {space!r} has {digest!r}: put it back, or begin a new study"
        ]
    if given or remembered(digest).exists():
        return []
    return [
        f"`--space` must be given for a study that you have not begun on this machine, since its space is a program, "
        f"but got none: look at {space!r}, then add --space {shlex.quote(space)}"
    ]


GRID_POINTS = 4  # of a range, its ends among them


NAME_OF_PARAMETER = matching(r"(?!\.)[\w.: -]{1,250}", "letters, digits, `_`, `.`, `:`, `-` and spaces, at most 250")
RESERVED = ("number", "settings", "chosen", "known_epochs")  # what Ray Tune's configuration of a trial holds beside


class Pinned:
    """An Optuna trial, under its number in this study, in which some parameters have been decided on the command line:
    they are not asked for. With `grid`, ranges are asked for at a few points only, and at those of the `first` ones."""

    def __init__(
        self, trial: Any, values: dict[str, Any], number: int, grid: bool = False, first: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._trial = trial
        self._values = values
        self._first = first
        self.number = number
        self.failed: Exception | None = None
        """What Optuna raised that is no fault of the space, such as an error of its storage."""
        if grid:
            self.suggest_float = self._suggest_from_grid(float)
            self.suggest_int = self._suggest_from_grid(int)

    def _suggest_from_grid(self, kind: type) -> Callable[..., Any]:
        def suggest(name: str, low: float, high: float, *, log: bool = False, **_: Any) -> Any:
            if name in self._values:
                return self._values[name]
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
            return self._values[name] if name in self._values else self._ask(attribute, name, *args, **options)

        return suggest

    def _ask(self, suggest: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        if not isinstance(name, str) or not NAME_OF_PARAMETER.holds(name) or name in RESERVED:
            raise SpaceError(
                f"must ask under names of {NAME_OF_PARAMETER.words}, other than {', '.join(RESERVED)}, but asks for "
                f"{SHOWN.repr(name)}: rename it"
            )
        try:
            return suggest(name, *args, **options)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise SpaceError(
                f"must ask for {name!r} as Optuna allows, but Optuna says {str(error).rstrip('.')!r}: mend its choices "
                f"or range, or ask under a second name"
            ) from error
        except Exception as error:
            self.failed = error
            raise


def searched_settings(
    settings: Settings, space: Callable[[Any], dict[str, Any]], trial: Any, number: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """The trial settings of one point of the space, over those of the command line, and the names of those that the
    space decides.

    Raises:
        SpaceError: the space raises, or what it returns cannot be trained, or a pinned setting is computed from others.
    """
    pinned = {name: getattr(settings.trial, name) for name in settings.pinned}
    grid = settings.study.sampler == "grid"
    asking = Pinned(trial, pinned, number, grid, first_points(settings) if grid else ())
    workers = max(1, settings.study.workers_per_trial)
    known = settings.trial.problems(workers)  # the command line's own, which `check` reports
    try:
        found = space(asking)
        if not isinstance(found, dict):
            raise SpaceError(f"must return a dict of settings, but returned {SHOWN.repr(found)}: see search_spaces")
        clash = [name for name in pinned if name in found and found[name] != pinned[name]]
        point = TrialSettings.from_dict(dataclasses.asdict(settings.trial) | found)
        problems = [text for text in point.problems(workers) if text not in known]
    except SpaceError:
        raise
    except (Exception, SystemExit) as error:  # a user's own function: whatever it raises is what they must mend
        if error is asking.failed:
            raise
        raise SpaceError(f"must return settings, but raised {type(error).__name__}: {error}: mend it") from error
    if clash:
        options = ", ".join(map(flag, clash))
        raise SpaceError(f"computes {options} from what it searches: leave the option out, or use another space")
    if problems:
        raise SpaceError(f"must return settings that can be trained: {'; '.join(problems)}")
    return dataclasses.asdict(point), sorted(found)


def read_points(path: str) -> list[dict[str, Any]]:
    """The points of --first-points. Raises ValueError."""
    if not is_file(path):
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
    """What a search begins with: the space's guide, and the points of --first-points. Raises SpaceError."""
    return [load_space(settings.study.space)[1], *settings.first_points]


def check_space(settings: Settings) -> list[str]:
    """Whether Optuna can search the space, and its first points and both ends of its ranges can be trained."""
    from tune.space_check import check_apart, problems_of_space

    if not is_own(settings.study.space):
        return problems_of_space(settings)
    try:
        read_space(settings.study.space)
    except SpaceError as error:
        return [f"`--space` {error}"]
    return check_apart(settings)
