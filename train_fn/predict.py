"""Use an adapter: `python -m train_fn.predict --adapter DIR IMAGE|FOLDER|MANIFEST ...`, one JSON line an image.

Base model, question and candidate answers come from the adapter's task.json unless options replace them. With
`--merge-into DIR` the adapter is instead merged into a full checkpoint in the base's own layout.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.data.folders import DATA_SUFFIXES, IMAGE_SUFFIXES, is_image
from train_fn.data.images import MAX_PIXELS, PILLOWS_LIMIT, image_problems
from train_fn.data.manifest import read_manifest
from train_fn.data.samples import Sample
from train_fn.model.adapters import BadAdapter, check_files, read_config, read_shapes, read_task
from train_fn.model.checkpoint import file_problems, resolve_model
from train_fn.model.hub import fetch
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import is_hub_model
from train_fn.model.preflight import checked_processor, text_problems
from train_fn.settings import DTYPES, ModelSettings
from train_fn.support.files import DamagedFile, replace_folder
from train_fn.support.text import shorten

if TYPE_CHECKING:
    from train_fn.model.base import Base

BASE_VARIABLE = "VLM_TUNE_BASE"


class InputError(Exception):
    """The command line is wrong, or a file that it names cannot be used."""


class NotFinite(ValueError):
    """The model's scores of an image are not finite."""


