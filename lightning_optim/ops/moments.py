"""First and second moments of gradients, their ratios, and compressed ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
    chosen = ("left" if m <= n else "right") if sides == "short" else sides
    return ("left", "right") if chosen == "both" else (chosen,)


def gram(x: Tensor, *, left: bool) -> Tensor:
    """X x^T or x^T x.

    Args:
        x: `[..., m, n]`.
        left: whether of the rows.

    Returns:
        `[..., m, m]` or `[..., n, n]`.
    """
    return x @ x.mT if left else x.mT @ x


def adam_moments(m: Tensor, v: Tensor, first: Tensor, second: Tensor, betas: tuple[float, float]) -> None:
    """Adam's averages, in place: m <- b1 m + (1 - b1) first;  v <- b2 v + (1 - b2) second^2.

    Args:
        m: first moment, written.
        v: second moment, written.
        first: gradient in the basis of m.
        second: gradient in the basis of v; the same one, where m and v share a basis.
        betas: (b1, b2).
    """
    m.lerp_(first, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(second, second, value=1 - betas[1])


def rank_one(a: Tensor, iterations: int = 5) -> tuple[Tensor, Tensor]:
    """Fit a non-negative matrix by an outer product q s^T (Gong et al. 2025, arXiv:2502.07752, Prop. 3).

        q = 1;  repeat:  s = A^T q / |q|^2;  q = A s / |s|^2

    This is a power iteration: q and s tend to the principal left and right singular vectors, and q s^T to that
    singular value times their outer product, at a rate of (sigma_2 / sigma_1)^2 per iteration.

    Args:
        a: `[..., m, n]`, non-negative.
        iterations: at least 1.

    Returns:
        (q `[..., m, 1]`, s `[..., 1, n]`), the scale of `a` in s; zeros for a zero matrix.
    """
    tiny = torch.finfo(a.dtype).tiny
    q = torch.ones_like(a[..., :1])
    s = a[..., :1, :]
    for _ in range(iterations):
        s = (q / (q * q).sum(-2, keepdim=True).clamp(min=tiny)).mT @ a
        top = s.amax(-1, keepdim=True).clamp(min=tiny)  # squares of small gradients' squares would underflow
        unit = s / top
        q = a @ (unit / (unit * unit).sum(-1, keepdim=True).clamp(min=tiny) / top).mT
    return q, s


def bias_corrections(betas: tuple[float, float], t: int) -> tuple[float, float]:
    """What a mean and a root of running means from zero are divided by after t steps.

    Returns:
        (1 - b1^t, sqrt(1 - b2^t)).
    """
    return 1 - betas[0] ** t, (1 - betas[1] ** t) ** 0.5


def adam_ratio(m: Tensor, v: Tensor, mean: float, root: float, eps: float) -> Tensor:
    """(m / mean) / (sqrt(v) / root + eps), with one temporary.

    Args:
        m: first moment.
        v: second moment, shaped like `m`.
        mean: correction of m.
        root: correction of sqrt(v).
        eps: added to the corrected root.

    Returns:
        The ratio.
    """
    d = v.sqrt().add_(eps * root)
    if mean != root:
        d.mul_(mean / root)
    return torch.div(m, d, out=d)
