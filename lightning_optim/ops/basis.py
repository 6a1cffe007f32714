"""Matrices in another basis: of their rows, their columns or both, whole or only the leading part of it."""

from __future__ import annotations

from torch import Tensor


def project(x: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """Coordinates of matrices in a basis: left^T x right.

    Args:
        x: `[..., m, n]`.
        left: orthonormal columns `[..., m, k]`; None for no change of rows.
        right: orthonormal columns `[..., n, l]`; None for no change of columns.

    Returns:
        `[..., k, l]`.
    """
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def restore(x: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """Matrices out of their coordinates: left x right^T; undoes `project` for square bases.

    Args:
        x: `[..., k, l]`.
        left: as in `project`.
        right: as in `project`.

    Returns:
        `[..., m, n]`.
    """
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT


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
