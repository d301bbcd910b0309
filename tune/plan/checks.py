"""Checks of a new study that need its data or its model."""

from __future__ import annotations

import json
from pathlib import Path

from train_fn.data.samples import Splits
from train_fn.model.checkpoint import resolve_model
from train_fn.scoring.metrics import MODES
from train_fn.settings import ModelSettings, TrialSettings
from tune.config.settings import Settings
from tune.records.goals import Goal, comparison
from tune.records.journal import read_events


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


def check_goals(settings: Settings, goals: tuple[Goal, ...], splits: Splits, positive: str) -> list[str]:
    """Whether the validation images can give every metric of --metric, --require and --stop-when."""
    if positive and positive not in splits.candidates:
        answers = ", ".join(splits.candidates) or "none, for lack of a closed set"
        return [f"`--positive-label` must be an answer of the data ({answers}), but got {positive!r}"]
    study = settings.study
    uses = [("--metric", name, name) for name, _ in goals if name in MODES]
    uses += [("--require", text, comparison(text)[0]) for text in study.require]
    uses += [("--stop-when", study.stop_when, comparison(study.stop_when)[0])] if study.stop_when else []
    return [
        f"`{option}` needs {need}, but got {text!r}: leave it out, or take another metric"
        for option, text, name in uses
        if (need := missing_for(name, splits, positive))
    ]


def missing_for(metric: str, splits: Splits, positive: str) -> str:
    """What the validation images lack for a metric, or ""."""
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


def check_name(directory: Path) -> list[str]:
    """Whether a new study's folder holds no other study."""
    if (directory / "plan.json").exists():
        what, fix = "a study", f"go on with --resume {directory.name}"
    elif (directory / "journal.jsonl").exists() and read_events(directory / "journal.jsonl"):
        what, fix = "a study whose plan.json is gone", "put plan.json back"
    else:
        return []
    return [f"`--name` must be new, but {directory} holds {what}: choose another name, or {fix}"]
