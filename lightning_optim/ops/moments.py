"""Compressed second moments."""

from __future__ import annotations

import torch
from torch import Tensor


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
