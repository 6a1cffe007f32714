"""Bounds of the spectral norm."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_lower_bound(x: Tensor) -> Tensor:
    """A lower bound of the spectral norm of symmetric matrices: one power step from the longest column.

        c = x e_j / max|x|;  v = x c;  |x v| / |v|

    Exact for rank one. Measured on A A^T + B B^T of normal 256 x 512 matrices: 0.80 to 0.82 of the norm.

    Args:
        x: `[..., n, n]`, symmetric.

    Returns:
        `[..., 1, 1]`.
    """
    tiny = torch.finfo(x.dtype).tiny
    top = x.abs().amax((-2, -1), keepdim=True)
    x = x / top.clamp(min=tiny)
    longest = x.square().sum(-2, keepdim=True).argmax(-1, keepdim=True)
    column = x @ x.gather(-1, longest.expand(*x.shape[:-1], 1))
    length = torch.linalg.vector_norm(column, dim=(-2, -1), keepdim=True).clamp(min=tiny)
    return top * torch.linalg.vector_norm(x @ (column / length), dim=(-2, -1), keepdim=True)
