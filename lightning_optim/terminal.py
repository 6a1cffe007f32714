"""Tables: by `rich` on a terminal, where it is installed, and as plain lines for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def print_table(
    rows: Sequence[Sequence[str]], heading: Sequence[str] = (), indent: int = 0, *, heading_when_piped: bool = False
) -> None:
    """Print a table.

    Args:
        rows: cells, as many in every row.
        heading: of the columns.
        indent: spaces before a plain line.
        heading_when_piped: whether plain lines begin with the heading; else they are rows and nothing else.
    """
    if not rows:
        return
    if sys.stdout.isatty() and find_spec("rich"):
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*heading, show_header=bool(heading), box=box.SIMPLE)
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    rows = [heading, *rows] if heading_when_piped else rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(" " * indent + "  ".join([*cells, row[-1]]).rstrip())
