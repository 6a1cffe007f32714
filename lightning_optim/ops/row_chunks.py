"""Passes over matrices in runs of rows that stay in a CPU's cache.

An operation on a whole matrix streams it through memory; several operations on a run of its rows stream it once. Where
that does not help (other devices, a DTensor) there is one run of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.ops.kernels.graphs import is_traced

RUN = 2**18
"""Elements of a run of rows of one matrix. Shorter ones lie in a cache nearer to the processor, but then Python's time
per operation counts: with 2^14 to 2^20 a step of `lamb` took 10.4, 7.3, 6.2, 5.3, 5.2, 5.6 and 6.0 steps of fused
AdamW (one thread, 1 MiB of L2)."""


def row_chunks(x: Tensor) -> list[slice]:
    """Runs of rows that together are every matrix of a stack.

    They depend on the size of the matrices only, so that a sum over runs is the same for a matrix in a stack and alone.

    Args:
        x: `[..., m, n]`.

    Returns:
        Slices of `m`; one of all rows where matrices are small or not on a CPU, and for a DTensor.
    """
    m, n = x.shape[-2:]
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter) or m * n <= RUN:
        return [slice(0, m)]
    step = max(1, RUN // n)
    return [slice(i, min(i + step, m)) for i in range(0, m, step)]


def take_rows(x: Tensor, run: slice) -> Tensor:
    """Some rows of every matrix.

    Args:
        x: `[..., m, n]`, or `[..., 1, n]`, which has the same row for all.
        run: of `runs`.

    Returns:
        A view, or `x` itself.
    """
    m = x.shape[-2]
    return x if m == 1 or (run.start == 0 and run.stop == m) else x[..., run, :]


def sum_over_row_chunks(step: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """Call a function on every run of rows and add up what it returns.

    Args:
        step: takes the same rows of every tensor, may write them, and returns sums over them.
        *tensors: `[..., m, n]` with equal m, or one row; the largest says how long the runs are.

    Returns:
        The sums of each.
    """
    first, *later = [step(*(take_rows(t, run) for t in tensors)) for run in row_chunks(max(tensors, key=Tensor.numel))]
    out = list(first)
    for sums in later:
        out = [a + b for a, b in zip(out, sums, strict=True)]
    return out


def squares(x: Tensor) -> Tensor:
    """The sum of the squares of every matrix, `[..., 1, 1]`."""
    if is_traced():  # row by row: to sum up a whole matrix exactly, Inductor calls a function per vector
        return (x * x).sum(-1, keepdim=True).sum(-2, keepdim=True)
    return vector_norm(x, dim=(-2, -1), keepdim=True).square()


def row_products(x: Tensor, v: Tensor) -> Tensor:
    """The product of every matrix with a vector.

    Args:
        x: `[..., m, n]`.
        v: `[..., n, 1]`.

    Returns:
        `[..., m, 1]`.
    """
    return (x * v.mT).sum(-1, keepdim=True) if is_traced() else x @ v


def column_sums(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of the rows of every matrix, each times a number.

    Args:
        x: `[..., m, n]`.
        weights: `[..., m, 1]`, of ones if not given.

    Returns:
        `[..., 1, n]`.
    """
    if weights is not None and not is_traced():
        return weights.mT @ x
    return (x if weights is None else x * weights).sum(dim=-2, keepdim=True)
