"""The settings of a study."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any

from train_fn.settings import MAX_SEED, PATH, ModelSettings, Range, TextRule, TrialSettings, matching, one_of
from tune.records.plan import PARTS

SCHEDULERS = ("asha", "median", "none")
SAMPLERS = ("tpe", "random", "gp", "grid")
REPORT_TO = ("mlflow", "tensorboard", "wandb")
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
    """How points are chosen: tpe, random, gp, or grid (every point once, ranges at four points each)."""
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


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
