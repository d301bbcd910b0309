"""The files of an adapter's folder, which are not trusted: every value is checked for type and range before its use.

PEFT would read more than is safe: regular expressions that run for minutes, initialisations that load other files, and
missing files from a hub. So `adapter_config.json` is read here: the values in `AdapterConfig` are used, and all others
must be switched off. The modules that get an adapter follow from the names of the tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train_fn.data.decision import Decision, is_aim
from train_fn.data.samples import KINDS, Sample, Task, closed_set
from train_fn.data.tasks import labels_of, unique, with_sorted_labels
from train_fn.model.checkpoint import tensor_shapes
from train_fn.settings import SHOWN, ModelSettings, broken_rule, rules
from train_fn.support.files import DamagedFile, check_sums, read_json
from train_fn.support.text import plain_form, shorten

MAX_RANK = 4096
MAX_CANDIDATES = 1000
MAX_POINTS = 500  # calibration scores of a candidate
MAX_TASKS = 10_000
MAX_QUESTIONS = 1000  # of a task in task.json
MAX_OFFSET = 1e6  # of a decision; larger ones would overflow
MAX_LENGTH = 100_000  # characters of a question or answer
MAX_TASK_BYTES = 64_000_000
MAX_NEW_TOKENS = 64  # of a generated answer, where task.json sets no limit
MOST_NEW_TOKENS = 32_768
WITH_CANDIDATES = ("closed", "binary", "ordinal")  # kinds of task; those of a multilabel task may be generated
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which tokenizers reject
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


ClassScores = tuple[tuple[float, float], ...]  # probability and mass of the calibration samples of a class


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
class AdapterTask:
    """What an adapter was trained to answer, and on which base: `task.json`."""

    model: ModelSettings
    question: str
    """The most frequent question of the training part."""
    tasks: tuple[Task, ...]
    questions: Mapping[str, tuple[str, ...]]
    """Questions of each task, by its name."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Most tokens of a generated answer."""
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    """By the task's name; of adapters from earlier versions none: the most probable candidate is the answer."""
    conformal: Mapping[str, tuple[ClassScores, ...]] = field(default_factory=dict)
    """Of each task with calibration scores, by its name: those of each candidate, as
    `train_fn.scoring.conformal.calibration_scores` returns them."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidate answers, if there is one task only; else empty."""
        return self.tasks[0].candidates if len(self.tasks) == 1 else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table of answers that the adapter gives as an MLflow model."""
        return (*self.candidates, "answer") if len(self.tasks) == 1 else ("answer", "probabilities")

    @functools.cached_property
    def by_name(self) -> dict[str, Task]:
        """Each task by its name, and the task of unknown questions."""
        return {task.name: task for task in (self.unknown, *self.tasks)}

    @functools.cached_property
    def unknown(self) -> Task:
        """The task of a question that no task has: the only open one, or an unnamed open one."""
        found = [task for task in self.tasks if task.kind == "open"]
        return found[0] if len(found) == 1 else Task()

    @functools.cached_property
    def by_question(self) -> dict[str, list[Task]]:
        """The tasks of each question."""
        found: dict[str, list[Task]] = {}
        for task in self.tasks:
            for form in dict.fromkeys(map(plain_form, self.questions.get(task.name, ()))):
                found.setdefault(form, []).append(task)
        return found

    def task_of(self, question: str, question_type: str = "") -> Task:
        """The task that a question belongs to.

        It is the only task, or else the task with this question, or else the task that is named after the question's
        type. If several tasks have the question, the type decides between them. Otherwise it is `unknown`.
        """
        if len(self.tasks) == 1:
            return self.tasks[0]
        its = self.by_question.get(plain_form(question), [])
        if len(its) == 1 or not question_type:
            return its[0] if its else self.unknown
        name = unique(question_type, set())  # as `find_tasks` has named it
        return next((task for task in its or self.tasks if task.name == name), its[0] if its else self.unknown)

    def assign(self, sample: Sample) -> Sample:
        """A sample with its task, and with its answer and `label` as this task has them."""
        task = self.task_of(sample.question, sample.question_type)
        if task.separator and sample.answer:
            sample = with_sorted_labels(sample, task.separator)

        def form(answer: str) -> list[str]:
            return labels_of(plain_form(answer), task.separator) if task.separator else [plain_form(answer)]

        label = task.indices.get(sample.answer, -1)
        if label < 0 and sample.answer:
            label = next((i for i, answer in enumerate(task.candidates) if form(answer) == form(sample.answer)), -1)
        return replace(sample, task=task.name, label=label)


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


def read_task(adapter: Path) -> AdapterTask:
    """The tasks of an adapter, also of one from earlier versions, which knew one task only.

    Raises:
        BadAdapter: with every problem, at most 20 of them.
    """
    path = adapter / "task.json"
    fix = "train or fetch the adapter again"
    if path.is_file() and path.stat().st_size > MAX_TASK_BYTES:
        raise BadAdapter(f"{path} must have at most {MAX_TASK_BYTES:,} bytes, but has {path.stat().st_size:,}: {fix}")
    stored = read_folder_json(adapter, path.name)
    question, candidates, most = (stored.get(name) for name in ("question", "candidates", "max_new_tokens"))
    problems = [] if is_text(question) else [f"`question` must be text, but is {SHOWN.repr(question)}"]
    problems += answers_problems("candidates", candidates)
    if most is not None and not (type(most) is int and 0 <= most <= MOST_NEW_TOKENS):
        rule = f"must be a whole number from 0 to {MOST_NEW_TOKENS:,}"
        problems.append(f"`max_new_tokens` {rule}, but is {SHOWN.repr(most)}")
    if isinstance(model := stored.get("model"), dict):
        problems += model_problems(model)
    else:
        problems.append(f"`model` must be an object, but is {SHOWN.repr(model)}")
    entries = stored.get("tasks")
    if entries is not None:
        problems += tasks_problems(entries)
    if problems:
        raise BadAdapter(f"{path}: {'; '.join(shorten(problems))}: {fix}")
    if entries is None:
        tasks = closed_set(typing.cast(list, candidates))
        questions = {"": (typing.cast(str, question),)}
    else:
        tasks = tuple(
            Task(e["name"], e["kind"], tuple(e["candidates"]), e.get("positive", ""), e["separator"]) for e in entries
        )
        questions = {entry["name"]: tuple(entry["questions"]) for entry in entries}
    decisions = {e["name"]: read_decision(e["decision"]) for e in entries or () if e.get("decision")}
    found = AdapterTask(
        ModelSettings(**typing.cast(dict, model)),
        typing.cast(str, question),
        tasks,
        questions,
        most or MAX_NEW_TOKENS,
        decisions,
        {e["name"]: read_scores(e["conformal"]) for e in entries or () if e.get("conformal")},
    )
    if found.candidates != tuple(typing.cast(list, candidates)):
        raise BadAdapter(
            f"{path}: `candidates` must be those of the only task in `tasks`, but are {SHOWN.repr(candidates)}: {fix}"
        )
    return found


def is_text(value: Any) -> bool:
    """Whether a JSON value is a text that a tokenizer takes, not blank and of a bounded length."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_LENGTH and not UNPRINTABLE.search(value)


