"""Use an adapter: `python -m train_fn.predict --adapter DIR IMAGE|FOLDER|DATA ...`, one JSON line a sample.

Base model, questions and candidate answers come from the adapter's task.json unless options replace them. A line has
`id`, `image` (or `images`), `question`, `task` and `truth`, each if it is there; the `answer`; the `probabilities` of
the candidates; and what the model writes itself, as `generated`. `label` repeats the chosen candidate. With truths,
a last line on stderr says how many answers are right.

Probabilities and the chosen candidate are those of the decision that was fitted on the study's validation part, as in
the study's test; `--raw` gives the model's own.

With `--coverage 0.9` a line also has the set of `answers` that holds the true one in 90 % of the samples, and
`for_reader`: true if the set does not hold exactly one answer.

With `--merge-into DIR` the adapter is instead merged into a full checkpoint in the base's own layout.
With `--check-serving` it prints which servers take the adapter, and how.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.folders import DATA_SUFFIXES, IMAGE_SUFFIXES, is_image
from train_fn.data.formats import is_class_folder
from train_fn.data.images import MAX_PIXELS, PILLOWS_LIMIT, image_problems
from train_fn.data.manifest import read_manifest
from train_fn.data.rows import COLUMN
from train_fn.data.samples import Sample, closed_set
from train_fn.data.settings import SEPARATOR
from train_fn.model.adapters import (
    MOST_NEW_TOKENS,
    AdapterTask,
    BadAdapter,
    check_files,
    read_config,
    read_shapes,
    read_task,
)
from train_fn.model.checkpoint import file_problems, resolve_model
from train_fn.model.hub import fetch
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import is_hub_model
from train_fn.model.preflight import checked_processor
from train_fn.scoring.answering import BATCH_SIZE, Answer, answer_samples, sample_errors, summary
from train_fn.scoring.answers import described
from train_fn.scoring.conformal import SetRule, coverage_problems
from train_fn.serving import serving_lines
from train_fn.settings import DTYPES, ModelSettings
from train_fn.support.files import DamagedFile, replace_folder
from train_fn.support.progress import clear_progress, show_progress
from train_fn.support.text import plain, plain_form, shorten

if TYPE_CHECKING:
    from train_fn.model.base import Base

BASE_VARIABLE = "VLM_TUNE_BASE"
MAX_BATCH_SIZE = 1024


class InputError(Exception):
    """The command line is wrong, or a file that it names cannot be used."""


def main(argv: Sequence[str]) -> int:
    """Predict or merge.

    Returns:
        The exit code: 0; 1 when some of the samples could not be read or answered; 2 for bad input; 130 after Ctrl-C;
        141 when the reader of the answers has ended, as in `| head`.
    """
    parser = argparse.ArgumentParser(prog="python -m train_fn.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=Path, help="images, folders of images, or data in any format")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--model", default="", help="base model, if not the one the adapter was trained on")
    parser.add_argument("--image-root", type=Path, help="folder that a manifest's paths start from [the manifest's]")
    parser.add_argument("--columns", default="", help="columns with other than usual names, such as question=text")
    parser.add_argument("--question", default="", help="question, if not the one of the training images")
    parser.add_argument("--candidates", default="", help="answers to choose from, comma-separated, to every question")
    parser.add_argument("--multilabel", default="", help='separator between the labels of an answer, such as ";"')
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the model's own probabilities, and the most probable answer",
    )
    parser.add_argument("--coverage", type=float, help="share of samples whose set of `answers` holds the true one")
    parser.add_argument("--no-generate", action="store_true", help="generate no answer where there are candidates")
    parser.add_argument("--max-new-tokens", type=int, help="most tokens of a generated answer [as in training]")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"samples a batch [{BATCH_SIZE}]")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--merge-into", type=Path, help="write base and adapter as one checkpoint to this folder")
    parser.add_argument("--merge-layout", default="base", choices=("base", "transformers"),
                        help="of a merged Hulu-Med: its own, or transformers', for pipelines and servers")  # fmt: skip
    instead.add_argument("--check-serving", action="store_true", help="print which servers take the adapter, and how")
    parser.add_argument("--dtype", default="", choices=DTYPES, help="number format of base or merged checkpoint")
    parser.add_argument(
        "--max-image-pixels", type=int, default=MAX_PIXELS, help=f"largest image, in pixels [{MAX_PIXELS}]"
    )
    options = parser.parse_args(list(argv))
    try:
        return run(options)
    except (InputError, BadAdapter, DamagedFile) as error:
        print(plain(f"Cannot predict: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        clear_progress()
        print("Stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
        return 141


def run(options: argparse.Namespace) -> int:
    """Predict or merge. Returns the exit code. Raises InputError, BadAdapter or DamagedFile for bad input."""
    task = read_task(options.adapter)
    read_shapes(options.adapter, read_config(options.adapter))  # before the base is loaded, which takes minutes
    check_files(options.adapter)
    settings = replace(task.model, model=options.model or task.model.model)
    if options.dtype:
        settings = replace(settings, dtype=options.dtype, bf16=False, fp16=False)
    if options.check_serving:
        print("\n\n".join(serving_lines(options.adapter, settings)))
        return 0
    if options.merge_into:
        merge(settings, options.adapter, options.merge_into, options.merge_layout)
        return 0
    columns = words_of(options.columns)
    if problems := option_problems(options, columns):
        raise InputError("; ".join(problems))
    task = replace(task, max_new_tokens=options.max_new_tokens or task.max_new_tokens)
    if candidates := words_of(options.candidates):
        same = candidates == task.candidates
        task = task if same else replace(task, tasks=closed_set(candidates), decisions={}, conformal={})
    if options.multilabel:
        task = with_separator(task, options.multilabel)
    if options.raw:
        task = replace(task, decisions={}, conformal={})
    if problems := coverage_problems(task, options.coverage):
        raise InputError("; ".join(problems))
    sets = SetRule(task, options.coverage)
    question = options.question or task.question
    samples: list[Sample] = []
    num_failed = 0
    for path in options.inputs:
        found, problems = find_samples(path, options.image_root, question, columns, task.candidates, options.multilabel)
        samples += found
        num_failed += len(problems)
        for problem in problems:
            print(plain(f"Cannot read: {problem}"), file=sys.stderr)
    images = (image for sample in samples for image in sample.images)
    faults = image_problems(images, options.max_image_pixels, options=settings.image_options)
    if all(faults.keys() & set(sample.images) for sample in samples):
        raise InputError("; ".join(shorten(list(faults.values()))))
    samples = [task.assign(sample) for sample in samples]
    answered: list[tuple[Sample, Answer]] = []
    generate_all = not options.no_generate
    found_answers = answers_of(settings, options.adapter, samples, task, faults, options.batch_size, generate_all)
    for sample, answer in zip(samples, found_answers, strict=True):
        clear_progress()
        if answer.error:
            num_failed += 1
            print(plain(f"Cannot answer {sample.source or sample.image}: {answer.error}"), file=sys.stderr)
        print(json.dumps(line_of(sample, answer, task) | sets.line(sample, answer)), flush=True)
        answered.append((sample, answer))
        show_progress(len(answered), len(samples))
    clear_progress()
    for text in filter(None, [summary(answered, task.by_name), *sets.notes(answered)]):
        print(plain(text), file=sys.stderr)
    return 1 if num_failed else 0


def words_of(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def option_problems(options: argparse.Namespace, columns: Sequence[str]) -> list[str]:
    """Every option that cannot be used, as a sentence each."""
    candidates = words_of(options.candidates)
    roles = [text.partition("=")[0] for text in columns]
    most, separator = options.max_new_tokens, options.multilabel
    checks = [
        (bool(options.inputs), "nothing to predict: name an image, a folder or a manifest"),
        (
            len(set(candidates)) == len(candidates),
            f"`--candidates` must differ from each other, but got {options.candidates!r}: name each once",
        ),
        (
            all(map(COLUMN.holds, columns)) and len(set(roles)) == len(roles),
            f"`--columns` must be {COLUMN.words}, each role once, but got {options.columns!r}: correct it",
        ),
        (
            SEPARATOR.holds(separator) and not separator.isspace(),
            f"`--multilabel` must be {SEPARATOR.words}, but got {separator!r}: correct it",
        ),
        (
            most is None or 1 <= most <= MOST_NEW_TOKENS,
            f"`--max-new-tokens` must be from 1 to {MOST_NEW_TOKENS:,}, but got {most}: correct it",
        ),
        (
            1 <= options.batch_size <= MAX_BATCH_SIZE,
            f"`--batch-size` must be from 1 to {MAX_BATCH_SIZE:,}, but got {options.batch_size}: correct it",
        ),
        (
            1 <= options.max_image_pixels <= PILLOWS_LIMIT,
            f"`--max-image-pixels` must be from 1 to {PILLOWS_LIMIT}, but got {options.max_image_pixels}",
        ),
    ]
    return [problem for holds, problem in checks if not holds]


def with_separator(task: AdapterTask, separator: str) -> AdapterTask:
    """The task of an adapter, with answers that are sets of labels instead of classes and texts."""
    other = ("ordinal", "numeric")
    tasks = tuple(t if t.kind in other else replace(t, kind="multilabel", separator=separator) for t in task.tasks)
    return replace(task, tasks=tasks, decisions={}, conformal={})


def find_samples(
    path: Path,
    image_root: Path | None,
    question: str,
    columns: Sequence[str] = (),
    candidates: Collection[str] = (),
    multilabel: str = "",
) -> tuple[list[Sample], list[str]]:
    """The samples of a path: one image, all images of a folder, or data in any format of a study.

    Args:
        image_root: the folder that the paths in a manifest start from; None: the manifest's own.
        question: what is asked about images, and about data without questions.
        columns: `--columns`.
        candidates: an image in a folder of such a name, inside `path`, has it as its true answer.
        multilabel: `--multilabel`, which joins lists of answers.

    Returns:
        The samples, at least one; and every reason why others cannot be read.

    Raises:
        InputError: there is none.
    """
    if is_class_folder(path):
        # For `x.png` on a foreign disk, macOS writes a file `._x.png` with its notes.
        files = (p for p in path.rglob("*") if is_image(p) and not p.name.startswith("._"))
        images = sorted(files)
        if not images:
            raise InputError(f"folder {path} must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none")
        truths = {plain_form(answer): answer for answer in candidates}
        classes = ["" if image.parent == path else plain_form(image.parent.name) for image in images]
        return [
            Sample((str(image),), question, truths.get(name, "")) for image, name in zip(images, classes, strict=True)
        ], []
    if path.is_dir() or path.suffix.lower() in DATA_SUFFIXES:
        reading = read_manifest(path, image_root, columns, question, multilabel=multilabel, answers_optional=True)
        if not reading.samples:
            raise InputError("; ".join(reading.problems))
        for note in reading.notes:
            print(note, file=sys.stderr)
        return reading.samples, reading.problems
    if not path.is_file():  # reading a pipe or a device could block for ever
        raise InputError(f"{path} must be an image, a folder or a manifest, but is none")
    return [Sample((str(path),), question, "")], []


# ------------------------------------------------------------------------------------------------ answers


def answers_of(
    settings: ModelSettings,
    adapter: Path,
    samples: Sequence[Sample],
    task: AdapterTask,
    faults: Mapping[str, str],
    batch_size: int,
    generate_all: bool,
) -> Iterator[Answer]:
    """Answer each sample.

    Args:
        samples: from `AdapterTask.assign`.
        faults: errors of images that cannot be read, by path.
        generate_all: whether the model also generates an answer of its own where there are candidates.

    Raises:
        InputError: the base cannot be loaded, or cannot read any question, or cannot read a candidate.
        BadAdapter: the adapter is damaged or does not fit the base.
    """
    find_base(settings)
    try:
        errors = sample_errors(checked_processor(settings), samples, task.by_name, faults)
    except ValueError as error:
        raise InputError(str(error)) from error
    sound = [sample for sample, error in zip(samples, errors, strict=True) if not error]
    # Each image is used once, so its features need no cache.
    with adapted_base(replace(settings, feature_cache_gib=0.0), adapter) as base:
        answers = answer_samples(
            base, sound, task.by_name, task.max_new_tokens, batch_size, generate_all, task.decisions
        )
        for fault in errors:
            yield Answer(error=fault) if fault else next(answers)


def line_of(sample: Sample, answer: Answer, task: AdapterTask) -> dict[str, Any]:
    """The line of a sample."""
    line = described(sample)
    if answer.error:
        return line | {"error": answer.error}
    line |= answer.as_dict(task.by_name[sample.task])
    if answer.probabilities:
        line["label"] = line["answer"]  # its name before there were other answers
    return line if answer.text is None else line | {"generated": answer.text}


# ------------------------------------------------------------------------------------------------ the base


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


# ------------------------------------------------------------------------------------------------ merging


def merge(settings: ModelSettings, adapter: Path, directory: Path, layout: str = "base") -> None:
    """Write base and adapter as one checkpoint that loads wherever the base does.

    The weights are merged in float32 and written in the format of `--dtype`, by default in the base's own. A base in
    4 bit is merged unquantised: the adapter was trained on weights rounded to 4 bit, so the merged model answers a
    little differently. `layout` is that of `write_merged`.

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
        from train_fn.trial.merging import write_merged

        write_merged(settings, source, adapter, partial, layout)
        replace_folder(partial, directory)
    except BadAdapter:
        raise
    except ValueError as error:  # the base does not load
        raise InputError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Merged model: {directory}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
