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


def off_diagonal_sampled(
    matrix: Tensor, basis: Tensor, generator: torch.Generator, *, top: int = 32, count: int = 32
) -> Tensor:
    """`off_diagonal` from a few columns: the `top` first ones, where the energy is, and `count` random others.

    The squared off-diagonal part of column j is |L q_j|^2 - (q_j^T L q_j)^2. With n = 512 and 32 + 32 columns the
    relative error is 4 to 8 % at 7 to 8 % of the cost.

    Args:
        matrix: L, `[n, n]`, symmetric.
        basis: Q, `[n, n]`, eigenvectors by falling eigenvalue.
        generator: of the choice of columns, on the CPU.
        top: columns taken for certain.
        count: columns taken at random.

    Returns:
        A scalar; exact when `top + count` reach n.
    """
    n = matrix.shape[-1]
    top = min(top, n)
    count = min(count, n - top)
    others = torch.randperm(n - top, generator=generator)[:count] + top
    chosen = torch.cat([torch.arange(top), others]).to(basis.device)
    q = basis[:, chosen]
    power = matrix @ q
    off = (power.square().sum(0) - (q * power).sum(0).square()).clamp(min=0.0)
    total = off[:top].sum() + (off[top:].mean() * (n - top) if count else 0.0)
    return (total / matrix.square().sum()).sqrt().clamp(max=1.0)
