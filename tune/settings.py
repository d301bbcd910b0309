"""The settings of a study, the command line derived from them, and every check that needs neither Ray nor torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.metrics import MODES
from train_fn.settings import DTYPES, ModelSettings, TrialSettings
from train_fn.storage import Storage
from tune.uris import scrub, strip_credentials

SCHEDULERS = ("asha", "median", "none")
SAMPLERS = ("tpe", "random", "gp", "cmaes", "qmc", "grid", "nsga2")
COSTS = {"trainable_params": "min", "train_s": "min"}  # goals beside the metrics: what a trial costs
# What may change when a study goes on: how it is run and shown, and these, upwards only.
FREE = ("results", "hang_timeout", "lanes", "lanes_per_gpu", "device", "verbose", "profile", "trace", "report_to",
        "stop_when", "confirm", "confirm_seeds", "folds", "require", "register")  # fmt: skip
BUDGETS = ("trials", "time_budget", "gpu_hours", "max_failures")
REPORT_TO = ("mlflow", "tensorboard", "wandb")


class SettingsError(Exception):
    """The command line or what it names is wrong; holds every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [scrub(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The labelled images."""

    data: str = "phantoms"
    """Manifest: a JSON list of {"image", "text", "answer", "label"}. phantoms: generated ultrasound phantoms."""
    image_root: str = ""
    """Folder from which the manifest's image paths start. Not given: the manifest's own folder."""
    val_data: str = ""
    """Manifest of validation images. Not given: a stratified share of --data."""
    test_data: str = ""
    """Manifest of test images. Not given: a stratified share of --data."""
    val_fraction: float = 0.2
    """Share of --data that validation gets when --val-data is not given."""
    test_fraction: float = 0.2
    """Share of --data that the test gets when --test-data is not given."""
    contradictions: str = "keep"
    """What becomes of near-copies with different answers: keep, drop (leave them out), or train (only there)."""
    split_seed: int = 0
    """Seed of the split (and of the phantoms)."""
    positive_label: str = ""
    """Answer whose sensitivity and specificity are reported. Not given: Malignant, where it occurs."""
    num_phantoms: int = 240
    """Images to generate for --data phantoms."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The search."""

    trials: int = 20
    """Trials to run. The first is always the guide's own settings."""
    time_budget: str = ""
    """Wall time after which no trial goes on, such as 90m, 2h or 30s: those that run then can be resumed."""
    gpu_hours: float = 0.0
    """Hours of GPU time (of CPU workers where there is none), summed over all trials, after which none goes on. 0: no
    limit."""
    max_failures: int = 0
    """Failed trials at which the study ends. 0: no limit."""
    stop_when: str = ""
    """Ends the search when a completed trial reaches this validation score, such as auroc>=0.9."""
    space: str = "lora"
    """Search space: a module of search_spaces/ or a Python file with `space(trial)` and `GUIDE`."""
    scheduler: str = "asha"
    """Early stopping by epoch: asha (arXiv:1810.05934; goes on with the better third at epochs 1, 3, 9, ...), median
    (stops what is below the median), or none. The guide's trial always runs to its end."""
    grace_period: int = 1
    """Epochs that every trial gets before it may be stopped."""
    confirm: int = 0
    """After the search, train this many of the best trials, and the guide's, again over fresh seeds, and choose the
    winner by the mean. 0: the best single score wins."""
    confirm_seeds: int = 3
    """Seeds of the confirmation."""
    folds: int = 0
    """Confirm over this many folds of training and validation images instead of seeds (near-copies stay together)."""
    require: tuple[str, ...] = ()
    """Rules that the winner must keep on validation, such as sensitivity>=0.9; several with commas."""
    sampler: str = "tpe"
    """How points are chosen: tpe, random, gp, cmaes, qmc, grid (ranges at four points each), or nsga2."""
    first_points: str = ""
    """JSON list of points to try right after the guide's: objects of the names that the space asks for."""
    warm_start: str = ""
    """A study (name or folder) whose completed trials the sampler starts from, as far as they fit the space."""
    metric: tuple[str, ...] = ()
    """Validation metric to tune on. Not given: auroc, or loss where there is no small closed set of answers. Several
    with commas give a Pareto front, the first decides in the end; trainable_params and train_s are goals too. A minus
    before a name: less is better. With several goals every trial runs to its end."""
    workers_per_trial: int = 1
    """Worker processes (one GPU each, or CPU cores) that train one trial together under ZeRO."""
    lanes: int = 0
    """Trials trained side by side. 0: as many as GPUs (or cores) and workers per trial allow."""
    lanes_per_gpu: int = 1
    """Lanes that share a GPU, where a trial has one worker: what a small model or micro-batch leaves idle, another
    trial uses."""
    hang_timeout: float = 600.0
    """Seconds without a sign of life after which a worker is taken for frozen: it is ended, and its trial goes on from
    the last checkpoint. Collectives wait as long."""
    device: str = "auto"
    """gpu, cpu, or auto: GPUs if the cluster has one now. An autoscaling cluster starts without: say gpu there, and
    how many lanes."""
    study_seed: int = 0
    """Seed of the search."""
    results: str = "results"
    """Folder for studies: splits, adapters, study.json."""
    name: str = ""
    """Name of the study. Not given: date and time."""
    storage: str = ""
    """Object storage (s3://bucket/prefix or gs://) to which the study's folder is copied as it grows, for nodes that
    share no folder. Not given: --results is a folder that all nodes see."""
    experiment: str = "vlm-tune"
    """MLflow experiment."""
    mlflow_uri: str = ""
    """MLflow's store or server. Not given: MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    register: str = ""
    """Register the winner as a version of the MLflow model of this name."""
    report_to: tuple[str, ...] = ("mlflow",)
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

    resume: str = ""
    """Go on with this study after a kill, or with a larger --trials or other budget. Its settings stay."""
    show: str = ""
    """Print the table and the paths of this study, also while it runs."""
    replay: str = ""
    """Train one trial of this study again (--trial) and compare its metrics."""
    trial: int = 0
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

    def to_dict(self) -> dict[str, Any]:
        """What `stored_values` reads back."""
        parts = ("study", "model", "data", "trial")
        return {part: dataclasses.asdict(getattr(self, part)) for part in parts} | {"pinned": self.pinned}


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
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line. Raises SettingsError with everything that is wrong with it."""
    parser = build_parser()
    problems: list[str] = []
    # --lora_r as well as --lora-r: the guide writes its options with underscores.
    argv = [re.sub("^--[^=]*", lambda found: found[0].replace("_", "-"), word) for word in argv]
    flags = {flag(field.name): field for group in GROUPS for field in dataclasses.fields(group)}
    try:
        given, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise SettingsError([f"{error}: see --help"]) from error
    for word in unknown:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            fix = f"did you mean {near[0]}?" if near else "see --help"
            problems.append(f"options must be known ones, but got {word!r}: {fix}")
        elif argv[list(argv).index(word) - 1] not in unknown:
            problems.append(f"every value must follow an option, but got {word!r}: see --help")
    values: dict[str, Any] = {}
    for name, text in vars(given).items():
        field = flags[flag(name)]
        kind = typing.get_type_hints(next(g for g in GROUPS if field in dataclasses.fields(g)))[name]
        try:
            values[name] = text if isinstance(text, bool) else convert(text, kind)
        except ValueError:
            what = {int: "a whole number", float: "a number"}.get(kind, "a number")
            problems.append(f"`{flag(name)}` must be {what}, but got {text!r}: for example {show(field.default)}")
    pinned = tuple(field.name for field in dataclasses.fields(TrialSettings) if field.name in values)
    commands = [name for name in ("resume", "show", "replay") if values.get(name)]
    if len(commands) > 1:
        problems.append(f"one thing at a time, but got {' and '.join(map(flag, commands))}: keep one")
    elif commands:
        if "://" in values[commands[0]]:
            fetched = fetch(values[commands[0]], Path(values.get("results", "results")), problems)
            values[commands[0]] = fetched
        found = study_directory(values[commands[0]], values.get("results", "results"))
        if found is None:
            problems.append(
                f"`{flag(commands[0])}` must name a study, but got {values[commands[0]]!r}: give its name (and "
                f"--results) or its folder, in which plan.json lies"
            )
        elif commands != ["show"]:
            values, pinned, changed = resumed_values(values, found)
            problems += changed
    groups = [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in GROUPS
    ]
    settings = Settings(*groups, pinned)  # type: ignore[call-arg, arg-type]  # in the order of GROUPS
    problems += [] if problems and commands else check(settings)
    if problems:
        raise SettingsError(problems)
    return settings


def fetch(uri: str, results: Path, problems: list[str]) -> str:
    """The name of a study that lies on object storage, its files fetched into `results` where they are missing."""
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    storage = Storage(results.resolve() / name, uri)
    try:
        for file in ("splits.json", "journal.jsonl", "plan.json"):  # the last makes the folder a study
            storage.pull(storage.directory / file)
    except (OSError, ValueError) as error:
        problems.append(f"`--resume` must name a study that can be fetched, but {uri!r}: {error}")
    return name


def study_directory(name: str, results: str) -> Path | None:
    """The folder of a study that was begun, by its name under `results` or by its path."""
    return next((folder for folder in (Path(results) / name, Path(name)) if (folder / "plan.json").is_file()), None)


def resumed_values(given: dict[str, Any], directory: Path) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """The stored settings of a study with those of the command line over them, which of them are pinned, and a problem
    for every one that must not change."""
    stored = json.loads((directory / "plan.json").read_text(encoding="utf-8"))["settings"]
    values = {name: value for part in ("study", "model", "data", "trial") for name, value in stored[part].items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values["results"] = str(directory.parent)
    problems = []
    for name, value in given.items():
        if name in BUDGETS:
            try:
                old, new = (seconds(v) if name == "time_budget" else v for v in (values[name], value))
            except (ValueError, KeyError):
                continue  # `check` tells of it
            if (old and new and new < old) or (old == 0 and new and name != "trials"):
                limit = values[name] or "none"
                problems.append(f"`{flag(name)}` must not fall when a study goes on, but {limit} became {value}")
        elif name not in FREE and name in values and values[name] != value:
            problems.append(
                f"`{flag(name)}` must stay what the study was begun with, {show(values[name])!r}, but got "
                f"{show(value)!r}: leave it out, or begin a new study"
            )
    return values | given, tuple(stored["pinned"]), problems


def seconds(text: str) -> float:
    """A duration such as 30s, 90m or 2h in seconds; empty: 0. Raises ValueError."""
    if not text:
        return 0.0
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]] if text[-1] in "smh" else float(text)


def comparison(text: str) -> tuple[str, str, float]:
    """A rule such as sensitivity>=0.9 as (metric, ">=" or "<=", value). Raises ValueError."""
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*", text)
    if not found or found[1] not in MODES:
        raise ValueError(f"must be METRIC>=X or METRIC<=X with one of {', '.join(MODES)}")
    return found[1], found[2], float(found[3])


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

    def rule(name: str, holds: object, text: str, fix: str) -> None:
        if not holds:
            found.append(f"`{flag(name)}` {text}, but got {given[name]!r}: {fix}")

    at_least = {"confirm": 0, "confirm_seeds": 1, "trials": 1, "workers_per_trial": 1, "lanes": 0, "lanes_per_gpu": 1,
                "max_failures": 0, "grace_period": 1, "num_phantoms": 30, "per_device_eval_batch_size": 1,
                "max_image_tokens": 0}  # fmt: skip
    for name, least in at_least.items():
        rule(name, given[name] >= least, f"must be at least {least}", "give a larger whole number")
    for name, no_limit in (("gpu_hours", "0: no limit"), ("feature_cache_gib", "0 turns the cache off")):
        rule(name, 0 <= given[name] < float("inf"), "must not be negative", no_limit)
    one_of = {"scheduler": SCHEDULERS, "sampler": SAMPLERS, "dtype": DTYPES, "device": ("auto", "gpu", "cpu"),
              "contradictions": ("keep", "drop", "train")}  # fmt: skip
    for name, known in one_of.items():
        rule(name, given[name] in known, "must be a known one", f"choose from {', '.join(known)}")
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
        for text in texts:
            try:
                read(text)
            except (ValueError, KeyError) as error:
                why = "must be a number with s, m or h, such as 90m" if name == "time_budget" else error
                found.append(f"`{flag(name)}` {why}, but got {text!r}: see --help")
    several = len(study.metric) > 1
    rule("sampler", not (several and study.sampler == "cmaes"), "knows one goal only", "take tpe or nsga2")
    if study.warm_start and not goes_on and study_directory(study.warm_start, study.results) is None:
        found.append(f"`--warm-start` must name a study, but got {study.warm_start!r}: give its name or its folder")
    places = ", ".join(REPORT_TO)
    rule("report_to", set(study.report_to) <= set(REPORT_TO), "must name known places", f"choose from {places}")
    for name, needed in (("report_to", "wandb"), ("sampler", "cmaes")):
        if needed in getattr(study, name) and importlib.util.find_spec(needed) is None:
            found.append(f"`{flag(name)}` {needed} needs the package {needed}: pip install {needed}")
    for name in ("val_fraction", "test_fraction"):
        rule(name, 0 < given[name] < 1, "must be between 0 and 1", "0.2 is usual")
    if max(data.val_fraction, data.test_fraction) < 1 <= data.val_fraction + data.test_fraction:
        found.append(
            f"`--val-fraction` and `--test-fraction` must leave images to train on, but together are "
            f"{data.val_fraction + data.test_fraction:g}: lower one"
        )
    rule("hang_timeout", 1 <= study.hang_timeout < 1e6, "must be at least 1 s", "600 is the default")
    asked = [name for name in ("bf16", "fp16") if getattr(model, name)]
    if len(asked) + (model.dtype != "auto") > 1:
        found.append(
            f"`--bf16`, `--fp16` and `--dtype` must not contradict each other, but got {', '.join(map(flag, asked))} "
            f"and --dtype {model.dtype}: keep one"
        )
    for name in ("split_seed", "study_seed"):
        rule(name, 0 <= given[name] < 2**32, "must fit 32 bits", "give a whole number from 0 to 4294967295")
    remote = not study.storage or re.match("(s3|gs)://.+", study.storage)
    rule("storage", remote, "must begin with s3:// or gs://", "a folder is given by --results")
    # Others see command lines, and settings are written down.
    for name, fix in (("storage", "leave them to AWS_ACCESS_KEY_ID and the like"),
                      ("mlflow_uri", "give the whole address as MLFLOW_TRACKING_URI instead")):  # fmt: skip
        rule(name, given[name] == getattr(study, name), "must hold no key or password", fix)
    rule("name", study.name == Path(study.name).name, "must be a plain folder name", "leave out slashes")
    if data.data == "phantoms":
        for name in ("image_root", "val_data", "test_data"):
            rule(name, not given[name], "goes with --data", "give --data MANIFEST, or leave it out")
    for name in ("data", "val_data", "test_data"):
        if given[name] and not (name == "data" and data.data == "phantoms") and not goes_on:
            rule(name, Path(given[name]).is_file(), "must be an existing manifest", "check the path")
    if data.image_root and not goes_on:
        rule("image_root", Path(data.image_root).is_dir(), "must be a folder", "check the path")
    if model.model != "nano":
        found += check_model_directory(Path(model.model))
    found += settings.trial.problems(max(1, study.workers_per_trial))
    return found + [text for text in check_space(settings) if not any(text.endswith(known) for known in found)]


def check_model_directory(directory: Path) -> list[str]:
    """What can be told of a base model's directory without transformers."""
    where = f"`--model` {str(directory)!r}"
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return [f"{where} must be a model directory with a config.json: give the folder of the base model, or nano"]
    except ValueError as error:
        return [f"{where}: config.json must be JSON, but {error}: fetch the model again"]
    found = []
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        found.append(f"{where}: config.json must name a model_type: fetch the model again")
    if not list(directory.glob("*.safetensors")):
        found.append(f"{where} must hold its weights as *.safetensors: convert them (pickled weights are not read)")
    return found


def load_space(name: str) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """`space` and `GUIDE` of a module of search_spaces/ or of a Python file. Raises ValueError."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"space_{Path(name).stem}", name)
        if spec is None or spec.loader is None or not Path(name).is_file():
            raise ValueError(f"must be an existing Python file, but got {name!r}: check the path")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(f"search_spaces.{name}")
        except ModuleNotFoundError as error:
            folder = Path(__file__).parents[1] / "search_spaces"
            known = ", ".join(sorted(path.stem for path in folder.glob("[a-z]*.py")))
            raise ValueError(f"must be one of {known} or a Python file, but got {name!r}: check the name") from error
    if not callable(getattr(module, "space", None)) or not isinstance(getattr(module, "GUIDE", None), dict):
        raise ValueError(f"must define a function `space` and a dict `GUIDE`, but {name!r} does not: see search_spaces")
    return module.space, module.GUIDE


GRID_POINTS = 4  # of a range, its ends among them


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
            return self._trial.suggest_categorical(name, sorted(choices))

        return suggest

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._trial, name)
        if not name.startswith("suggest_"):
            return attribute
        return lambda parameter, *args, **options: (
            self._values[parameter] if parameter in self._values else attribute(parameter, *args, **options)
        )


def searched_settings(
    settings: Settings, space: Callable[[Any], dict[str, Any]], trial: Any, number: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """The trial settings of one point of the space, over those of the command line, and the names of those that the
    space decides. Raises ValueError for an unknown name, or a pinned one that the space computes from others."""
    pinned = {name: getattr(settings.trial, name) for name in settings.pinned}
    study, grid = settings.study, settings.study.sampler == "grid"
    found = space(Pinned(trial, pinned, number, grid, first_points(study.space, study.first_points) if grid else ()))
    clash = [name for name in pinned if name in found and found[name] != pinned[name]]
    if clash:
        options = ", ".join(map(flag, clash))
        raise ValueError(f"computes {options} from what it searches: leave the option out, or use another space")
    return dataclasses.asdict(TrialSettings.from_dict(dataclasses.asdict(settings.trial) | found)), sorted(found)


class Probe:
    """Stands in for an Optuna trial in checks: answers with the guide's value, else with an end of the range."""

    def __init__(self, values: dict[str, Any], end: int) -> None:
        self._values = values
        self._end = end
        self.asked: set[str] = set()
        self.outside: list[str] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked.add(name)
        value = self._values.get(name, choices[self._end])
        if value not in choices:
            self.outside.append(f"{name} must be one of {', '.join(map(str, choices))}, but got {value!r}")
            return choices[self._end]
        return value

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        self.asked.add(name)
        value = self._values.get(name, (low, high)[self._end])
        if not isinstance(value, int | float) or not low <= value <= high:
            self.outside.append(f"{name} must lie between {low:g} and {high:g}, but got {value!r}")
            return (low, high)[self._end]
        return value

    suggest_int = suggest_float


def read_points(path: str) -> list[dict[str, Any]]:
    """The points of --first-points. Raises ValueError."""
    try:
        points = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"must be a readable file, but {path!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"must be a JSON list of objects, but {path!r}: {error}") from error
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise ValueError(f"must be a JSON list of objects, but {path!r} holds something else")
    return points


@functools.cache
def first_points(space: str, path: str) -> list[dict[str, Any]]:
    """What a search begins with: the space's guide, and the points of --first-points. Raises ValueError."""
    return [load_space(space)[1], *(read_points(path) if path else [])]


def check_space(settings: Settings) -> list[str]:
    """Whether the space exists and its first points and both ends of its ranges make settings that can be trained."""
    where = f"`--space` {settings.study.space!r}"
    try:
        space, guide = load_space(settings.study.space)
    except ValueError as error:
        return [f"`--space` {error}"]
    except Exception as error:  # a user's own file: whatever it raises is what they must mend
        return [f"{where} must be importable, but raised {type(error).__name__}: {error}"]
    points = [(f"{where}: GUIDE", guide, 0), (where, {}, 0), (where, {}, -1)]
    if settings.study.first_points and not (settings.command.resume or settings.command.replay):
        try:
            given = read_points(settings.study.first_points)
        except ValueError as error:
            return [f"`--first-points` {error}"]
        points += [(f"`--first-points` point {number}", point, 0) for number, point in enumerate(given)]
    grid = dataclasses.replace(settings.study, sampler="tpe")  # a grid's points lie inside the ranges
    settings = dataclasses.replace(settings, study=grid)
    found: list[str] = []
    for name, values, end in points:
        probe = Probe(values, end)
        try:
            point, _ = searched_settings(settings, space, probe)
        except Exception as error:
            return [f"{where} {error}" if isinstance(error, ValueError) else f"{where} raised {error!r}: mend it"]
        found += [f"{name}: {text}: change it" for text in probe.outside]
        if stray := sorted(set(values) - probe.asked - set(settings.pinned)):
            found.append(f"{name} must name what the space asks for, but has {', '.join(stray)}: mend its name")
        found += [
            f"{where}: {text}" for text in TrialSettings(**point).problems(max(1, settings.study.workers_per_trial))
        ]
    return list(dict.fromkeys(found))
