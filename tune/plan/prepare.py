"""Before Ray: a new study from its settings (`prepare`), or one that goes on (`resume`).

Both report every problem at once. They write only phantoms, the study's folder with its empty journal and lock, and the
mark that the user has begun a study with this space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.data.manifest import Parts, asked_by_default, divide, read_manifest, unreadable_images
from train_fn.data.samples import Splits
from train_fn.data.settings import DataSettings, split_rules, task_rules
from train_fn.data.splits_file import load_splits
from train_fn.data.splitting import DataReport, make_splits
from train_fn.model.checkpoint import base_hash, resolve_model
from train_fn.model.hub_ids import is_hub_model
from train_fn.model.preflight import base_problems
from train_fn.model.unchanged import data_hash
from train_fn.scoring.metrics import METRICS
from train_fn.scoring.own_metric import is_own_metric, read_own_metric, scorer
from train_fn.support.files import DamagedFile, file_hash
from train_fn.support.storage import Storage
from train_fn.worker import versions
from tune.config.base_shape import read_base_shape
from tune.config.paths import SettingsError, study_directory
from tune.config.settings import Settings, flag
from tune.config.space import space_hash
from tune.config.space_check import check_space
from tune.config.trust import check_metric_trust, remember_metric, remember_space
from tune.config.uris import tracking_uri
from tune.plan.checks import (
    check_aim,
    check_global_batch,
    check_goals,
    check_model_type,
    check_name,
    check_warm_start,
    family_of,
    shipped,
    usual_aim,
    usual_goal,
    with_plain_names,
)
from tune.plan.hub_names import download_base, fetch_again, find_named, manifest_path
from tune.plan.provenance import git_state
from tune.records.bucket import Lease
from tune.records.goals import COSTS, Goal, goal
from tune.records.journal import Journal, StudyLock, holder
from tune.records.plan import read_plan
from tune.records.process import REPLAY, STUDY, SYNC, named
from tune.tracking.store_check import check_store


@dataclass(frozen=True)
class Study:
    """A study that can start or go on: settings without problems, its data, and its files."""

    settings: Settings
    name: str
    directory: Path
    goals: tuple[Goal, ...]
    splits: Splits
    data_report: DataReport
    plan: dict[str, Any]
    """The content of plan.json and study.json that is fixed before the first trial."""
    storage: Storage
    journal: Journal = field(compare=False)
    lock: StudyLock = field(compare=False)
    lease: Lease = field(compare=False)
    then: Study | None = field(default=None, compare=False)
    """The study that begins when this one has a winner (`--model-small`)."""

    @property
    def metric(self) -> str:
        """The first goal's name."""
        return self.goals[0][0]


def prepare(settings: Settings, say: Callable[[str], None]) -> Study:
    """A new study: read, check and split the data. Raises SettingsError with every problem."""
    settings, base, problems = find_named(settings, say)
    data = settings.data
    try:
        parts = read_manifests(settings, say)
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from error
    say("Looking for near-copies")
    splits, report, found = make_splits(
        parts["data"] or [],
        parts["val_data"],
        parts["test_data"],
        split_rules(data, settings.model.image_options),
        task_rules(data),
    )
    splits = dataclasses.replace(splits, max_new_tokens=data.max_new_tokens, allow_flips=data.allow_flips)
    try:
        splits = with_own_metric(splits, settings.study.metric)
    except ValueError as error:
        found.append(f"`--metric` {error}")
    problems += found if problems else [*found, *check_model_type(settings.model.model)]
    if not problems and base:
        problems += download_base(base, say)
    if not problems and is_hub_model(settings.model.model):  # a space's ranges may depend on the base
        settings = dataclasses.replace(settings, base=read_base_shape(str(resolve_model(settings.model.model))))
        problems += check_space(settings)
    if not problems and not shipped(settings):
        say("Checking the base model, and what its processor makes of the data")
        problems += base_problems(settings.model, settings.trial, splits, say)
    settings = with_plain_names(settings, splits)
    goals = tuple(goal(text) for text in settings.study.metric or (usual_goal(splits),))
    problems += check_aim(settings, splits)
    aim = settings.study.decide or usual_aim(settings, goals, splits)
    settings = dataclasses.replace(settings, study=dataclasses.replace(settings.study, decide=aim))
    splits = dataclasses.replace(splits, decide=aim, prevalence=settings.study.prevalence)
    problems += check_goals(settings, goals, splits)
    problems += check_global_batch(settings, splits)
    problems += check_warm_start(settings, goals)
    settings = with_absolute_paths(settings)
    name = name_of(settings)
    directory = Path(settings.study.results).resolve() / name
    uri = tracking_uri(settings.study.mlflow_uri)
    problems += check_name(directory)
    problems += check_store(settings, directory, uri, say)
    if problems:
        raise SettingsError(problems)
    storage = Storage.under(settings.study.storage, directory)
    lease = take_lease(storage, new=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            [f"`--results` must be a folder that can be written, but {directory}: {error.strerror}: choose another"]
        ) from error
    plan = {
        "study_id": uuid.uuid4().hex,
        "settings": settings.to_dict(),
        "tracking_uri": uri,
        "data_report": dataclasses.asdict(report),
        "goals": goals,
        "candidates": splits.candidates,
        "positive_label": splits.tasks[0].positive if len(splits.tasks) == 1 else data.positive_label,
        "tasks": [dataclasses.asdict(task) for task in splits.tasks],
        "class_counts": {part: splits.class_counts(part) for part in ("train", "validation", "test")},
        "data_hash": data_hash(splits),
        "base_hash": base_hash(settings.model.model),
        "family": family_of(settings.model.model),
        "space_hash": space_hash(settings.study.space),
        "first_points": settings.first_points,
        "base": dataclasses.asdict(settings.base),
        "versions": versions(),
        "git": git_state(),
    }
    mark_programs(settings, splits, say)
    lock = take_lock(directory)
    journal = Journal(directory / "journal.jsonl")
    return Study(settings, name, directory, goals, splits, report, plan, storage, journal, lock, lease)


