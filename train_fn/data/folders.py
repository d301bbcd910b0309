"""Folders: of images by class, whose name is the answer, below `train/`, `val/` and `test/` or not; and of data files,
with their images or without."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from train_fn.data.dicom import is_dicom
from train_fn.data.rows import PARTS
from train_fn.data.tables import MAX_ENTRIES, SUPPORTED, Records
from train_fn.settings import SHOWN

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm", ".jp2", ".j2k", ".ppm",
                  ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".avif")  # fmt: skip
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an image folder of `datasets`
NO_DATA = ("dataset_info.json", "dataset_infos.json", "config.json", "README.json")  # notes about data
LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot


class DataFile(NamedTuple):
    """A data file in a folder."""

    path: Path
    below: str
    """Folder that its image paths start from, within the whole; "": the whole."""
    split: str
    """The part that its name, or its folder's, names; "": none."""


def data_files(folder: Path) -> tuple[list[DataFile], list[str], str]:
    """The data files in a folder, in its `data/`, or in its folders of parts; the first of these that has any.

    Returns:
        The files; every problem; and a fact that the user should know, or "". Raises OSError.
    """
    inside = visible(folder)
    note = ""
    if files := [DataFile(path, "", "") for path in data_in(inside)]:
        others = [path.name for path in inside if path.name.casefold() not in ("data", *PARTS) and path.is_dir()]
        if len(others) > 1:
            note = (
                f"Reading {files[0].path.name} of {folder}; without it, {others[0]}/ and {others[1]}/ could be classes"
            )
    elif (data := folder / "data").is_dir():
        files = [DataFile(path, "", "") for path in data_in(visible(data))]
    if not files:
        parts = [path for path in inside if path.name.casefold() in PARTS and path.is_dir()]
        by_part = {path.name: data_in(visible(path)) for path in parts}
        files = [DataFile(path, name, name) for name, paths in by_part.items() for path in paths]
        if files and (without := [name for name, paths in by_part.items() if not paths]):
            return [], [
                f"manifest {folder} must have a data file in each of its parts, but {without[0]}/ has none: add it"
            ], ""  # fmt: skip
    if len(kinds := {file.path.suffix.lower(): file.path.name for file in files}) > 1:
        return [], [
            f"manifest {folder} must have data files of one kind, but has {' and '.join(sorted(kinds.values())[:2])}: "
            f"give one as --data"
        ], ""  # fmt: skip
    if len(files) > 1 and not files[0].below:
        files = [DataFile(file.path, "", part_in_name(file.path.name)) for file in files]
        if len({bool(file.split) for file in files}) > 1:
            one, other = (next(f.path.name for f in files if bool(f.split) is named) for named in (True, False))
            return [], [
                f"manifest {folder} must have data files that all name their part (train, val, test), or none, but has "
                f"{one} and {other}: give one as --data"
            ], ""  # fmt: skip
    return files, [], note


def data_in(paths: list[Path]) -> list[Path]:
    """The data files among files: the metadata of an image folder, or else all."""
    if metadata := [path for path in paths if path.name in METADATA and path.is_file()]:
        return metadata[:1]
    return [p for p in paths if p.suffix.lower() in DATA_SUFFIXES and p.name not in NO_DATA and p.is_file()]


def part_in_name(name: str) -> str:
    """The part that a file's name names, as in train-00000-of-00003.parquet; "" if none or several."""
    found = {PARTS[word] for word in re.split(r"[^a-z]+", name.casefold()) if word in PARTS}
    return found.pop() if len(found) == 1 else ""


