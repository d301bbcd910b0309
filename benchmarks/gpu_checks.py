"""The checks of benchmarks/gpu.py. Each measures the product's own steps, and returns a criterion and whether it holds.

A step is 16 images. Times are medians without the first steps, in which layers are compiled and images encoded.
"""

from __future__ import annotations

import collections
import contextlib
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu import Lab
from gpu_memory import (
    attention,
    determinism,
    fragments,
    gpu_tests,
    lane,
    out_of_memory,
    poisoned,
    small_card,
    two_lanes,
    zero_stages,
)
from gpu_steps import Result, Steps, apart, brief, chosen, settings, train, wait

from train_fn.execution import BUDGET, PADDED_PAIRS, Execution

BUSI_STEPS, BUSI_IMAGES, BUSI_EPOCHS, BUSI_TRIALS = 24, 126, 36, 20  # a study under ASHA: epochs of all trials
OTHER_SECONDS = 68  # of a study: start, features of all images, the final test, the end (estimate)


def default_step(lab: Lab) -> Result:
    """The default step against the guide's micro-batch of 2."""
    base, trial = lab.base(), settings(lab, compiled=True)
    default: dict[bool, Steps] = {}
    guide: dict[bool, Steps] = {}
    for mixed in (False, True):
        splits = lab.splits(mixed)
        kind = "mixed sizes" if mixed else "one size"
        execution = chosen(lab, base, splits, trial)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if lab.on_gpu else None
        default[mixed] = run = train(lab, base, splits, trial, execution, 6, around_last=profiler)
        busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 if profiler else 0.0
        lab.row(f"default, {kind}", way=brief(execution), first_s=run.seconds[0], step_s=run.step_s,
                peak_gib=run.peak_gib, busy_share=busy / run.step_s, graphs=run.graphs)  # fmt: skip
        guide[mixed] = run = train(lab, base, splits, trial, PADDED_PAIRS, 3)
        lab.row(f"guide, {kind}", way=brief(PADDED_PAIRS), step_s=run.step_s, peak_gib=run.peak_gib)
    name = torch.cuda.get_device_name() if lab.on_gpu else ""
    ratio = guide[False].step_s / default[False].step_s
    if "H100" in name or "H200" in name:
        return default[
            False
        ].step_s <= 0.85, f"{default[False].step_s:.3f} s <= 0.85 s a step; {ratio:.2f} x the guide's"
    return ratio > 1 if lab.on_gpu else None, f"the default is faster than the guide's micro-batches: {ratio:.2f} times"


def compile_once(lab: Lab) -> Result:
    """Trials of other ranks, scalings and dropout rates compile nothing."""
    base, splits = lab.base(), lab.splits(mixed=True)
    graphs, quick = [], True
    for rank, alpha, dropout in ((64, 128.0, 0.05), (8, 4.0, 0.1), (128, 512.0, 0.05), (16, 16.0, 0.2)):
        trial = settings(lab, compiled=True, lora_r=rank, lora_alpha=alpha, lora_dropout=dropout)
        run = train(lab, base, splits, trial, chosen(lab, base, splits, trial), 4)
        lab.row(f"rank {rank}", first_s=run.seconds[0], later_s=run.step_s, graphs=run.graphs, loss=run.losses[-1])
        graphs.append(run.graphs)
        quick &= rank == 64 or not lab.on_gpu or run.seconds[0] < 2 * run.step_s
    note = base.compiler.error if base.compiler else "nothing was compiled"
    good = not any(graphs[1:]) and quick and not note
    return good, f"no graph after the first trial, and a first step under twice a later one: graphs {graphs} {note}"


