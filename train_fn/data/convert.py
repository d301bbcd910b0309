"""Manifests of data in any format: the project's own JSON Lines, or the guide's JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_fn.data.manifest import divide, read_manifest
from train_fn.data.samples import Sample
from train_fn.data.stored_images import stored_images_folder


def write_manifest(
    manifest: Path,
    data: Path,
    image_root: Path | None = None,
    columns: Sequence[str] = (),
    question: str = "",
    multilabel: str = "",
) -> tuple[Path | None, list[str]]:
    """Read data of any format and write its samples.

    Image paths start from the manifest's folder if that holds all images, else from the folder that holds all images.
    Images from bytes are copied into a folder beside the manifest.

    Args:
        manifest: the new file: the guide's JSON if its name ends in .json, else JSON Lines. Keys beyond the guide's
            (id, group and so on) are written where a sample has them.
        data, image_root, columns, question, multilabel: as in `read_manifest`.

    Returns:
        The image root that goes with the manifest, None if that is its own folder; and every reason why there is none.
    """
    reading = read_manifest(data, image_root, columns, question, multilabel=multilabel)
    problems = reading.problems or divide({"data": reading.samples}, question)[1]
    if problems:
        return None, problems
    guides = manifest.suffix == ".json"
    with_labels = guides or any(sample.label != sample.answer for sample in reading.samples)
    folder, stored = manifest.parent.resolve(), stored_images_folder().resolve()
    copies = folder / f"{manifest.stem}_images"
    moved: dict[str, str] = {}
    try:
        with manifest.open("x", encoding="utf-8") as file:
            for image in dict.fromkeys(image for sample in reading.samples for image in sample.images):
                if Path(image).is_relative_to(stored):
                    copies.mkdir(exist_ok=True)
                    moved[image] = str(shutil.copyfile(image, copies / Path(image).name))
            images = {moved.get(image, image) for sample in reading.samples for image in sample.images}
            root = None
            if not all(Path(image).is_relative_to(folder) for image in images):
                root = Path(os.path.commonpath([Path(image).parent for image in images]))
            entries = []
            for sample in reading.samples:
                paths = [Path(moved.get(image, image)).relative_to(root or folder) for image in sample.images]
                entries.append(as_entry(sample, [path.as_posix() for path in paths], guides, with_labels))
            if guides:
                json.dump(entries, file, indent=2)
            else:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    except OSError as error:
        return None, [f"`--write` must name a new file, but got {manifest}: {error.strerror}; choose another"]
    return root, []


def as_entry(sample: Sample, images: list[str], guides: bool, with_label: bool) -> dict[str, Any]:
    """The entry of a sample, with those of its fields that are set.

    Args:
        images: the paths to write.
        guides: whether the question has the guide's name, text.
    """
    entry: dict[str, Any] = {
        "image": images[0] if len(images) == 1 else images,
        "text" if guides else "question": sample.question,
        "answer": sample.answer,
    }
    if with_label:
        entry["label"] = sample.label
    more = {name: getattr(sample, name) for name in ("system", "turns", "id", "question_type", "group", "split")}
    return entry | {name: value for name, value in more.items() if value}
