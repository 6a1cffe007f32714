"""Norms of matrices, and what bounds their growth from step to step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every matrix.

    Args:
        x: `[..., m, n]`.

    Returns:
        `[..., 1, 1]`.
    """
    return vector_norm(x, dim=(-2, -1), keepdim=True)


def rms(x: Tensor) -> Tensor:
    """Root mean square of every matrix.

    Args:
        x: `[..., m, n]`.

    Returns:
        `[..., 1, 1]`.
    """
    return norm(x) / (x.shape[-2] * x.shape[-1]) ** 0.5


def normalized(x: Tensor, target: float | Tensor = 1.0) -> Tensor:
    """Every matrix scaled to a given root mean square; zero stays zero.

    Args:
        x: `[..., m, n]`.
        target: the root mean square, or one per matrix `[..., 1, 1]`.

    Returns:
        Shaped like `x`.
    """
    size = rms(x)
    return x * (target / size.clamp(min=torch.finfo(size.dtype).tiny))


def growth_factor(size: Tensor, last: Tensor, limit: float) -> Tensor:
    """Factor that keeps a norm from growing by more than `limit` from one step to the next (Chen et al. 2024, Fira).

        factor = min(1, limit last / size), or 1 where last is 0

    Only growth is limited. The caller stores `factor * size` as the next `last`; after a zero gradient it is 0 and
    nothing is limited, where Fira's and Alice's formulae would divide by zero or by their eps.

    Args:
        size: the present norm, `[..., 1, 1]`.
        last: the norm after limiting at the previous step, 0 before the first.
        limit: largest ratio, 1.01 in the publications.

    Returns:
        Shaped like `size`, in (0, 1].
    """
    tiny = torch.finfo(size.dtype).tiny
    return torch.where(last > 0, (limit * last / size.clamp(min=tiny)).clamp(max=1.0), 1.0)


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
