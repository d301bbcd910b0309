"""Conversations: LLaVA's `conversations` with from and value, and `messages` with role and content (ms-swift,
LLaMA-Factory, OpenAI), whose content may be text or a list of parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from train_fn.data.rows import (
    BadRecord,
    Row,
    check_placeholders,
    image_columns,
    image_paths,
    place_images,
    refuse_other_media,
    refuse_placeholders,
    texts_beside,
)
from train_fn.data.samples import PLACEHOLDER
from train_fn.settings import SHOWN

KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
OTHER = {"conversations": KEYS["messages"], "messages": KEYS["conversations"]}
ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip


def conversation_rows(source: str, record: Mapping[str, Any], key: str, names: Mapping[str, str]) -> list[Row]:
    """A row for each answer of a record with a conversation, with the turns before it.

    An answer with `"loss": false` (ms-swift) is context only, and so are answers before the first image.

    Args:
        key: the column of the conversation, one of KEYS.
        names: the columns of the image and of what stands beside the conversation, from `rows.resolve`.

    Raises:
        BadRecord: the conversation is malformed, or its placeholders do not match its images.
    """
    refuse_other_media(record)
    columns = image_columns(names)
    named = record.get(columns[0]) if len(columns) == 1 else [record.get(column) for column in columns]
    paths = list(named) if isinstance(named, list) else [named]
    written = record.get(key)
    if not isinstance(written, list) or not written:
        raise BadRecord(f" must have a list as {key}, but has {SHOWN.repr(written)}: correct it or take the entry out")
    system, speakers, texts, learned = [], [], [], []
    for turn in written:
        # LLaMA-Factory and others also write messages with from and value, or conversations with role and content.
        own = isinstance(turn, dict) and KEYS[key][0] in turn
        role, text = read_turn(turn, KEYS[key] if own else OTHER[key], paths)
        if role == "system":
            system.append(text)
            continue
        speakers.append(role)
        texts.append(text)
        learned.append(turn.get("loss") is None or turn["loss"] != 0)  # also of questions, where it means nothing
    beside = texts_beside(record, names)
    beside["system"] = "\n".join(filter(None, map(str.strip, [*system, beside.get("system", "")])))
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(speakers)):
        raise BadRecord(
            f" must have question and answer in turn, but has {', '.join(speakers)[:99]}: correct the order"
        )
    images = image_paths(paths)
    questions, answers = list(map(str.strip, texts[::2])), texts[1::2]
    total = sum(text.count(PLACEHOLDER) for text in (*questions, *answers, beside["system"]))
    if total:
        check_placeholders(total, len(images))
        refuse_placeholders(beside["system"], *answers)
    if answers and not any(learned[1::2]):
        raise BadRecord(' must have an answer to learn, but each has "loss": false: take the entry out')
    rows = []
    turns: list[tuple[str, str]] = []
    num_images = 0 if total else len(images)
    for number, (question, answer) in enumerate(itertools.zip_longest(questions or [""], answers, fillvalue="")):
        num_images += question.count(PLACEHOLDER)
        is_last = number == max(len(questions), 1) - 1
        if (num_images or is_last) and learned[2 * number + 1 : 2 * number + 2] != [False]:
            row = Row(images[:num_images], question, answer, None, source, tuple(turns), **beside)
            rows.append(place_images(row, at_end=key == "conversations"))
        turns.append((question, answer))
    if len(rows) < 2:
        return rows
    return [
        replace(row, source=f"{source} answer {len(row.turns) + 1}", id=row.id and f"{row.id}#{len(row.turns) + 1}")
        for row in rows
    ]


def read_turn(turn: Any, keys: tuple[str, str], paths: list[Any]) -> tuple[str, str]:
    """Role (system, user or assistant) and text of a turn. Images in its parts become placeholders.

    Args:
        keys: the names of role and content.
        paths: the images that are named within the parts are added to it.

    Raises:
        BadRecord: the turn is malformed.
    """
    role, content = (turn.get(keys[0]), turn.get(keys[1])) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(
            f" must have turns of {keys[0]} ({', '.join(ROLES)}) and {keys[1]}, but has {SHOWN.repr(turn)}: correct it"
        )
    if isinstance(content, str):
        return ROLES[role], content
    if not isinstance(content, list):
        raise BadRecord(f" must have text or parts as {keys[1]}, but has {SHOWN.repr(content)}: correct it")
    text = ""
    for piece in content:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "text" and isinstance(piece.get("text"), str):
            text += piece["text"]
        elif kind in ("image", "image_url"):
            text += PLACEHOLDER
            path = piece.get("image") or piece.get("image_url") or piece.get("path") or piece.get("url")
            if isinstance(path, dict) and "url" in path:  # OpenAI
                path = path["url"]
            if path:
                paths.append(path)
        else:
            raise BadRecord(f" must have parts of type text or image, but has {SHOWN.repr(piece)}: take it out")
    return ROLES[role], text
