"""Rules between settings, and between settings and this machine. They need no data, no Ray and no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

from train_fn.data.formats import is_class_folder
from train_fn.model.hub_ids import is_hub_data, is_hub_model, name_problem
from train_fn.settings import SHOWN, broken_rules
from train_fn.support.files import DamagedFile, read_json, unwritable
from tune.config.paths import study_directory
from tune.config.settings import REPORT_TO, DataSettings, Settings, StudySettings, flag
from tune.config.space_check import check_space
from tune.config.uris import strip_credentials

Rule = tuple[str, object, str, str]
"""A field, whether its value is allowed, the rule in words, and the fix."""


def check(settings: Settings) -> list[str]:
    """Every broken rule, as one sentence each: the rule, the value, the fix."""
    study, data, model = settings.study, settings.data, settings.model
    shown = {**vars(settings.trial), **vars(study), **vars(data), **vars(model)}
    shown |= {name: strip_credentials(shown[name]) for name in ("storage", "mlflow_uri")}
    study_shown = dataclasses.replace(study, storage=shown["storage"], mlflow_uri=shown["mlflow_uri"])
    broken: dict[str, str] = {}
    for group in (study_shown, model, data):
        broken |= broken_rules(group, flag)
    problems = list(broken.values())
    problems += [
        f"`{flag(name)}` {text}, but got {SHOWN.repr(shown[name])}: {fix}"
        for name, holds, text, fix in rules_between(settings)
        if not holds and name not in broken
    ]
    if not (settings.command.show or settings.command.doctor) and "results" not in broken:
        problems += check_writable(Path(study.results))
    if "model" not in broken:
        problems += check_model(model.model)
    if study.model_small and "model_small" not in broken and not (settings.command.resume or settings.command.replay):
        problems += [text.replace("`--model`", "`--model-small`") for text in check_model(study.model_small)]
    problems += settings.trial.problems(max(1, study.workers_per_trial), flag)
    if not {"space", "workers_per_trial"} & broken.keys():
        problems += check_space(settings)
    return problems


def rules_between(settings: Settings) -> list[Rule]:
    """The rules that more than one setting, or this machine, decides."""
    study, data, model = settings.study, settings.data, settings.model
    phantoms = data.data == "phantoms"
    goes_on = settings.command.resume or settings.command.replay  # its manifest has been read, and may be gone
    goals = [text.removeprefix("-") for text in study.metric]
    manifest = ("must be an existing manifest, a folder of images by class, or hf://OWNER/NAME[@REVISION][:FOLDER]",
                "check the path")  # fmt: skip
    given = [path for path in (data.data, data.val_data, data.test_data) if path]
    rules: list[Rule] = [
        ("lanes_per_gpu", study.lanes_per_gpu == 1 or study.workers_per_trial == 1,
         "must be 1 for trials of several workers, which need a GPU each", "leave one out"),
        ("folds", study.folds != 1, "must be at least 2", "0 confirms over seeds"),
        ("folds", not study.folds or study.confirm > 0, "needs --confirm", "add --confirm 3"),
        ("metric", len(set(goals)) == len(goals), "must name each goal only once", "leave one out"),
        ("report_to", study.report_to, "must name a store", f"choose from {', '.join(REPORT_TO)}"),
        ("report_to", "wandb" not in study.report_to or importlib.util.find_spec("wandb"), "needs the package wandb",
         "pip install wandb"),
        ("warm_start", goes_on or not study.warm_start or study_directory(study.warm_start, study.results),
         "must name a study", "give its name or its folder"),
        ("model_small", study.model_small != model.model, "must be another base than --model", "name the smaller one"),
        ("transfer_trials", study.model_small or study.transfer_trials == StudySettings().transfer_trials,
         "goes with --model-small", "add it, or leave this out"),
        ("test_fraction", data.val_fraction >= 1 or data.val_fraction + data.test_fraction < 1,
         f"must leave images to train on beside --val-fraction {data.val_fraction:g}", "lower one"),
        ("bf16", not (model.bf16 and model.fp16), "must not be combined with --fp16", "keep one"),
        ("dtype", model.dtype == "auto" or not (model.bf16 or model.fp16), "must not be combined with --bf16 or --fp16",
         "keep one"),
        ("zero_stage", model.base_dtype != "float16" or settings.trial.zero_stage > 0,
         "must be 1 or 2 with a float16 base, which needs the loss scale of ZeRO", "give --zero-stage 2, or --bf16"),
        # Others see command lines, and settings are written to files.
        ("storage", strip_credentials(study.storage) == study.storage, "must hold no key or password",
         "leave them to AWS_ACCESS_KEY_ID and the like"),
        ("mlflow_uri", strip_credentials(study.mlflow_uri) == study.mlflow_uri, "must hold no key or password",
         "give the whole address as MLFLOW_TRACKING_URI instead"),
        ("data", goes_on or phantoms or is_present(data.data), *manifest),
        ("val_data", goes_on or not data.val_data or is_present(data.val_data), *manifest),
        ("test_data", goes_on or not data.test_data or is_present(data.test_data), *manifest),
        ("image_root", goes_on or not data.image_root or os.path.isdir(data.image_root), "must be a folder",
         "check the path"),
        ("image_root", goes_on or not data.image_root or not all(map(is_class_folder, given)), "goes with a manifest",
         "leave it out: the images of a folder need none"),
        ("columns", len({text.partition("=")[0] for text in data.all_columns}) == len(data.all_columns),
         "must name each role only once", "leave one out"),
    ]  # fmt: skip
    only_with_data = [
        name
        for name in ("image_root", "val_data", "test_data", "columns", "group_field", "question")
        if phantoms and getattr(data, name) != getattr(DataSettings(), name)
    ]
    return rules + [
        (name, False, "goes with --data", "give --data MANIFEST, or leave it out") for name in only_with_data
    ]


def is_present(path: str) -> bool:
    """Whether a path is a file or a folder (a pipe or a device could be read for ever), or names data on the hub."""
    return os.path.isfile(path) or os.path.isdir(path) or is_hub_data(path)


def check_writable(results: Path) -> list[str]:
    """Whether files can be made in --results, or where that folder will be made."""
    if (obstacle := unwritable(results.absolute())) is None:
        return []
    what = f"{str(results)!r}: {obstacle[1]}"
    return [f"`--results` must be a folder in which files can be made, but {what}: choose another folder"]


def check_model(model: str) -> list[str]:
    """Problems of `--model` that show without transformers. The hub is asked later (`tune.plan.hub_names`)."""
    if model == "nano" or is_hub_model(model):
        return []
    if not os.path.lexists(model):
        return [name_problem(model)]
    directory = Path(model)
    problems = check_config(directory, model)
    if not problems and not list(directory.glob("*.safetensors")):
        problems.append(
            f"`--model` {model!r} must hold its weights as *.safetensors: convert them (pickled weights are not read)"
        )
    return problems


def check_config(directory: Path, model: str) -> list[str]:
    """Problems of a base model's config.json. model: its name in messages."""
    where = f"`--model` {model!r}"
    if not os.path.isfile(directory / "config.json"):
        return [f"{where} must be a model directory with a config.json: give the folder of the base model, or nano"]
    try:
        config = read_json(directory / "config.json", dict, "download the model again")
    except OSError as error:
        return [f"{where} must be readable, but its config.json: {error.strerror}: change its permissions"]
    except DamagedFile as error:
        return [f"{where}: {error}"]
    if not isinstance(config.get("model_type"), str):
        return [f"{where}: config.json must name a model_type: download the model again"]
    return []
