"""A look at the data: `python -m train_fn.inspect --data PATH` shows it, and whether a study can start with it.

With `--write MANIFEST.jsonl` it first converts data of any format to JSON Lines, or to the guide's JSON (.json).
`--busi FOLDER --write MANIFEST` first makes a manifest of the BUSI images as downloaded: subfolders normal, benign and
malignant; masks are left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from train_fn.data.convert import write_manifest
from train_fn.data.copies import MAX_DISTANCE, copy_groups, copy_pairs
from train_fn.data.formats import is_class_folder
from train_fn.data.images import MAX_PIXELS, PILLOWS_LIMIT, image_facts, image_problems, image_size
from train_fn.data.manifest import Parts, asked_by_default, divide, read_manifest
from train_fn.data.phantoms import CLASSES, QUESTION
from train_fn.data.rows import COLUMN
from train_fn.data.samples import Sample, Splits
from train_fn.data.splitting import (
    LARGE_GROUP,
    DataReport,
    SplitRules,
    contradictory_groups,
    different_images,
    make_splits,
)
from train_fn.data.tasks import MAX_ANSWERS
from train_fn.settings import FRAME, WINDOW, ImageOptions
from train_fn.support.text import plain, shorten


def main(argv: Sequence[str]) -> int:
    """Show the data. Returns the exit code: 0 if a study can start with it, else 2."""
    parser = argparse.ArgumentParser(prog="python -m train_fn.inspect", description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="file or folder of labelled images, as in a study")
    source.add_argument("--busi", type=Path, help="folder of the BUSI images: make its manifest, then inspect that")
    parser.add_argument(
        "--write", type=Path, help="manifest to make of --busi or --data: .jsonl, or .json (the guide's)"
    )
    parser.add_argument("--columns", default="", help="columns with other than usual names, such as question=text")
    parser.add_argument("--group-field", default="", help="column of what may not be divided, such as patient_id")
    parser.add_argument("--question", default="", help="the question of BUSI [the guide's], or as in a study")
    parser.add_argument("--image-root", type=Path, help="folder that a manifest's paths start from [the manifest's]")
    parser.add_argument("--val-data", type=Path, help="validation images")
    parser.add_argument("--test-data", type=Path, help="test images")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share of validation without --val-data [0.2]")
    parser.add_argument("--test-fraction", type=float, default=0.2, help="share of the test without --test-data [0.2]")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the split [0]")
    parser.add_argument("--contradictions", choices=("keep", "drop", "train"), default="keep", help="as in a study")
    parser.add_argument("--copies-distance", type=int, default=MAX_DISTANCE, help="as in a study; -1: no near-copies")
    parser.add_argument("--max-image-pixels", type=int, default=MAX_PIXELS, help=f"as in a study [{MAX_PIXELS}]")
    parser.add_argument("--window", default="auto", help="as in a study [auto]")
    parser.add_argument("--frames", default="", help="as in a study")
    options = parser.parse_args(list(argv))
    if min(fractions := (options.val_fraction, options.test_fraction)) <= 0 or not sum(fractions) < 1:
        parser.error(f"--val-fraction and --test-fraction must be above 0 and below 1 together, but got {fractions}")
    if not 0 <= options.split_seed < 2**32:
        parser.error(f"--split-seed must be a whole number from 0 to {2**32 - 1}, but got {options.split_seed}")
    if not -1 <= options.copies_distance <= 16:
        parser.error(f"--copies-distance must be from -1 to 16, but got {options.copies_distance}")
    if not 1 <= options.max_image_pixels <= PILLOWS_LIMIT:
        parser.error(f"--max-image-pixels must be from 1 to {PILLOWS_LIMIT}, but got {options.max_image_pixels}")
    for name, rule in (("window", WINDOW), ("frames", FRAME)):
        if (value := getattr(options, name)) and not rule.holds(value):
            parser.error(f"--{name} must be {rule.words}, but got {value!r}")
    if options.busi and (options.image_root or not options.write):
        parser.error("--busi must be given with --write, and without --image-root: that is the BUSI folder")
    options.columns = tuple(part.strip() for part in options.columns.split(",") if part.strip())
    options.columns += (f"group={options.group_field}",) if options.group_field else ()
    roles = [text.partition("=")[0] for text in options.columns]
    if not all(map(COLUMN.holds, options.columns)) or len(set(roles)) < len(roles):
        parser.error(f"--columns must be {COLUMN.words}, each role once, but got {options.columns}")
    if options.image_root and is_class_folder(options.data):
        parser.error("--image-root goes with a manifest: leave it out, since the images of a folder need none")
    if options.busi:
        if problems := write_busi(options.busi, options.write, options.question or QUESTION):
            print("The manifest cannot be made:", *map(plain, problems), sep="\n  - ", file=sys.stderr)
            return 2
        print(f"Written; for a study: --data {options.write} --image-root {options.busi}")
        options.data, options.image_root, options.question = options.write, options.busi, ""
    elif options.write:
        if options.val_data or options.test_data:
            parser.error("--write converts --data only: leave --val-data and --test-data out")
        root, problems, notes = write_manifest(
            options.write, options.data, options.image_root, options.columns, options.question
        )
        if problems:
            parser.exit(2, "\n  - ".join(["The manifest cannot be made:", *map(plain, problems)]) + "\n")
        for note in notes:
            print(plain(note))
        options.columns, options.question, options.image_root = (), "", root
        given = f" --image-root {shlex.quote(str(root))}" if root else ""
        print(f"Written; for a study: --data {shlex.quote(str(options.write))}{given}")
        options.data = options.write
    return inspect(options)


def write_busi(folder: Path, manifest: Path, question: str) -> list[str]:
    """Write the manifest of a BUSI folder, with image paths relative to it. Returns every reason why that failed."""
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    entries, problems = [], []
    for label, answer in enumerate(CLASSES):
        name = answer.lower()
        files = folders[name].glob("*.png") if name in folders else ()
        images = sorted(path.relative_to(folder).as_posix() for path in files if "_mask" not in path.stem)
        entries += [{"image": image, "text": question, "answer": answer, "label": label} for image in images]
        if not images:
            lack = "it has no *.png" if name in folders else "there is no such folder"
            problems.append(f"`--busi` {folder} must have images in {name}/, but {lack}: check the path")
    if not problems:
        try:
            with manifest.open("x", encoding="utf-8") as file:
                json.dump(entries, file, indent=2)
        except OSError as error:
            problems.append(f"`--write` must name a new file, but got {manifest}: {error.strerror}; choose another")
    return problems


def inspect(options: argparse.Namespace) -> int:
    """Print the tables that the data allows, then every reason why a study cannot start. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    folder = options.data if options.data.is_dir() else options.data.parent
    root: Path = options.image_root or folder
    parts: Parts = {}
    problems = []
    notes: list[str] = []
    for name in ("data", "val_data", "test_data"):
        if path := getattr(options, name):
            its_root = options.image_root or (path if path.is_dir() else options.data.parent)
            reading = read_manifest(path, its_root, options.columns, options.question)
            parts[name] = reading.samples
            notes += reading.notes
            problems += [f"`--{name.replace('_', '-')}`: {text}" for text in reading.problems]
    parts, found = divide(parts, options.question, "group" in [text.partition("=")[0] for text in options.columns])
    problems += found
    images = [image for samples in parts.values() for sample in samples or [] for image in sample.images]
    usual = ImageOptions(options.window or "auto", options.frames)
    bad = image_problems(images, options.max_image_pixels, lambda text: print(text, file=sys.stderr), options=usual)
    problems += shorten(list(bad.values()))
    sound = {name: [s for s in samples or [] if not bad.keys() & set(s.images)] for name, samples in parts.items()}
    samples = [sample for part in sound.values() for sample in part]
    splits, report = None, None
    if all(sound.values()):
        splits, report, found = make_splits(
            sound["data"],
            sound.get("val_data"),
            sound.get("test_data"),
            SplitRules(
                val_fraction=options.val_fraction,
                test_fraction=options.test_fraction,
                seed=options.split_seed,
                contradictions=options.contradictions,
                copies_distance=options.copies_distance,
                images=usual,
            ),
        )
        problems += found
    console = Console(markup=False, emoji=False, highlight=False)  # a file may be called [red]
    if not console.is_terminal:
        console.width = 100
    if samples:
        for title, columns, rows in tables(samples, root.resolve(), splits, report, options.copies_distance, usual):
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*(plain(str(cell)) for cell in row))
            console.print(table)
    for note in dict.fromkeys(notes):
        console.print("  " + plain(note), soft_wrap=True)
    if asked := asked_by_default(parts):
        console.print("  " + asked, soft_wrap=True)
    for problem in problems:
        console.print("  - " + plain(problem, keep="\n"), soft_wrap=True)
    for sentence in report.sentences() if report and report.largest_group > LARGE_GROUP * report.num_images else ():
        console.print("  " + plain(sentence), soft_wrap=True)
    reasons = ", for the reasons above"
    console.print(f"A study {'cannot' if problems else 'can'} start with this data{reasons if problems else ''}.")
    return 2 if problems else 0