def eager_compiled(lab: Lab) -> Result:
    """Whether compiled layers give eager's losses, and what two seeds of the dropout differ by."""
    base, splits = lab.base(), lab.splits()
    plain = settings(lab, lora_dropout=0.0, warmup_ratio=0.0)  # no warm-up: the first update is a real one
    dropped = replace(plain, lora_dropout=0.05)
    compiled = replace(chosen(lab, base, splits, plain), compiled=True)
    eager = replace(compiled, compiled=False, activation_budget=1.0)
    ways = {
        "eager": (plain, eager, 0),
        "eager again": (plain, eager, 0),
        "eager, other micro-batches": (plain, PADDED_PAIRS, 0),
        "compiled": (plain, compiled, 0),
        "eager, dropout": (dropped, eager, 0),
        "eager, dropout of another seed": (dropped, eager, 1),
        "compiled, dropout": (dropped, compiled, 0),
    }
    runs = {}
    for name, (trial, execution, seed) in ways.items():
        runs[name] = run = train(lab, base, splits, trial, execution, 6, seed=seed)
        lab.row(name, losses=[round(loss, 4) for loss in run.losses], apart=apart(run, runs["eager"]))
    rounding = max(apart(runs[name], runs["eager"]) for name in ("eager again", "eager, other micro-batches"))
    difference = apart(runs["compiled"], runs["eager"])
    seeds = apart(runs["eager, dropout of another seed"], runs["eager, dropout"])
    dropout = apart(runs["compiled, dropout"], runs["eager, dropout"])
    good = difference <= max(2 * rounding, 0.01) and dropout <= max(2 * seeds, 2 * rounding, 0.01)
    return good, (
        f"without dropout compiled differs from eager ({difference:.2g}) at most twice as much as two cuts of eager do "
        f"({rounding:.2g}); with it ({dropout:.2g}) at most twice as much as two seeds do ({seeds:.2g})"
    )


def memory_model(lab: Lab) -> Result:
    """Measured peaks against the memory model's."""
    from train_fn.trial.memory import cached_sizes, longest_sample, memory_needed

    base, splits, trial = lab.base(), lab.splits(), settings(lab)
    longest, good = longest_sample(base, splits.train), True
    slopes: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, way in {
        "eager": Execution(images=8),
        "compiled": Execution(images=8, compiled=True),
        "compiled, budget": Execution(images=8, compiled=True, activation_budget=BUDGET),
        "checkpointing": Execution(images=8, gradient_checkpointing=True),
    }.items():
        peaks = {}
        for images in (4, 8):
            execution = replace(way, images=images)
            run = train(lab, base, splits, trial, execution, 4)
            parts = memory_needed(cached_sizes(base, trial), trial, execution, 1, lab.on_gpu, longest, candidates=0)
            expected = sum(parts.values()) - parts["worker"]
            peaks[images], seconds[name] = run.peak_gib, run.step_s
            lab.row(f"{name}, micro-batch {images}", step_s=run.step_s, peak_gib=run.peak_gib, expected_gib=expected)
            good &= run.peak_gib <= expected * 1.02 and expected <= 1.15 * run.peak_gib
        slopes[name] = (peaks[8] - peaks[4]) / 4
    if lab.on_gpu:
        lab.row("GiB an image", **slopes)
        lab.row("COMPILED_SHARE", full=slopes["compiled"] / slopes["eager"],
                budget=slopes["compiled, budget"] / slopes["eager"],
                budget_costs=seconds["compiled, budget"] / seconds["compiled"] - 1)  # fmt: skip
    return good if lab.on_gpu else None, "the model expects what is measured, or up to 15 % more"


