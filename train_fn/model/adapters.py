"""The files of an adapter's folder, which are not trusted: every value is checked for type and range before its use.

PEFT would read more than is safe: regular expressions that run for minutes, initialisations that load other files, and
missing files from a hub. So `adapter_config.json` is read here: the values in `AdapterConfig` are used, and all others
must be switched off. The modules that get an adapter follow from the names of the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.model.checkpoint import tensor_shapes
from train_fn.settings import ModelSettings, broken_rule, rules
from train_fn.support.files import DamagedFile, check_sums, read_json

MAX_RANK = 4096
MAX_CANDIDATES = 1000
WEIGHTS = "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
# Keys of PEFT's that change nothing about an adapter of this project, and the types that they may hold.
IGNORED: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str, type(None)),
    "inference_mode": (bool,),
    "megatron_core": (str, type(None)),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "revision": (str, type(None)),
    "task_type": (str, type(None)),
}


class BadAdapter(ValueError):
    """An adapter's folder cannot be used; the message has rule, value and fix."""


@dataclass(frozen=True)
class AdapterConfig:
    """The values of an `adapter_config.json` that are used."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True)
class Task:
    """The base, question and candidate answers that an adapter was trained with: `task.json`."""

    model: ModelSettings
    question: str
    candidates: tuple[str, ...]


def read_folder_json(adapter: Path, name: str) -> dict[str, Any]:
    """The JSON object in one file of an adapter's folder. Raises BadAdapter."""
    path = adapter / name
    if not path.is_file():
        raise BadAdapter(f"`--adapter` must be a folder with {name}, but {str(adapter)!r} has none: check the path")
    try:
        return read_json(path, dict, "train or fetch the adapter again")
    except OSError as error:
        raise BadAdapter(f"{path} must be readable, but is not: {error.strerror}") from error
    except DamagedFile as error:
        raise BadAdapter(str(error)) from error


def read_config(adapter: Path) -> AdapterConfig:
    """The settings of a saved LoRA adapter. Raises BadAdapter with every problem."""
    path = adapter / "adapter_config.json"
    stored = read_folder_json(adapter, path.name)
    problems: list[str] = []

    def check(name: str, rule: str, holds: bool) -> None:
        if not holds:
            problems.append(f"`{name}` {rule}, but is {stored.get(name)!r:.100}")

    r, alpha, dropout = (stored.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
    check("peft_type", "must be LORA", stored.get("peft_type") == "LORA")
    check("r", f"must be a whole number from 1 to {MAX_RANK}", type(r) is int and 1 <= r <= MAX_RANK)
    check("lora_alpha", "must be a positive number", is_number(alpha) and alpha > 0)  # type: ignore[operator]
    check("lora_dropout", "must be at least 0 and below 1", is_number(dropout) and 0 <= dropout < 1)  # type: ignore[operator]
    check("bias", "must be none", stored.get("bias", "none") == "none")
    for name in ("use_rslora", "use_dora"):
        check(name, "must be true or false", isinstance(stored.get(name, False), bool))
    check("init_lora_weights", "must be true or false", isinstance(stored.get("init_lora_weights", True), bool))
    check("target_modules", "must be text or a list of names", texts(stored.get("target_modules")))
    check("modules_to_save", "must be null or a list of names", texts(stored.get("modules_to_save"), absent=True))
    for name, kinds in IGNORED.items():
        check(name, "must be of another type", name not in stored or isinstance(stored[name], kinds))
    used = {"peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights",
            "target_modules", "modules_to_save", *IGNORED}  # fmt: skip
    for name in stored.keys() - used:
        check(name, "must be switched off (null, false or empty)", stored[name] in (None, False, {}, []))
    if problems:
        raise BadAdapter(f"{path}: {'; '.join(sorted(problems))}: train or fetch the adapter again")
    return AdapterConfig(r, float(alpha), dropout, stored.get("use_rslora", False), stored.get("use_dora", False))  # type: ignore[arg-type]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def texts(value: Any, absent: bool = False) -> bool:
    """Whether a JSON value is text or a list of texts, or, with `absent`, null."""
    return (value is None and absent) or isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )  # fmt: skip


def read_shapes(adapter: Path, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors by name, from the header of its file. Raises BadAdapter."""
    try:
        shapes = tensor_shapes(adapter / WEIGHTS)
    except DamagedFile as error:
        raise BadAdapter(str(error)) from error
    ranks = {shape[0] for name, shape in shapes.items() if TENSOR.fullmatch(name) and shape}
    if ranks != {config.r}:
        raise BadAdapter(
            f"{adapter / WEIGHTS} must hold LoRA matrices of rank {config.r}, as adapter_config.json says, but their "
            f"ranks are {', '.join(map(str, sorted(ranks))) or 'none'}: train or fetch the adapter again"
        )
    return shapes


def check_files(adapter: Path) -> None:
    """Compare an adapter's files with their checksums, if it has any. Raises BadAdapter."""
    try:
        check_sums(adapter)
    except (OSError, DamagedFile) as error:
        raise BadAdapter(str(error)) from error


def read_task(adapter: Path) -> Task:
    """The task of an adapter. Raises BadAdapter with every problem."""
    stored = read_folder_json(adapter, "task.json")
    path, fix = adapter / "task.json", "train or fetch the adapter again"
    problems = []
    if not isinstance(question := stored.get("question"), str) or not question.strip():
        problems.append(f"`question` must be text, but is {question!r:.100}")
    candidates = stored.get("candidates")
    if not isinstance(candidates, list) or len(candidates) > MAX_CANDIDATES:
        problems.append(f"`candidates` must be a list of at most {MAX_CANDIDATES} answers, but is {candidates!r:.100}")
    elif not all(isinstance(answer, str) and answer.strip() for answer in candidates):
        problems.append(f"`candidates` must be texts, but are {candidates!r:.100}")
    elif len(set(candidates)) < len(candidates):
        problems.append(f"`candidates` must differ from each other, but are {candidates!r:.100}")
    if isinstance(model := stored.get("model"), dict):
        problems += model_problems(model)
    else:
        problems.append(f"`model` must be an object, but is {model!r:.100}")
    if problems:
        raise BadAdapter(f"{path}: {'; '.join(problems)}: {fix}")
    return Task(ModelSettings(**typing.cast(dict, model)), str(question), tuple(typing.cast(list, candidates)))


def model_problems(values: dict[str, Any]) -> list[str]:
    """Every value that breaks a rule of `ModelSettings`."""
    defaults = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    problems = [f"`model` has no setting {name!r:.100}" for name in values.keys() - defaults.keys()]
    for name, default in defaults.items():
        value = values.get(name, default)
        if broken := broken_rule(value, *rules(ModelSettings)[name], may_be_empty=not default):
            problems.append(f"`model.{name}` {broken}, but is {value!r:.100}")
    return problems