def tables(
    samples: list[Sample],
    root: Path,
    splits: Splits | None,
    report: DataReport | None,
    copies_distance: int,
    reading: ImageOptions,
) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Title, columns and rows of each table."""
    counts = {"all": Counter(sample.answer for sample in samples)}
    for part in ("train", "validation", "test") if splits else ():
        counts[part] = Counter(sample.answer for sample in getattr(splits, part))
    listed = [answer for answer, _ in counts["all"].most_common(MAX_ANSWERS)]
    answers = splits.candidates if splits and (splits.candidates or len(splits.tasks) == 1) else listed
    rows: list[list[Any]] = [[answer, *(count[answer] for count in counts.values())] for answer in answers]
    rows.append([f"{len(counts['all'])} different answers", *(count.total() for count in counts.values())])
    open_set = "" if answers else " (no small closed set of answers: a study tunes on the loss)"
    yield f"Images per answer{open_set}", ["answer", *counts], rows

    sizes: dict[str, list[tuple[int, int]]] = {}
    for path in sorted({image for sample in samples for image in sample.images}):
        facts = image_facts(path)
        sizes.setdefault(f"{facts.format} {facts.mode}", []).append(image_size(path, reading))
    rows = []
    for kind, seen in sorted(sizes.items()):
        spans = [f"{min(side)} / {median(side):g} / {max(side)}" for side in zip(*seen, strict=True)]
        rows.append([kind, len(seen), *spans])
    yield "Image files", ["format and mode", "files", "width min / median / max", "height min / median / max"], rows

    paths, uses = different_images(samples)
    pairs = copy_pairs(paths, copies_distance, options=reading)
    numbers = copy_groups(len(paths), pairs)
    of_sample = numbers[[its[0] for its in uses]]
    members: dict[int, list[Sample]] = {}
    for group, sample in zip(of_sample.tolist(), samples, strict=True):
        members.setdefault(group, []).append(sample)
    sizes_by_group = dict(Counter(numbers.tolist()))
    groups = [members[group] for group, size in sorted(sizes_by_group.items(), key=lambda pair: -pair[1]) if size > 1]
    mixed = [members[group] for group in sorted(contradictory_groups(samples, uses, pairs, of_sample))]
    grouped = sum(size for size in sizes_by_group.values() if size > 1)
    rows = [["images that have one", grouped], ["pairs", len(pairs)], ["groups", len(groups)]]
    rows.append(["images in the largest group", max(sizes_by_group.values()) if groups else 0])
    rows.append(["groups with contradictory answers", len(mixed)])
    if report:
        rows.append(["images left out for a contradiction", report.num_left_out])
        rows.append(["validation images with one in train", report.leaked["validation"]])
        rows.append(["test images with one in train or validation", report.leaked["test"]])
        rows.append(["the same, had the split been random", f"{report.leaked_if_random:.0%} of the test images"])
    yield "Near-copies", ["", "number"], rows
    for title, chosen, most in (("Largest groups of near-copies", groups, 5), ("Contradictory near-copies", mixed, 50)):
        rows = []
        for found in chosen[:most]:
            asked = len({sample.question for sample in found}) > 1
            names = [
                f"{shown_path(Path(sample.image), root)}: {sample.question + ' ' if asked else ''}{sample.answer}"
                for sample in found
            ]
            names = shorten(names, 10)
            rows.append([len(found), "\n".join(names)])
        if rows:
            yield f"{title} ({len(rows)} of {len(chosen)})", ["entries", "file: answer"], rows


def shown_path(image: Path, root: Path) -> Path:
    """An image's path from the image root. Images from bytes lie elsewhere."""
    return image.relative_to(root) if image.is_relative_to(root) else Path(image.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