def study(lab: Lab) -> Result:
    """Three whole trials, and by them the wall time of 20 trials on data of BUSI's size."""
    from train_fn.trial.loop import run_trial

    base, splits = lab.base(), lab.splits(mixed=True)
    setups, checkpoints, steps, evaluated, extra = [], [], [], [], 0.0
    for number, rank in enumerate((64, 8, 32)):
        trial = settings(lab, lora_r=rank, num_train_epochs=2, save_steps=0)
        reports: list[dict[str, float]] = []
        begun = time.perf_counter()
        run_trial(base, splits, trial, lambda report, to=reports: to.append(dict(report.seconds)) or False,
                  execution=chosen(lab, base, splits, trial), output=lab.folder / f"study-{number}")  # fmt: skip
        first, second = reports
        in_epoch = second["train"] - first["train"]
        extra = extra or max(first["train"] - in_epoch, 0)
        setups.append(first["setup"])
        steps.append(in_epoch / (len(splits.train) / 16))
        evaluated.append((second["evaluation"] - first["evaluation"]) / len(splits.validation))
        checkpoints.append(second.get("checkpoint", 0.0))
        lab.row(f"trial {number}", wall_s=time.perf_counter() - begun, setup_s=setups[-1], step_s=steps[-1],
                evaluated_image_s=evaluated[-1], written_s=checkpoints[-1])  # fmt: skip
    epoch = BUSI_STEPS * median(steps) + BUSI_IMAGES * median(evaluated)
    wall = OTHER_SECONDS + extra + BUSI_TRIALS * (median(setups) + median(checkpoints)) + BUSI_EPOCHS * epoch
    lab.row("20 trials", minutes=wall / 60, epoch_s=epoch, first_extra_s=extra)
    return wall <= 17 * 60 if lab.on_gpu else None, f"{wall / 60:.1f} <= 17 minutes for 20 trials, 57 before"


def packing(lab: Lab) -> Result:
    """Packed rows against padded micro-batches of 8."""
    base, splits, trial = lab.base(), lab.splits(mixed=True), settings(lab)
    packed = chosen(lab, base, splits, trial)
    padded = replace(packed, tokens=0, images=8)
    runs = {}
    for name, execution in (("padded", padded), ("packed", packed)):
        runs[name] = run = train(lab, base, splits, trial, execution, 4)
        lab.row(name, way=brief(execution), step_s=run.step_s, peak_gib=run.peak_gib, loss=run.losses[0])
    difference = abs(runs["packed"].losses[0] - runs["padded"].losses[0])
    is_faster = not lab.on_gpu or runs["packed"].step_s < runs["padded"].step_s
    return difference < 0.05 and is_faster, f"packed is faster, and the first loss within 0.05: {difference:.2g}"


def evaluation(lab: Lab) -> Result:
    """Evaluation in padded batches of 16 against one image at a time."""
    from train_fn.scoring.evaluation import predict
    from train_fn.trial.lora import adapted

    base, splits = lab.base(), lab.splits(mixed=True)
    found: dict[int, tuple[float, np.ndarray]] = {}
    with adapted(base, settings(lab)):
        for size in (16, 1, 16):  # the first time, images are encoded
            wait(lab)
            begun = time.perf_counter()
            scores = predict(base, splits.validation, splits, size)["scores"]
            found[size] = (time.perf_counter() - begun) / len(splits.validation), scores
    difference = float(np.abs(found[16][1] - found[1][1]).max() / np.abs(found[1][1]).mean())
    lab.row("an image", batches_of_16_s=found[16][0], one_at_a_time_s=found[1][0], relative_difference=difference)
    is_faster = not lab.on_gpu or found[16][0] < 0.6 * found[1][0]
    return difference < 0.02 and is_faster, "padded batches take under 0.6 of the time, scores within 2 %"


def waits(lab: Lab) -> Result:
    """Where a step waits for the GPU."""
    base, splits, trial = lab.base(), lab.splits(mixed=True), settings(lab)
    places: collections.Counter[str] = collections.Counter()

    def note(*_: Any, **__: Any) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-1]
                  if "/torch/" not in frame.filename and Path(frame.filename).name not in ("warnings.py",)]  # fmt: skip
        places[" < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-1:-4:-1])] += 1

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    around = noting() if lab.on_gpu else contextlib.nullcontext()
    train(lab, base, splits, trial, chosen(lab, base, splits, trial), 2, around_last=around)
    for place, count in places.most_common(12):
        lab.row(place, times=count)
    total = sum(places.values())
    # The helper's own wait behind the step is none of the product's, and torch counts it, too.
    return total <= 9 if lab.on_gpu else None, f"a step waits at most 8 times for the GPU, this check once: {total}"


CHECKS = [default_step, compile_once, eager_compiled, memory_model, study, packing, evaluation, waits, out_of_memory,
          attention, fragments, determinism, zero_stages, small_card, poisoned, two_lanes, gpu_tests]  # fmt: skip
INTERNAL = [lane]
