"""The settings of a study, the command line derived from them, and every check that needs neither Ray nor torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
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

SCHEDULERS = ("asha", "median", "none")
SAMPLERS = ("tpe", "random", "gp", "cmaes", "qmc")
REPORT_TO = ("mlflow", "tensorboard", "wandb")


class SettingsError(Exception):
    """The command line or what it names is wrong; holds every problem found."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


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
    sampler: str = "tpe"
    """How points are chosen: tpe, random, gp, cmaes, or qmc."""
    metric: str = ""
    """Validation metric to tune on. Not given: auroc, or loss where there is no small closed set of answers."""
    workers_per_trial: int = 1
    """Worker processes (one GPU each, or CPU cores) that train one trial together under ZeRO."""
    lanes: int = 0
    """Trials trained side by side. 0: as many as GPUs (or cores) and workers per trial allow."""
    device: str = "auto"
    """gpu, cpu, or auto: GPUs if the cluster has one now. An autoscaling cluster starts without: say gpu there, and
    how many lanes."""
    study_seed: int = 0
    """Seed of the search."""
    results: str = "results"
    """Folder for studies: splits, adapters, study.json."""
    name: str = ""
    """Name of the study. Not given: date and time."""
    experiment: str = "vlm-tune"
    """MLflow experiment. The store is MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""
    report_to: tuple[str, ...] = ("mlflow",)
    """Where to record: mlflow, tensorboard (event files in each trial's runs/), wandb; several with commas."""
    verbose: bool = False
    """Show what Ray and the workers print."""


GROUPS: tuple[type, ...] = (StudySettings, ModelSettings, DataSettings, TrialSettings)


@dataclass(frozen=True)
class Settings:
    """All settings of a command line; `pinned` holds the trial settings that were given, which the search leaves be."""

    study: StudySettings
    model: ModelSettings
    data: DataSettings
    trial: TrialSettings
    pinned: tuple[str, ...]


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
    groups = [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in GROUPS
    ]
    pinned = tuple(field.name for field in dataclasses.fields(TrialSettings) if field.name in values)
    settings = Settings(*groups, pinned)  # type: ignore[call-arg, arg-type]  # in the order of GROUPS
    problems += check(settings)
    if problems:
        raise SettingsError(problems)
    return settings


# ------------------------------------------------------------------------------------------------ rules


def check(settings: Settings) -> list[str]:
    """Every broken rule that can be told without reading data, GPUs or the model's weights."""
    study, data, model = settings.study, settings.data, settings.model
    found: list[str] = []

    def rule(name: str, value: Any, holds: bool, text: str, fix: str) -> None:
        if not holds:
            found.append(f"`{flag(name)}` {text}, but got {value!r}: {fix}")

    for name, least in (("confirm", 0), ("confirm_seeds", 1), ("trials", 1), ("workers_per_trial", 1), ("lanes", 0)):
        value = getattr(study, name)
        rule(name, value, value >= least, f"must be at least {least}", "give a larger whole number")
    schedulers, samplers = ", ".join(SCHEDULERS), ", ".join(SAMPLERS)
    rule("scheduler", study.scheduler, study.scheduler in SCHEDULERS, "must be known", f"choose from {schedulers}")
    rule("sampler", study.sampler, study.sampler in SAMPLERS, "must be known", f"choose from {samplers}")
    rule("grace_period", study.grace_period, study.grace_period >= 1, "must be at least 1", "1 is the default")
    metrics = ", ".join(MODES)
    rule("metric", study.metric, study.metric in ("", *MODES), "must be a known metric", f"choose from {metrics}")
    for name in study.report_to:
        rule("report_to", name, name in REPORT_TO, "must be a known place", f"choose from {', '.join(REPORT_TO)}")
    if "wandb" in study.report_to and importlib.util.find_spec("wandb") is None:
        found.append("`--report-to` wandb needs the package wandb: pip install wandb")
    for name in ("val_fraction", "test_fraction"):
        value = getattr(data, name)
        rule(name, value, 0 < value < 1, "must be between 0 and 1", "0.2 is usual")
    if max(data.val_fraction, data.test_fraction) < 1 <= data.val_fraction + data.test_fraction:
        found.append(
            f"`--val-fraction` and `--test-fraction` must leave images to train on, but together are "
            f"{data.val_fraction + data.test_fraction:g}: lower one"
        )
    rule("device", study.device, study.device in ("auto", "gpu", "cpu"), "must be auto, gpu or cpu", "auto is usual")
    known = ("keep", "drop", "train")
    rule(
        "contradictions", data.contradictions, data.contradictions in known, "must be keep, drop or train", "see --help"
    )
    rule("num_phantoms", data.num_phantoms, data.num_phantoms >= 30, "must be at least 30", "the default works")
    rule("dtype", model.dtype, model.dtype in DTYPES, "must be a known format", f"choose from {', '.join(DTYPES)}")
    asked = [name for name in ("bf16", "fp16") if getattr(model, name)]
    if len(asked) + (model.dtype != "auto") > 1:
        found.append(
            f"`--bf16`, `--fp16` and `--dtype` must not contradict each other, but got {', '.join(map(flag, asked))} "
            f"and --dtype {model.dtype}: keep one"
        )
    rule("max_image_tokens", model.max_image_tokens, model.max_image_tokens >= 0, "must not be negative", "0: no limit")
    for name, value in (("split_seed", data.split_seed), ("study_seed", study.study_seed)):
        rule(name, value, 0 <= value < 2**32, "must fit 32 bits", "give a whole number from 0 to 4294967295")
    rule("per_device_eval_batch_size", model.per_device_eval_batch_size, model.per_device_eval_batch_size >= 1,
         "must be at least 1", "16 is the default")  # fmt: skip
    rule("feature_cache_gib", model.feature_cache_gib, 0 <= model.feature_cache_gib < float("inf"),
         "must not be negative", "0 turns the cache off")  # fmt: skip
    slash = study.name != Path(study.name).name if study.name else False
    rule("name", study.name, not slash, "must be a plain folder name", "leave out slashes")
    if data.data == "phantoms":
        for name in ("image_root", "val_data", "test_data"):
            value = getattr(data, name)
            rule(name, value, not value, "goes with --data", "give --data MANIFEST, or leave it out")
    for name in ("data", "val_data", "test_data"):
        value = getattr(data, name)
        if value and not (name == "data" and value == "phantoms"):
            rule(name, value, Path(value).is_file(), "must be an existing manifest", "check the path")
    if data.image_root:
        rule("image_root", data.image_root, Path(data.image_root).is_dir(), "must be a folder", "check the path")
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


class Pinned:
    """An Optuna trial in which some parameters have been decided on the command line: they are not asked for."""

    def __init__(self, trial: Any, values: dict[str, Any]) -> None:
        self._trial = trial
        self._values = values

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._trial, name)
        if not name.startswith("suggest_"):
            return attribute
        return lambda parameter, *args, **options: (
            self._values[parameter] if parameter in self._values else attribute(parameter, *args, **options)
        )


