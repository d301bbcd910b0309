"""How long a trial and a study take: an estimate from the model's shapes and the speed of a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train_fn.data.order import by_images, by_tokens, epoch_order
from train_fn.execution import Execution
from train_fn.settings import TrialSettings
from train_fn.trial.memory import Sizes

# All from an H200 at Hulu-Med-4B's shape (benchmarks/README.md, "On a GPU"), whose matmul of 8192 cubed reaches 790
# TFLOP/s and whose copies 4 TB/s. A step of 362 TFLOP takes 0.848 s compiled: 0.73 s of matrix products, and 0.5 TB of
# other traffic. Eager it takes 1.294 s, with 2.0 TB.
MATMUL_SHARE = 0.63  # of the probe's rate that a step's matrix products reach
TRAFFIC_EAGER, TRAFFIC_COMPILED = 12.0, 3.0  # bytes moved in a step for each byte that is kept for the backward pass
LAUNCHES_EAGER, LAUNCHES_COMPILED = 350, 190  # operations of one layer, forwards and backwards: 12,600 of 36 layers
LAUNCHES_TOWER = 20  # of a layer without adapters, forwards
LAUNCH_OVERHEAD = 2.0  # time of an operation in the model, as a multiple of the probe's bare one: a guess
RECOMPUTED_BUDGET, RECOMPUTED_ALL = 1.06, 1.47  # time of a step with an activation budget, with gradient checkpointing
TOWER_BACKWARD = 1.5  # time of a trained tower's backward pass, as a multiple of its forward pass: a guess
ATTENTION_BACKWARD = 2.5  # FLOPs of attention's backward pass, as a multiple of its forward pass: 5 products to 2
# Constants of a study in seconds (benchmarks/README.md).
START_S = 25.0  # from the command to the first step, and the end: processes, imports, base
COMPILE_S = 40.0  # the first step of a lane
STEPS_LOOKED_AT = 8


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, and how long it takes to start an operation."""

    matmul: float
    """FLOP/s of a large matrix product in the base's number format."""
    copy: float
    """Bytes/s read and written by a copy."""
    launch: float
    """Seconds of one small operation."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What decides how long a trial takes, beside the device. Lengths are tokens of each sample."""

    weights: int
    """Of the language model's linear layers."""
    trained: int
    kept: float
    """Bytes that the forward pass of one token keeps for the backward pass, uncompiled."""
    layers: int
    attention: int
    """FLOPs of the forward pass for a token that attends to another one, in all layers."""
    tower_weights: int
    tower_attention: int
    tower_layers: int
    patches_per_token: int
    """Patches of the vision tower for each token of the language model."""
    features_kept: bool
    """Whether the tower sees each image once a study, and not in every forward pass."""
    trains_tower: bool
    """Whether a step also goes backwards through the tower."""
    packed: bool
    """Whether the samples of a forward pass are not padded to the longest."""
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Estimated seconds."""

    step: float
    epoch: float
    """Training and evaluation."""
    trial: float
    study: tuple[float, float]
    """If early stopping ends all that it can as soon as it can, and if every trial runs to its end."""


def work_of(base: Any, sizes: Sizes, *lengths: Sequence[int]) -> Work:
    """The work of a trial. base: a skeleton; lengths: tokens of each training, validation and test sample."""
    import torch

    def linear_weights(name: str) -> int:
        modules = base.model.get_submodule(name).modules()
        return sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))

    text, vision = base.model.config.get_text_config(), getattr(base.model.config, "vision_config", None)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tower_layers: int = getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0)
    train, validation, test = map(tuple, lengths)
    return Work(
        weights=linear_weights(base.language_model),
        trained=sizes.trained,
        kept=sizes.activations,
        layers=text.num_hidden_layers,
        attention=4 * text.num_attention_heads * head * text.num_hidden_layers,
        tower_weights=linear_weights(base.vision_tower),
        tower_attention=4 * getattr(vision, "hidden_size", 0) * tower_layers,
        tower_layers=tower_layers,
        patches_per_token=getattr(vision, "spatial_merge_size", 1) ** 2,
        features_kept=base.counts_patches and base.settings.feature_cache_gib > 0 and not sizes.tower,
        trains_tower=sizes.tower > 0,
        packed=base.needs_no_mask,
        train=train,
        validation=validation,
        test=test,
    )


def train_flops(work: Work, lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward pass of these samples, counted as torch's FlopCounterMode does: all of S x S.

    A frozen weight costs a token 2 FLOPs forwards and 2 for the gradient of its input, a trained one 2 more.
    """
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    return tokens * (4 * work.weights + 6 * work.trained) + pairs * work.attention * (1 + ATTENTION_BACKWARD)


