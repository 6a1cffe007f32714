"""How far two subspaces, or a basis and the matrix it should diagonalise, have drifted apart."""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(u: Tensor, v: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of orthonormal columns.

    Args:
        u: `[..., n, r]`.
        v: `[..., n, r]`.

    Returns:
        `[..., r]`, largest first.
    """
    return torch.linalg.svdvals(u.mT @ v).clamp(max=1.0)


def overlap(u: Tensor, v: Tensor) -> Tensor:
    """|U^T V|_F^2 / r: the mean squared cosine.

    Returns:
        `[...]`, 1 for equal spans, about r / n for unrelated ones.
    """
    return (u.mT @ v).square().sum((-2, -1)) / u.shape[-1]


def adjusted_overlap(u: Tensor, v: Tensor) -> Tensor:
    """The overlap, moved and scaled so that unrelated subspaces are at 0 and equal ones at 1.

    Returns:
        `[...]`; 1 where the columns span the whole space.
    """
    n, r = u.shape[-2:]
    return (overlap(u, v) - r / n) / (1 - r / n) if r < n else torch.ones_like(overlap(u, v))


def chordal(u: Tensor, v: Tensor) -> Tensor:
    """sqrt(r - |U^T V|_F^2) = |U U^T - V V^T|_F / sqrt(2).

    Returns:
        `[...]`.
    """
    r = u.shape[-1]
    return (r - r * overlap(u, v)).clamp(min=0.0).sqrt()


def column_cosines(u: Tensor, v: Tensor) -> Tensor:
    """|u_i^T v_i|, column by column; at near-equal eigenvalues they pair wrongly, so read them beside the overlap.

    Returns:
        `[..., r]`.
    """
    return (u * v).sum(-2).abs()


def captured(basis: Tensor, a: Tensor) -> Tensor:
    """|P^T A|_F^2 / |A|_F^2 for orthonormal columns P: the energy that a projection keeps.

    Args:
        basis: `[..., m, r]`.
        a: `[..., m, n]`.

    Returns:
        `[...]`, in [0, 1]; NaN for a zero matrix.
    """
    return (basis.mT @ a).square().sum((-2, -1)) / a.square().sum((-2, -1))


def off_diagonal(matrix: Tensor, basis: Tensor) -> Tensor:
    """Staleness of an eigenbasis: |B - diag B|_F / |B|_F with B = Q^T L Q (arXiv:2506.03595).

    `ops.eigenbasis.off_diagonal` estimates it from a few columns.

    Args:
        matrix: L, `[..., n, n]`, symmetric.
        basis: Q, `[..., n, n]`, orthogonal.

    Returns:
        `[...]`, in [0, 1].
    """
    rotated = basis.mT @ matrix @ basis
    inner = torch.diagonal(rotated, dim1=-2, dim2=-1).square().sum(-1)
    whole = rotated.square().sum((-2, -1))
    return ((whole - inner).clamp(min=0.0) / whole).sqrt()
