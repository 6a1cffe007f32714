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


def norm_by_power(x: Tensor, iterations: int = 5) -> Tensor:
    """The spectral norm by power iterations on x^T x from equal entries, a lower bound.

        v = 1 / sqrt(n);  repeat:  u = x v / |x v|;  v = x^T u / |x^T u|;  |x v|

    Measured on normal matrices after five iterations: 0.89 to 1 of the norm at 20 x 30, 0.91 to 0.96 at 256 x 512.
    Almost nothing where the rows of x sum to zero.

    Args:
        x: `[..., m, n]`.
        iterations: products with x and x^T.

    Returns:
        `[..., 1, 1]`.
    """
    v = torch.full_like(x[..., :1, :], x.shape[-1] ** -0.5).mT
    for _ in range(iterations):
        u = torch.nn.functional.normalize(x @ v, dim=-2, eps=1e-10)
        v = torch.nn.functional.normalize(x.mT @ u, dim=-2, eps=1e-10)
    return torch.linalg.vector_norm(x @ v, dim=(-2, -1), keepdim=True)
