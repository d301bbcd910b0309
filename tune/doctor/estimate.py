"""How much memory, disk and time a study needs, estimated from the model's shapes."""

from __future__ import annotations

import dataclasses
import math

from train_fn.model.batches import num_tokens
from train_fn.model.memory import GIB
from train_fn.settings import TrialSettings
from train_fn.trial.memory import measure, skeleton
from tune.config.settings import Settings
from tune.config.space_check import corners
from tune.doctor.duration import Speed, Times, times, work_of
from tune.doctor.findings import Facts, Finding, Need
from tune.doctor.fit import Worker, fit
from tune.plan.prepare import Study
from tune.search.early_stopping import MIN_SAMPLES


def estimate(study: Study, need: Need, facts: dict[str, Facts], findings: list[Finding]) -> Need:
    """The need with memory and disk of the largest trial of the space, and the times of the guide's trial.

    Args:
        facts: as `ask_nodes` returns them.
    """
    import torch

    settings, layout = study.settings, need.layout
    on_gpu = layout is not None and layout.use_gpu
    gpus = [gpu for node in facts.values() for gpu in node.get("gpus", ())]
    model = settings.model
    if on_gpu and model.base_dtype == "auto" and not all(gpu["bf16"] for gpu in gpus):
        model = dataclasses.replace(model, dtype="float16")  # it needs more memory
    dtype = getattr(torch, "bfloat16" if on_gpu else "float32")
    guide, *others = corners(settings)
    try:
        base = skeleton(model, dtype)
        parts = (study.splits.train, study.splits.validation, study.splits.test)
        lengths = [[num_tokens(base, sample) for sample in part] for part in parts]

        def worker(trial: TrialSettings) -> Worker:
            return Worker(
                sizes=measure(model, trial, dtype),
                trial=trial,
                workers=settings.study.workers_per_trial,
                on_gpu=on_gpu,
                longest=max(map(max, filter(None, lengths))),
                candidates=len(study.splits.candidates),
            )

        largest, usual = worker(largest_trial([guide, *others])), worker(guide)
    except (ValueError, OSError) as error:
        findings.append(Finding("model", "driver", "cannot be built", str(error)))
        return need
    work = work_of(base, usual.sizes, *lengths)

    def times_on(speed: Speed, present_gib: float, compiles: bool) -> Times:
        return times(
            work,
            speed,
            fit(usual, present_gib, compiles).execution,
            guide,
            workers=usual.workers,
            lanes=layout.lanes if layout else 1,
            trials=settings.study.trials,
            eval_batch_size=model.per_device_eval_batch_size,
            **early_stopping(settings),
        )

    disk = disk_needed(study, largest.trial, largest.sizes.trained)
    return dataclasses.replace(need, worker=largest, times=times_on, disk=disk)


def early_stopping(settings: Settings) -> dict[str, float]:
    """How many trials run to their end in any case, and after which epoch all others may be stopped; 0: never."""
    study = settings.study
    if study.scheduler == "none" or len(study.metric) > 1:
        return {"to_end": study.trials, "first_stop": 0}
    return {"to_end": 1 if study.scheduler == "asha" else MIN_SAMPLES, "first_stop": study.grace_period}


def largest_trial(trials: list[TrialSettings]) -> TrialSettings:
    """The trial with most memory."""

    def order(trial: TrialSettings) -> tuple[int, bool, int, bool]:
        trains_tower = trial.train_vision != "none"
        return trial.per_device_train_batch_size or 0, trains_tower, trial.lora_r, trial.train_projector

    return max(trials, key=order)


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