def answer_flops(work: Work, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass of these samples. The candidate answers are a few tokens behind each and left out."""
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    return 2 * tokens * (work.weights + work.trained) + pairs * work.attention


def tower_s(work: Work, speed: Speed, lengths: Sequence[int]) -> float:
    """Seconds of the vision tower for the images of these samples, one by one."""
    patches = [length * work.patches_per_token for length in lengths]
    flops = sum(2 * p * work.tower_weights + p**2 * work.tower_attention for p in patches)
    floor = len(patches) * work.tower_layers * LAUNCHES_TOWER * LAUNCH_OVERHEAD * speed.launch
    return max(flops / (MATMUL_SHARE * speed.matmul), floor)


def pass_s(work: Work, speed: Speed, execution: Execution, lengths: Sequence[int]) -> float:
    """Seconds of one micro-batch, forwards and backwards."""
    if not work.packed or execution.images:
        lengths = [max(lengths)] * len(lengths)
    compiled = execution.compiled
    traffic = sum(lengths) * work.kept * (TRAFFIC_COMPILED if compiled else TRAFFIC_EAGER)
    busy = train_flops(work, lengths) / (MATMUL_SHARE * speed.matmul) + traffic / speed.copy
    launches = work.layers * (LAUNCHES_COMPILED if compiled else LAUNCHES_EAGER)
    again = RECOMPUTED_BUDGET if execution.activation_budget < 1 else 1.0
    again = RECOMPUTED_ALL if execution.gradient_checkpointing else again
    seconds = again * max(busy, launches * LAUNCH_OVERHEAD * speed.launch)
    if work.features_kept:
        return seconds
    return seconds + tower_s(work, speed, lengths) * (1 + TOWER_BACKWARD * work.trains_tower)


def step_s(work: Work, speed: Speed, execution: Execution, trial: TrialSettings, workers: int) -> float:
    """Seconds of an optimizer step, the mean over a few."""
    order = epoch_order(len(work.train), trial.global_batch_size, 0, 0)[:STEPS_LOOKED_AT]
    seconds = []
    for step in order:
        tokens = [work.train[index] for index in step]
        if execution.images:
            cut = by_images(tokens, execution.images, 0, workers)
        else:
            cut = by_tokens(tokens, execution.tokens, 0, workers, work.packed)
        seconds.append(sum(pass_s(work, speed, execution, [tokens[place] for place in places]) for places in cut))
    return float(np.mean(seconds))


def evaluation_s(work: Work, speed: Speed, lengths: Sequence[int], batch_size: int) -> float:
    """Seconds to score samples: each batch passes with its prompts, and again with the candidate answers."""
    busy = answer_flops(work, lengths) / (MATMUL_SHARE * speed.matmul)
    busy += sum(lengths) * work.kept * TRAFFIC_EAGER / 3 / speed.copy
    passes = 2 * math.ceil(len(lengths) / batch_size)
    floor = passes * work.layers * LAUNCHES_EAGER / 3 * LAUNCH_OVERHEAD * speed.launch
    return max(busy, floor) + (0.0 if work.features_kept else tower_s(work, speed, lengths))


def times(
    work: Work, speed: Speed, execution: Execution, trial: TrialSettings, *, workers: int, lanes: int, trials: int,
    eval_batch_size: int, to_end: float, first_stop: float,
) -> Times:  # fmt: skip
    """Estimate a trial and a study.

    Args:
        to_end: trials that run to their end in any case.
        first_stop: epochs after which early stopping may end all others; 0 if there is none.
    """
    step = step_s(work, speed, execution, trial, workers)
    steps = math.ceil(len(work.train) / trial.global_batch_size)
    epochs = math.ceil(trial.max_steps / steps) if trial.max_steps else trial.num_train_epochs
    epoch = step * steps + evaluation_s(work, speed, work.validation, eval_batch_size) / workers
    once = START_S + (COMPILE_S if execution.compiled else 0.0)
    if work.features_kept:
        variants = trial.augment_variants if trial.augment != "none" else 1
        once += tower_s(work, speed, [*variants * work.train, *work.validation, *work.test]) / (lanes * workers)
    # The winner, the guide's trial and the base.
    once += 3 * evaluation_s(work, speed, work.test, eval_batch_size) / workers
    stopped = min(epochs, first_stop) if first_stop else epochs

    def study(others: float) -> float:
        first = min(to_end, trials)
        return once + epoch * max((first * epochs + (trials - first) * others) / lanes, epochs)

    return Times(step, epoch, epochs * epoch, (study(stopped), study(epochs)))
