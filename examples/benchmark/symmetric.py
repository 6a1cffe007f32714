"""Symmetric matrix products in Triton: the tiles below the diagonal are computed, the others mirrored.

A candidate for the Newton-Schulz iterations, which `gpu.py` sets beside cuBLAS: X X^T and b A + c A A are symmetric, so
that half of their multiplications are enough. Not part of the package until a card has shown that it is faster.

    TRITON_INTERPRET=1 python examples/benchmark/gpu.py --device cpu --small --parts newton_schulz

compares it with float64 on a machine without a GPU, where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch's builds for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILES = ((128, 64, 3, 8), (128, 64, 4, 8), (128, 32, 4, 4), (64, 64, 4, 4))
"""(rows and columns of a tile, products summed up at a time, stages, warps). Chosen by the caller, not by a measurement
at run time: ranks, and a resumed run, have to take the same one."""


@triton.jit
def _half(
    x: Any,
    add: Any,
    out: Any,
    size: Any,
    length: Any,
    x_batch: Any,
    x_row: Any,
    x_column: Any,
    alpha: Any,
    beta: Any,
    ADDS: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of `alpha x x^T + beta add`, written at its place and, mirrored, above the diagonal."""
    k = tl.program_id(0)
    row = ((tl.sqrt(8.0 * k + 1.0) - 1.0) / 2.0).to(tl.int32)
    row -= (row * (row + 1) // 2 > k).to(tl.int32)  # the root is rounded
    row += ((row + 1) * (row + 2) // 2 <= k).to(tl.int32)
    column = k - row * (row + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    i = row * SIDE + tl.arange(0, SIDE)
    j = column * SIDE + tl.arange(0, SIDE)
    terms = tl.arange(0, DEPTH)
    left = x + batch * x_batch + i[:, None].to(tl.int64) * x_row + terms[None, :] * x_column
    right = x + batch * x_batch + j[None, :].to(tl.int64) * x_row + terms[:, None] * x_column
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        inside = terms < length - start
        a = tl.load(left, mask=(i < size)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=(j < size)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
        left += DEPTH * x_column
        right += DEPTH * x_column
    total *= alpha
    square = batch * size * size
    here = square + i[:, None].to(tl.int64) * size + j[None, :]
    within = (i < size)[:, None] & (j < size)[None, :]
    if ADDS:
        total += beta * tl.load(add + here, mask=within, other=0.0).to(tl.float32)
    value = total.to(out.dtype.element_ty)
    tl.store(out + here, value, mask=within)
    if row != column:
        mirrored = square + j[:, None].to(tl.int64) * size + i[None, :]
        tl.store(out + mirrored, tl.trans(value), mask=(j < size)[:, None] & (i < size)[None, :])


def gram(
    x: Tensor,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    tiles: tuple[int, int, int, int] = TILES[0],
) -> Tensor:
    """`alpha x x^T + beta add`, summed in float32 and rounded once.

    Args:
        x: `[b, s, l]`, of any strides.
        add: `[b, s, s]`, symmetric and contiguous.
        alpha: factor of the product.
        beta: factor of `add`.
        tiles: of `TILES`.

    Returns:
        `[b, s, s]`, in the dtype of `x`.
    """
    b, size, length = x.shape
    side, depth, stages, warps = tiles
    out, rows = x.new_empty(b, size, size), triton.cdiv(size, side)
    numbers = (size, length, *x.stride(), alpha, beta)
    launch: Any = _half
    launch[rows * (rows + 1) // 2, b](
        *(x, out if add is None else add, out, *numbers),
        ADDS=add is not None,
        SIDE=side,
        DEPTH=depth,
        num_stages=stages,
        num_warps=warps,
    )
    return out


def iterate(
    y: Tensor, steps: int, coefficients: tuple[float, float, float], tiles: tuple[int, int, int, int] = TILES[0]
) -> Tensor:
    """Newton-Schulz iterations as `lightning_optim.ops.orthogonal` has them, with symmetric products.

    Args:
        y: `[b, s, l]` with s <= l, of a norm of at most one.
        steps: iterations.
        coefficients: (a, b, c).
        tiles: of `TILES`.

    Returns:
        Shaped like `y`.
    """
    a, b, c = coefficients
    for _ in range(steps):
        square = gram(y, tiles=tiles)
        y = torch.baddbmm(y, gram(square, square, alpha=c, beta=b, tiles=tiles), y, beta=a)
    return y
