"""The checks of benchmarks/gpu.py. Each measures the product's own steps, and returns a criterion and whether it holds.

A step is 16 images. Times are medians without the first steps, in which layers are compiled and images encoded.
"""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import sys
import time
import traceback
import unittest.mock
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu import GIB, ROOT, Lab

from train_fn.execution import BUDGET, PADDED_PAIRS, Execution, change, smaller
from train_fn.settings import TrialSettings

Result = tuple[bool | None, str]
SMALL_CARD_GIB = 22.0  # what a card of "24 GB" leaves for tensors
BUSI_STEPS, BUSI_IMAGES, BUSI_EPOCHS, BUSI_TRIALS = 24, 126, 36, 20  # a study under ASHA: epochs of all trials
OTHER_SECONDS = 68  # of a study: start, features of all images, the final test, the end (estimate)


@dataclass
class Steps:
    """Optimizer steps of one trial."""

    seconds: list[float]
    losses: list[float]
    graphs: int
    """How many were compiled."""
    peak_gib: float
    reserved_gib: float
    weights: torch.Tensor
    """The trained weights at the end, on the CPU."""

    @property
    def step_s(self) -> float:
        return median(self.seconds[2:] or self.seconds[1:] or self.seconds)


def settings(lab: Lab, compiled: bool = False, **options: Any) -> TrialSettings:
    """The default trial, which a GPU compiles and a CPU does not.

    Args:
        compiled: whether a CPU compiles, too.
    """
    return TrialSettings(**({"torch_compile": True} if compiled and not lab.on_gpu else {}), **options)


def chosen(lab: Lab, base: Any, splits: Any, trial: TrialSettings, share: float = 1.0) -> Execution:
    """What the product chooses here."""
    from train_fn.trial.memory import choose_execution, free_memory

    return choose_execution(base, splits.train, trial, free_memory(base.device, share * lab.share))[0]


def train(
    lab: Lab,
    base: Any,
    splits: Any,
    trial: TrialSettings,
    execution: Execution,
    num_steps: int,
    seed: int = 0,
    around_last: contextlib.AbstractContextManager | None = None,
) -> Steps:
    """The product's optimizer steps, on the same samples each time.

    Args:
        seed: of the dropout; the adapter's is the trial's.
        around_last: encloses a further step that is not timed.
    """
    from torch._dynamo.utils import counters

    from train_fn.support.cleanup import at_end
    from train_fn.support.ranks import seed_everything
    from train_fn.trial.engine import build_engine
    from train_fn.trial.lora import adapted
    from train_fn.trial.steps import micro_batches, train_step
    from train_fn.worker import release_memory

    release_memory()
    if lab.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    num_steps = num_steps if lab.on_gpu else min(num_steps, 2)
    rng, before = np.random.default_rng(0), counters["stats"]["unique_graphs"]
    steps = num_steps + (around_last is not None)
    order = np.stack([rng.permutation(len(splits.train))[: trial.global_batch_size] for _ in range(steps)])
    seconds, losses = [], []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(adapted(base, trial, execution))
        engine = build_engine(base, model, trial, torch.tensor([], device=lab.device), 100, 1, execution)
        stack.enter_context(at_end(engine.destroy))
        seed_everything(seed, 0)
        batches = stack.enter_context(contextlib.closing(micro_batches(base, splits.train, execution, order)))
        for step in range(1, num_steps + 1):
            begun = time.perf_counter()
            losses.append(train_step(engine, batches, step, False)[0])
            wait(lab)
            seconds.append(time.perf_counter() - begun)
        if around_last is not None:
            with around_last:
                train_step(engine, batches, steps, False)
                wait(lab)
        weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])
    peak = torch.cuda.max_memory_allocated() / GIB if lab.on_gpu else 0.0
    reserved = torch.cuda.max_memory_reserved() / GIB if lab.on_gpu else 0.0
    return Steps(seconds, losses, counters["stats"]["unique_graphs"] - before, peak, reserved, weights)


def wait(lab: Lab) -> None:
    """Wait for the device."""
    if lab.on_gpu:
        torch.cuda.synchronize()


