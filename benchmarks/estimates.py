"""What a study of Hulu-Med-4B on BUSI would take on several cards: estimates by the doctor's model, not measurements.

    HULUMED_FIXTURES=DIR python benchmarks/estimates.py

The model has the published shape and no weights. The 630 samples have 619 to 2,650 tokens, 1,391 in the mean, as BUSI's
images as downloaded. Of a card only the data sheet is known: a matmul is taken to reach 0.8 of the dense bfloat16 peak
(an H200: 790 of 989 TFLOP/s), a copy 0.83 of the bandwidth, and an operation to start in 5 us. Prints the table of
benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

MATMUL, COPY, LAUNCH_S = 0.8, 0.83, 5e-6
PARTS, SHORTEST, LONGEST, MEAN = (378, 126, 126), 619, 2650, 1391
# Dense bfloat16 TFLOP/s and GB/s (NVIDIA's data sheets), free GiB, AWS instance, dollars an hour on demand.
# Prices: us-east-1, spring of 2026, from public lists; 0 where sources disagree or AWS rents no such card alone.
CARDS = {
    "A10G": (70, 600, 21.9, "g5.xlarge", 1.006),
    "RTX 4090": (165, 1008, 23.2, "", 0),
    "A100 40 GB": (312, 1555, 39.2, "p4d.24xlarge (8)", 0),
    "L40S": (362, 864, 43.8, "g6e.xlarge", 1.861),
    "H100": (989, 3350, 78.9, "p5.4xlarge", 6.88),
    "H200": (989, 4800, 139.5, "p5en.48xlarge (8)", 0),
}


def main() -> None:
    """Print a row for each card."""
    import numpy as np
    import torch
    from test_hulumed import PUBLISHED_4B

    from train_fn.model import hulumed
    from train_fn.settings import ModelSettings, TrialSettings
    from train_fn.trial.memory import measure, skeleton
    from tune.doctor.duration import Speed, times, work_of
    from tune.doctor.findings import duration
    from tune.doctor.fit import Worker, fit, words

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        source = Path(os.environ["HULUMED_FIXTURES"]) / "checkpoint"
        shutil.copytree(
            source, folder, ignore=shutil.ignore_patterns("model.safetensors"), copy_function=shutil.copyfile
        )
        small = hulumed.read_config(source)
        config = {**small, **PUBLISHED_4B, "image_token_index": small["image_token_index"]}
        (folder / "config.json").write_text(json.dumps(config))
        model = ModelSettings(model=str(folder))
        base = skeleton(model, torch.bfloat16)
        curve = (LONGEST - SHORTEST) / (MEAN - SHORTEST) - 1
        spread = SHORTEST + (LONGEST - SHORTEST) * np.linspace(0, 1, sum(PARTS)) ** curve
        tokens = np.random.default_rng(0).permutation(spread.round().astype(int))
        lengths = [part.tolist() for part in np.split(tokens, np.cumsum(PARTS)[:-1])]
        guide = TrialSettings()
        largest = dataclasses.replace(guide, lora_r=128, lora_alpha=512.0, train_projector=True)
        usual, most = (
            Worker(sizes=measure(model, trial, torch.bfloat16), trial=trial, workers=1, on_gpu=True, longest=LONGEST,
                   candidates=3)
            for trial in (guide, largest)
        )  # fmt: skip
    work = work_of(base, usual.sizes, *lengths)
    print("| card | the guide's trial (rank 64) | the largest (rank 128, projector) | GiB of it | step, s | trial | "
          "study of 20 trials | $ |\n| --- | --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for card, (tflops, bandwidth, free_gib, instance, price) in CARDS.items():
        speed = Speed(MATMUL * tflops * 1e12, COPY * bandwidth * 1e9, LAUNCH_S)
        ways = [fit(worker, free_gib, compiles=True) for worker in (usual, most)]
        found = times(work, speed, ways[0].execution, guide, workers=1, lanes=1, trials=20, eval_batch_size=16,
                      to_end=1, first_stop=1)  # fmt: skip
        texts = [words(way.execution).removeprefix("forward passes of ") if way.fits else "does not fit"
                 for way in ways]  # fmt: skip
        dollars = " to ".join(f"{seconds / 3600 * price:.2f}" for seconds in found.study) if price else ""
        wall = " to ".join(map(duration, found.study))
        taken = f"{sum(ways[1].parts.values()):.1f} of {free_gib}"
        name = f"{card} ({instance})" if instance else card
        print(f"| {name} | {texts[0]} | {texts[1]} | {taken} | {found.step:.2f} | {duration(found.trial)} | "
              f"{wall} | {dollars} |")  # fmt: skip


if __name__ == "__main__":
    main()
