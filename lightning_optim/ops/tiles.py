"""Matrices cut into tiles of one size."""

from __future__ import annotations

import torch
from torch import Tensor


def tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut matrices into tiles, row by row of tiles; tiles at the edges are filled up with zeros.

    Args:
        x: `[..., m, n]`.
        rows: of a tile.
        columns: of a tile.

    Returns:
        `[..., ceil(m / rows) * ceil(n / columns), rows, columns]`; a view where nothing is cut.
    """
    m, n = x.shape[-2:]
    if (m, n) == (rows, columns):
        return x.unsqueeze(-3)
    x = torch.nn.functional.pad(x, (0, -n % columns, 0, -m % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).transpose(-3, -2).flatten(-4, -3)


def joined(x: Tensor, m: int, n: int) -> Tensor:
    """Put tiles together again.

    Args:
        x: what `tiles` gave.
        m: rows of the matrices.
        n: columns.

    Returns:
        `[..., m, n]`.
    """
    across = -(-n // x.shape[-1])
    x = x.unflatten(-3, (-1, across)).transpose(-3, -2)
    return x.flatten(-2).flatten(-3, -2)[..., :m, :n]


def filled(m: int, n: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows and columns of each tile are only filled up.

    Returns:
        Two masks, `[tiles, rows]` and `[tiles, columns]`.
    """
    down, across = -(-m // rows), -(-n // columns)
    row = torch.arange(down * rows, device=device).view(down, 1, rows) >= m
    column = torch.arange(across * columns, device=device).view(1, across, columns) >= n
    return row.expand(down, across, rows).flatten(0, 1), column.expand(down, across, columns).flatten(0, 1)