def apart(one: Steps, other: Steps) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def brief(execution: Execution) -> str:
    """An execution in a few words."""
    cut = f"{execution.images} images" if execution.images else f"{execution.tokens} tokens"
    way = "checkpointing" if execution.gradient_checkpointing else "compiled" if execution.compiled else "eager"
    return f"{way} {execution.activation_budget:g}, {cut}"


# ------------------------------------------------------------------------------------------------ time


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


# ------------------------------------------------------------------------------------------------ memory


def small_card(lab: Lab) -> Result:
    """What a card of 24 GB takes: the base in bfloat16 and in 4 bit."""
    good = True
    share = 1.0
    if lab.on_gpu:
        lab.release_base()
        share = min(1.0, SMALL_CARD_GIB * GIB / torch.cuda.mem_get_info()[1])
        torch.cuda.set_per_process_memory_fraction(share)
    try:
        for quantised in (False, True):
            base = lab.base(use_qlora=quantised)
            for mixed in (False, True):
                splits, trial = lab.splits(mixed), settings(lab)
                execution = chosen(lab, base, splits, trial, share)
                name = f"{'QLoRA' if quantised else 'bfloat16'}, {'mixed' if mixed else 'one size'}"
                try:
                    run = train(lab, base, splits, trial, execution, 3)
                except torch.OutOfMemoryError as error:
                    good = False
                    lab.row(name, way=brief(execution), error=str(error)[:120])
                    continue
                lab.row(name, way=brief(execution), step_s=run.step_s, peak_gib=run.peak_gib,
                        reserved_gib=run.reserved_gib)  # fmt: skip
                good &= run.reserved_gib < 24
    finally:
        lab.release_base()
        if lab.on_gpu:
            torch.cuda.set_per_process_memory_fraction(lab.share)
    return good, f"what the product chooses runs within {SMALL_CARD_GIB:.0f} GiB"


