"""Tables in a terminal of any width. Columns become narrower between words, and rows become blocks where even that does
not suffice: no word is broken."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from train_fn.support.text import plain

if TYPE_CHECKING:
    from rich.console import Console

HELD = "\N{NO-BREAK SPACE}"
"""A space in a cell at which no line ends."""
WORDS = re.compile(r"[^ ]+ *| +")
NAMES = re.compile(r"[^ _]*_+ *|[^ _]+ *| +")  # a long name may also be divided after an underscore


def new_console(width: int) -> Console:
    """A console for texts of the user's: no markup. width: without a terminal, and if COLUMNS is not set."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = width
    return console


def wrap(text: str, width: int, atoms: re.Pattern[str] = WORDS) -> str:
    """A text in lines of at most `width` characters, except where one atom is longer."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for atom in atoms.findall(line):
            if current and cells(current + atom) > width:
                lines.append(current.rstrip(" "))
                current = ""
            current += atom
        lines.append(current.rstrip(" "))
    return "\n".join(lines)


def cells(text: str) -> int:
    """How many columns of a terminal a line takes, spaces at its end left out. Some characters take two."""
    from rich.cells import cell_len

    return cell_len(text.rstrip(" "))


def widths_within(width: int, least: Sequence[int], natural: Sequence[int]) -> list[int] | None:
    """The widths of the columns of a table of at most `width`; None if even the least ones are too wide."""
    left = width - (3 * len(least) + 1) - sum(least)  # each column has a border and two spaces
    if left < 0:
        return None
    widths = list(least)
    # The first column holds names; of the others, one that has its whole width is worth more than two that lack some.
    for column in (0, *sorted(range(1, len(least)), key=lambda n: natural[n] - least[n])):
        more = min(left, natural[column] - least[column])
        widths[column] += more
        left -= more
    return widths


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    narrow: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None,
    justify: Literal["left", "right"] = "left",
    width: int = 160,
) -> None:
    """Print a table that has rows, without characters that control the terminal.

    Args:
        title: a line above it; "": none.
        columns: their heads. Heads, and the cells of the first column, may be divided after underscores.
        rows: their cells. A line end starts a new line, `HELD` stands for a space at which none ends.
        narrow: columns and rows to show instead where the table does not fit.
        justify: of the table's columns, not of the narrow one's.
        width: as for `new_console`.
    """
    from rich.table import Table

    if not rows:
        return
    console = new_console(width)
    if title:
        print(wrap(plain(title), console.width))
    grid = [[plain(cell, keep="\n" + HELD) for cell in row] for row in (columns, *rows)]
    atoms = [
        [NAMES if line == 0 or column == 0 else WORDS for column in range(len(columns))] for line in range(len(grid))
    ]
    least, natural = [0] * len(columns), [0] * len(columns)
    for row, patterns in zip(grid, atoms, strict=True):
        for column, (text, pattern) in enumerate(zip(row, patterns, strict=True)):
            for line in text.split("\n"):
                natural[column] = max(natural[column], cells(line))
                least[column] = max([least[column], *map(cells, pattern.findall(line))])
    widths = widths_within(console.width, least, natural)
    if widths is None and narrow:
        print_table("", *narrow, width=width)
    elif widths is None:
        print_blocks(grid[0], grid[1:], console.width)
    else:
        head, *body = [
            [wrap(*each).replace(HELD, " ") for each in zip(row, widths, patterns, strict=True)]
            for row, patterns in zip(grid, atoms, strict=True)
        ]
        table = Table()
        for text in head:
            table.add_column(text, no_wrap=True, justify=justify)
        for row in body:
            table.add_row(*row)
        console.print(table)


def print_blocks(head: Sequence[str], body: Sequence[Sequence[str]], width: int) -> None:
    """Print each row as a block: its first cell, and below it the others, one a line."""
    name_width = max(map(cells, head[1:]), default=0)
    indent = " " * (name_width + 4)
    for row in body:
        print(f"{head[0]} {row[0]}".replace(HELD, " "))
        for name, text in zip(head[1:], row[1:], strict=True):
            lines = wrap(text, width - len(indent)).replace(HELD, " ").replace("\n", "\n" + indent)
            print(f"  {name}{' ' * (name_width - cells(name) + 2)}{lines}".rstrip())
