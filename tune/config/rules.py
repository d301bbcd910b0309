"""Every rule for a study's settings that needs no data, no Ray and no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_fn.settings import SHOWN, broken_rules
from train_fn.support.files import DamagedFile, read_json, unwritable
from tune.config.paths import is_file, is_folder, study_directory
from tune.config.settings import REPORT_TO, Settings, flag
from tune.config.space_check import check_space
from tune.config.uris import strip_credentials
from tune.records.budgets import seconds
from tune.records.goals import comparison, goal


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
    if study.warm_start and not goes_on:
        begun = study_directory(study.warm_start, study.results)
        rule("warm_start", begun, "must name a study", "give its name or its folder")
    rule("report_to", study.report_to, "must name a place", f"choose from {', '.join(REPORT_TO)}")
    for name, needed in (("report_to", "wandb"),):
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
