"""Settings of a trial and of the base, each with its rule: the typed contract between `tune/` and `train_fn/`.

Imports nothing heavy, so that every check here runs before Ray or torch is loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
import reprlib
import textwrap
import typing
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
VISION_TRAINING = ("none", "lora")
LR_SCHEDULER_TYPES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial")
AUGMENT = ("none", "light", "medium")
GUIDE_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAVE_STATE_EVERY_S = 60.0  # between two writes of a trial's state
PROFILE_PREFIX = "profile_"  # of the phases that `--profile` adds to a trial's seconds
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Stage 3 would partition the frozen base itself, and bitsandbytes' 4-bit weights cannot be split (bitsandbytes#1249).
WHY_NO_STAGE_3 = "3 would split up the frozen base, which a lane keeps from trial to trial"
GUIDE_MICRO_BATCH = 2  # images; with auto, the global batch is a multiple of it
BUCKET = 50_000_000  # largest communication buffer of DeepSpeed, in elements
MAX_TEXT = 4096  # bytes of one text setting
MAX_SEED = 2**31 - 1  # NumPy takes 32 bits, and a seed plus the number of a repeat must fit, too

SHOWN = reprlib.Repr()  # shortens values in messages to one line
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 120


# ------------------------------------------------------------------------------------------------ rules of one setting


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most` are allowed."""

    least: float
    most: float
    above: bool = False
    """`least` itself is not allowed."""
    below: bool = False
    """`most` itself is not allowed."""
    why: str = ""

    @property
    def words(self) -> str:
        """The rule as text, to follow "must be a number"."""
        if not self.above and not self.below:
            ends = f"from {self.least:,.15g} to {self.most:,.15g}"
        else:
            least = f"{'above' if self.above else 'at least'} {self.least:,.15g}"
            ends = f"{least} and {'below' if self.below else 'at most'} {self.most:,.15g}"
        return ends + (f" ({self.why})" if self.why else "")

    def holds(self, value: float) -> bool:
        """Whether a number is allowed. NaN never is."""
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)


@dataclass(frozen=True)
class TextRule:
    """A rule for a text, or for each text of a list: it must be `words`."""

    words: str
    holds: Callable[[str], bool]


def one_of(values: tuple[str, ...]) -> TextRule:
    """A text must be one of these."""
    return TextRule(f"one of {', '.join(values)}", lambda text: text in values)


def matching(pattern: str, words: str) -> TextRule:
    """A text must match a regular expression in full."""
    return TextRule(words, lambda text: re.fullmatch(pattern, text) is not None)


MODULE_NAME = matching(r"\w+(\.\w+)*", "a module name, such as q_proj or model.vision_tower")
NAME_PART = matching(r"[\w.-]+", "a part of module names (letters, digits, `.`, `_` and `-`; no regular expression)")
# Linux allows 4,096 bytes in all, and a study adds its own names.
PATH = TextRule(
    "a path of at most 3,000 bytes, each part of at most 255",
    lambda text: len(text.encode()) <= 3000 and all(len(part.encode()) <= 255 for part in text.split("/")),
)


def is_window(text: str) -> bool:
    """Whether a text is "auto" or two numbers in rising order."""
    try:
        low, high = (-1.0, 1.0) if text == "auto" else map(float, text.split(","))
    except ValueError:
        return False
    return low < high and math.isfinite(high - low)


WINDOW = TextRule("auto, or two numbers in rising order, such as -160,240", is_window)
FRAME = matching(r"first|middle|[1-9]\d{0,5}", "first, middle, or the number of a frame (the first is 1)")


@functools.cache
def rules(group: type) -> dict[str, tuple[Any, Any]]:
    """Type and rule (or None) of each field of a settings class."""
    hints = typing.get_type_hints(group, include_extras=True)
    pairs = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Annotated}
    return {name: (*pairs[name][:2],) if name in pairs else (hint, None) for name, hint in hints.items()}  # type: ignore[misc]


def broken_rule(value: Any, kind: Any, rule: Any, may_be_empty: bool = True) -> str:
    """The rule of type, range or form that a value breaks, as "must be ..."; "" if it breaks none."""
    if value is None and kind in (bool | None, int | None, float | None):
        return ""
    if kind in (bool, bool | None):
        return "" if isinstance(value, bool) else "must be true or false"
    if kind in (int, int | None, float, float | None):
        whole = kind in (int, int | None)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if number and rule.holds(value):
            return ""
        return f"must be {'auto, or ' * (kind == int | None)}{'a whole number' if whole else 'a number'} {rule.words}"
    if kind == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            return "must be a list of texts"
        if len(set(value)) < len(value):
            return "must name each only once"
        return next((text for item in value if (text := broken_rule(item, str, rule, False))), "")
    if not isinstance(value, str):
        return "must be text"
    if {unicodedata.category(character) for character in value} & {"Cc", "Cs", "Zl", "Zp"}:
        return "must be UTF-8 text on one line, without control characters"
    if len(value.encode()) > MAX_TEXT:
        return f"must have at most {MAX_TEXT:,} bytes"
    if not value.strip() and (value or not may_be_empty):
        return "must not be empty"
    return f"must be {rule.words}" if value and rule and not rule.holds(value) else ""