def read_class_folders(folder: Path) -> tuple[Records, list[str]]:
    """A record for each image (image, answer, and split where there are parts), and every problem."""
    try:
        inside = visible(folder)
        folders = [path for path in inside if path.is_dir()]
        if not folders:
            return [], [what_is_missing(folder, inside)]
        parts = [path for path in folders if path.name.casefold() in PARTS]
        classes = {its.name for path in parts or [folder] for its in visible(path) if its.is_dir()}
        if len(classes) == 1:
            return [], [
                f"manifest {folder} must hold a folder for each of two or more classes, but has {classes.pop()}/ only: "
                f"add the others, or write the answers into {folder / 'metadata.csv'} with the header "
                f"file_name,question,answer"
            ]
        if not parts:
            return read_classes(folder, folder, "")
        if len(parts) < len(folders):
            other = next(path.name for path in folders if path not in parts)
            return [], [
                f"manifest {folder} must hold folders of classes, or of parts (train, val, test) only, but has "
                f"{parts[0].name}/ and {other}/: move one"
            ]
        records: Records = []
        problems: list[str] = []
        for path in parts:
            found, its = read_classes(folder, path, path.name)
            records += found
            problems += its
        return records, problems
    except OSError as error:
        return [], [f"manifest {folder} must be a folder that can be read, but {error.filename}: {error.strerror}"]


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, by name, but for those that systems leave there."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in LEFT_BY_SYSTEMS)


def is_image(path: Path) -> bool:
    """Whether a file has an image's suffix, or is DICOM, whose files often have none."""
    try:
        return path.suffix.lower() in IMAGE_SUFFIXES or (path.is_file() and is_dicom(str(path)))
    except OSError:
        return False


def read_classes(top: Path, folder: Path, split: str) -> tuple[Records, list[str]]:
    """The records of the class folders in a folder. `top` is the folder that messages name paths from."""
    records: Records = []
    problems = []
    inside = visible(folder)
    if loose := [path for path in inside if path.is_file() and is_image(path)]:
        problems.append(
            f"manifest {folder} must hold its images in folders of classes, but {SHOWN.repr(loose[0].name)}"
            f"{f' (and {len(loose) - 1:,} more)' if loose[1:] else ''} lies beside them: move it"
        )
    classes = [path for path in inside if path.is_dir()]
    if not classes:
        problems.append(f"manifest {folder} must hold a folder for each class, but has none: add them")
    for path in classes:
        files: list[Path] = []
        for where, names, here in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            if len(files) > MAX_ENTRIES:
                problem = f"manifest {top} must have at most {MAX_ENTRIES:,} images, but has more: use a part of it"
                return [], [problem]
            files += [Path(where) / n for n in sorted(here) if not n.startswith(".") and n not in LEFT_BY_SYSTEMS]
            if wrong := [name for name in names if name.casefold() in PARTS]:
                problems.append(
                    f"manifest {top} must have parts above the classes, but has {wrong[0]}/ in {path.name}/: move it"
                )
        images = [file for file in files if is_image(file)]
        problems += class_problems(path.relative_to(top), files, images)
        records += [
            (str(image.relative_to(top)), {"image": image, "answer": path.name} | ({"split": split} if split else {}))
            for image in images
        ]
    return records, problems


def class_problems(name: Path, files: list[Path], images: list[Path]) -> list[str]:
    """What a folder of a class holds beside images of this class."""
    problems = []
    if not images:
        problems.append(
            f"class folder {name}/ must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none: take it out"
        )
    if other := Counter(file.suffix or file.name for file in sorted(set(files) - set(images))):
        listed = ", ".join(f"{count}x {suffix}" for suffix, count in other.most_common(5))
        problems.append(f"class folder {name}/ must hold images only, but has {listed}: convert them or take them out")
    whole = {(image.parent, image.stem) for image in images}
    masks = [
        image.name for image in images
        if (match := re.fullmatch(r"(.+)_mask(_\d+)?", image.stem)) and (image.parent, match[1]) in whole
    ]  # fmt: skip
    if masks:
        problems.append(
            f"class folder {name}/ must hold no masks, but has {SHOWN.repr(masks[0])} ({len(masks):,} masks): take "
            f"them out, or make a manifest with `python -m train_fn.inspect --busi`"
        )
    return problems


def what_is_missing(folder: Path, inside: list[Path]) -> str:
    """The problem of a folder without folders."""
    fix = (
        f"move the images into a folder for each class, or list them in {folder / 'metadata.csv'} with the header "
        f"file_name,question,answer"
    )
    counts = Counter(path.suffix or path.name for path in inside).most_common(3)
    holds = ", ".join(f"{count:,}x {suffix}" for suffix, count in counts) or "nothing"
    return f"manifest {folder} must be an existing file or folder of data ({SUPPORTED}), but holds {holds}: {fix}"
