"""Text from outside (names, answers, errors), made safe to print and to write."""

from __future__ import annotations

import unicodedata
from typing import Any


def plain(text: Any, keep: str = "") -> str:
    """A text without characters that could control a terminal, forge a line or fail to be encoded.

    Args:
        text: a string, or a value that is converted to one.
        keep: unprintable characters that stay, such as a line end.

    Returns:
        The text, with every other unprintable character (control characters, ESC, NUL, lone surrogates, bidirectional
        marks) written as its escape sequence.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def plain_values(value: Any) -> Any:
    """A JSON value with every text in it made `plain`; line ends stay."""
    if isinstance(value, dict):
        return {plain(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return plain(value, keep="\n") if isinstance(value, str) else value


def shorten(problems: list[str], most: int = 20) -> list[str]:
    """The first problems, and the number of the others."""
    return problems if len(problems) <= most else [*problems[:most], f"... and {len(problems) - most} more like these"]


def plain_form(text: str) -> str:
    """A text without differences in case, spaces, Unicode form and invisible characters."""
    composed = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
