"""Whether the workers of a lane can train together, and how fast they exchange gradients."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from train_fn.settings import TrialSettings
from train_fn.support.storage import Storage
from tune.doctor.findings import Facts, Finding
from tune.doctor.nodes import ANSWER_S, last_line
from tune.lanes.layout import Layout

MESSAGES_MIB = (1, 16, 64)


def measure_collectives(
    layout: Layout | None, facts: dict[str, Facts], storage: Storage | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Time an all-reduce and a ZeRO-2 step between the workers of a trial; on several nodes, between two at least."""
    if not layout or not storage:
        yield Finding("collectives", "cluster", "skipped: lanes and storage must be in order first")
        return
    kind = "GPU" if layout.use_gpu else "CPU"
    slots = [int(node["resources"].get(kind, 0)) for node in facts.values() if "resources" in node]
    workers = max(layout.workers_per_trial, 2 if sum(map(bool, slots)) > 1 else 1)
    single = workers == 1 and not layout.use_gpu  # a single GPU is tried, too: its driver must suit torch
    if single or sum(slots) < workers:
        why = "a trial has one worker" if single else f"{workers} {kind}s are not there yet"
        yield Finding("collectives", "cluster", f"skipped: {why}")
        return
    say(f"Measuring collectives between {workers} workers")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    from tune.lanes.loopback import torch_config

    trainer = TorchTrainer(
        collectives_loop,
        train_loop_config={"storage": storage},
        torch_config=torch_config(ANSWER_S),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=layout.worker_resources,
            placement_strategy="PACK" if layout.workers_per_trial > 1 else "SPREAD",
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(storage.directory),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
        storage.pull(storage.directory / "collectives.json")
        times = json.loads((storage.directory / "collectives.json").read_text())
    except Exception as error:  # any error here would also end a trial's workers
        fix = f"{workers} workers must be able to train together, but {last_line(error)}: look at network and firewall"
        yield Finding("collectives", "cluster", "failed", f"{fix} (NCCL: NCCL_SOCKET_IFNAME)")
        return
    speeds = ", ".join(f"{speed:.2f} GB/s at {mib} MiB" for mib, speed in times["gb_per_s"].items())
    if workers > 1:
        yield Finding("collectives", "cluster", f"{workers} workers, {times['backend']}: all-reduce {speeds}")
    yield Finding("ZeRO-2", "cluster", f"a step over {times['trained']:,} weights takes {times['step_s']:.3f} s")


def collectives_loop(config: dict[str, Any]) -> None:
    """The train loop of the doctor's workers: time all-reduce, and an optimizer step under ZeRO-2."""
    import ray.train.torch
    import torch
    import torch.distributed as dist

    from train_fn.trial.engine import deepspeed, deepspeed_config

    device, size = ray.train.torch.get_device(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def seconds_of(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(2):  # the first builds connections
            dist.barrier()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[-1]

    speeds = {}
    for mib in MESSAGES_MIB:
        message = torch.ones(mib * 2**18, device=device)
        reduce_s = seconds_of(functools.partial(dist.all_reduce, message))
        # The "bus bandwidth" of NCCL's tests: what a link carries, for any number of workers.
        speeds[mib] = 2 * (size - 1) / size * message.nbytes / reduce_s / 1e9
    torch.manual_seed(0)
    toy = torch.nn.Linear(1024, 1024).to(device)
    trained = sum(parameter.numel() for parameter in toy.parameters())
    settings = deepspeed_config(TrialSettings(gradient_accumulation_steps=size), size, trained, device.type == "cuda")
    optimizer = torch.optim.AdamW(toy.parameters())
    engine, *_ = deepspeed.initialize(model=toy, optimizer=optimizer, config=settings, dist_init_required=False)

    def step() -> None:
        engine.backward(engine(torch.randn(2, 1024, device=device)).square().mean())
        engine.step()

    step_s = seconds_of(step)
    weights = [torch.empty_like(toy.weight) for _ in range(size)]
    dist.all_gather(weights, toy.weight.detach())
    if not all(torch.equal(weights[0], other) for other in weights):
        raise RuntimeError("the workers' weights differ after a ZeRO-2 step")
    if dist.get_rank() == 0:
        path = config["storage"].directory / "collectives.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"gb_per_s": speeds, "backend": dist.get_backend(), "step_s": step_s, "trained": trained})
        )
        config["storage"].push(path)
