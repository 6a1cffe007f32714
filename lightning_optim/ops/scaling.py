"""Root mean squares and norms of matrices, and steps scaled by them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm


def norm(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix.

    Args:
        x: `[..., m, n]`.

    Returns:
        `[..., 1, 1]`.
    """
    return vector_norm(x, dim=(-2, -1), keepdim=True)


def rms(x: Tensor) -> Tensor:
    """The root mean square of each matrix.

    Args:
        x: `[..., m, n]`.

    Returns:
        `[..., 1, 1]`.
    """
    return norm(x) / (x.shape[-2] * x.shape[-1]) ** 0.5


def clip_rms_(x: Tensor, limit: float) -> Tensor:
    """Scale down every matrix whose root mean square exceeds a limit: x <- x / max(1, RMS(x) / limit).

    Args:
        x: `[..., m, n]`, written.
        limit: of the root mean square.

    Returns:
        `x`.
    """
    return x.div_((rms(x) / limit).clamp_(min=1.0))


def quotient(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """A / b where both are positive (and `where` is too), else 1: a layer's trust ratio.

    Args:
        a: norms of a weight.
        b: norms of its step.
        where: a third quantity that must not be zero.

    Returns:
        Finite ratios.
    """
    safe = (a > 0) & (b > 0) if where is None else (a > 0) & (b > 0) & (where > 0)
    return torch.where(safe, a / b, torch.ones_like(a))
