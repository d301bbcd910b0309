"""What keeping vision features saves: measured on small models, computed for Hulu-Med-4B. Times are CPU seconds.

    HULUMED_FIXTURES=DIR python benchmarks/features.py [--images 120]
    python benchmarks/features.py --lanes MANIFEST [--repeats 3]

Without HULUMED_FIXTURES (see tests/test_hulumed.py) only the nano base is measured. --lanes trains the first epoch of
the nano base in two processes of one thread at once, on an empty cache: with the images shared, and with each process
computing all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

PROMPT_TOKENS, ANSWER_TOKENS = 60, 2  # of the phantoms' question and of one of its answers
EPOCHS = 3


def measure_epochs(model: str, manifest: Path) -> None:
    """CPU seconds of an epoch after the first, with and without; the metrics must be the same."""
    from train_fn.data.manifest import read_manifest
    from train_fn.data.splitting import SplitRules, make_splits
    from train_fn.model.base import load_base
    from train_fn.settings import ModelSettings, TrialSettings
    from train_fn.trial.loop import run_trial

    entries = read_manifest(manifest, manifest.parent).samples
    splits = make_splits(entries, None, None, SplitRules(val_fraction=0.25, test_fraction=0.25, seed=0))[0]
    settings, metrics = TrialSettings(num_train_epochs=EPOCHS, lora_r=8, save_steps=0), defaultdict(list)
    for gib in (0.0, 4.0):
        base = load_base(ModelSettings(model=model, feature_cache_gib=gib), torch.device("cpu"))
        ends = [time.process_time()]

        def report(told: Any, ends: list[float] = ends) -> bool:
            ends.append(time.process_time())
            metrics[told.epoch].append(told.metrics)
            return False

        run_trial(base, splits, settings, report)
        first, later = ends[1] - ends[0], (ends[-1] - ends[1]) / (EPOCHS - 1)
        print(f"  features {'kept' if gib else 'computed'}: first epoch {first:.2f} s, each later one {later:.2f} s")
    assert all(computed == kept for computed, kept in metrics.values()), "not the same training"


def fill(model: str, manifest: Path) -> list[torch.Tensor]:
    """Load a base, take the features of all images, and say what CPU time that took and what memory they are."""
    from train_fn.data.manifest import read_manifest
    from train_fn.model.base import load_base
    from train_fn.model.batches import image_features
    from train_fn.settings import ModelSettings

    images = [sample.image for sample in read_manifest(manifest, manifest.parent).samples]
    base = load_base(ModelSettings(model=model), torch.device("cpu"))
    started = time.process_time()
    assert base.features
    key_s = time.process_time() - started
    held = [image_features(base, image) for image in images]
    seconds = time.process_time() - started
    torch.stack([features.sum() for features in held])  # touches every page
    maps, counting = defaultdict(int), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counting = line.endswith(".safetensors") and "vlm-tune/features" in line
        elif counting and line.startswith(("Rss:", "Pss:")):
            maps[line[:3]] += int(line.split()[1])
    print(f"  process {os.getpid()}: key {key_s:.3f} s, {len(images)} images {seconds:.2f} s; of the mapped files "
          f"resident {maps['Rss'] / 1024:.1f} MiB, this process' share {maps['Pss'] / 1024:.1f} MiB")  # fmt: skip
    return held


def first_epoch(manifest: Path, folder: Path, shares: bool) -> None:
    """Train an epoch in this process, beside another one that does the same; print wall and CPU seconds of it."""
    from unittest import mock

    from train_fn.data.manifest import read_manifest
    from train_fn.data.splitting import SplitRules, make_splits
    from train_fn.model.base import load_base
    from train_fn.model.features import FeatureStore
    from train_fn.settings import ModelSettings, TrialSettings
    from train_fn.trial.loop import run_trial

    rules = SplitRules(val_fraction=0.2, test_fraction=0.2, seed=0)
    splits = make_splits(read_manifest(manifest, manifest.parent).samples, None, None, rules)[0]
    base, computed = load_base(ModelSettings(), torch.device("cpu")), []
    base.model.get_submodule(base.vision_tower).register_forward_hook(lambda *given: computed.append(1))
    assert base.features
    if not shares:  # as before: no process regards the others
        mock.patch("train_fn.trial.loop.prepare_features", lambda *given: None).start()
        mock.patch.object(FeatureStore, "claim", lambda *given: True).start()
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    wall, cpu = time.perf_counter(), time.process_time()
    run_trial(base, splits, TrialSettings(num_train_epochs=1), lambda told: False)
    print(f"{time.perf_counter() - wall} {time.process_time() - cpu} {len(computed)}")


def measure_lanes(manifest: Path, repeats: int) -> None:
    """The first epoch of two lanes at once, alternately with and without sharing."""
    for repeat in range(repeats):
        for how in ("apart", "shared"):
            with tempfile.TemporaryDirectory(prefix="features-") as folder:
                command = [sys.executable, __file__, "--lane", how, folder, "--lanes", str(manifest)]
                lanes = [
                    subprocess.Popen(command, env=os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"},
                                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                    for _ in range(2)
                ]  # fmt: skip
                told = [lane.communicate()[0].split()[-3:] for lane in lanes]
            walls, cpus, images = ([float(lane[column]) for lane in told] for column in range(3))
            print(f"{repeat + 1} {how:7} first epoch {max(walls):.2f} s, CPU of both {sum(cpus):.2f} s, "
                  f"images computed {images[0]:.0f} + {images[1]:.0f}", flush=True)  # fmt: skip


def measure_preparation(image_tokens: int) -> None:
    """CPU seconds until an image of that size is ready for the tower, and until its features come from the store."""
    import numpy as np
    from PIL import Image

    from train_fn.data.images import read_image
    from train_fn.model.features import FeatureStore
    from train_fn.model.hulumed import HulumedImageProcessor

    side = round(image_tokens**0.5) * 14
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        os.environ["XDG_CACHE_HOME"], image = f"{folder}/cache", f"{folder}/image.png"
        noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side + 5, side - 5)).save(image)
        processor, store = HulumedImageProcessor(merge_size=1), FeatureStore("key", 2**30)
        store.keep(image, torch.zeros(image_tokens, 1152, dtype=torch.bfloat16))
        ends = [time.process_time()]
        for _ in range(10):
            processor([read_image(image)], return_tensors="pt")
        ends.append(time.process_time())
        for _ in range(10):
            torch.cat([store.find(image, (image_tokens, 1152))])
        ends.append(time.process_time())
    prepared, found = ((after - before) * 100 for before, after in pairwise(ends))
    print(f"  on one CPU thread: image read and prepared in {prepared:.0f} ms, its features found in {found:.1f} ms")


def flops(image_tokens: int) -> dict[str, float]:
    """Floating-point operations for one image of Hulu-Med-4B with LoRA r 64, by part: counted by torch on meta tensors.

    One patch is one token here (`merge_size` 1). torch counts causal attention in full, which flatters no cache: the
    language model's share comes out too large rather than too small.
    """
    from peft import LoraConfig, get_peft_model
    from test_hulumed import PUBLISHED_4B
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import VideoLlama3ForConditionalGeneration

    from train_fn.model import hulumed
    from train_fn.settings import TrialSettings

    def count(run) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    defaults = TrialSettings()
    adapted = rf".*language_model\..*\.(?:{'|'.join(defaults.lora_target_modules)})"
    with torch.device("meta"):
        model = VideoLlama3ForConditionalGeneration(hulumed.native_config(PUBLISHED_4B)).requires_grad_(False)
        get_peft_model(model, LoraConfig(r=defaults.lora_r, target_modules=adapted))
        tower, width = model.model.vision_model, model.config.vision_config.hidden_size
        hidden = model.config.text_config.hidden_size
        patches = torch.empty(image_tokens, 3 * model.config.vision_config.patch_size**2)
        angles = torch.empty(image_tokens, width // model.config.vision_config.num_attention_heads)
        embedded = torch.empty(1, image_tokens + PROMPT_TOKENS + ANSWER_TOKENS, hidden)
        features, answer = torch.empty(image_tokens, width), torch.empty(ANSWER_TOKENS, hidden, requires_grad=True)
    lengths = torch.tensor([0, image_tokens])
    found: dict[str, float] = {}
    with torch.no_grad():
        found["vision tower"] = count(lambda: tower.encoder(
            tower.embeddings(patches), cu_seqlens=lengths, position_embeddings=(angles, angles)))  # fmt: skip
        found["projector"] = count(lambda: model.model.projector(features))
    outputs: list[torch.Tensor] = []
    causal = {"full_attention": None}
    found["language model forward"] = count(lambda: outputs.append(
        model.model.language_model(inputs_embeds=embedded, attention_mask=causal, use_cache=False)[0]))  # fmt: skip
    found["language model backward"] = count(lambda: outputs[0].sum().backward())
    found["answer logits"] = count(lambda: model.lm_head(answer).sum().backward())
    return found


def print_flops(image_tokens: int) -> None:
    """The table, and an epoch of three training images to one of validation."""
    found = flops(image_tokens)
    step = sum(found.values())
    print(f"Hulu-Med-4B, {image_tokens} image tokens, {PROMPT_TOKENS} + {ANSWER_TOKENS} of text: TFLOP of one image")
    for part, value in found.items():
        print(f"  {part:26}{value / 1e12:8.2f}{value / step:8.1%}")
    scored = step - found["language model backward"]
    without = 3 * step + scored
    kept = without - 4 * found["vision tower"]
    print(f"  an epoch after the first costs {kept / without:.2f} of one without; its evaluation alone "
          f"{1 - found['vision tower'] / scored:.2f}")  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--fill", nargs=2, metavar=("MODEL", "MANIFEST"), help=argparse.SUPPRESS)
    parser.add_argument("--lanes", type=Path, metavar="MANIFEST", help="measure two lanes on these images only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lane", nargs=2, metavar=("HOW", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.lanes and not options.lane:
        measure_lanes(options.lanes, options.repeats)
        return
    if options.fill:
        fill(options.fill[0], Path(options.fill[1]))
        return
    import torch.distributed as dist

    from train_fn.data.phantoms import generate

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # DeepSpeed wants a group
    if options.lane:
        first_epoch(options.lanes, Path(options.lane[1]), options.lane[0] == "shared")
        return
    fixtures = os.environ.get("HULUMED_FIXTURES")
    for model in ["nano"] + [f"{fixtures}/checkpoint"] * bool(fixtures):
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            manifest = generate(Path(folder) / "phantoms", options.images, 0)
            print("the nano base" if model == "nano" else "Hulu-Med's tiny checkpoint")
            fill(model, manifest)
            held = fill(model, manifest)  # mapped, while another process maps the same
            again = [sys.executable, __file__, "--fill", model, str(manifest)]
            subprocess.run(again, check=True, stderr=subprocess.DEVNULL)
            del held
            os.environ["XDG_CACHE_HOME"] = f"{folder}/empty"
            measure_epochs(model, manifest)
    for image_tokens in (1225, 5000):
        print_flops(image_tokens)
        measure_preparation(image_tokens)


if __name__ == "__main__":
    main()
