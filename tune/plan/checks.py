"""Checks of a new study that need its data or its model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np

from train_fn.data.decision import AIMS, ARGMAX, Decision, is_aim, operating_point
from train_fn.data.samples import Splits
from train_fn.model.checkpoint import resolve_model
from train_fn.scoring.fitting import decide
from train_fn.scoring.metrics import CHOICE, METRICS, OF_POSITIVE
from train_fn.scoring.scores import metrics_of
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.support.files import DamagedFile
from tune.config.base_shape import language_config
from tune.config.paths import study_directory
from tune.config.settings import Settings, flag
from tune.records.end_state import EndState
from tune.records.goals import COSTS, Goal, comparison, metric_of
from tune.records.journal import read_events
from tune.records.plan import read_plan
from tune.records.trials import trial_records


def shipped(settings: Settings) -> bool:
    """Whether base, data and adapted modules are the project's own, which its tests check."""
    names = ("lora_target_modules", "lora_exclude_patterns")
    same_modules = all(getattr(settings.trial, name) == getattr(TrialSettings(), name) for name in names)
    return settings.model == ModelSettings() and settings.data.data == "phantoms" and same_modules


def check_model_type(model: str) -> list[str]:
    """Whether transformers has an image-text-to-text class for the base."""
    if model == "nano":
        return []
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

    kind = json.loads((resolve_model(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind in TYPES or kind in ("hulumed_qwen2", "hulumed_qwen3"):
        return []
    return [
        f"`--model` {model!r} must be an image-text-to-text model that transformers knows, but its model_type is "
        f"{kind!r}: the known ones are hulumed_qwen2, hulumed_qwen3, {', '.join(sorted(TYPES))}"
    ]


def family_of(model: str) -> str:
    """The family of a base, such as video_llama_3/qwen3: the model_type of its config.json and of its text model. Bases
    of one family differ in size only."""
    config = json.loads((resolve_model(model) / "config.json").read_text(encoding="utf-8"))
    return "/".join(filter(None, (config["model_type"], language_config(config).get("model_type"))))


def check_warm_start(settings: Settings, goals: tuple[Goal, ...]) -> list[str]:
    """Whether the study of --warm-start can be read, and its trials have this study's goals."""
    study = settings.study
    other = study_directory(study.warm_start, study.results) if study.warm_start else None
    if other is None:  # with --model-small it has not begun
        return []
    try:
        read_plan(other)
        records = trial_records(read_events(other / "journal.jsonl")).values()
    except (OSError, DamagedFile) as error:
        return [f"`--warm-start` must name a study that can be read, but {error}"]
    complete = [record for record in records if record.state == EndState.COMPLETE]
    lacking = [name for name, _ in goals if not any(math.isfinite(record.value(name)) for record in complete)]
    if not complete or not lacking:
        return []
    given = ", ".join(dict.fromkeys(name for record in complete for name in record.metrics))
    return [
        f"`--warm-start` needs a study whose trials have this one's goals, but {other.name} lacks {', '.join(lacking)} "
        f"(it has {given}): give another --metric, or leave it out"
    ]


def check_goals(settings: Settings, goals: tuple[Goal, ...], splits: Splits) -> list[str]:
    """Whether the validation part can give every metric of --metric, --require and --stop-when."""
    if (positive := settings.data.positive_label) and not any(positive in task.candidates for task in splits.tasks):
        answers = ", ".join(dict.fromkeys(answer for task in splits.tasks for answer in task.candidates))
        answers = answers or "none, for lack of a closed set"
        return [
            f"`--positive-label` must be an answer of the data ({answers}), but got {positive!r}: name one of them, or "
            f"leave it out"
        ]
    study = settings.study
    uses = [("--metric", name, name) for name, _ in goals if name not in COSTS]
    uses += [("--require", text, comparison(text)[0]) for text in study.require]
    uses += [("--stop-when", study.stop_when, comparison(study.stop_when)[0])] if study.stop_when else []
    if not splits.validation or not uses:
        return []
    possible, limit = of_a_perfect_model(splits), settings.data.max_answers
    return [
        f"`{option}` needs {need}, but got {text!r}: leave it out, or take another metric"
        for option, text, name in uses
        if (need := missing_for(name, splits, possible, limit))
    ]


def of_a_perfect_model(splits: Splits) -> dict[str, float]:
    """The validation metrics of a model that is always right: those that this data can give are finite."""
    part = splits.validation
    widest = max((len(task.candidates) for task in splits.tasks), default=0)
    scores = np.full((len(part), max(1, widest)), np.nan)
    for row, sample in enumerate(part):
        if candidates := splits.task_of(sample).candidates:
            scores[row, : len(candidates)] = -10.0
            scores[row, int(sample.label)] = 0.0
    texts = np.array([sample.answer for sample in part], dtype=object)
    predicted = {"losses": np.zeros(len(part)), "scores": scores, "texts": texts}
    decided = decide({task.name: Decision() for task in splits.tasks if task.kind in CHOICE}, predicted, part, splits)
    return metrics_of(predicted, part, splits, decided)


def missing_for(name: str, splits: Splits, possible: dict[str, float], max_answers: int) -> str:
    """What the validation part lacks for a metric, or "".

    Args:
        possible: from `of_a_perfect_model`.
        max_answers: `--max-answers`.
    """
    if np.isfinite(possible.get(name, np.nan)):
        return ""
    metric, only = metric_of(name), splits.tasks[0]
    if metric not in METRICS and not splits.own_metric:
        return ""  # a metric of one's own that cannot be used is a problem already
    plain = metric.removesuffix("_raw")
    if plain != metric and splits.decide in ("", ARGMAX):
        return f"a fitted decision (--decide, not {ARGMAX}); without one it is {plain}"
    if plain in OF_POSITIVE and splits.candidates:
        if not only.positive:
            return f"a positive class (--positive-label, one of {', '.join(splits.candidates)})"
        if np.isnan(possible["sensitivity"]):
            return f"validation images whose answer is {only.positive!r}"
        if np.isnan(possible["specificity"]):
            return f"validation images whose answer is not {only.positive!r}"
    if metric in METRICS and not any(task.kind in METRICS[metric].tasks for task in splits.tasks):
        kinds = ", ".join(dict.fromkeys(task.kind for task in splits.tasks))
        return (
            f"answers of the kind {' or '.join(METRICS[metric].tasks)}, and those of this data are {kinds} (a closed "
            f"set has at most --max-answers {max_answers} answers, each three times on average)"
        )
    if metric == "auroc" and splits.candidates:
        return "validation images of two answers"
    given = ", ".join(name for name, value in possible.items() if np.isfinite(value))
    return f"validation samples that give it (this data gives {given})"


def with_plain_names(settings: Settings, splits: Splits) -> Settings:
    """The settings with auroc instead of closed/auroc where all data is of that kind: then only plain names exist."""
    if len(splits.tasks) > 1:
        return settings
    prefix, study = f"{splits.tasks[0].kind}/", settings.study
    study = dataclasses.replace(
        study,
        metric=tuple(re.sub(rf"^(-?){prefix}", r"\1", text) for text in study.metric),
        require=tuple(text.strip().removeprefix(prefix) for text in study.require),
        stop_when=study.stop_when.strip().removeprefix(prefix),
    )
    return dataclasses.replace(settings, study=study)


def usual_goal(splits: Splits) -> str:
    """The metric to tune on where the user names none: auroc of classes, label_auroc of sets of labels, mae of numbers,
    and the loss of answers that the model writes, or of tasks of different kinds."""
    kinds = {task.kind for task in splits.tasks}
    usual = "loss"
    if kinds <= {"closed", "binary", "ordinal"}:
        usual = "auroc"
    elif len(kinds) == 1 and all(task.candidates or task.kind == "numeric" for task in splits.tasks):
        usual = {"multilabel": "label_auroc", "numeric": "mae"}[kinds.pop()]
    single = len(splits.tasks) == 1  # then a metric that the data cannot give is a problem that the user should know
    if single or not splits.validation or np.isfinite(of_a_perfect_model(splits).get(usual, np.nan)):
        return usual
    return "loss"


def usual_aim(settings: Settings, goals: tuple[Goal, ...], splits: Splits) -> str:
    """What answers are chosen for where the user does not say: the first score of --metric that a rule can be fitted
    for, else the operating point of --require, else macro_f1; the argmax where no task has one answer of a set."""
    possible = [name for name, _ in goals if possible_aim(name, splits)]
    points = [text.replace(" ", "") for text in settings.study.require if operating_point(text)]
    others = ("macro_f1" if possible_aim("macro_f1", splits) else ARGMAX,)
    return [*possible, *(text for text in points if possible_aim(text, splits)), *others][0]


def possible_aim(aim: str, splits: Splits) -> bool:
    """Whether the data has a task whose answers can be chosen for this."""
    if operating_point(aim):
        return any(task.positive for task in splits.tasks)
    kinds = ("ordinal",) if aim == "quadratic_kappa" else CHOICE
    return aim in AIMS and any(task.kind in kinds for task in splits.tasks)


def check_aim(settings: Settings, splits: Splits) -> list[str]:
    """Whether answers can be chosen for what --decide names."""
    aim = settings.study.decide
    if not aim or aim == ARGMAX or not is_aim(aim) or possible_aim(aim, splits):
        return []
    need = "a task with one answer of a set"
    if operating_point(aim):
        need = "a positive answer (--positive-label)"
    elif aim == "quadratic_kappa":
        need = "grades (--ordinal)"
    return [f"`--decide` {aim} needs {need}, which this data lacks: leave it out, or choose another"]


def check_global_batch(settings: Settings, splits: Splits) -> list[str]:
    """Whether the command line's global batch holds no image twice. The default's may, on a handful of images."""
    size, images = settings.trial.global_batch_size, len(splits.train)
    given = [n for n in ("per_device_train_batch_size", "gradient_accumulation_steps") if n in settings.pinned]
    if not given or size <= images:
        return []
    names = " x ".join(f"`{flag(name)}`" for name in given)
    return [
        f"{names} must give a global batch of at most the {images:,} training samples, but it is {size:,}: lower one"
    ]


def check_name(directory: Path) -> list[str]:
    """Whether a new study's folder holds no other study."""
    if (directory / "plan.json").exists():
        what, fix = "a study", f"go on with --resume {shlex.quote(directory.name)}"
    elif (directory / "journal.jsonl").exists() and read_events(directory / "journal.jsonl"):
        what, fix = "a study whose plan.json is gone", "put plan.json back"
    else:
        return []
    return [f"`--name` must be new, but {directory} holds {what}: choose another name, or {fix}"]
