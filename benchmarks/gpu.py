"""Checks on one GPU, the most decisive first: a line for each figure, a table, and JSON.

    python benchmarks/gpu.py [--only NAME,NAME] [--limit 540] [--model DIR] [--output gpu.json]

Every check prints its criterion. The model has Hulu-Med-4B's shape and random weights: for time and memory the same.
Each figure is in the JSON as soon as it is printed. After `--limit` seconds, or at SIGTERM, the checks that have ended
stay. A check that raises has failed, and the next one runs. On a CPU all checks run with the nano base, in about a
minute: a test of this script, whose criteria of time and memory then say nothing.

A bare GPU machine needs, for Python 3.11 or later and CUDA 13 (for all that the product can do: `pip install .`):

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130
    pip install transformers==5.23.0 peft==0.21.2 deepspeed==0.19.8 bitsandbytes==0.50.2 pillow==13.0.0 \\
        numpy scipy scikit-learn psutil pytest hypothesis
    pip install "ray[train,tune]==2.60.0" optuna==5.0.0 mlflow==3.17.2    # for the studies of `-m gpu`; 80 MB

A machine without a network, which has torch with CUDA and what comes with it: its Python's version is the 3.12 below.
The wheels take about 40 MB, since bitsandbytes keeps only the libraries of CUDA 13. Here:

    pip wheel --no-deps -w .whl deepspeed==0.19.8
    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 \\
        huggingface_hub==2.4.0 tokenizers==0.23.3 hjson==3.1.0 pydantic==2.14.4 pydantic_core==2.50.5 \\
        annotated-types==0.8.0 typing-inspection==0.4.5 rapidfuzz==3.14.6 pillow==13.0.0
    zip -qd .whl/bitsandbytes-*.whl '*cuda11*' '*cuda12*' '*rocm*' '*xpu*'

There, in the same folder:

    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --limit 540 --output gpu.json

torch 2.11 is enough for that: see `support_older_torch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # as the product's lanes run
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

GIB = 2**30
IMAGE_TOKENS = 1225


class CutOff(BaseException):
    """The time limit has passed, or SIGTERM came."""


@dataclass
class Lab:
    """What the checks share: the device, the model, the images, and what has been measured."""

    device: torch.device
    folder: Path
    model: Path | None = None
    """Not given: random weights."""
    output: Path | None = None
    share: float = 1.0
    """Part of the GPU's memory that this process may take."""
    results: dict[str, Any] = field(default_factory=dict)
    current: str = ""
    """The check that runs."""
    bases: dict[Any, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def base(self, **settings: Any) -> Any:
        """The loaded base. Only one stays in memory."""
        from train_fn.model.base import load_base
        from train_fn.settings import ModelSettings

        self.model = self.model or make_model(self.folder / "model", self.device)
        wanted = ModelSettings(model=str(self.model), **settings)
        if wanted not in self.bases:
            self.release_base()
            begun = time.perf_counter()
            self.bases[wanted] = load_base(wanted, self.device)
            self.row("base loaded", seconds=time.perf_counter() - begun)
        return self.bases[wanted]

    def release_base(self) -> None:
        """Free the base's memory. `load_base` has frozen the collector."""
        from train_fn.worker import release_memory

        self.bases.clear()
        gc.unfreeze()
        release_memory()

    def splits(self, mixed: bool = False) -> Any:
        """32 training and 16 validation images, all of 1,225 tokens, or of as many sizes as BUSI's."""
        return make_splits_of(self.folder / f"images-{mixed}", mixed, self.on_gpu)

    def row(self, name: str, **figures: Any) -> None:
        """Print and keep the figures of one measurement."""
        told = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in figures.items())  # fmt: skip
        print(f"  {name:32}{told}", flush=True)
        self.results["checks"].setdefault(self.current, {"rows": {}})["rows"][name] = figures
        self.write()

    def write(self) -> None:
        """Write the JSON. A kill leaves the version before."""
        if self.output:
            new = self.output.with_name(self.output.name + ".new")
            new.write_text(json.dumps(self.results, indent=1, default=str))
            new.replace(self.output)


def make_model(folder: Path, device: torch.device) -> Path:
    """A model directory: on a GPU Hulu-Med-4B's shape with random weights, on a CPU the nano base. Both have the nano
    base's tokenizer, and an image processor that keeps an image's size."""
    from transformers import VideoLlama3ForConditionalGeneration

    from train_fn.model import hulumed

    shutil.copytree(ROOT / "train_fn" / "nano" / "checkpoint", folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 4 * 14**2, "longest_edge": 16_384 * 14**2}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if device.type == "cuda":
        from test_hulumed import PUBLISHED_4B

        small = json.loads((folder / "config.json").read_text())
        config = hulumed.native_config(PUBLISHED_4B | {"image_token_index": small["image_token_id"]})
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = VideoLlama3ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
    return folder


