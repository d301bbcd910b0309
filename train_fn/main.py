"""One trial without Ray: `torchrun --nproc-per-node N -m train_fn.main TRIAL.json`, or `python -m` for one process.

TRIAL.json holds {"splits": path of a study's splits.json, "output": folder, "trial": {...}, "model": {...},
"positive": answer}; `trial` and `model` have the fields of `train_fn.settings`, as in a study.json. `positive` is for
a splits.json of an earlier version, which does not name it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from train_fn.data.splits_file import load_splits
from train_fn.jobs import EpochReport
from train_fn.model.hub import fetch
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import is_hub_model
from train_fn.settings import ModelSettings, TrialSettings, broken_rules


def main(argv: list[str]) -> int:
    """Train the trial that a JSON file describes. Rank 0 prints a line after each epoch. Returns the exit code: 0, or 2
    for bad settings."""
    if len(argv) != 1:
        print(f"one settings file is needed, but got {len(argv)}: {(__doc__ or '').splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        wanted = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        trial, model = TrialSettings.from_dict(wanted["trial"]), ModelSettings(**wanted.get("model", {}))
        splits, output = load_splits(Path(wanted["splits"]), wanted.get("positive", "")), Path(wanted["output"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{argv[0]} must describe a trial, but {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = [*trial.problems(world_size), *broken_rules(model).values()]
    if not problems and is_hub_model(model.model):
        try:
            model = dataclasses.replace(model, model=fetch(model.model))
        except HubError as error:
            problems.append(f"the base model {error}")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    import torch
    import torch.distributed as dist

    from train_fn.model.base import load_base
    from train_fn.trial.loop import run_trial

    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    store: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
    dist.init_process_group("nccl" if on_gpu else "gloo", **store)

    def report(message: EpochReport) -> bool:
        if dist.get_rank() == 0:
            print(json.dumps({"epoch": message.epoch, **message.metrics, "seconds": message.seconds}))
        return False

    base = load_base(model, device)
    run_trial(
        base,
        splits,
        trial,
        report,
        eval_batch_size=model.per_device_eval_batch_size,
        output=output,
    )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
