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

from train_fn.data.manifest import read_manifest, unreadable_images
from train_fn.data.samples import Splits
from train_fn.data.splitting import DataReport, load_splits, make_splits
from train_fn.model.checkpoint import base_hash
from train_fn.model.preflight import base_problems
from train_fn.model.unchanged import data_hash
from train_fn.nano import CHECKPOINT
from train_fn.scoring.metrics import MODES
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.files import DamagedFile, file_hash
from train_fn.support.storage import Storage
from train_fn.worker import versions
from tune.config.paths import SettingsError, study_directory
from tune.config.settings import Settings, flag
from tune.config.space import space_hash
from tune.config.trust import remember_space
from tune.config.uris import tracking_uri
from tune.plan.provenance import git_state
from tune.records.bucket import Lease
from tune.records.goals import Goal, comparison, goal
from tune.records.journal import Journal, StudyLock, read_events
from tune.records.plan import read_plan
from tune.tracking.store_check import check_store


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
    lease: Lease = field(compare=False)

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
        from train_fn.data.phantoms import generate

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
    problems += unreadable_images(images, data.max_image_pixels, say)
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
        copies_distance=data.copies_distance,
    )
    problems += found
    problems += check_model_type(settings.model.model)
    if not problems and not shipped(settings):
        say("Checking the base model, and what its processor makes of the data")
        problems += base_problems(settings.model, settings.trial, splits)
    goals = tuple(goal(text) for text in settings.study.metric or (("auroc",) if splits.candidates else ("loss",)))
    positive = data.positive_label or ("Malignant" if "Malignant" in splits.candidates else "")
    problems += check_goals(settings, goals, splits, positive)
    settings = with_absolute_paths(settings)
    name = settings.study.name or time.strftime("study-%Y%m%d-%H%M%S")
    directory = Path(settings.study.results).resolve() / name
    if (directory / "plan.json").exists():
        problems.append(
            f"`--name` must be new, but {directory} holds a study: choose another name, or go on with --resume {name}"
        )
    elif (directory / "journal.jsonl").exists() and read_events(directory / "journal.jsonl"):
        problems.append(
            f"`--name` must be new, but {directory} holds a study whose plan.json is gone: choose another name, or put "
            f"plan.json back"
        )
    problems += check_store(settings, directory, tracking_uri(settings.study.mlflow_uri), say)
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
        "tracking_uri": tracking_uri(settings.study.mlflow_uri),
        "data_report": dataclasses.asdict(report),
        "goals": goals,
        "candidates": splits.candidates,
        "positive_label": positive,
        "class_counts": {part: splits.class_counts(part) for part in ("train", "validation", "test")},
        "data_hash": data_hash(splits),
        "base_hash": base_hash(model_directory(settings)),
        "space_hash": space_hash(settings.study.space),
        "first_points": settings.first_points,
        "versions": versions(),
        "git": git_state(),
    }
    note_space(settings, say)
    held = lock(directory)
    journal = Journal(directory / "journal.jsonl")
    return Study(settings, name, directory, goals, positive, splits, report, plan, storage, journal, held, lease)


