"""Before Ray: a study from its settings, or one that goes on, with every problem that needs the data told at once.

Nothing is written but phantoms and the study's folder.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.copies import file_hash
from train_fn.data import DataReport, Splits, load_splits, make_splits, read_manifest, unreadable_images
from train_fn.metrics import MODES
from train_fn.nano import CHECKPOINT
from train_fn.storage import Storage
from train_fn.worker import versions
from tune.journal import Journal, StudyLock
from tune.provenance import base_hash, data_hash, git_state
from tune.results import Goal
from tune.settings import Settings, SettingsError, flag, goal, load_space, study_directory
from tune.store_check import check_store
from tune.uris import tracking_uri


@dataclass(frozen=True)
class Study:
    """A study that can start, or go on: settings without problems, and its data."""

    settings: Settings
    name: str
    directory: Path
    goals: tuple[Goal, ...]
    positive: str
    splits: Splits
    data_report: DataReport
    plan: dict[str, Any]
    """What is fixed before the first trial, as plan.json and study.json hold it."""
    storage: Storage
    journal: Journal = field(compare=False)
    lock: StudyLock = field(compare=False)

    @property
    def metric(self) -> str:
        """The first goal's name."""
        return self.goals[0][0]


def prepare(settings: Settings, say: Callable[[str], None]) -> Study:
    """A new study: read, check and split the data. Raises SettingsError with every problem found."""
    data = settings.data
    problems: list[str] = []
    manifest = Path(data.data)
    if data.data == "phantoms":
        from train_fn.phantoms import generate

        say(f"Generating {data.num_phantoms} phantoms (no --data given)")
        folder = Path(settings.study.results) / f"phantoms-{data.num_phantoms}-{data.split_seed}"
        manifest = generate(folder, data.num_phantoms, data.split_seed)
    root = Path(data.image_root) if data.image_root else manifest.parent
    parts: dict[str, list[dict[str, Any]] | None] = {}
    for name, path in (("data", manifest), ("val_data", data.val_data), ("test_data", data.test_data)):
        parts[name] = None
        if path:
            parts[name], found = read_manifest(Path(path), root)
            problems += [f"`{flag(name)}`: {text}" for text in found]
    images = [entry["image"] for entries in parts.values() for entry in entries or []]
    if images:
        say(f"Checking {len(images)} images")
    problems += unreadable_images(images)
    if problems:
        raise SettingsError(problems)
    say("Looking for near-copies")
    splits, report, found = make_splits(
        parts["data"] or [],
        parts["val_data"],
        parts["test_data"],
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
        contradictions=data.contradictions,
    )
    problems += found
    problems += check_model_type(settings.model.model)
    goals = tuple(goal(text) for text in settings.study.metric or (("auroc",) if splits.candidates else ("loss",)))
    positive = data.positive_label or ("Malignant" if "Malignant" in splits.candidates else "")
    problems += check_goals(goals, splits, positive)
    settings = with_absolute_paths(settings)
    name = settings.study.name or time.strftime("study-%Y%m%d-%H%M%S")
    directory = Path(settings.study.results).resolve() / name
    if (directory / "plan.json").exists():
        problems.append(
            f"`--name` must be new, but {directory} holds a study: choose another name, or go on with --resume {name}"
        )
    problems += check_store(settings, directory, tracking_uri(settings.study.mlflow_uri), say)
    if not problems:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"`--results` must be a folder that can be written, but {directory}: {error.strerror}")
    if problems:
        raise SettingsError(problems)
    plan = {
        "study_id": uuid.uuid4().hex,
        "settings": settings.to_dict(),
        "tracking_uri": tracking_uri(settings.study.mlflow_uri),
        "data_report": dataclasses.asdict(report),
        "goals": goals,
        "candidates": splits.candidates,
        "positive_label": positive,
        "class_counts": {part: splits.class_counts(part) for part in ("train", "validation", "test")},
        "data_hash": data_hash(splits),
        "base_hash": base_hash(model_directory(settings)),
        "space_hash": space_hash(settings.study.space),
        "versions": versions(),
        "git": git_state(),
    }
    held = lock(directory)
    journal = Journal(directory / "journal.jsonl")
    storage = Storage.under(settings.study.storage, directory)
    return Study(settings, name, directory, goals, positive, splits, report, plan, storage, journal, held)


