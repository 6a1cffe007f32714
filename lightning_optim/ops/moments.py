"""First and second moments of gradients, their ratios, and compressed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.row_chunks import column_sums, row_products, sum_over_row_chunks

Sides = Literal["both", "left", "right", "short"]


def gram_sides(m: int, n: int, sides: Sides = "both") -> tuple[str, ...]:
    """Which Gram matrices of an m x n matrix are kept.

    Args:
        m: rows.
        n: columns.
        sides: `"left"` that of the rows, `"right"` of the columns, `"short"` of the shorter side (of a square, the
            rows).

    Returns:
        `("left",)`, `("right",)` or both.
    """
    side = ("left" if m <= n else "right") if sides == "short" else sides
    return ("left", "right") if side == "both" else (side,)


def gram(x: Tensor, *, left: bool) -> Tensor:
    """X x^T or x^T x.

    Args:
        x: `[..., m, n]`.
        left: whether of the rows.

    Returns:
        `[..., m, m]` or `[..., n, n]`.
    """
    return product(x, x.mT) if left else product(x.mT, x)


def average_square_(v: Tensor, x: Tensor, beta: float) -> None:
    """V <- beta v + (1 - beta) x^2.

    Args:
        v: second moment, written.
        x: gradient in the basis of v.
        beta: of the mean.
    """
    v.mul_(beta).addcmul_(x, x, value=1 - beta)


BI_MAXWELL = ((0.85, 0.4385), (0.98, 0.5615))
"""A young and an old mean, of mean age 30; from step 1000 of 2635 on in modded-nanogpt, track 3, pull request 339."""


def k_maxwell() -> tuple[tuple[float, float, float], ...]:
    """Eight means whose mean age falls from 58 to 26 steps (modded-nanogpt, track 3, pull request 357).

        beta_k = tau_k / (tau_k + 1), tau_k = 3 (64 / 3)^(k / 7);  weights proportional to k + 1, but for the last

    Published between the steps 1000 and 3250.

    Returns:
        (beta, weight, last weight) of each, the youngest first.
    """
    taus = [3 * (64 / 3) ** (k / 7) for k in range(8)]
    starts, ends = ([w * (k + 1) for k in range(7)] for w in (0.005094, 0.0322618))
    pairs = zip([*starts, 1 - sum(starts)], [*ends, 1 - sum(ends)], strict=True)
    return tuple((tau / (tau + 1), *pair) for tau, pair in zip(taus, pairs, strict=True))


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum_k w_k x_k.

    Args:
        parts: tensors of one shape, at least one.
        weights: one each.

    Returns:
        A new tensor.
    """
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def rank_one(a: Tensor, iterations: int = 5, *, squared: bool = False) -> tuple[Tensor, Tensor]:
    """Fit a non-negative matrix by an outer product q s^T (Gong et al. 2025, arXiv:2502.07752, Prop. 3).

        q = 1;  repeat:  s = A^T q / |q|^2;  q = A s / |s|^2

    This is a power iteration: q and s tend to the principal left and right singular vectors, and q s^T to that
    singular value times their outer product, at a rate of (sigma_2 / sigma_1)^2 per iteration. One pass over A takes
    q of an iteration and A^T q of the next.

    Args:
        a: `[..., m, n]`, non-negative.
        iterations: at least 1.
        squared: fit the squares of `a`, which may be negative then.

    Returns:
        (q `[..., m, 1]`, s `[..., 1, n]`), the scale of `a` in s; zeros for a zero matrix.
    """
    tiny = torch.finfo(a.dtype).tiny

    def entries(x: Tensor) -> Tensor:
        return x * x if squared else x

    (s,) = sum_over_row_chunks(lambda x: (column_sums(entries(x)),), a)
    s, parts = s / a.shape[-2], []
    for last in [False] * (iterations - 1) + [True]:
        # squares of small gradients' squares would underflow; not the largest, which no columns on a rank have not
        top = s.sum(-1, keepdim=True).clamp(min=tiny)
        unit = s / top
        weights, parts = (unit / (unit * unit).sum(-1, keepdim=True).clamp(min=tiny)).mT, []

        def take(
            x: Tensor, weights: Tensor = weights, top: Tensor = top, parts: list[Tensor] = parts, last: bool = last
        ) -> list[Tensor]:
            x = entries(x)
            parts.append(row_products(x, weights) / top)  # 1 / top may be infinite
            return [] if last else [column_sums(x, parts[-1]), (parts[-1] * parts[-1]).sum(-2, keepdim=True)]

        if not last:
            product_, size = sum_over_row_chunks(take, a)
            s = product_ / size.clamp(min=tiny)
        else:
            sum_over_row_chunks(take, a)
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0], s


def adam_ratio(m: Tensor, v: Tensor, mean: float, root: float, eps: float, out: Tensor | None = None) -> Tensor:
    """(m / mean) / (sqrt(v) / root + eps), with one temporary.

    Args:
        m: first moment.
        v: second moment, shaped like `m`.
        mean: correction of m.
        root: correction of sqrt(v).
        eps: added to the corrected root.
        out: the temporary, shaped like `m`; made if not given.

    Returns:
        The ratio.
    """
    d = torch.sqrt(v, out=out).add_(eps * root)
    if mean is not root:  # not `!=`: in a graph they are tensors
        d.mul_(mean / root)
    return torch.div(m, d, out=d)