def answers_problems(name: str, answers: Any) -> list[str]:
    """Why a JSON value is no list of candidate answers, in a list of one problem at most."""
    if not isinstance(answers, list) or len(answers) > MAX_CANDIDATES:
        return [f"`{name}` must be a list of at most {MAX_CANDIDATES} answers, but is {SHOWN.repr(answers)}"]
    if not all(map(is_text, answers)):
        return [f"`{name}` must be texts, but are {SHOWN.repr(answers)}"]
    if len(set(answers)) < len(answers):
        return [f"`{name}` must differ from each other, but are {SHOWN.repr(answers)}"]
    return []


def tasks_problems(entries: Any) -> list[str]:
    """Every problem of the `tasks` of a task.json."""
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_TASKS:
        return [f"`tasks` must be a list of 1 to {MAX_TASKS:,} tasks, but is {SHOWN.repr(entries)}"]
    problems = []
    for number, entry in enumerate(entries):
        where = f"tasks[{number}]"
        if not isinstance(entry, dict):
            problems.append(f"`{where}` must be an object, but is {SHOWN.repr(entry)}")
            continue
        name, kind, candidates, separator, questions = (
            entry.get(key) for key in ("name", "kind", "candidates", "separator", "questions")
        )
        faults = answers_problems(f"{where}.candidates", candidates)
        faults += conformal_problems(f"{where}.conformal", entry.get("conformal"), candidates)
        if not (is_text(name) or (name == "" and len(entries) == 1)):
            faults.append(f"`{where}.name` must be text, but is {SHOWN.repr(name)}")
        if kind not in KINDS:
            faults.append(f"`{where}.kind` must be one of {', '.join(KINDS)}, but is {SHOWN.repr(kind)}")
        elif not faults and kind != "multilabel" and bool(candidates) != (kind in WITH_CANDIDATES):
            rule = "have candidates" if kind in WITH_CANDIDATES else "have no candidates"
            faults.append(f"`{where}` must {rule}, since it is {kind}, but has {SHOWN.repr(candidates)}")
        if not isinstance(separator, str) or len(separator) > MAX_LENGTH or (kind == "multilabel") != bool(separator):
            rule = "must be text in a multilabel task, and empty in others"
            faults.append(f"`{where}.separator` {rule}, but is {SHOWN.repr(separator)}")
        if not isinstance(questions, list) or len(questions) > MAX_QUESTIONS or not all(map(is_text, questions)):
            rule = f"must be a list of at most {MAX_QUESTIONS} texts"
            faults.append(f"`{where}.questions` {rule}, but is {SHOWN.repr(questions)}")
        faults += decision_problems(f"{where}.decision", entry.get("decision"), candidates)
        if entry.get("positive", "") not in ("", *(candidates if isinstance(candidates, list) else ())):
            faults.append(f"`{where}.positive` must be one of the candidates, but is {SHOWN.repr(entry['positive'])}")
        problems += faults
    names = [entry["name"] for entry in entries] if not problems else []
    if len(set(names)) < len(names):
        problems.append(f"the names of `tasks` must differ from each other, but are {SHOWN.repr(names)}")
    return problems


