"""How fast the devices of each node are: a few seconds of one worker's work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from train_fn.model.memory import GIB
from tune.doctor.duration import Speed
from tune.doctor.findings import Facts
from tune.lanes.layout import Layout

ANSWER_S = 90  # a device that is busy for longer gets no estimate
TIMED_S = 0.5  # of each measurement


def probe_nodes(layout: Layout | None, facts: dict[str, Facts]) -> dict[str, Speed]:
    """Speed of one worker's device by node; nodes without a free device are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if layout is None:
        return {}
    task: Any = ray.remote(probe)
    kind, answers = "GPU" if layout.use_gpu else "CPU", {}
    for where, node in facts.items():
        if node.get("resources", {}).get(kind, 0) >= 1:
            there = NodeAffinitySchedulingStrategy(node["id"], soft=False)
            options = {"num_cpus": 0 if layout.use_gpu else 1, "num_gpus": int(layout.use_gpu), "max_retries": 0}
            answers[where] = task.options(scheduling_strategy=there, **options).remote(layout.num_threads)
    speeds: dict[str, Speed] = {}
    until = time.monotonic() + ANSWER_S
    for where, answer in answers.items():
        try:
            speeds[where] = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.RayError:
            ray.cancel(answer, force=True)
    return speeds


def probe(num_threads: int) -> Speed:
    """Measure this process's device. num_threads: of a CPU worker; 0 on a GPU."""
    import torch

    on_gpu = torch.cuda.is_available() and not num_threads
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.set_num_threads(num_threads or torch.get_num_threads())

    def rate(work: Callable[[], Any], amount: float) -> float:
        """Amount a second, of as many calls as fit the time."""
        for _ in range(2):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        calls, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < TIMED_S:
            work()
            calls += 1
            if on_gpu:
                torch.cuda.synchronize()
        return calls * amount / passed

    half = torch.bfloat16 if on_gpu and torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    side, dtype = (8192, half) if on_gpu else (1024, torch.float32)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    source = torch.ones(GIB // (4 if on_gpu else 32), device=device)
    target = torch.empty_like(source)
    tiny, num = torch.ones(8, 8, device=device, requires_grad=True), 500

    def operations() -> None:
        """Small operations, forwards and backwards: on a GPU only their launches take time."""
        output = tiny
        for _ in range(num):
            output = torch.nn.functional.silu(output)
        output.sum().backward()

    return Speed(
        matmul=rate(lambda: torch.mm(matrix, matrix, out=product), 2.0 * side**3),
        copy=rate(lambda: target.copy_(source), 2.0 * source.nbytes),
        launch=1 / rate(operations, 2 * num),
    )
