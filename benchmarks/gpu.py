"""What training Hulu-Med-4B costs on one GPU: seconds a step and peak memory, by setting, against a bare PyTorch loop.

    HULUMED_FIXTURES=DIR python benchmarks/gpu.py [--model DIR] [--image-tokens 1225] [--only 'NAME;...']

Without `--model` the model has the published shape and random weights (for speed and memory the same), and the
tokenizer of HULUMED_FIXTURES (see tests/test_hulumed.py). One process, as one worker of a lane runs; nothing is
profiled. A step is 16 images; medians over the epochs after the first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

GIB = 2**30
# name: (settings of the base, settings of the trial). `bare`: the loop of benchmarks/alternatives.py.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "guide": ({}, {}),
    "bare loop": ({}, {}),
    "ZeRO 1": ({}, {"zero_stage": 1}),
    "ZeRO 0": ({}, {"zero_stage": 0}),
    "micro-batch 8": ({}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}),
    "micro-batch 16": ({}, {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}),
    "projector trained": ({}, {"train_projector": True}),
    "rank 8": ({}, {"lora_r": 8}),
    "gradient checkpointing": ({}, {"gradient_checkpointing": True}),
    "compiled": ({}, {"torch_compile": True}),
    "compiled, micro-batch 8": (
        {},
        {"torch_compile": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    ),
    "8-bit AdamW": ({}, {"optim": "adamw_8bit"}),
    "no feature cache": ({"feature_cache_gib": 0.0}, {}),
    "QLoRA": ({"use_qlora": True}, {}),
    "QLoRA, checkpointing, micro-batch 1": (
        {"use_qlora": True},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    ),
}


def random_checkpoint(folder: Path, fixtures: Path, device: torch.device, shape: dict[str, Any]) -> Path:
    """A model directory in Hulu-Med's layout with random weights."""
    from safetensors.torch import save_file
    from transformers import VideoLlama3ForConditionalGeneration

    from train_fn.model import hulumed

    shutil.copytree(fixtures / "checkpoint", folder, ignore=shutil.ignore_patterns("model.safetensors"))
    folder.chmod(0o755)
    small = hulumed.read_config(folder)
    config = {**small, **shape, "image_token_index": small["image_token_index"]}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = VideoLlama3ForConditionalGeneration(hulumed.native_config(config))
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    tensors = {hulumed.original_name(name): tensor for name, tensor in model.named_parameters()}
    save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def prepare(folder: Path, images: int, image_tokens: int) -> Any:
    """Splits of generated images, each of that many tokens of 14 x 14 pixels: 2/3 train, 1/3 validation."""
    from PIL import Image

    from train_fn.data.manifest import read_manifest
    from train_fn.data.phantoms import generate
    from train_fn.data.splitting import SplitRules, make_splits

    manifest = generate(folder / "phantoms", images, 0)
    samples = read_manifest(manifest, manifest.parent).samples
    side = round(image_tokens**0.5) * 14
    for sample in samples:
        with Image.open(sample.image) as image:
            larger = image.resize((side, side))
        larger.save(sample.image)
    splits = make_splits(samples, None, None, SplitRules(val_fraction=0.3, test_fraction=0.1, seed=0))[0]
    return dataclasses.replace(splits, train=splits.train[: len(splits.train) // 16 * 16])


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """GiB that tensors took at most."""
    found: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB


def run(base: Any, splits: Any, trial: Any, folder: Path) -> dict[str, float]:
    """One trial of the product's loop: seconds of a step and of an evaluated image after the first epoch."""
    from train_fn.trial.loop import run_trial

    reports: list[Any] = []

    def report(told: Any) -> bool:
        reports.append(copy.deepcopy(told))
        return False

    run_trial(base, splits, trial, report, output=folder)
    steps = len(splits.train) // 16

    def later(name: str) -> float:
        spent = [told.seconds.get(name, 0.0) for told in reports]
        return median(after - before for before, after in pairwise(spent))

    return {
        "step_s": later("train") / steps,
        "evaluated_image_s": later("evaluation") / len(splits.validation),
        "setup_s": reports[0].seconds["setup"],
        "checkpoint_s": later("checkpoint"),
        "first_epoch_s": reports[0].seconds["train"],
        "loss": reports[-1].metrics["loss"],
    }


def run_bare(base: Any, splits: Any, trial: Any, folder: Path) -> dict[str, float]:
    """The same trial in a bare loop."""
    from alternatives import bare_trials

    (told,) = bare_trials(base, splits, {0: trial}, folder)
    steps = len(splits.train) // 16 * (trial.num_train_epochs - (base.device.type == "cuda"))
    return {"step_s": told["train"] / steps, "setup_s": told["setup"], "loss": told["metrics"]["loss"]}


def measure(name: str, base: Any, splits: Any, epochs: int, folder: Path) -> dict[str, float]:
    """One row of the table."""
    from train_fn.settings import TrialSettings
    from train_fn.trial.memory import measure as sizes_of
    from train_fn.trial.memory import memory_needed

    trial = TrialSettings(num_train_epochs=epochs, save_steps=0, **VARIANTS[name][1])
    (output := folder / name.replace(" ", "-")).mkdir(exist_ok=True)
    with peak_memory(base.device) as memory:
        if name == "bare loop":
            return run_bare(base, splits, trial, output) | memory
        found = run(base, splits, trial, output)
    on_gpu = base.device.type == "cuda"
    sizes = sizes_of(base.settings, trial, on_gpu, splits.train, splits.candidates)
    expected = memory_needed(sizes, trial, 1, on_gpu, 16)
    return found | memory | {"expected_gib": sum(expected.values()) - expected["worker"]}


def main() -> None:
    """Measure, print a row as soon as it is there, write."""
    import torch.distributed as dist
    from test_hulumed import PUBLISHED_4B

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", type=int, default=56)
    parser.add_argument("--image-tokens", type=int, default=1225)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", default="", help="variants, with ; between")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    names = options.only.split(";") if options.only else list(VARIANTS)

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        splits = prepare(folder, options.images, options.image_tokens)
        shape = PUBLISHED_4B if on_gpu else {}
        start = time.perf_counter()
        model = options.model or random_checkpoint(
            folder / "model", Path(os.environ["HULUMED_FIXTURES"]), device, shape)  # fmt: skip
        print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}; model written in "
              f"{time.perf_counter() - start:.1f} s; {len(splits.train)} training, {len(splits.validation)} "
              f"validation images of {options.image_tokens} tokens", flush=True)  # fmt: skip
        base, held = None, None
        for variant in names:
            wanted = ModelSettings(model=str(model), **VARIANTS[variant][0])
            if wanted != held:
                base = None
                gc.collect()
                start = time.perf_counter()
                base, held = load_base(wanted, device), wanted
                print(f"{variant}: base loaded in {time.perf_counter() - start:.1f} s", flush=True)
            found[variant] = measure(variant, base, splits, options.epochs, folder)
            told = "  ".join(f"{key} {value:.4f}" for key, value in found[variant].items())
            print(f"{variant:28}{told}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