def decision_problems(name: str, values: Any, candidates: Any) -> list[str]:
    """Every reason why a JSON value is no decision between these candidates; none for null."""
    if values is None:
        return []
    if not isinstance(values, dict) or values.keys() != {field.name for field in dataclasses.fields(Decision)}:
        return [f"`{name}` must have the fields of a decision, but is {SHOWN.repr(values)}"]
    problems = []
    if not (isinstance(values["aim"], str) and is_aim(values["aim"])):
        problems.append(f"`{name}.aim` must be what answers can be chosen for, but is {SHOWN.repr(values['aim'])}")
    if not (is_number(values["scale"]) and 0 < values["scale"] <= MAX_OFFSET):
        problems.append(
            f"`{name}.scale` must be above 0 and at most {MAX_OFFSET:g}, but is {SHOWN.repr(values['scale'])}"
        )
    for key in ("offsets", "rule"):
        numbers = values[key]
        sound = isinstance(numbers, list) and all(is_number(n) and abs(n) <= MAX_OFFSET for n in numbers)
        if not sound or len(numbers) not in (0, len(candidates) if isinstance(candidates, list) else 0):
            rule = f"must be a number from -{MAX_OFFSET:g} to {MAX_OFFSET:g} for each candidate, or empty"
            problems.append(f"`{name}.{key}` {rule}, but is {SHOWN.repr(numbers)}")
    positive, threshold = values["positive"], values["threshold"]
    sound = type(positive) is int and is_number(threshold) and 0 <= threshold <= 1 and isinstance(candidates, list)
    if not (positive is threshold is None or (sound and 0 <= positive < len(candidates))):
        rule = "must be the index of a candidate and a number from 0 to 1, or both null"
        problems.append(f"`{name}.positive` and `threshold` {rule}, but are {SHOWN.repr([positive, threshold])}")
    return problems


def read_decision(values: dict[str, Any]) -> Decision:
    """A decision of a task.json without problems."""
    return Decision(**{**values, "offsets": tuple(values["offsets"]), "rule": tuple(values["rule"])})


def conformal_problems(name: str, values: Any, candidates: Any) -> list[str]:
    """Why a JSON value holds no calibration scores of these candidates, in a list of one problem at most. Null and an
    empty list are no problem."""

    def sound(scores: Any) -> bool:
        return isinstance(scores, list) and len(scores) <= MAX_POINTS and all(map(is_pair, scores))

    def is_pair(pair: Any) -> bool:
        return isinstance(pair, list) and len(pair) == 2 and all(is_number(n) and 0 <= n <= 1 for n in pair)

    if values is None or values == []:
        return []
    fits = isinstance(values, list) and isinstance(candidates, list) and len(values) == len(candidates)
    if fits and all(map(sound, values)) and all(sum(mass for _, mass in scores) < 1 for scores in values):
        return []
    rule = (
        f"must hold at most {MAX_POINTS} pairs of probability and mass for each candidate, with masses below 1 in sum"
    )
    return [f"`{name}` {rule}, but is {SHOWN.repr(values)}"]


def read_scores(values: list[list[list[float]]]) -> tuple[ClassScores, ...]:
    """Calibration scores of a task.json without problems."""
    return tuple(tuple((probability, mass) for probability, mass in scores) for scores in values)


def model_problems(values: dict[str, Any]) -> list[str]:
    """Every value that breaks a rule of `ModelSettings`."""
    defaults = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    problems = [f"`model` has no setting {name!r:.100}" for name in values.keys() - defaults.keys()]
    for name, default in defaults.items():
        value = values.get(name, default)
        if broken := broken_rule(value, *rules(ModelSettings)[name], may_be_empty=not default):
            problems.append(f"`model.{name}` {broken}, but is {value!r:.100}")
    return problems
