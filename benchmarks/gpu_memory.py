"""The checks of benchmarks/gpu.py on memory, kernels, bits and lanes."""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import sys
import time
import unittest.mock
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from gpu import GIB, ROOT, Lab
from gpu_steps import Result, apart, brief, chosen, settings, train, wait

from train_fn.execution import PADDED_PAIRS, Execution, change, smaller

SMALL_CARD_GIB = 22.0  # what a card of "24 GB" leaves for tensors


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
