"""Use an adapter: `python -m train_fn.predict --adapter DIR IMAGE|FOLDER|MANIFEST ...`, one JSON line an image.

Base model, question and candidate answers come from the adapter's task.json unless they are given. With
`--merge-into DIR` the adapter is merged into a full checkpoint in the base's own layout instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data import Sample, read_manifest
from train_fn.settings import DTYPES, ModelSettings

if TYPE_CHECKING:
    from train_fn.model import Base

BASE_VARIABLE = "VLM_TUNE_BASE"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class InputError(Exception):
    """The command line or what it names is wrong."""


def main(argv: Sequence[str]) -> int:
    """Predict or merge. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m train_fn.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="images, folders of images, or manifests")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--model", default="", help="base model, if not the one the adapter was trained on")
    parser.add_argument("--image-root", type=Path, help="folder that a manifest's paths start from [the manifest's]")
    parser.add_argument("--question", default="", help="question, if not the one of the training images")
    parser.add_argument("--candidates", default="", help="answers to choose from, comma-separated")
    parser.add_argument("--no-generate", action="store_true", help="leave out the generated answer")
    parser.add_argument("--merge-into", type=Path, help="write base and adapter as one checkpoint to this folder")
    parser.add_argument("--dtype", default="", choices=DTYPES, help="number format of base or merged checkpoint")
    options = parser.parse_args(list(argv))
    try:
        task = read_task(options.adapter)
        settings = ModelSettings(**task["model"])
        settings = replace(settings, model=options.model or settings.model)
        if options.dtype:
            settings = replace(settings, dtype=options.dtype, bf16=False, fp16=False)
        if options.merge_into:
            merge(settings, options.adapter, options.merge_into)
            return 0
        if not options.inputs:
            raise InputError("nothing to predict: name an image, a folder or a manifest")
        question = options.question or task["question"]
        given = tuple(filter(None, map(str.strip, options.candidates.split(","))))
        candidates = given or tuple(task["candidates"])
        samples = [s for path in options.inputs for s in find_samples(path, options.image_root, question)]
        for line in predict_lines(settings, options.adapter, samples, candidates, not options.no_generate):
            print(json.dumps(line), flush=True)
    except InputError as error:
        print(f"Cannot predict: {error}", file=sys.stderr)
        return 2
    return 0


def read_task(adapter: Path) -> dict[str, Any]:
    """The adapter's task.json. Raises InputError."""
    try:
        return json.loads((adapter / "task.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"`--adapter` must be a folder with task.json, but got {str(adapter)!r}: {error}") from error


def find_samples(path: Path, image_root: Path | None, question: str) -> list[Sample]:
    """The images that a path names: itself, all of a folder, or those of a manifest with their own questions."""
    if path.is_dir():
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"folder {path} must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none")
        return [Sample(str(image), question, "", -1) for image in images]
    if path.suffix == ".json":
        entries, problems = read_manifest(path, image_root or path.parent)
        if problems:
            raise InputError("; ".join(problems))
        return [Sample(entry["image"], entry["text"], entry["answer"], -1) for entry in entries]
    if not path.is_file():
        raise InputError(f"{path} must be an image, a folder or a manifest, but is none")
    return [Sample(str(path), question, "", -1)]


def predict_lines(
    settings: ModelSettings, adapter: Path, samples: Sequence[Sample], candidates: Sequence[str], generate: bool
) -> Iterator[dict[str, Any]]:
    """For each image its path and, with candidates, their probabilities and the likeliest; the generated answer."""
    from train_fn.data import unreadable_images

    if problems := unreadable_images([sample.image for sample in samples]):
        raise InputError("; ".join(problems))
    # Images that are looked at once need not be kept in the store of features.
    with adapted_base(replace(settings, feature_cache_gib=0.0), adapter) as base:
        for sample in samples:
            line: dict[str, Any] = {"image": sample.image}
            if candidates:
                line |= label_probabilities(base, sample, candidates)
            if generate:
                line["generated"] = generated_answer(base, sample)
            yield line


@contextlib.contextmanager
def adapted_base(settings: ModelSettings, adapter: Path) -> Iterator[Base]:
    """The base, on a GPU where there is one, with a saved adapter on it. Raises InputError where there is no base."""
    import torch

    from train_fn.lora import load_adapter
    from train_fn.model import load_base

    find_base(settings)
    base = load_base(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with load_adapter(base, adapter):
        yield base


def find_base(settings: ModelSettings) -> Path:
    """The folder of the base. Raises InputError where there is none."""
    from train_fn.model import resolve_model

    directory = resolve_model(settings.model)
    if not (directory / "config.json").is_file():
        raise InputError(
            f"the base model must be a folder with config.json, but got {settings.model!r}: name its folder with "
            f"`--model`, or for an MLflow model in the environment variable {BASE_VARIABLE}"
        )
    return directory


def label_probabilities(base: Base, sample: Sample, candidates: Sequence[str]) -> dict[str, Any]:
    """The probability of each candidate, and the likeliest one."""
    from train_fn.evaluation import score_candidates
    from train_fn.scores import probabilities

    found = probabilities(score_candidates(base, [sample], candidates).double().cpu().numpy())[0]
    return {
        "label": candidates[int(found.argmax())],
        "probabilities": dict(zip(candidates, found.tolist(), strict=True)),
    }


def generated_answer(base: Base, sample: Sample, most_tokens: int = 64) -> str:
    """The model's own words, greedy."""
    import torch

    from train_fn.model import process

    inputs = {
        name: value.to(base.device, base.model.dtype if value.is_floating_point() else None)
        for name, value in process(base, sample).items()
    }
    tokenizer = base.processor.tokenizer
    with torch.no_grad():
        tokens = base.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=most_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def merge(settings: ModelSettings, adapter: Path, directory: Path) -> None:
    """Write base and adapter as one checkpoint that loads wherever the base does.

    Merged in float32 and written in the format of `--dtype`, else in the base's own. A base that was held in 4 bit is
    merged unquantised: the adapter was trained on weights rounded to 4 bit, so the merged model answers a little
    differently.
    """
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"`--merge-into` must be a new or empty folder, but {directory} is not: choose another")
    import torch
    from safetensors.torch import save_file

    from train_fn.hulumed import original_name
    from train_fn.lora import merged_adapter
    from train_fn.model import choose_dtype, load_base

    wanted = settings.base_dtype
    source = find_base(settings)
    plain = replace(settings, use_qlora=False, dtype="float32", bf16=False, fp16=False)
    base = load_base(plain, torch.device("cpu"))
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    dtype = choose_dtype(own if wanted == "auto" else wanted, torch.device("cpu"))
    merged_adapter(base, adapter)
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():  # tokenizer, processor, configuration: everything but the weights
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copyfile(file, directory / file.name)
    model = base.model.to(dtype)  # type: ignore[arg-type]
    if base.hulumed:
        tensors = {original_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(directory)
    print(f"Merged model: {directory}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