def name_of(settings: Settings) -> str:
    """The name of a new study."""
    return settings.study.name or time.strftime("study-%Y%m%d-%H%M%S")


def resume(settings: Settings, say: Callable[[str], None] = print) -> Study:
    """A study that goes on. Raises SettingsError when it runs, is damaged, or rests on something that has changed."""
    found = study_directory(settings.command.resume or settings.command.replay, settings.study.results)
    assert found, "the command line was checked for this"
    directory = found.resolve()
    lock = take_lock(directory, REPLAY if settings.command.replay else STUDY)
    try:
        plan = read_plan(directory)
        splits = load_splits(directory / "splits.json", plan["positive_label"])
        journal = Journal(directory / "journal.jsonl")
        report = DataReport(**plan["data_report"])
    except (DamagedFile, OSError, TypeError) as error:
        raise SettingsError([f"the study's files must be whole, but {error}"]) from error
    problems = check_journal(directory, journal)
    images = list(splits.images)
    problems += unreadable_images(images, settings.data.max_image_pixels, options=settings.model.image_options)
    problems += check_metric_trust(splits.own_metric)
    if problems:
        raise SettingsError(problems)
    base = settings.model.model
    fetch_again(base, say)
    hashes = {
        "splits_hash": ("splits.json", file_hash(directory / "splits.json")),
        "data_hash": ("the images, questions and answers", data_hash(splits)),
        "base_hash": (f"the base model {base}", base_hash(base, plan["format"])),
        "space_hash": (f"the space {settings.study.space}", space_hash(settings.study.space)),
    }
    problems = [
        f"{what} must stay as the study was begun with (sha256 {plan[key]:.12}...), but is now {value:.12}...: put it "
        f"back, or begin a new study"
        for key, (what, value) in hashes.items()
        if plan[key] != value
    ]
    if problems:
        raise SettingsError(problems)
    if plan["format"] == 1:  # its hash leaves out some of the files that decide a prompt
        plan["base_hash"] = base_hash(base)
    plan |= {"settings": settings.to_dict(), "first_points": settings.first_points}
    plan |= {"base": dataclasses.asdict(settings.base)}
    storage = Storage.under(settings.study.storage, directory)
    mark_programs(settings, splits, say)
    return Study(
        settings=settings,
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        splits=splits,
        data_report=report,
        plan=plan,
        storage=storage,
        journal=journal,
        lock=lock,
        lease=take_lease(storage) if settings.command.resume else Lease(storage),
    )


def read_manifests(settings: Settings, say: Callable[[str], None]) -> Parts:
    """The samples of --data, --val-data and --test-data; None where there is none. Raises SettingsError."""
    data = settings.data
    manifest = generate_phantoms(settings, say) if data.data == "phantoms" else manifest_path(data.data)
    parts, notes, problems = read_parts(data, manifest)
    for note in dict.fromkeys(notes):
        say(note)
    parts, found = divide(parts, data.question, any(text.startswith("group=") for text in data.all_columns))
    problems += found
    if asked := asked_by_default(parts):
        say(asked)
    images = [image for samples in parts.values() for sample in samples or [] for image in sample.images]
    if images:
        say(f"Checking {len(set(images))} images")
    problems += unreadable_images(images, data.max_image_pixels, say, settings.model.image_options)
    if problems:
        raise SettingsError(problems)
    return parts


def read_parts(data: DataSettings, manifest: Path) -> tuple[Parts, list[str], list[str]]:
    """The samples of --data (read from `manifest`), --val-data and --test-data, notes, and problems. Opens no image."""
    parts: Parts = {}
    problems: list[str] = []
    notes: list[str] = []
    for name, path in (("data", manifest), ("val_data", data.val_data), ("test_data", data.test_data)):
        parts[name] = None
        if path:
            path = manifest_path(str(path))
            root = data.image_root or (path if path.is_dir() else path.parent)
            reading = read_manifest(path, Path(root), data.all_columns, data.question, multilabel=data.multilabel)
            parts[name] = reading.samples
            notes += reading.notes
            problems += [f"`{flag(name)}`: {text}" for text in reading.problems]
    return parts, notes, problems


