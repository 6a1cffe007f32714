"""Second moments of matrices kept as row and column means, as in Adafactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from lightning_optim.ops.row_chunks import RUN, column_sums, squares, sum_over_row_chunks


def mean(x: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, as a sum: a shard's mean is no share of the whole one's where shards are uneven.

    Args:
        x: any tensor, or a DTensor, which is not gathered for it.
        dim: the dimension, kept with size 1.

    Returns:
        The means.
    """
    return x.sum(dim=dim, keepdim=True) / x.shape[dim]


def update_means_(
    row: Tensor, column: Tensor, x: Callable[..., Tensor], weight: float, eps: float = 0.0, *, of: tuple[Tensor, ...]
) -> None:
    """Move row and column means towards those of a matrix's squares, in one pass.

    Means over columns by `vector_norm(dim=-2)` would need no squares, but take ten times as long on a CPU.

    Args:
        row: `[..., m, 1]`, written.
        column: `[..., 1, n]`, written.
        x: gives some rows of the matrix, a tensor that may be written, out of these rows of the tensors `of`.
        weight: of the new means.
        eps: added to them.
        of: `[..., m, n]`, or what `swept` takes.
    """
    if isinstance(weight, Tensor):  # a number of a graph
        weight = cast("float", weight.to(row.dtype))

    def sums(row: Tensor, *views: Tensor) -> tuple[Tensor]:
        product = x(*views)
        square = product.mul_(product) if all(product is not view for view in views) else product * product
        row.lerp_(mean(square, -1) + eps, weight)
        return (column_sums(square),)

    (total,) = sum_over_row_chunks(sums, row, *of)
    column.lerp_(total / row.shape[-2] + eps, weight)


def inverse_roots(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of one over the root of the second moment that has these means, V = row column / mean(row).

    Args:
        row: positive means of the rows, `[..., m, 1]`.
        column: positive means of the columns, `[..., 1, n]`.

    Returns:
        (left `[..., m, 1]`, right `[..., 1, n]`) with left right = 1 / sqrt(V).
    """
    least = torch.finfo(row.dtype).tiny  # a row without gradient beside large ones
    return (row / mean(row, -2)).clamp_(min=least).rsqrt_(), column.rsqrt()


def scaled(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A matrix with its rows and columns multiplied.

    Args:
        x: `[..., m, n]`.
        left: factors of the rows, `[..., m, 1]`.
        right: factors of the columns, `[..., 1, n]`.

    Returns:
        A new tensor.
    """
    return (x * left).mul_(right)


def over_root(x: Tensor, row: Tensor, column: Tensor, least: float, factor: Tensor | None = None) -> Tensor:
    """X / sqrt(max(row column, least)), times a factor.

    On a CPU, a run of rows of a large matrix in which no entry of V is that small is scaled by rows and columns, which
    is half the work.

    Args:
        x: `[..., m, n]`.
        row: `[..., m, 1]`.
        column: `[..., 1, n]`.
        least: the smallest second moment.
        factor: one per matrix, `[..., 1, 1]`.

    Returns:
        A new tensor.
    """
    plain = type(x) is Tensor and x.device.type == "cpu"
    alone = plain and x.shape[:-2].numel() == 1 and x.numel() >= RUN // 2
    if alone and bool(row.amin() * column.amin() > least):
        left = row.rsqrt()
        return scaled(x, left if factor is None else left * factor, column.rsqrt())
    out = (row * column).clamp_(min=least).rsqrt_().mul_(x)
    return out if factor is None else out.mul_(factor)


def clipping(x: Callable[..., Tensor], limit: float, *, of: tuple[Tensor, ...]) -> Tensor:
    """What every matrix is divided by so that its root mean square is at most a limit, in one pass.

    Args:
        x: gives some rows of the matrix out of these rows of the tensors `of`.
        limit: of the root mean square.
        of: `[..., m, n]`, or what `swept` takes; the first is of the shape of x.

    Returns:
        max(1, RMS(x) / limit), `[..., 1, 1]`.
    """
    (total,) = sum_over_row_chunks(lambda *views: (squares(x(*views)),), *of)
    m, n = of[0].shape[-2:]
    return (total.sqrt() / ((m * n) ** 0.5 * limit)).clamp_(min=1.0)