def main(argv: Sequence[str]) -> int:
    """Predict or merge.

    Returns:
        The exit code: 0; 1 when some of the images could not be answered; 2 for bad input.
    """
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
    parser.add_argument(
        "--max-image-pixels", type=int, default=MAX_PIXELS, help=f"largest image, in pixels [{MAX_PIXELS}]"
    )
    options = parser.parse_args(list(argv))
    try:
        return run(options)
    except (InputError, BadAdapter, DamagedFile) as error:
        print(f"Cannot predict: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Predict or merge. Returns the exit code. Raises InputError, BadAdapter or DamagedFile for bad input."""
    task = read_task(options.adapter)
    read_shapes(options.adapter, read_config(options.adapter))  # before the base is loaded, which takes minutes
    check_files(options.adapter)
    settings = replace(task.model, model=options.model or task.model.model)
    if options.dtype:
        settings = replace(settings, dtype=options.dtype, bf16=False, fp16=False)
    if options.merge_into:
        merge(settings, options.adapter, options.merge_into)
        return 0
    if not options.inputs:
        raise InputError("nothing to predict: name an image, a folder or a manifest")
    candidates = tuple(filter(None, map(str.strip, options.candidates.split(","))))
    if len(set(candidates)) < len(candidates):
        raise InputError(f"`--candidates` must differ from each other, but got {options.candidates!r}: name each once")
    if not 1 <= options.max_image_pixels <= PILLOWS_LIMIT:
        raise InputError(f"`--max-image-pixels` must be from 1 to {PILLOWS_LIMIT}, but got {options.max_image_pixels}")
    question = options.question or task.question
    samples = [s for path in options.inputs for s in find_samples(path, options.image_root, question)]
    images = (sample.image for sample in samples)
    faults = image_problems(images, options.max_image_pixels, options=settings.image_options)
    if len(faults) == len({sample.image for sample in samples}):
        raise InputError("; ".join(shorten(list(faults.values()))))
    failed = 0
    answers = candidates or task.candidates
    for line in predict_lines(settings, options.adapter, samples, answers, not options.no_generate, faults):
        if "error" in line:
            failed += 1
            print(f"Cannot answer {line['image']}: {line['error']}", file=sys.stderr)
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


def find_samples(path: Path, image_root: Path | None, question: str) -> list[Sample]:
    """The images of a path: one image, all images of a folder, or those of a manifest with their own questions."""
    if path.is_dir():
        # For `x.png` on a foreign disk, macOS writes a file `._x.png` with its notes.
        files = (p for p in path.rglob("*") if is_image(p) and not p.name.startswith("._"))
        images = sorted(files)
        if not images:
            raise InputError(f"folder {path} must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none")
        return [Sample((str(image),), question, "") for image in images]
    if path.suffix.lower() in DATA_SUFFIXES:
        reading = read_manifest(path, image_root or path.parent, question=question)
        if reading.problems:
            raise InputError("; ".join(reading.problems))
        return reading.samples
    if not path.is_file():  # reading a pipe or a device could block for ever
        raise InputError(f"{path} must be an image, a folder or a manifest, but is none")
    return [Sample((str(path),), question, "")]


def predict_lines(
    settings: ModelSettings,
    adapter: Path,
    samples: Sequence[Sample],
    candidates: Sequence[str],
    generate: bool,
    faults: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer each image.

    Args:
        generate: whether the model also generates an answer of its own.
        faults: errors of images that cannot be read, by path.

    Yields:
        For each image its path (`image`) and, with candidates, their `probabilities` and the likeliest as `label`; with
        `generate`, the answer as `generated`. For an image that cannot be answered, its path and the `error`.

    Raises:
        InputError: the base cannot be loaded, or cannot read a question or candidate.
        BadAdapter: the adapter is damaged or does not fit the base.
    """
    find_base(settings)
    try:
        processor = checked_processor(settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    if problems := text_problems(processor, samples, [candidates]):
        raise InputError("; ".join(problems))
    # Each image is used once, so its features need no cache.
    with adapted_base(replace(settings, feature_cache_gib=0.0), adapter) as base:
        for sample in samples:
            line: dict[str, Any] = {"image": sample.image}
            try:
                if faults and sample.image in faults:
                    raise ValueError(faults[sample.image])
                if candidates:
                    line |= label_probabilities(base, sample, candidates)
                if generate:
                    line["generated"] = generated_answer(base, sample)
            except (ValueError, MemoryError) as error:  # among them BatchFailed: the processor refuses this image
                line = {"image": sample.image, "error": str(error) or type(error).__name__}
            yield line


@contextlib.contextmanager
def adapted_base(settings: ModelSettings, adapter: Path) -> Iterator[Base]:
    """The base, on a GPU if there is one, with a saved adapter on it.

    Raises:
        InputError: the base cannot be loaded.
        BadAdapter: the adapter is damaged or does not fit.
    """
    find_base(settings)
    import torch

    from train_fn.model.base import load_base
    from train_fn.trial.adapter_files import load_adapter

    try:
        base = load_base(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, OSError) as error:  # from transformers, for a folder that holds no model
        raise InputError(f"the base model {settings.model} must load, but does not: {error}") from error
    with load_adapter(base, adapter):
        yield base


def find_base(settings: ModelSettings) -> Path:
    """The folder of the base, which is downloaded if it is on the hub.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    if is_hub_model(settings.model):
        try:
            fetch(settings.model, functools.partial(print, file=sys.stderr))
        except HubError as error:
            raise InputError(f"the base model {error}") from error
    directory = resolve_model(settings.model)
    if not (directory / "config.json").is_file():
        raise InputError(
            f"the base model must be a folder with config.json, or a model of the hub (OWNER/NAME), but got "
            f"{settings.model!r}: name it with `--model`, or for an MLflow model in the environment variable "
            f"{BASE_VARIABLE}"
        )
    if problems := file_problems(directory):
        raise InputError("; ".join(problems))
    return directory


def label_probabilities(base: Base, sample: Sample, candidates: Sequence[str]) -> dict[str, Any]:
    """The probability of each candidate, and the likeliest one. Raises NotFinite."""
    from train_fn.scoring.evaluation import score_candidates
    from train_fn.scoring.scores import probabilities

    scores = score_candidates(base, [sample], candidates).double().cpu().numpy()
    if not np.isfinite(scores).all():
        raise NotFinite(f"the model's scores must be finite, but are {scores[0].tolist()}: try --dtype float32")
    found = probabilities(scores)[0]
    return {
        "label": candidates[int(found.argmax())],
        "probabilities": dict(zip(candidates, found.tolist(), strict=True)),
    }


def generated_answer(base: Base, sample: Sample, most_tokens: int = 64) -> str:
    """The model's own answer, decoded greedily."""
    import torch

    from train_fn.model.batches import process

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

    The weights are merged in float32 and written in the format of `--dtype`, by default in the base's own. A base in
    4 bit is merged unquantised: the adapter was trained on weights rounded to 4 bit, so the merged model answers a
    little differently.

    Raises:
        InputError: the base cannot be used, or `directory` is not new or empty.
        BadAdapter: the adapter is damaged or does not fit.
    """
    source, directory = find_base(settings), directory.resolve()
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"`--merge-into` must be a new or empty folder, but {directory} is not: choose another")
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"`--merge-into` must be a folder that can be written, but {directory} cannot be made ({error.strerror}: "
            f"{error.filename}): choose another"
        ) from error
    try:
        write_merged(settings, source, adapter, partial)
        replace_folder(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Merged model: {directory}", file=sys.stderr)


def write_merged(settings: ModelSettings, source: Path, adapter: Path, directory: Path) -> None:
    """Write the merged checkpoint of `merge`; `source` is the base's folder."""
    import torch
    from safetensors.torch import save_file

    from train_fn.model.base import choose_dtype, load_base
    from train_fn.model.hulumed import original_name
    from train_fn.trial.adapter_files import merged_adapter

    plain = replace(settings, use_qlora=False, dtype="float32", bf16=False, fp16=False)
    base = load_base(plain, torch.device("cpu"))
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    if own not in DTYPES:
        raise InputError(f"`dtype` in {source / 'config.json'} must be one of {', '.join(DTYPES)}, but is {own!r}")
    dtype = choose_dtype(own if settings.base_dtype == "auto" else settings.base_dtype, torch.device("cpu"))
    merged_adapter(base, adapter)
    for file in source.iterdir():  # tokenizer, processor, configuration: everything but the weights
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copyfile(file, directory / file.name)
    model = base.model.to(dtype)  # type: ignore[arg-type]
    if base.hulumed:
        tensors = {original_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
