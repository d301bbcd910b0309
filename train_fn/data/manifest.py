"""Manifests, splits and batches.

A manifest is a JSON list of {"image", "text", "answer", "label"}: an image path under the image root, the question, the
answer to learn, and the class. Only the pixels and the question ever reach the model; the path never does (in BUSI
the class can be read off it).

Shapes: B images in a batch, S tokens of the longest sequence, P vision patches.
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

Say = Callable[[str], None]
FIELDS: dict[str, Any] = {"image": str, "text": str, "answer": str, "label": (int, str)}
MAX_CANDIDATES = 20  # more distinct answers than this are not a closed set: such data is tuned on the loss
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters, which no tokenizer takes
MAX_ENTRIES = 1_000_000  # near-copies are looked for in all pairs of images


def read_manifest(path: Path, image_root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The faultless entries of a manifest with absolute image paths, and every problem (at most 20 are spelled out).

    Images are looked up but not decoded: see `image_problems`.
    """
    if not os.path.isfile(path):  # a pipe or a device would be read for ever
        return [], [f"manifest {path} must be an existing file: check the path"]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin a file with a mark
    except OSError as error:
        return [], [f"manifest {path} must be a readable file: {error.strerror}; check the path"]
    except UnicodeDecodeError as error:
        return [], [f"manifest {path} must be UTF-8 text, but byte {error.start} is not: save it as UTF-8"]
    except (ValueError, RecursionError) as error:
        return [], [f"manifest {path} must be JSON: {error}; mend it at that place"]
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
    """Every problem of one entry of a manifest, to be put behind its name."""
    rule = f" must be an object with {', '.join(FIELDS)}, but"
    if not isinstance(entry, dict):
        yield f"{rule} is {SHOWN.repr(entry)}"
        return
    if missing := FIELDS.keys() - entry.keys():
        yield f"{rule} lacks {', '.join(sorted(missing))}"
    given = {key: entry[key] for key in FIELDS if key in entry}
    wrong = {
        key: value
        for key, value in given.items()
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or not str(value).strip()
    }
    if wrong:
        values = ", ".join(f"{key}={SHOWN.repr(value)}" for key, value in wrong.items())
        yield f" must hold non-empty text (label: a number or text), but got {values}"
    for key in given.keys() & {"text", "answer", "label"} - wrong.keys():
        if unprintable := UNPRINTABLE.search(str(given[key])):
            yield (
                f" must hold Unicode text, but {key}={SHOWN.repr(given[key])} has the character "
                f"{unprintable[0]!a}: take it out"
            )
    if "image" in given and "image" not in wrong:
        file, shown = root / given["image"], SHOWN.repr(given["image"])
        if not os.path.isfile(file):  # also says no to names that no file can have
            yield f": image {shown} must be an existing file under the image root {root}: check path and root"
        elif not Path(os.path.realpath(file)).is_relative_to(root):  # links are followed: none may lead out of the root
            yield f": image must lie under the image root, but got {shown}: move it there"


def shorten(problems: list[str], most: int = 20) -> list[str]:
    """The first problems and a count of the rest: a thousand lines of the same fault help nobody."""
    return problems if len(problems) <= most else [*problems[:most], f"... and {len(problems) - most} more like these"]


def unreadable_images(paths: Iterable[str], max_pixels: int = MAX_PIXELS, say: Say = lambda text: None) -> list[str]:
    """What `image_problems` finds, for people. `say` is given lines of progress."""
    return shorten(list(image_problems(paths, max_pixels, say).values()))


def plain_form(text: str) -> str:
    """A text without what two people write differently: case, spaces, Unicode form, invisible characters."""
    composed = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def answer_set(entries: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[str]]:
    """The candidate answers in the order of their labels, and every contradiction between answers and labels.

    Answers form a closed set when there are at most 20 and each is given at least three times on average; otherwise
    there are no candidates, and the data is tuned on the loss. Answers of a closed set that differ in case, spaces or
    Unicode form only would be classes of their own, and are refused.
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
                f"{SHOWN.repr(partner)} ({count}x)" for partner, count in sorted(found, key=lambda pair: -pair[1])
            )
            + ": mend the rarer one"
            for value, found in partners.items()
            if len(found) > 1
        ]
    order = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    return tuple(dict.fromkeys(answer for _, answer in order)), shorten(problems)
