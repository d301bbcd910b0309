"""Progress over itself in one line on stderr."""

from __future__ import annotations

import sys

FEW = 20  # samples for which no progress is shown


def show_progress(num_answered: int, num_samples: int) -> None:
    """Write progress over itself on stderr, if that is a terminal and the answers go elsewhere."""
    if num_samples > FEW and sys.stderr.isatty() and not sys.stdout.isatty():
        print(f"\rAnswered {num_answered:,} of {num_samples:,}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    """Remove the line of `show_progress`."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
