"""Tables: by `rich` on a terminal, where it is installed, and as plain lines for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def print_table(rows: Sequence[Sequence[str]], heading: Sequence[str] = (), indent: int = 0) -> None:
    """Print a table.

    Args:
        rows: cells, as many in every row.
        heading: of the columns, on a terminal only: piped lines are rows and nothing else.
        indent: spaces before a plain line.
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(" " * indent + "  ".join([*cells, row[-1]]).rstrip())
