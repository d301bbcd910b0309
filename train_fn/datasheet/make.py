"""The facts about a data set, gathered by the rules of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from train_fn.data.images import AS_USUAL
from train_fn.data.manifest import Parts, asked_by_default
from train_fn.data.samples import Splits
from train_fn.data.settings import DataSettings, split_rules, task_rules
from train_fn.data.splitting import LARGE_GROUP, DataReport, make_splits
from train_fn.data.tasks import find_tasks
from train_fn.datasheet.facts import DataSheet, find_copies, named_groups, read_files
from train_fn.settings import ImageOptions, ModelSettings, TrialSettings
from train_fn.support.text import shorten


def make_sheet(
    name: str,
    parts: Parts,
    root: Path,
    data: DataSettings,
    recognised: list[str],
    problems: list[str],
    log: Callable[[str], None],
    reading: ImageOptions = AS_USUAL,
) -> DataSheet:
    """All facts about the data that need no model.

    Args:
        name: the name of the data.
        root: the folder that shown paths start from.
        recognised: what was recognised in the files.
        problems: those of the files and options.
        log: called with lines of progress.
        reading: how images are read.
    """
    images = [image for samples in parts.values() for sample in samples or [] for image in sample.images]
    log(f"Reading {len(set(images)):,} images")
    files, bad = read_files(images, data.max_image_pixels, log, reading)
    sound = {name: [s for s in samples or [] if not bad.keys() & set(s.images)] for name, samples in parts.items()}
    problems = problems + shorten(list(bad.values()))
    splits: Splits | None = None
    report: DataReport | None = None
    if all(sound.values()):
        log("Looking for near-copies")
        splits, report, found = make_splits(
            sound["data"], sound.get("val_data"), sound.get("test_data"), split_rules(data, reading), task_rules(data)
        )
        problems += found
    together = find_tasks([sample for part in sound.values() for sample in part], task_rules(data))
    remarks = [*filter(None, [asked_by_default(parts)])]
    if report:
        remarks += report.sentences() if report.largest_group > LARGE_GROUP * report.num_images else report.notes
    else:
        remarks += together.notes
        problems += together.problems
    return DataSheet(
        name=name,
        root=root,
        recognised=recognised,
        samples=together.samples,
        tasks=together.tasks,
        splits=splits,
        report=report,
        files=files,
        unreadable=bad,
        copies=find_copies(together.samples, split_rules(data, reading)),
        groups=named_groups(together.samples, splits),
        tokens=None,
        problems=problems,
        remarks=remarks,
        images=reading,
        asked=asked_shares(data, parts),
        allow_flips=data.allow_flips,
    )


def asked_shares(data: DataSettings, parts: Parts) -> dict[str, float]:
    """The share of all samples that each part should get, without those parts that the data or the user sets."""
    pool, total = len(parts.get("data") or []), sum(len(samples or []) for samples in parts.values())
    fractions = {"validation": data.val_fraction, "test": data.test_fraction}
    options = {"validation": "val_data", "test": "test_data"}
    free = {name: fraction for name, fraction in fractions.items() if not parts.get(options[name])}
    shares = {"train": 1 - sum(free.values()), **free} if free else {}
    return {name: share * pool / max(1, total) for name, share in shares.items()}


def with_model(sheet: DataSheet, model: ModelSettings, log: Callable[[str], None]) -> DataSheet:
    """The facts with those that the base decides: tokens, and every reason why it cannot be trained with this data."""
    from train_fn.datasheet.tokens import token_lengths
    from train_fn.model.checkpoint import resolve_model
    from train_fn.model.preflight import base_problems, checked_processor

    if not sheet.splits:
        return sheet
    log("Checking the base model, and what its processor makes of the data")
    warnings: list[str] = []
    problems = base_problems(model, TrialSettings(), sheet.splits, warnings.append)
    tokens = None
    if not problems:
        sizes = {path: facts.size for path, facts in sheet.files.items()}
        tokens = token_lengths(checked_processor(model), resolve_model(model.model), sheet.samples, sizes)
        if tokens.beyond:
            warnings.append(
                f"{len(tokens.beyond):,} of {len(sheet.samples):,} samples have more tokens than the {tokens.limit:,} "
                f"of the model: shorten them, or give a smaller --max-image-tokens"
            )
    return dataclasses.replace(
        sheet, tokens=tokens, problems=[*sheet.problems, *problems], remarks=[*sheet.remarks, *warnings]
    )