def broken_rules(settings: Any, label: Callable[[str], str] = str, fix: str = "") -> dict[str, str]:
    """A message for each field of a settings dataclass whose value has the wrong type or breaks its rule, by field.

    Args:
        label: returns the name of a field in messages.
        fix: advice for the user; "" advises the field's default.
    """
    problems: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value, (kind, rule) = getattr(settings, field.name), rules(settings.__class__)[field.name]
        if text := broken_rule(value, kind, rule, may_be_empty=not field.default):
            default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            advice = fix or ("leave it out, or mend it" if default in ("", None) else f"the default is {default}")
            problems[field.name] = f"`{label(field.name)}` {text}, but got {SHOWN.repr(value)}: {advice}"
    return problems


# ------------------------------------------------------------------------------------------------ options


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def convert(text: str, kind: Any) -> Any:
    """An option's text as its field's type. Raises ValueError or OverflowError."""
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == int | None:
        return None if text == "auto" else int(text)
    return (float if kind == float | None else kind)(text)


def field_docs(group: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The hyperparameters of one trial. The defaults are those of the Hulu-Med fine-tuning guide."""

    num_train_epochs: Annotated[int, Range(1, 10_000)] = 3
    """Passes over the training images."""
    max_steps: Annotated[int, Range(0, 10**8)] = 0
    """Optimizer steps to train for, instead of num_train_epochs. 0: num_train_epochs decides."""
    per_device_train_batch_size: Annotated[int | None, Range(1, 4096)] = None
    """Images in one forward pass of one worker (the micro-batch). auto, the default: as many as the memory takes, by
    their tokens. The global batch is this number (auto: the guide's 2) x gradient_accumulation_steps images."""
    gradient_accumulation_steps: Annotated[int, Range(1, 65_536)] = 8
    """The global batch as a multiple of the micro-batch: 2 x 8 = 16 images in the guide. It stays whatever the number
    of workers and the memory are, and so does the meaning of the learning rate."""
    learning_rate: Annotated[float, Range(0, 10, above=True)] = 2e-4
    """Peak learning rate of the adapter. 1e-4 to 5e-4 is usual for LoRA."""
    projector_learning_rate: Annotated[float | None, Range(0, 10, above=True)] = None
    """Peak learning rate of the projector when it is trained. Not given: the adapter's."""
    vision_learning_rate: Annotated[float | None, Range(0, 10, above=True)] = None
    """Peak learning rate of the vision tower's adapter (--train-vision lora). Not given: the language model's."""
    lr_scheduler_type: Annotated[str, one_of(LR_SCHEDULER_TYPES)] = "cosine"
    """Learning-rate schedule: cosine, linear, constant, constant_with_warmup or polynomial."""
    warmup_ratio: Annotated[float, Range(0, 1, below=True)] = 0.03
    """Share of the optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.01
    """AdamW's decoupled weight decay, on all trained weights but biases."""
    max_grad_norm: Annotated[float, Range(0, 10**9)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    optim: Annotated[str, one_of(OPTIMIZERS)] = "adamw_torch"
    """Optimizer: adamw_torch, or bitsandbytes' adamw_8bit (a quarter of the state) or paged_adamw_8bit (the state also
    moves to the CPU when the GPU is full)."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: about a sixteenth of the memory,
    and half as much time again. Where nothing else fits, trials turn it on themselves and say so."""
    torch_compile: bool | None = None
    """Compile the language model's layers with torch.compile: fewer and larger GPU kernels, after one wait for the
    compiler a lane. Changes numbers in their last digits. Not given: on GPUs of compute capability 8.0 and more."""
    use_lora: bool = True
    """Train an adapter on the language model. Without it only the projector (--train-projector) or the vision tower's
    adapter (--train-vision lora) is trained."""
    lora_r: Annotated[int, Range(1, 16_384)] = 64
    """Rank of the adapter."""
    lora_alpha: Annotated[float, Range(0, 10**6, above=True)] = 128
    """Scaling: an adapter's output is multiplied by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Dropout probability on an adapter's input."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA, arXiv:2312.03732): large ranks then learn as fast."""
    use_dora: bool = False
    """Learn direction and magnitude separately (DoRA, arXiv:2402.09353): slower, sometimes better at low rank."""
    loraplus_lr_ratio: Annotated[float, Range(0, 10**6, above=True)] = 1.0
    """Learning rate of an adapter's B matrix as a multiple of the A matrix's (LoRA+, arXiv:2402.12354, advises 16).
    1: the same."""
    lora_target_modules: Annotated[tuple[str, ...], MODULE_NAME] = GUIDE_MODULES
    """Linear layers that get an adapter, by the last part of their name."""
    lora_exclude_patterns: Annotated[tuple[str, ...], NAME_PART] = ("vision", "visual")
    """Parts of names, such as layers.0. or gate_proj; a module of the language model whose full name contains one gets
    no adapter. Other modules get one only by train_vision and projector_lora."""
    train_projector: bool = False
    """Train the vision-to-language projector (all its weights) beside the adapter."""
    projector_lora: bool = False
    """With --train-projector: train an adapter on the projector's linear layers instead of all its weights. Its rank,
    lora_alpha and dropout are those of the language model's adapter, its rate is projector_learning_rate."""
    train_vision: Annotated[str, one_of(VISION_TRAINING)] = "none"
    """none, or lora: also train an adapter on the linear layers of the vision tower, of the same rank, lora_alpha and
    dropout. The features of an image then change in every step. So none are cached, and the tower runs in every forward
    and backward pass."""
    class_balanced_loss: bool = True
    """Weight each image by the inverse frequency of its answer in the training split (mean weight 1). Near-copies, and
    images of one group, share the weight of one image."""
    augment: Annotated[str, one_of(AUGMENT)] = "none"
    """Vary the training images: light or medium rotation (up to 5 or 15 degrees), brightness and contrast (10 or 25 %)
    and speckle noise; with --allow-flips also left and right. Validation and test images stay as they are."""
    augment_variants: Annotated[int, Range(2, 64)] = 4
    """With --augment: fixed variants of each training image, itself among them. An image shows another one in each
    epoch. The cache of vision features keeps each for all trials."""
    zero_stage: Annotated[int, Range(0, 2, why=WHY_NO_STAGE_3)] = 2
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer states, 2 also gradients partitioned over the workers."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory (ZeRO-Offload): saves GPU memory, costs time. Needs ZeRO 1 or 2."""
    logging_steps: Annotated[int, Range(1, 10**8)] = 10
    """Optimizer steps between two records of training loss and learning rate."""
    save_steps: Annotated[int, Range(0, 10**8)] = 100
    """Optimizer steps between two checkpoints of the adapter. 0: none before the end."""
    save_total_limit: Annotated[int, Range(0, 10**6)] = 3
    """Checkpoints of a trial to keep, the newest; 0: all."""
    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    """Seed of adapter initialisation, dropout and data order."""

    @property
    def lora_parts(self) -> tuple[str, ...]:
        """The parts of the model that get an adapter, by their field of `train_fn.model.base.Base`."""
        wanted = {
            "language_model": self.use_lora,
            "vision_tower": self.train_vision == "lora",
            "projector": self.train_projector and self.projector_lora,
        }
        return tuple(part for part, is_wanted in wanted.items() if is_wanted)

    @property
    def global_batch_size(self) -> int:
        """Images in one optimizer step, over all workers."""
        return (self.per_device_train_batch_size or GUIDE_MICRO_BATCH) * self.gradient_accumulation_steps

    def shared_by(self, world_size: int) -> bool:
        """Whether the workers of a trial can each do an equal share of the global batch, in whole micro-batches."""
        return self.global_batch_size % ((self.per_device_train_batch_size or 1) * world_size) == 0

    def problems(self, world_size: int = 1, label: Callable[[str], str] = str) -> list[str]:
        """Every broken rule as one message; empty if the settings can be trained.

        Args:
            label: returns the name of a setting in messages.
        """
        broken = broken_rules(self, label)
        problems = list(broken.values())

        times = "" if self.per_device_train_batch_size else f"times {GUIDE_MICRO_BATCH} (auto) "
        workers = f"{times}must be a multiple of the {world_size} workers per trial, so that the global batch stays"
        together: list[tuple[tuple[str, ...], Callable[[], bool], str, str]] = [
            (("lora_target_modules",), lambda: bool(self.lora_target_modules), "must name a layer", "such as q_proj"),
            (("use_lora", "train_projector", "train_vision"),
             lambda: self.use_lora or self.train_projector or self.train_vision != "none", "leaves nothing to train",
             "add --train-projector or --train-vision lora"),
            (("projector_lora", "train_projector"), lambda: self.train_projector or not self.projector_lora,
             "needs a trained projector", "add --train-projector, or leave it out"),
            (("vision_learning_rate", "train_vision"),
             lambda: self.train_vision == "lora" or self.vision_learning_rate is None, "needs a trained vision tower",
             "add --train-vision lora, or leave it out"),
            (("offload_optimizer", "zero_stage"), lambda: not self.offload_optimizer or self.zero_stage > 0,
             "needs ZeRO", "give --zero-stage 2"),
            (("gradient_accumulation_steps", "per_device_train_batch_size"), lambda: self.shared_by(world_size),
             workers, "change either"),
        ]  # fmt: skip
        for names, holds, text, fix in together:
            if not broken.keys() & set(names) and not holds():
                problems.append(f"`{label(names[0])}` {text}, but got {SHOWN.repr(getattr(self, names[0]))}: {fix}")
        return problems

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialSettings:
        """The settings with these values, and defaults for all others. Raises ValueError for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names), key=str):
            raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}: a trial has {', '.join(names)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)


@dataclass(frozen=True)
class ImageOptions:
    """How image files become pictures; see the fields of these names in `ModelSettings`."""

    window: str = "auto"
    frames: str = ""

    @property
    def limits(self) -> tuple[float, float] | None:
        """The values of a grey image that become black and white; None: they follow from each image."""
        if self.window == "auto":
            return None
        low, high = map(float, self.window.split(","))
        return low, high


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The frozen base that all trials of a study share."""

    model: Annotated[str, PATH] = "nano"
    """Base model (an image-text-to-text model that transformers loads): its folder, its id on the Hugging Face hub
    (OWNER/NAME or OWNER/NAME@REVISION; a folder of that name comes first), or `nano`: the small one that ships with
    this project."""
    use_qlora: bool = False
    """Hold the language model's linear layers in 4 bit (QLoRA, arXiv:2305.14314: nf4, double quantisation); vision
    tower and projector stay as they are."""
    bf16: bool = False
    """The guide's name for --dtype bfloat16."""
    fp16: bool = False
    """The guide's name for --dtype float16."""
    dtype: Annotated[str, one_of(DTYPES)] = "auto"
    """Number format of the frozen base: float32, bfloat16 or float16. auto: bfloat16 on a GPU that supports it, float16
    on other GPUs, float32 on a CPU. Trained weights are always float32."""
    vision_tower: Annotated[str, MODULE_NAME] = ""
    """Full module name of the vision tower. Not given: found by the usual names."""
    projector: Annotated[str, MODULE_NAME] = ""
    """Full module name of the vision-to-language projector. Not given: found by the usual names."""
    language_model: Annotated[str, MODULE_NAME] = ""
    """Full module name of the language model. Not given: found by the usual names."""
    per_device_eval_batch_size: Annotated[int, Range(1, 4096)] = 16
    """Images in one forward pass of an evaluation."""
    max_image_tokens: Annotated[int, Range(0, 10**6)] = 0
    """Maximum tokens of one image; larger images are scaled down. 0: the model's own limit."""
    window: Annotated[str, WINDOW] = "auto"
    """LOW,HIGH: the values that become black and white in grey images of more than 8 bits, as stored; for DICOM as
    rescaled (Hounsfield units of a CT). auto: DICOM's own window, else each image's range without its darkest and
    brightest 0.1%. The window belongs to the adapter, which needs images of the same kind."""
    frames: Annotated[str, FRAME] = ""
    """The frame or page that is used of files with several (DICOM, TIFF, GIF, ...): first, middle, or its number from
    1. Not given: such files are refused."""
    upright_images: bool = False
    """Hulu-Med only: keep an image's shape. Its weights were trained on images whose height and width the original
    implementation swaps when it resizes, which is the default here."""
    feature_cache_gib: Annotated[float, Range(0, 10**6)] = 4.0
    """Disk space in GiB for cached features of frozen vision towers, shared by all workers and studies of a machine
    (VideoLLaMA3 and Hulu-Med, in ~/.cache/vlm-tune/features). When space is needed, the least recently used files go
    first. Files used since a worker's start stay, and features that do not fit are computed each time. 0: no cache."""

    @property
    def base_dtype(self) -> str:
        """The number format, from `dtype` or the guide's names for it."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype

    @property
    def image_options(self) -> ImageOptions:
        """How the images of this base are read, in training and in use."""
        return ImageOptions(self.window, self.frames)