def out_of_memory(lab: Lab) -> Result:
    """A real out of memory: the ladder's steps until a way fits, and nothing is left behind."""
    from train_fn.trial import engine as engines
    from train_fn.trial.memory import longest_sample
    from train_fn.worker import release_memory

    base, splits, trial = lab.base(), lab.splits(), settings(lab)
    longest = longest_sample(base, splits.train)
    execution: Execution | None = replace(chosen(lab, base, splits, trial), tokens=0, images=16, compiled=lab.on_gpu)
    fresh = train(lab, base, splits, trial, PADDED_PAIRS, 2)
    release_memory()
    held = torch.cuda.memory_allocated() if lab.on_gpu else 0
    plain = engines.answer_losses

    def limited(base: Any, batch: Any) -> torch.Tensor:
        if len(batch["labels"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated on a CPU)")
        return plain(base, batch)

    filler, failures, steps = None, 0, None
    with contextlib.ExitStack() as stack:
        if lab.on_gpu:  # 16 GiB are left
            free = torch.cuda.mem_get_info()[0]
            filler = torch.empty(max(free - 16 * GIB, 0), dtype=torch.uint8, device=lab.device)
        else:
            stack.enter_context(unittest.mock.patch.object(engines, "answer_losses", limited))
        while execution and steps is None:
            try:
                steps = train(lab, base, splits, trial, execution, 2)
            except engines.MicroBatchTooLarge:
                failures += 1
                less = smaller(execution, longest)
                lab.row(
                    f"failure {failures}", way=brief(execution), then=change(execution, less) if less else "nothing"
                )
                execution = less
    del filler
    release_memory()
    left = (torch.cuda.memory_allocated() if lab.on_gpu else 0) - held
    again = train(lab, base, splits, trial, PADDED_PAIRS, 2)
    lab.row("afterwards", left_mib=left / 2**20, next_trial_differs=apart(again, fresh))
    good = failures > 0 and steps is not None and left < 2**20
    return good, "the ladder ends in a way that fits, each failure is MicroBatchTooLarge, and under 1 MiB is left"


BROKEN = """
import torch
from train_fn.model.memory import is_broken_device
try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
    torch.cuda.synchronize()
except Exception as error:
    print(is_broken_device(error), type(error).__name__)
"""
NO_WORKSPACE = """
import torch
from train_fn.model.memory import is_out_of_memory
one, held, size = torch.ones(64, 64, device="cuda"), [], 2**33
while size > 2**20:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        size //= 2
try:
    (one @ one).sum().item()
    print("True none")
except Exception as error:
    print(is_out_of_memory(error), type(error).__name__, str(error)[:80])
"""


def poisoned(lab: Lab) -> Result:
    """A broken device, and a cuBLAS without memory for its handle, are recognised."""
    if not lab.on_gpu:
        return None, "needs a GPU"
    lab.release_base()
    good = True
    for name, code in (("device-side assert", BROKEN), ("cuBLAS without memory", NO_WORKSPACE)):
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
        lab.row(name, answer=found.stdout.strip() or found.stderr.strip()[-200:])
        good &= found.stdout.startswith("True")
    return good, "is_broken_device and is_out_of_memory return True"


def fragments(lab: Lab) -> Result:
    """Reserved over allocated memory where lengths differ, with and without expandable segments."""
    if not lab.on_gpu:
        return None, "needs a GPU"
    base, splits, trial = lab.base(), lab.splits(mixed=True), settings(lab)
    change_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    change_allocator = change_allocator or torch.cuda.memory._set_allocator_settings
    ratio = {}
    for expandable in (False, True):
        torch.cuda.empty_cache()
        change_allocator(f"expandable_segments:{expandable}")
        run = train(lab, base, splits, trial, chosen(lab, base, splits, trial), 6)
        ratio[expandable] = run.reserved_gib / run.peak_gib
        lab.row(f"expandable segments {expandable}", reserved_over_allocated=ratio[expandable], step_s=run.step_s,
                peak_gib=run.peak_gib)  # fmt: skip
    return ratio[True] < 1.1, "reserved is under 1.1 of allocated memory with expandable segments, which lanes use"


# ------------------------------------------------------------------------------------------------ the rest


def attention(lab: Lab) -> Result:
    """Which attention kernel is the fastest, and whether torch takes it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from train_fn.model.attention import by_kernel, each_sequence, has_varlen_kernel, max_length

    images, tokens = (8, 1255) if lab.on_gpu else (2, 16)
    dtype = torch.bfloat16 if lab.on_gpu else torch.float32
    query, key, value = (torch.randn(images, heads, tokens, 128, device=lab.device, dtype=dtype, requires_grad=True)
                         for heads in (32, 8, 8))  # fmt: skip
    rows = [heads.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for heads in (query, key, value)]
    ends = torch.arange(images + 1, dtype=torch.int32) * tokens

    def padded() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def packed() -> torch.Tensor:
        has_kernel = has_varlen_kernel(lab.device, dtype)
        attend = by_kernel if has_kernel else each_sequence
        return attend(*rows, ends.to(lab.device) if has_kernel else ends, max_length(tokens), 128**-0.5)

    ways: dict[str, Any] = {"default": contextlib.nullcontext}
    for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if lab.on_gpu else ():
        ways[kernel] = lambda kernel=kernel: sdpa_kernel(getattr(SDPBackend, kernel))
    ways["packed row"] = contextlib.nullcontext
    found = {}
    for name, context in ways.items():
        try:
            with context():
                for repeat in range(12):
                    if repeat == 2:
                        wait(lab)
                        begun = time.perf_counter()
                    (packed if name == "packed row" else padded)().sum().backward(retain_graph=True)
                wait(lab)
        except RuntimeError as error:
            lab.row(name, refused=str(error).splitlines()[0][:90])
            continue
        found[name] = (time.perf_counter() - begun) / 10
        lab.row(name, layer_ms=1000 * found[name])
    fastest = min(seconds for name, seconds in found.items() if name != "packed row")
    return (found["default"] <= 1.1 * fastest) if lab.on_gpu else None, "torch takes the fastest kernel, within 10 %"


def determinism(lab: Lab) -> Result:
    """Whether two runs end with the same bits, and what deterministic algorithms cost."""
    base, splits, trial = lab.base(), lab.splits(mixed=True), settings(lab)
    execution = chosen(lab, base, splits, trial)
    same = {}
    try:
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted, warn_only=True)
            one, two = (train(lab, base, splits, trial, execution, 4) for _ in range(2))
            same[wanted] = torch.equal(one.weights, two.weights)
            lab.row(f"deterministic {wanted}", same_bits=same[wanted], step_s=one.step_s, losses_apart=apart(one, two),
                    weights_apart=float((one.weights - two.weights).abs().max()))  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    return same[False] or same[True], "two runs end with the same bits, at least with deterministic algorithms"


def zero_stages(lab: Lab) -> Result:
    """What ZeRO's stages cost on one worker, against two runs of the same stage."""
    base, splits = lab.base(), lab.splits()
    found: dict[int, list[float]] = collections.defaultdict(list)
    for stage in (2, 1, 0) * 2:
        trial = settings(lab, zero_stage=stage)
        found[stage].append(train(lab, base, splits, trial, chosen(lab, base, splits, trial), 5).step_s)
    for stage, seconds in found.items():
        lab.row(f"stage {stage}", run_1_s=seconds[0], run_2_s=seconds[1])
    noise = max(max(seconds) / min(seconds) - 1 for seconds in found.values())
    excess = median(found[2]) / median(found[1]) - 1
    criterion = f"stage 2, which runs as stage 1, takes its time within the noise: {excess:+.1%}, noise {noise:.1%}"
    return abs(excess) <= max(noise, 0.02) if lab.on_gpu else None, criterion


def lane(lab: Lab) -> Result:
    """The steps of a lane that shares its GPU (a part of `two_lanes`)."""
    base, splits, trial = lab.base(), lab.splits(), settings(lab)
    execution = chosen(lab, base, splits, trial)
    run = train(lab, base, splits, trial, execution, 12 if lab.on_gpu else 2)
    lab.row("lane", way=brief(execution), step_s=run.step_s)
    return None, "none"


def two_lanes(lab: Lab) -> Result:
    """Two lanes on one GPU against one."""
    import json

    base, splits, trial = lab.base(), lab.splits(), settings(lab)
    alone = train(lab, base, splits, trial, chosen(lab, base, splits, trial, 0.5), 5).step_s
    lab.release_base()
    outputs = [lab.folder / f"lane-{number}.json" for number in range(2)]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--only", "lane", "--model", str(lab.model),
               "--share", "0.5", "--output"]  # fmt: skip
    lanes = [subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL) for output in outputs]
    try:
        codes = [process.wait() for process in lanes]
    finally:
        for process in lanes:
            process.kill()
    if any(codes):
        return False, f"both lanes end well, but got the exit codes {codes}"
    seconds = [json.loads(output.read_text())["checks"]["lane"]["rows"]["lane"]["step_s"] for output in outputs]
    lab.row("a step", alone_s=alone, together_s=seconds, gain=2 * alone / median(seconds))
    good = max(seconds) < 2.1 * alone if lab.on_gpu else None
    return good, f"two lanes lose no time: {max(seconds):.3f} s a step of each, {alone:.3f} s of one alone"


def gpu_tests(lab: Lab) -> Result:
    """`pytest -m gpu`, without the studies where Ray is not installed."""
    from importlib.util import find_spec

    lab.release_base()
    some = [] if find_spec("ray") else ["-k", "not study"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu",
               "tests/test_gpu.py", *some]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    lab.row("pytest", summary=lines[-1] if lines else found.stderr[-200:])
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            lab.row(line[:100])
    return found.returncode == 0, "all pass"


CHECKS = [default_step, compile_once, eager_compiled, memory_model, study, packing, evaluation, waits, out_of_memory,
          attention, fragments, determinism, zero_stages, small_card, poisoned, two_lanes, gpu_tests]  # fmt: skip
INTERNAL = [lane]