def searched_settings(settings: Settings, space: Callable[[Any], dict[str, Any]], trial: Any) -> dict[str, Any]:
    """The trial settings of one point of the space, over those of the command line. Raises ValueError for an unknown
    name or one that was pinned but that the space computes from others."""
    pinned = {name: getattr(settings.trial, name) for name in settings.pinned}
    found = space(Pinned(trial, pinned))
    clash = [name for name in pinned if name in found and found[name] != pinned[name]]
    if clash:
        options = ", ".join(map(flag, clash))
        raise ValueError(f"computes {options} from what it searches: leave the option out, or use another space")
    return dataclasses.asdict(TrialSettings.from_dict(dataclasses.asdict(settings.trial) | found))


class Probe:
    """Stands in for an Optuna trial in checks: answers with the guide's value, else with an end of the range."""

    def __init__(self, values: dict[str, Any], end: int) -> None:
        self._values = values
        self._end = end
        self.number = 0
        self.asked: set[str] = set()

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked.add(name)
        return self._values.get(name, choices[self._end])

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        self.asked.add(name)
        return self._values.get(name, (low, high)[self._end])

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        self.asked.add(name)
        return self._values.get(name, (low, high)[self._end])


def check_space(settings: Settings) -> list[str]:
    """Whether the space exists and its first point and both ends of its ranges make settings that can be trained."""
    where = f"`--space` {settings.study.space!r}"
    try:
        space, guide = load_space(settings.study.space)
    except ValueError as error:
        return [f"`--space` {error}"]
    except Exception as error:  # a user's own file: whatever it raises is what they must mend
        return [f"{where} must be importable, but raised {type(error).__name__}: {error}"]
    found: list[str] = []
    for values, end in ((guide, 0), ({}, 0), ({}, -1)):
        probe = Probe(values, end)
        try:
            point = searched_settings(settings, space, probe)
        except Exception as error:
            return [f"{where} {error}" if isinstance(error, ValueError) else f"{where} raised {error!r}: mend it"]
        if stray := sorted(set(values) - probe.asked - set(settings.pinned)):
            names = ", ".join(stray)
            found.append(f"{where}: GUIDE must name what the space asks for, but has {names}: mend its name")
        found += [
            f"{where}: {text}" for text in TrialSettings(**point).problems(max(1, settings.study.workers_per_trial))
        ]
    return list(dict.fromkeys(found))
