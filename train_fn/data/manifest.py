"""Manifests: their entries, their faults, and the set of answers.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question reach the model. The path does not: in BUSI it contains
the class.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train_fn.data.images import MAX_PIXELS, image_problems
from train_fn.settings import SHOWN

FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
MAX_CANDIDATES = 20  # more different answers are no closed set: such data is tuned on the loss
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which tokenizers reject
MAX_ENTRIES = 1_000_000  # near-copies are searched among all pairs of images


def read_manifest(path: Path, image_root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a manifest.

    Image files must exist, but are not decoded; `image_problems` does that.

    Returns:
        The entries without faults, with absolute image paths; and every problem, at most 20 of them in full.
    """
    if not os.path.isfile(path):  # reading a pipe or a device could go on for ever
        return [], [f"manifest {path} must be an existing file: check the path"]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a mark at the beginning
    except OSError as error:
        return [], [f"manifest {path} must be a readable file: {error.strerror}; check the path"]
    except UnicodeDecodeError as error:
        return [], [f"manifest {path} must be UTF-8 text, but byte {error.start} is not: save it as UTF-8"]
    except (ValueError, RecursionError) as error:
        return [], [f"manifest {path} must be JSON: {error}; correct it there"]
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else f"a {type(content).__name__}"
        return [], [f"manifest {path} must be a JSON list of at least one entry, but holds {kind}"]
    if len(content) > MAX_ENTRIES:
        return [], [
            f"manifest {path} must have at most {MAX_ENTRIES:,} entries, but has {len(content):,}: use a part of it"
        ]
    if not os.path.isdir(image_root):
        return [], [f"image root {image_root} must be a folder: give the folder that the manifest's paths start from"]
    root = image_root.resolve()
    entries, problems = [], []
    for number, entry in enumerate(content):
        found = [f"{path.name} entry {number}{text}" for text in entry_problems(entry, root)]
        problems += found
        if not found:
            entries.append({**entry, "image": os.path.realpath(root / entry["image"])})
    return entries, shorten(problems)


def entry_problems(entry: Any, root: Path) -> Iterator[str]:
    """Every problem of one entry of a manifest, as the end of a sentence that begins with its name."""
    rule = f" must be an object with {', '.join(FIELDS)}, but"
    if not isinstance(entry, dict):
        yield f"{rule} is {SHOWN.repr(entry)}"
        return
    if missing := FIELDS.keys() - entry.keys():
        yield f"{rule} lacks {', '.join(sorted(missing))}"
    present = {key: entry[key] for key in FIELDS if key in entry}
    wrong = {
        key: value
        for key, value in present.items()
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or not str(value).strip()
    }
    if wrong:
        values = ", ".join(f"{key}={SHOWN.repr(value)}" for key, value in wrong.items())
        yield f" must hold non-empty text (label: a number or text), but got {values}"
    for key in present.keys() & {"text", "answer", "label"} - wrong.keys():
        if unprintable := UNPRINTABLE.search(str(present[key])):
            yield (
                f" must hold Unicode text, but {key}={SHOWN.repr(present[key])} has the character "
                f"{unprintable[0]!a}: take it out"
            )
    if "image" in present and "image" not in wrong:
        file, shown = root / present["image"], SHOWN.repr(present["image"])
        if not os.path.isfile(file):  # False also for names that no file can have
            yield f": image {shown} must be an existing file under the image root {root}: check path and root"
        elif not Path(os.path.realpath(file)).is_relative_to(root):  # links are followed: none may lead out of the root
            yield f": image must lie under the image root, but got {shown}: move it there"


def shorten(problems: list[str], most: int = 20) -> list[str]:
    """The first problems, and the number of the others."""
    return problems if len(problems) <= most else [*problems[:most], f"... and {len(problems) - most} more like these"]


def unreadable_images(
    paths: Iterable[str], max_pixels: int = MAX_PIXELS, log: Callable[[str], None] = lambda text: None
) -> list[str]:
    """The `image_problems`, shortened. `log` is called with lines of progress."""
    return shorten(list(image_problems(paths, max_pixels, log).values()))


def plain_form(text: str) -> str:
    """A text without differences in case, spaces, Unicode form and invisible characters."""
    composed = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def answer_set(entries: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """The candidate answers in the order of their labels, and every contradiction between answers and labels.

    Answers form a closed set if there are at most 20 and each occurs at least three times on average. Otherwise there
    are no candidates, and the data is tuned on the loss. In a closed set, answers that differ only in case, spaces or
    Unicode form are a problem: they would count as different classes.
    """
    answers = Counter(entry["answer"] for entry in entries)
    variants: dict[str, list[str]] = {}
    for answer in answers:
        variants.setdefault(plain_form(answer), []).append(answer)
    if len(variants) > MAX_CANDIDATES or len(variants) * 3 > len(entries) or len(answers) < 2:
        return (), []
    if mixed := [same for same in variants.values() if len(same) > 1]:
        return (), shorten([
            "answers that differ in case, spaces or Unicode form only must be written alike, but got "
            + ", ".join(f"{SHOWN.repr(answer)} ({answers[answer]}x)" for answer in same)
            + ": make them equal"
            for same in mixed
        ])  # fmt: skip
    pairs = Counter((entry["label"], entry["answer"]) for entry in entries)
    problems = []
    for side, other in ((0, 1), (1, 0)):
        partners: dict[Any, list[tuple[Any, int]]] = {}
        for pair, count in pairs.items():
            partners.setdefault(pair[side], []).append((pair[other], count))
        name, its = (("label", "answers"), ("answer", "labels"))[side]
        problems += [
            f"each {name} must go with one of the {its}, but {name} {SHOWN.repr(value)} goes with "
            + " and ".join(
                f"{SHOWN.repr(partner)} ({count}x)" for partner, count in sorted(counts, key=lambda pair: -pair[1])
            )
            + ": correct the rarer one"
            for value, counts in partners.items()
            if len(counts) > 1
        ]
    order = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    return tuple(dict.fromkeys(answer for _, answer in order)), shorten(problems)
