"""How much memory and disk a study needs, estimated from the model's shapes."""

from __future__ import annotations

import dataclasses
import math

from train_fn.execution import Execution
from train_fn.model.memory import GIB
from train_fn.settings import TrialSettings
from train_fn.trial.memory import longest_sample, measure, memory_needed, skeleton
from tune.config.settings import Settings
from tune.config.space_check import corners
from tune.doctor.findings import Facts, Finding, Need
from tune.plan.prepare import Study


def estimate(study: Study, need: Need, facts: dict[str, Facts], findings: list[Finding]) -> Need:
    """The need with memory and disk of the largest trial of the space. facts: as `ask_nodes` returns them."""
    import torch

    trial, workers = largest_trial(study.settings), study.settings.study.workers_per_trial
    on_gpu = need.layout is not None and need.layout.use_gpu
    samples = [*study.splits.train, *study.splits.validation, *study.splits.test]
    gpus = [gpu for node in facts.values() for gpu in node.get("gpus", ())]
    model = study.settings.model
    if on_gpu and model.base_dtype == "auto" and not all(gpu["bf16"] for gpu in gpus):
        model = dataclasses.replace(model, dtype="float16")  # it needs more memory
    dtype = getattr(torch, "bfloat16" if on_gpu else "float32")
    try:
        sizes = measure(model, trial, dtype)
        longest = longest_sample(skeleton(model, dtype), samples)
    except (ValueError, OSError) as error:
        findings.append(Finding("model", "driver", "cannot be built", str(error)))
        return need

    def at(micro_batch: int) -> dict[str, float]:
        way = Execution(images=micro_batch, gradient_checkpointing=trial.gradient_checkpointing)
        return memory_needed(sizes, trial, way, workers, on_gpu, longest, len(study.splits.candidates))

    size, largest = trial.per_device_train_batch_size or 1, trial.global_batch_size // workers
    larger = {m: sum(at(m).values()) for m in range(size + 1, largest + 1) if largest % m == 0}
    disk = disk_needed(study, trial, sizes.trained)
    return dataclasses.replace(need, memory=at(size), least=sum(at(1).values()), larger=larger, disk=disk)


def largest_trial(settings: Settings) -> TrialSettings:
    """The trial with most memory among the space's guide and both ends of its ranges."""
    trials = corners(settings)
    return max(trials, key=lambda trial: (trial.per_device_train_batch_size or 0, trial.lora_r, trial.train_projector))


def disk_needed(study: Study, trial: TrialSettings, trained: int) -> float:
    """GiB of results if every trial runs to its end: adapters in float32, and the state of the trials that run."""
    settings = study.settings.study
    steps = trial.max_steps or trial.num_train_epochs * math.ceil(len(study.splits.train) / trial.global_batch_size)
    checkpoints = steps // trial.save_steps if trial.save_steps else 0
    checkpoints = min(checkpoints, trial.save_total_limit or checkpoints)
    again = (settings.confirm + 1) * (settings.folds or settings.confirm_seeds) if settings.confirm else 0
    adapters = (settings.trials + again) * (checkpoints + 1) + 1
    state = 2 * 16 * max(1, settings.lanes)  # two points, each with weights, ZeRO's copy and moments
    return trained * (4 * adapters + state) / GIB
