"""Every setting of a study: its type, unit and rule. The command line and its help are derived from this file and from
`train_fn/settings.py`, which holds those that a trial and the base need, and `train_fn/data/settings.py`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from train_fn.data.decision import AIMS, is_aim
from train_fn.data.settings import DataSettings
from train_fn.scoring.metrics import NAMED
from train_fn.settings import (
    MAX_SEED,
    PATH,
    SAVE_STATE_EVERY_S,
    ModelSettings,
    Range,
    TextRule,
    TrialSettings,
    matching,
    one_of,
)
from train_fn.settings import flag as flag
from tune.config.base_shape import BaseShape
from tune.records.budgets import MAX_SECONDS, seconds
from tune.records.goals import COSTS, comparison, goal
from tune.records.plan import PARTS

SCHEDULERS = ("asha", "median", "none")
REMOVED_METRICS = ("macro_f1_prior_corrected",)
REMOVED_SAMPLERS = ("cmaes", "qmc", "nsga2")  # of earlier versions; see CHANGELOG.md
SAMPLERS = ("tpe", "random", "gp", "grid")
REPORT_TO = ("mlflow", "tensorboard", "wandb")
# What `--help` shows; `--help-all` shows every option.
BASIC = ("trials", "time_budget", "space", "metric", "workers_per_trial", "lanes", "device", "results", "name", "model",
         "use_qlora", "bf16", "data", "image_root", "resume", "show", "doctor")  # fmt: skip
# A folder name of at most 200 bytes leaves room for the files beside it whose names are longer.
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


def readable_by(read: Callable[[str], Any], words: str) -> TextRule:
    """A text must be readable by a function, which raises ValueError otherwise."""

    def holds(text: str) -> bool:
        try:
            read(text)
        except ValueError:
            return False
        return True

    return TextRule(words, holds)


GOAL = readable_by(
    goal,
    f"one of {', '.join([*NAMED, *COSTS])}, also of one task or kind of task (such as open/token_f1), or a "
    f"function of a Python file (my.py:score), with a minus before it where less is better",
)
SCORE_RULE = readable_by(
    comparison,
    f"METRIC>=X or METRIC<=X, with X from 0 to 1 (loss and errors: at least 0) and one of {', '.join(NAMED)}, also "
    f"of one task or kind of task (such as open/token_f1)",
)
AIM = TextRule(f"one of {', '.join(AIMS)}, or sensitivity>=X or specificity>=X with X between 0 and 1", is_aim)
DURATION = readable_by(seconds, f"a time such as 90m, 2h or 30s, above 0 and at most {MAX_SECONDS // 3600:,} h")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The search."""

    trials: Annotated[int, Range(1, 100_000)] = 20
    """Trials to run. The first is always the guide's own settings."""
    time_budget: Annotated[str, DURATION] = ""
    """Wall time of the search, such as 90m, 2h or 30s. Trials that run at its end can be resumed."""
    gpu_hours: Annotated[float, Range(0, 10**6)] = 0.0
    """GPU-hours (without a GPU: hours of CPU workers) of all trials together at which the search ends. 0: no limit."""
    max_failures: Annotated[int, Range(0, 100_000)] = 0
    """Failed trials at which the search ends. 0: no limit."""
    stop_when: Annotated[str, SCORE_RULE] = ""
    """Validation score of a completed trial at which the search ends, such as auroc>=0.9."""
    space: Annotated[str, PATH] = "lora"
    """Search space: a module of search_spaces/ or a Python file with `space(trial)` and `GUIDE`."""
    scheduler: Annotated[str, one_of(SCHEDULERS)] = "asha"
    """Early stopping by epoch: asha (arXiv:1810.05934; the better third goes on at epochs 1, 3, 9, ...), median (trials
    below the median stop), or none. A trial whose training loss rises far above its start is stopped in any case. The
    guide's trial always runs to its end."""
    grace_period: Annotated[float, Range(0, 10_000, above=True)] = 1
    """Epochs of a trial before early stopping may end it. Trials are compared after 1, 3, 9, ... times as many. Where
    such a point lies within an epoch (0.5, 1.5, ...) it costs each trial that comes so far an evaluation more. Of a
    training shorter than an epoch (--max-steps) they are parts of the whole."""
    confirm: Annotated[int, Range(0, 1000)] = 0
    """After the search, train this many of the best trials, and the guide's, again with fresh seeds; the best mean then
    wins. 0: the best single score wins."""
    confirm_seeds: Annotated[int, Range(1, 1000)] = 3
    """Fresh seeds of each trial that is confirmed."""
    folds: Annotated[int, Range(0, 1000)] = 0
    """Confirm with this many folds of training and validation images instead of seeds. Near-copies stay together."""
    require: Annotated[tuple[str, ...], SCORE_RULE] = ()
    """Validation scores that the winner must reach, such as sensitivity>=0.9; several with commas."""
    search_alpha: bool = False
    """Search lora_alpha, too, as a ratio to lora_r. Without it the spaces lora, qlora and vision keep it at twice
    lora_r, because it acts like the learning rate once more."""
    sampler: Annotated[str, one_of(SAMPLERS)] = "tpe"
    """How points are chosen: tpe, random, gp, or grid (every point once, ranges at four points each)."""
    first_points: Annotated[str, PATH] = ""
    """JSON list of points to try right after the guide's. A point is an object by the names that the space asks for."""
    warm_start: Annotated[str, PATH] = ""
    """A study (name or folder) whose completed trials the sampler learns from first, if they fit the space. If it had
    another base, other data or other fixed settings, only the order of its trials counts, and its best points, those
    near a better one left out, are tried right after the guide's."""
    model_small: Annotated[str, PATH] = ""
    """A smaller base of --model's family, named as --model is. The whole search runs on it first, as the study
    NAME-small. Then the guide's settings and the best ones of the search are trained on --model, each to its end, as
    the study NAME. --confirm and --register are for the second study; budgets are for each of the two."""
    transfer_trials: Annotated[int, Range(1, 1000)] = 5
    """How many of the small base's best settings are trained on --model. With --model-small."""
    metric: Annotated[tuple[str, ...], GOAL] = ()
    """Validation metric to tune on. Not given: auroc, or loss if the answers are no small closed set. Several with
    commas give a Pareto front; then the first one names the winner, and every trial runs to its end. trainable_params
    and train_s are goals too. A minus before a name: less is better."""
    decide: Annotated[str, AIM] = ""
    """What answers are chosen for, by a rule fitted on the validation images: macro_f1, accuracy, balanced_accuracy,
    quadratic_kappa (of grades), sensitivity>=X or specificity>=X (then the other one is as high as it can be), or
    argmax (the most probable answer, nothing fitted). Not given: the first of these that --metric or --require names,
    else macro_f1."""
    select: Annotated[str, one_of(("best", "last"))] = "best"
    """The epoch by which a trial counts, and whose adapter is kept: the best by the first --metric, or the last."""
    prevalence: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of positive cases where the adapter is to be used, for its predictive values. 0: as in the test images."""
    workers_per_trial: Annotated[int, Range(1, 4096)] = 1
    """Worker processes (each with a GPU, or with CPU cores) that train one trial together under ZeRO."""
    lanes: Annotated[int, Range(0, 4096)] = 0
    """Trials that train side by side. 0: as many as the GPUs (or cores) have room for."""
    lanes_per_gpu: Annotated[int, Range(1, 64)] = 1
    """Lanes that share a GPU, if a trial has one worker: a small model or micro-batch leaves room for another trial."""
    hang_timeout: Annotated[float, Range(1, 10**6)] = 600.0
    """Seconds without a heartbeat or progress after which a worker is ended; its trial goes on from the last
    checkpoint. Also the timeout of collectives."""
    save_state_every: Annotated[float, Range(0, 10**6)] = SAVE_STATE_EVERY_S
    """Seconds of training that a killed trial may have to repeat: after the first epoch that ends later than this after
    the last write, a trial writes its state. 0: after every epoch. It is also written every --save-steps steps, and
    when the study is interrupted."""
    device: Annotated[str, one_of(("auto", "gpu", "cpu"))] = "auto"
    """gpu, cpu, or auto: GPUs if the cluster has one now. On an autoscaling cluster, which starts without, give gpu and
    --lanes."""
    study_seed: Annotated[int, Range(0, MAX_SEED)] = 0
    """Seed of the search."""
    results: Annotated[str, RESULTS] = "results"
    """Folder for studies: splits, adapters, study.json."""
    name: Annotated[str, NAME] = ""
    """Name of the study. Not given: study-, date and time."""
    storage: Annotated[str, STORAGE] = ""
    """Object storage (s3://bucket/prefix or gs://) for the study's folder, for nodes that share no folder. Not given:
    --results is a folder that all nodes see."""
    experiment: Annotated[str, EXPERIMENT] = "vlm-tune"
    """MLflow experiment."""
    mlflow_uri: Annotated[str, MLFLOW_URI] = ""
    """MLflow's store or server. Not given: MLFLOW_TRACKING_URI, else mlflow.db in the working folder."""
    register: Annotated[str, MODEL_NAME] = ""
    """Name of an MLflow model; the winner is registered as its next version."""
    report_to: Annotated[tuple[str, ...], one_of(REPORT_TO)] = ("mlflow",)
    """Stores: mlflow, tensorboard (event files in each trial's runs/), wandb; several with commas."""
    verbose: bool = False
    """Show what Ray and the workers print."""
    profile: bool = False
    """Measure each trial's seconds by phase: data, encoder, forward, backward, optimizer, communication, and so on."""
    trace: bool = False
    """Write a torch profiler trace of optimizer steps 4 to 6 of each trial (trace.json.gz in its folder)."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to do instead of a new study."""

    resume: Annotated[str, PATH] = ""
    """Go on with this study (its name or folder), after a kill or with larger budgets. Its settings stay."""
    show: Annotated[str, PATH] = ""
    """Print the results of this study so far, also while it runs."""
    replay: Annotated[str, PATH] = ""
    """Train a trial of this study again (--trial) and compare its metrics."""
    trial: Annotated[int, Range(0, 10**6)] = 0
    """Number of the trial for --replay."""
    run: Annotated[int, Range(0, 1000)] = 0
    """Which training of that trial: 0 the search's own, 1 the first fresh seed or fold of --confirm, and so on."""
    doctor: bool = False
    """Check machines, model, data and storage for these settings; start no study."""


GROUPS: tuple[type, ...] = (StudySettings, ModelSettings, DataSettings, TrialSettings, Command)


@dataclass(frozen=True)
class Settings:
    """All settings of a command line."""

    study: StudySettings
    model: ModelSettings
    data: DataSettings
    trial: TrialSettings
    command: Command
    pinned: tuple[str, ...]
    """Trial settings that the command line gives: the search does not choose them."""
    first_points: tuple[dict[str, Any], ...] = ()
    """The points of --first-points, read once: a study that goes on elsewhere has no such file."""
    base: BaseShape = field(default_factory=BaseShape)
    """What the search space may know of the base. A study that goes on takes it from its plan."""

    @classmethod
    def of(
        cls, values: Mapping[str, Any], pinned: Sequence[str], first_points: Sequence[dict[str, Any]], base: BaseShape
    ) -> Settings:
        """The settings with these values by field; all others have their defaults."""
        groups = [
            group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
            for group in GROUPS
        ]
        return cls(*groups, tuple(pinned), tuple(first_points), base)  # type: ignore[arg-type, call-arg]  # in their order

    @property
    def pinned_values(self) -> dict[str, Any]:
        """The trial settings that the command line gives."""
        return {name: getattr(self.trial, name) for name in self.pinned}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plan.json holds them; `stored_settings` reads them."""
        return {part: dataclasses.asdict(getattr(self, part)) for part in PARTS} | {"pinned": self.pinned}


def show(value: Any) -> str:
    """A setting as a command line holds it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "auto" if value is None else str(value)
