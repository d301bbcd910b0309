"""Conversations: LLaVA's `conversations` with from and value, and `messages` with role and content (ms-swift,
LLaMA-Factory, OpenAI), whose content may be text or a list of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_fn.data.rows import PLACEHOLDER, BadRecord, Row, image_paths, part, refuse_other_media, without_placeholders
from train_fn.settings import SHOWN

KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
OTHER = {"conversations": KEYS["messages"], "messages": KEYS["conversations"]}
ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip


def conversation_row(source: str, record: Mapping[str, Any], key: str, names: Mapping[str, str]) -> Row:
    """The row of a record with a conversation.

    Args:
        key: the column of the conversation, one of KEYS.
        names: the columns of image and split, from `rows.resolve`.

    Raises:
        BadRecord: the conversation is malformed, or its placeholders do not match its images.
    """
    refuse_other_media(record)
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    named = record.get(names["image"]) if "image" in names else None
    paths = list(named) if isinstance(named, list) else [named]
    order = []
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f" must have a list as {key}, but has {SHOWN.repr(turns)}: correct it or take the entry out")
    for turn in turns:
        # LLaMA-Factory and others also write messages with from and value, or conversations with role and content.
        own = isinstance(turn, dict) and KEYS[key][0] in turn
        role, text = read_turn(turn, KEYS[key] if own else OTHER[key], paths)
        said[role].append(text)
        order.append(role)
    if isinstance(system := record.get("system"), str):
        said["system"].append(system)
    speakers = [role for role in order if role != "system"]
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(speakers)):
        raise BadRecord(
            f" must have question and answer in turn, but has {', '.join(speakers)[:99]}: correct the order"
        )
    images = image_paths(paths)
    placeholders = sum(text.count(PLACEHOLDER) for texts in said.values() for text in texts)
    question, answer = said["user"][0] if said["user"] else "", said["assistant"][0] if said["assistant"] else ""
    if len(images) < 2 and len(said["user"]) < 2:  # others are refused as a whole, with their own sentence
        # LLaVA itself moves an image from the end of the question to its beginning.
        question = without_placeholders(question, placeholders, len(images), at_end=key == "conversations")
    elif placeholders != len(images):
        without_placeholders("", placeholders, len(images))
    split = part(record.get(names["split"])) if "split" in names else ""
    system = "\n".join(filter(None, map(str.strip, said["system"])))
    return Row(images, question, answer, None, split, source, system, max(map(len, (said["user"], said["assistant"]))))


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