def resume(settings: Settings, say: Callable[[str], None] = print) -> Study:
    """A study that goes on. Raises SettingsError when it runs, is damaged, or when what it rests on has changed."""
    found = study_directory(settings.command.resume or settings.command.replay, settings.study.results)
    assert found, "the command line was checked for this"
    directory = found.resolve()
    held = lock(directory)
    try:
        plan = read_plan(directory)
        splits = load_splits(directory / "splits.json")
        journal = Journal(directory / "journal.jsonl")
        report = DataReport(**plan["data_report"])
    except (DamagedFile, OSError, TypeError) as error:
        raise SettingsError([f"the study's files must be whole, but {error}"]) from error
    problems = journal_problems(directory, journal)
    images = [sample.image for sample in (*splits.train, *splits.validation, *splits.test)]
    problems += unreadable_images(images, settings.data.max_image_pixels)
    if problems:
        raise SettingsError(problems)
    now = {
        "splits_hash": ("splits.json", file_hash(directory / "splits.json")),
        "data_hash": ("the images, questions and answers", data_hash(splits)),
        "base_hash": (f"the base model {settings.model.model}", base_hash(model_directory(settings), plan["format"])),
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
    if plan["format"] == 1:  # from here on, all files that decide a prompt count
        plan["base_hash"] = base_hash(model_directory(settings))
    plan["settings"] = settings.to_dict()
    storage = Storage.under(settings.study.storage, directory)
    plan["first_points"] = settings.first_points
    note_space(settings, say)
    return Study(
        settings=settings,
        name=directory.name,
        directory=directory,
        goals=tuple((name, mode) for name, mode in plan["goals"]),
        positive=plan["positive_label"],
        splits=splits,
        data_report=report,
        plan=plan,
        storage=storage,
        journal=journal,
        lock=held,
        lease=take_lease(storage) if settings.command.resume else Lease(storage),
    )


def take_lease(storage: Storage, new: bool = False) -> Lease:
    """The right to run a study on object storage, which one machine has. Raises SettingsError when another one has it,
    when the storage cannot be used, or when a `new` study has the name of one that is there."""
    lease = Lease(storage)
    try:
        if new and storage.uri and storage.read(storage.directory / "plan.json") is not None:
            problem = (
                f"`--name` must be new, but {storage.uri} holds a study: choose another, or --resume {storage.uri}"
            )
        else:
            problem = lease.acquire()
    except (OSError, ValueError) as error:
        problem = f"`--storage` must be a place that can be read and written, but {storage.uri}: {error}"
    if problem:
        raise SettingsError([problem])
    return lease


def journal_problems(directory: Path, journal: Journal) -> list[str]:
    """Whether the journal is gone though trials have run: going on would train them again under other numbers."""
    numbers = sorted(path.name for path in (directory / "trials").glob("[0-9]*"))
    if journal.events or not numbers:
        return []
    return [
        f"journal.jsonl must tell what the study has done, but it is empty or gone, and trials/ has {numbers[0]} to "
        f"{numbers[-1]}: put it back from a copy, or begin a new study"
    ]


def note_space(settings: Settings, say: Callable[[str], None]) -> None:
    """Remember that this user runs the space of these settings. Where that fails, the study does not need it."""
    try:
        remember_space(settings.study.space)
    except OSError as error:
        say(f"The next --resume needs --space again, since the user's cache cannot be written: {error}")


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


def shipped(settings: Settings) -> bool:
    """Whether base, data and adapted modules are those that come with the project, which its tests have checked."""
    names = ("lora_target_modules", "lora_exclude_patterns")
    same_modules = all(getattr(settings.trial, name) == getattr(TrialSettings(), name) for name in names)
    return settings.model == ModelSettings() and settings.data.data == "phantoms" and same_modules


def check_goals(settings: Settings, goals: tuple[Goal, ...], splits: Splits, positive: str) -> list[str]:
    """Whether the validation images can give every metric of --metric, --require and --stop-when."""
    if positive and positive not in splits.candidates:
        known = ", ".join(splits.candidates) or "none, for lack of a closed set"
        return [f"`--positive-label` must be an answer of the data ({known}), but got {positive!r}"]
    study = settings.study
    asked = [("--metric", name, name) for name, _ in goals if name in MODES]
    asked += [("--require", text, comparison(text)[0]) for text in study.require]
    asked += [("--stop-when", study.stop_when, comparison(study.stop_when)[0])] if study.stop_when else []
    found = []
    for option, text, name in asked:
        if need := missing_for(name, splits, positive):
            found.append(f"`{option}` needs {need}, but got {text!r}: leave it out, or take another metric")
    return found


def missing_for(metric: str, splits: Splits, positive: str) -> str:
    """What the validation images lack for a metric, or nothing."""
    if metric == "loss":
        return ""
    if not splits.candidates:
        return "a small closed set of answers, which the data has not (loss is the only metric of open answers)"
    counts = dict(zip(splits.candidates, splits.class_counts("validation"), strict=True))
    if metric in ("sensitivity", "specificity"):
        if not positive:
            return f"a positive class (--positive-label, one of {', '.join(splits.candidates)})"
        others = sum(counts.values()) - counts[positive]
        if not (counts[positive] if metric == "sensitivity" else others):
            return f"validation images whose answer is {'' if metric == 'sensitivity' else 'not '}{positive!r}"
    elif metric == "auroc" and sum(map(bool, counts.values())) < 2:
        return "validation images of two answers"
    return ""


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
