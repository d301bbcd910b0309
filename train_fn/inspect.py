"""A look at the data: `python -m train_fn.inspect --data PATH` shows it, and whether a study can start with it.

`--model FOLDER` also checks and counts the words as tokens, and `--html PAGE` shows all of it with pictures. The
options about data are those of a study.

With `--write MANIFEST.jsonl` it first converts data of any format to JSON Lines, or to the guide's JSON (.json).
`--busi FOLDER --write MANIFEST` first makes a manifest of the BUSI images as downloaded: subfolders normal, benign and
malignant; masks are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_fn.data.convert import write_manifest
from train_fn.data.formats import format_name, is_class_folder
from train_fn.data.manifest import Parts, divide, read_manifest
from train_fn.data.phantoms import CLASSES, QUESTION
from train_fn.data.settings import DataSettings
from train_fn.datasheet.facts import DataSheet
from train_fn.datasheet.make import make_sheet, with_model
from train_fn.datasheet.page import write_page
from train_fn.datasheet.tables import all_tables
from train_fn.model.hub import data_path, fetch
from train_fn.model.hub_errors import HubError
from train_fn.model.hub_ids import is_hub_data, is_hub_model
from train_fn.settings import ModelSettings, broken_rule, broken_rules, convert, field_docs, flag, rules
from train_fn.support.tables import print_table
from train_fn.support.text import plain

DATA_OPTIONS = tuple(
    field.name for field in dataclasses.fields(DataSettings) if field.name not in ("num_phantoms", "max_new_tokens")
)
MODEL_OPTIONS = ("model", "max_image_tokens", "upright_images", "window", "frames")
PATHS = ("data", "val_data", "test_data", "image_root")


def main(argv: Sequence[str]) -> int:
    """Show the data. Returns the exit code: 0 if a study can start with it, else 2."""
    parser = build_parser()
    options = parser.parse_args(list(argv))
    if (options.data is None) == (options.busi is None):
        parser.error("one of the options --data and --busi must be given")
    if options.busi and (options.image_root or not options.write):
        parser.error("--busi must be given with --write, and without --image-root: that is the BUSI folder")
    data, model = read_options(parser, options)
    options.columns, options.question = data.all_columns, data.question
    try:
        for name in PATHS:
            setattr(options, name, local_path(text) if (text := getattr(options, name)) else None)
        if options.model and is_hub_model(model.model):
            model = dataclasses.replace(model, model=fetch(model.model, progress))
    except HubError as error:
        parser.exit(2, f"{plain(error)}\n")
    if options.busi:
        if problems := write_busi(options.busi, options.write, options.question or QUESTION):
            print("The manifest cannot be made:", *map(plain, problems), sep="\n  - ", file=sys.stderr)
            return 2
        given = shlex.join(["--data", str(options.write), "--image-root", str(options.busi)])
        print(f"Written; for a study: {given}")
        options.data, options.image_root, options.question = options.write, options.busi, ""
    elif options.write:
        if options.val_data or options.test_data:
            parser.error("--write converts --data only: leave --val-data and --test-data out")
        root, problems, notes = write_manifest(
            options.write, options.data, options.image_root, options.columns, options.question, data.multilabel
        )
        if problems:
            parser.exit(2, "\n  - ".join(["The manifest cannot be made:", *map(plain, problems)]) + "\n")
        for note in notes:
            print(plain(note))
        options.columns, options.question, options.image_root = (), "", root
        given = f" --image-root {shlex.quote(str(root))}" if root else ""
        print(f"Written; for a study: --data {shlex.quote(str(options.write))}{given}")
        options.data = options.write
    return inspect(options, data, model)


def local_path(text: str) -> Path:
    """A path, or the files of a data set of the hub, which is fetched. Raises HubError."""
    return data_path(fetch(text, progress)) if is_hub_data(text) else Path(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line: options of its own, and those of a study that concern the data."""
    parser = argparse.ArgumentParser(prog="python -m train_fn.inspect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--busi", type=Path, help="folder of the BUSI images: make its manifest, then inspect that")
    parser.add_argument(
        "--write", type=Path, help="manifest to make of --busi or --data: .jsonl, or .json (the guide's)"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write all of it, with pictures, to this HTML file")
    for group, names in ((DataSettings, DATA_OPTIONS), (ModelSettings, MODEL_OPTIONS)):
        section = parser.add_argument_group((group.__doc__ or "").partition(".")[0])
        docs = field_docs(group)
        for field in dataclasses.fields(group):
            if field.name in names:
                default = field.default if field.name not in ("data", "model") else ""
                shown = "" if default in ("", (), False) else f" [{default}]"
                how: dict[str, Any] = {"help": (docs[field.name] + shown).replace("%", "%%"), "default": None}
                if isinstance(field.default, bool):
                    how["action"] = argparse.BooleanOptionalAction
                else:
                    how["metavar"] = "..."
                section.add_argument(flag(field.name), **how)
    return parser


def read_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[DataSettings, ModelSettings]:
    """The options of a study in their types. Exits with every broken rule."""
    problems: list[str] = []
    made: list[Any] = []
    for group, names in ((DataSettings, DATA_OPTIONS), (ModelSettings, MODEL_OPTIONS)):
        values: dict[str, Any] = {}
        for name in names:
            text, (kind, rule) = getattr(options, name), rules(group)[name]
            try:
                if text is not None:
                    values[name] = text if isinstance(text, bool) else convert(text, kind)
            except (ValueError, OverflowError):
                problems.append(f"`{flag(name)}` {broken_rule(text, kind, rule)}, but got {text!r}: correct it")
        made.append(group(**values))
        problems += broken_rules(made[-1], flag).values()
    data: DataSettings = made[0]
    if (together := data.val_fraction + data.test_fraction) >= 1 and not problems:
        problems.append(
            f"`--val-fraction` and `--test-fraction` must be below 1 together, but got {together:g}: lower one"
        )
    roles = [text.partition("=")[0] for text in data.all_columns]
    if len(set(roles)) < len(roles):
        problems.append(f"`--columns` must name each role only once, but got {data.all_columns}: leave one out")
    if options.image_root and options.data and is_class_folder(options.data):
        problems.append("`--image-root` goes with a manifest: leave it out, since the images of a folder need none")
    if problems:
        parser.error("\n  - ".join(["", *map(plain, problems)]))
    return data, made[1]


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


def inspect(options: argparse.Namespace, data: DataSettings, model: ModelSettings) -> int:
    """Print the tables that the data allows, then every reason why a study cannot start. Returns the exit code."""
    root: Path = options.image_root or (options.data if options.data.is_dir() else options.data.parent)
    parts: Parts = {}
    recognised: list[str] = []
    problems = []
    for name in ("data", "val_data", "test_data"):
        if path := getattr(options, name):
            its_root = options.image_root or (path if path.is_dir() else path.parent)
            reading = read_manifest(path, its_root, options.columns, options.question, multilabel=data.multilabel)
            parts[name] = reading.samples
            if reading.samples:
                recognised.append(f"{path.name} is {format_name(path)} with {len(reading.samples):,} sound entries")
            recognised += reading.notes
            problems += [f"`{flag(name)}`: {text}" for text in reading.problems]
    has_groups = "group" in [text.partition("=")[0] for text in options.columns]
    parts, found = divide(parts, options.question, has_groups)
    problems += found
    name, recognised = options.data.resolve().name, list(dict.fromkeys(recognised))
    sheet = make_sheet(name, parts, root.resolve(), data, recognised, problems, progress, model.image_options)
    if options.model:
        sheet = with_model(sheet, model, progress)
    show(sheet)
    if options.html:
        try:
            write_page(sheet, options.html)
        except OSError as error:
            print(f"`--html` must be a file that can be written, but {options.html}: {error.strerror}", file=sys.stderr)
            return 2
        print(f"Written: {options.html}")
    return 2 if sheet.problems else 0


def progress(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr)


def show(sheet: DataSheet) -> None:
    """Print the facts."""
    for text in sheet.recognised:
        print(plain(text))
    for table in all_tables(sheet) if sheet.samples else ():
        print_table(table.title, table.columns, table.rows, width=100)
    for remark in sheet.remarks:
        print("  " + plain(remark))
    for problem in sheet.problems:
        print("  - " + plain(problem, keep="\n"))
    reasons = ", for the reasons above"
    can = "cannot" if sheet.problems else "can"
    print(f"A study {can} start with this data{reasons if sheet.problems else ''}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