def more_problems(settings: Settings, problems: Sequence[str]) -> list[str]:
    """Problems in the manifests of a new study whose command line has others: the user sees all of them at once. None
    are looked for if one of those concerns the data, because the manifests may be read in the wrong way then."""
    data, command = settings.data, settings.command
    paths = [path for path in (data.data, data.val_data, data.test_data) if path]
    concerned = any(flag(field.name) in text for field in dataclasses.fields(data) for text in problems)
    if concerned or command.resume or command.show or command.replay or not all(map(os.path.exists, paths)):
        return []  # phantoms and data on the hub are not there either
    with contextlib.suppress(OSError):
        return read_parts(data, Path(data.data))[2]
    return []


def with_own_metric(splits: Splits, metrics: Sequence[str]) -> Splits:
    """The splits with the user's own metric, if --metric names one. Raises ValueError if it cannot be used."""
    own = [text.removeprefix("-") for text in metrics if is_own_metric(text)]
    if not own:
        return splits
    metric = read_own_metric(own[0])
    if len(own) > 1 or metric.name in {*METRICS, *COSTS}:
        raise ValueError(f"must name one function of one's own, of a new name, but got {', '.join(own)}: change it")
    score = scorer(metric)
    for answer in dict.fromkeys(sample.answer for sample in splits.validation):
        score(answer, answer)  # what it cannot take is known before the first trial
    return dataclasses.replace(splits, own_metric=metric)


def generate_phantoms(settings: Settings, say: Callable[[str], None]) -> Path:
    """The manifest of `--data phantoms`, in the results folder; the images are generated if they are not there."""
    from train_fn.data.phantoms import generate

    data = settings.data
    say(f"Generating {data.num_phantoms} phantoms (no --data given)")
    folder = Path(settings.study.results) / f"phantoms-{data.num_phantoms}-{data.split_seed}"
    return generate(folder, data.num_phantoms, data.split_seed)


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute paths: workers, and a study that goes on, may run in another folder."""
    study, model = settings.study, settings.model
    if model.model != "nano" and not is_hub_model(model.model):
        model = dataclasses.replace(model, model=str(Path(model.model).resolve()))
    if study.space.endswith(".py"):
        study = dataclasses.replace(study, space=str(Path(study.space).resolve()))
    study = dataclasses.replace(study, metric=tuple(map(absolute_metric, study.metric)))
    if study.first_points:
        study = dataclasses.replace(study, first_points=str(Path(study.first_points).resolve()))
    if prior := study_directory(study.warm_start, study.results) if study.warm_start else None:
        study = dataclasses.replace(study, warm_start=str(prior.resolve()))
    return dataclasses.replace(settings, study=study, model=model)


def absolute_metric(text: str) -> str:
    """A --metric, with an absolute path if it is a user's own."""
    if not is_own_metric(text):
        return text
    path, _, name = text.removeprefix("-").rpartition(":")
    return f"{'-' if text.startswith('-') else ''}{Path(path).resolve()}:{name}"


def check_journal(directory: Path, journal: Journal) -> list[str]:
    """Whether trials have run although the journal is empty: they would run again under other numbers."""
    numbers = sorted(path.name for path in (directory / "trials").glob("[0-9]*"))
    if journal.events or not numbers:
        return []
    return [
        f"journal.jsonl must hold what the study has done, but it is empty or gone, and trials/ has {numbers[0]} to "
        f"{numbers[-1]}: put it back from a copy, or begin a new study"
    ]


def take_lock(directory: Path, work: str = STUDY) -> StudyLock:
    """The study's lock, for some work. Raises SettingsError when another process has it."""
    lock = StudyLock(directory)
    if not lock.acquire(work):
        process = holder(directory)
        does = {REPLAY: "replays a trial of", SYNC: "delivers the records of"}.get(
            (process or {}).get("work", ""), "runs"
        )
        where = f" {named(process)}" if process else ""
        raise SettingsError(
            [f"one process runs a study, but another one{where} {does} {directory.name}: wait for it, or end it"]
        )
    return lock


def take_lease(storage: Storage, new: bool = False) -> Lease:
    """The lease of a study on object storage.

    Raises:
        SettingsError: another machine runs the study, the storage cannot be used, or a `new` study's name is taken.
    """
    lease = Lease(storage)
    try:
        if new and storage.uri and storage.read(storage.directory / "plan.json") is not None:
            problem = (
                f"`--name` must be new, but {storage.uri} holds a study: choose another, or "
                f"--resume {shlex.quote(storage.uri)}"
            )
        else:
            problem = lease.acquire()
    except (OSError, ValueError) as error:
        problem = f"`--storage` must be a place that can be read and written, but {storage.uri}: {error}"
    if problem:
        raise SettingsError([problem])
    return lease


def mark_programs(settings: Settings, splits: Splits, say: Callable[[str], None]) -> None:
    """Mark the space and the user's own metric as programs with which this user has begun a study (see `trust`). A
    failure costs only a message."""
    try:
        remember_space(settings.study.space)
        remember_metric(splits.own_metric)
    except OSError as error:
        say(f"The next --resume needs --space again, since the user's cache cannot be written: {error}")
