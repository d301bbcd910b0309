"""Folders of images by class: the name of the folder is the answer. `train/`, `val/` and `test/` may lie above."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from train_fn.data.dicom import is_dicom
from train_fn.data.rows import PARTS
from train_fn.data.tables import AS_CSV, MAX_ENTRIES, SUPPORTED, Records
from train_fn.settings import SHOWN

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm", ".jp2", ".j2k", ".ppm",
                  ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".avif")  # fmt: skip
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot


def read_class_folders(folder: Path) -> tuple[Records, list[str]]:
    """A record for each image (image, answer, and split where there are parts), and every problem."""
    try:
        inside = visible(folder)
        folders = [path for path in inside if path.is_dir()]
        if not folders:
            return [], [what_is_missing(folder, inside)]
        parts = [path for path in folders if path.name.casefold() in PARTS]
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
    data = [path.name for path in inside if path.suffix.lower() in DATA_SUFFIXES]
    fix = f"give {folder / data[0]}" if data else f"move the images into a folder for each class, or {AS_CSV}"
    counts = Counter(path.suffix or path.name for path in inside).most_common(3)
    holds = ", ".join(f"{count:,}x {suffix}" for suffix, count in counts) or "nothing"
    return f"manifest {folder} must be an existing file or folder of data ({SUPPORTED}), but holds {holds}: {fix}"
