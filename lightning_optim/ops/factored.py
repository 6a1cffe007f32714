"""Second moments of matrices kept as row and column means, as in Adafactor."""

from __future__ import annotations

import torch
from torch import Tensor


def mean(x: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, as a sum: a shard's mean is no share of the whole one's where shards are uneven.

    Args:
        x: any tensor, or a DTensor, which is not gathered for it.
        dim: the dimension, kept with size 1.

    Returns:
        The means.
    """
    return x.sum(dim=dim, keepdim=True) / x.shape[dim]


def update_means_(row: Tensor, column: Tensor, square: Tensor, weight: float, eps: float = 0.0) -> None:
    """Move row and column means towards those of a matrix of squares.

    Means over columns by `vector_norm(dim=-2)` would need no squares, but take ten times as long on a CPU.

    Args:
        row: `[..., m, 1]`, written.
        column: `[..., 1, n]`, written.
        square: `[..., m, n]`, at least zero.
        weight: of the new means.
        eps: added to them.
    """
    row.lerp_(mean(square, -1) + eps, weight)
    column.lerp_(mean(square, -2) + eps, weight)


def over_root(x: Tensor, row: Tensor, column: Tensor, out: Tensor) -> Tensor:
    """X over the root of the second moment that has these means, V = row column / mean(row).

    Args:
        x: `[..., m, n]`.
        row: positive means of the rows, `[..., m, 1]`.
        column: positive means of the columns, `[..., 1, n]`.
        out: takes the result, shaped like `x`.

    Returns:
        `out`.
    """
    torch.mul(x, (row / mean(row, -2)).rsqrt_(), out=out)
    return out.mul_(column.rsqrt())