def resume(settings: Settings) -> Study:
    """A study that goes on. Raises SettingsError when it runs, or when what it rests on has changed."""
    found = study_directory(settings.command.resume or settings.command.replay, settings.study.results)
    assert found, "the command line was checked for this"
    directory = found.resolve()
    held = lock(directory)
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    splits = load_splits(directory / "splits.json")
    images = [sample.image for sample in (*splits.train, *splits.validation, *splits.test)]
    problems = unreadable_images(images)
    if problems:
        raise SettingsError(problems)
    now = {
        "splits_hash": ("splits.json", file_hash(directory / "splits.json")),
        "data_hash": ("the images, questions and answers", data_hash(splits)),
        "base_hash": (f"the base model {settings.model.model}", base_hash(model_directory(settings))),
        "space_hash": (f"the space {settings.study.space}", space_hash(settings.study.space)),
    }
    problems = [
        f"{what} must stay as the study was begun with (sha256 {plan[key]:.12}...), but is now {value:.12}...: put it "
        f"back, or begin a new study"
        for key, (what, value) in now.items()
        if plan[key] != value
    ]
    if problems:
        raise SettingsError(problems)
    plan["settings"] = settings.to_dict()
    return Study(
        settings=settings,
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        positive=plan["positive_label"],
        splits=splits,
        data_report=DataReport(**plan["data_report"]),
        plan=plan,
        storage=Storage.under(settings.study.storage, directory),
        journal=Journal(directory / "journal.jsonl"),
        lock=held,
    )


def lock(directory: Path) -> StudyLock:
    """The study's lock, held. Raises SettingsError when another process runs the study."""
    held = StudyLock(directory)
    if not held.acquire():
        raise SettingsError(
            [f"one process runs a study, but another one runs {directory.name}: wait for it, or end it"]
        )
    return held


def model_directory(settings: Settings) -> Path:
    """Where the base model lies."""
    return CHECKPOINT if settings.model.model == "nano" else Path(settings.model.model)


def space_hash(space: str) -> str:
    """sha256 of the file that defines a search space."""
    return file_hash(Path(load_space(space)[0].__code__.co_filename))


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with paths that hold in any folder: workers, and a study that goes on, may run elsewhere."""
    study, model = settings.study, settings.model
    if model.model != "nano":
        model = dataclasses.replace(model, model=str(Path(model.model).resolve()))
    if study.space.endswith(".py"):
        study = dataclasses.replace(study, space=str(Path(study.space).resolve()))
    if study.first_points:
        study = dataclasses.replace(study, first_points=str(Path(study.first_points).resolve()))
    if prior := study_directory(study.warm_start, study.results) if study.warm_start else None:
        study = dataclasses.replace(study, warm_start=str(prior.resolve()))
    return dataclasses.replace(settings, study=study, model=model)


def check_goals(goals: tuple[Goal, ...], splits: Splits, positive: str) -> list[str]:
    """Whether the data can give every goal."""
    names = [name for name, _ in goals if name in MODES]
    closed = [name for name in names if name != "loss"]
    if not splits.candidates and closed:
        return [
            f"`--metric` must be loss for data without a small closed set of answers, but got {', '.join(closed)}: "
            f"leave it out"
        ]
    if positive and positive not in splits.candidates:
        known = ", ".join(splits.candidates) or "none, for lack of a closed set"
        return [f"`--positive-label` must be an answer of the data ({known}), but got {positive!r}"]
    if {"sensitivity", "specificity"} & set(names) and not positive:
        return [f"`--metric` {', '.join(names)} needs a class: give --positive-label"]
    return []


def check_model_type(model: str) -> list[str]:
    """Whether transformers has an image-text-to-text class for the base."""
    if model == "nano":
        return []
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind in KNOWN or kind in ("hulumed_qwen2", "hulumed_qwen3"):
        return []
    return [
        f"`--model` {model!r} must be an image-text-to-text model that transformers knows, but its model_type is "
        f"{kind!r}: the known ones are hulumed_qwen2, hulumed_qwen3, {', '.join(sorted(KNOWN))}"
    ]