@functools.cache
def make_splits_of(folder: Path, mixed: bool, large: bool) -> Any:
    """Splits of generated images. An image has a token for each 14 x 14 pixels."""
    import numpy as np
    from PIL import Image

    from train_fn.data.manifest import read_manifest
    from train_fn.data.phantoms import generate
    from train_fn.data.splitting import SplitRules, make_splits

    manifest = generate(folder, 60, 0)
    samples = read_manifest(manifest, manifest.parent).samples
    rng = np.random.default_rng(0)
    for sample in samples:
        width = height = round((IMAGE_TOKENS if large else 16) ** 0.5) * 14
        if mixed:  # BUSI's images have about 700 to 2,600 tokens
            width = round(rng.uniform(400, 800) if large else rng.uniform(60, 140))
            height = round(width * rng.uniform(0.65, 1))
        with Image.open(sample.image) as image:
            resized = image.resize((width, height))
        resized.save(sample.image)
    splits = make_splits(samples, None, None, SplitRules(val_fraction=0.3, test_fraction=0.1, seed=0))[0]
    return dataclasses.replace(splits, train=splits.train[:32], validation=splits.validation[:16])


Check = Callable[[Lab], tuple[bool | None, str]]
"""Measures, and returns whether the criterion holds (None: it says nothing on this device), and the criterion."""


def run_checks(lab: Lab, checks: Sequence[Check], limit_s: float = 0) -> bool:
    """Run the checks and print a table. Returns whether none has failed or was cut off.

    Args:
        limit_s: seconds for all; 0: no limit.
    """

    def stop(*_: Any) -> None:
        raise CutOff

    lab.results |= {"checks": {}, "cut_off": False}
    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(limit_s, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if limit_s:
        timer.start()
    try:
        for check in checks:
            run_check(lab, check)
    except CutOff:
        lab.results["cut_off"] = True
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    done = lab.results["checks"]
    for check in checks:
        done.setdefault(check.__name__, {"rows": {}}).setdefault("result", "CUT OFF")
    lab.write()
    print()
    for name, found in done.items():
        print(f"{found['result']:8}{name:18}{found.get('seconds', 0):6.0f} s  {found.get('criterion', '')}")
    return all(found["result"] in ("PASS", "RAN") for found in done.values())


def run_check(lab: Lab, check: Check) -> None:
    """Run one check; an error is its result."""
    from train_fn.worker import release_memory

    lab.current = check.__name__
    print(f"== {lab.current}: {(check.__doc__ or '').splitlines()[0]}", flush=True)
    begun = time.perf_counter()
    try:
        passed, criterion = check(lab)
    except Exception as error:
        traceback.print_exc()
        passed, criterion = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    result = "RAN" if passed is None else "PASS" if passed else "FAIL"
    found = {"result": result, "criterion": criterion, "seconds": time.perf_counter() - begun}
    lab.results["checks"].setdefault(lab.current, {"rows": {}}).update(found)
    print(f"{result} {lab.current} ({found['seconds']:.0f} s): {criterion}", flush=True)
    lab.write()
    release_memory()


def support_older_torch() -> None:
    """Let torch before 2.13 run the product: it lacks two options of torch.compile and one of varlen_attn."""
    from torch.nn.attention import varlen

    import train_fn.model.attention

    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        from torch._dynamo import config

        config.recompile_limit = 64
        compile_of_torch = torch.compile

        def compile_without(
            *args: Any, recompile_limit: int = 0, isolate_recompiles: bool = False, **options: Any
        ) -> Any:
            return compile_of_torch(*args, **options)

        torch.compile = compile_without  # type: ignore[assignment]
    known = inspect.signature(varlen.varlen_attn).parameters
    if "enable_gqa" not in known:

        def with_groups(query: Any, key: Any, value: Any, *args: Any, enable_gqa: bool, **options: Any) -> Any:
            key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
            if "window_size" not in known:
                options = {name: option for name, option in options.items() if name != "window_size"}
                options["is_causal"] = True
            return varlen.varlen_attn(query, key, value, *args, **options)

        train_fn.model.attention.varlen_attn = with_groups


def open_lab(folder: Path, model: Path | None, output: Path | None, share: float = 1.0) -> Lab:
    """A process group of one, as a worker of a lane has it, and what the checks need."""
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", XDG_CACHE_HOME=str(folder / "cache"))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    support_older_torch()
    if not on_gpu:
        from train_fn.trial import compiled

        compiled.BACKEND = "aot_eager"  # needs no C++ compiler, and no half minute
    elif share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    import transformers

    results = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Lab(device, folder, model, output, share, results)


def main() -> None:
    """Run the wanted checks."""
    from gpu_checks import CHECKS, INTERNAL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--only", default=",".join(names), help=f"with commas, of {', '.join(names)}")
    parser.add_argument("--limit", type=float, default=0, help="seconds for all checks; 0, the default: no limit")
    parser.add_argument("--model", type=Path, help="folder of a model; not given: random weights")
    parser.add_argument("--output", type=Path, help="the JSON; not given: none")
    parser.add_argument("--share", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {check.__name__: check for check in (*CHECKS, *INTERNAL)}
    wanted = options.only.split(",")
    if unknown := set(wanted) - known.keys():
        parser.error(f"--only must name checks, but got {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as name:
        lab = open_lab(Path(name), options.model, options.output, options.share)
        print(f"{lab.results['device']}, torch {lab.results['torch']}", flush=True)
        passed = run_checks(lab, [known[name] for name in wanted], options.limit)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
