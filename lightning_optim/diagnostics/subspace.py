"""Distances between subspaces, and how much of a matrix a basis captures."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.ops.eigenbasis import mean_squared_cosine


def cosines(u: Tensor, v: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of orthonormal columns.

    Args:
        u: `[..., n, r]`.
        v: `[..., n, r]`.

    Returns:
        `[..., r]`, largest first.
    """
    return torch.linalg.svdvals(u.mT @ v).clamp(max=1.0)


def adjusted_overlap(u: Tensor, v: Tensor) -> Tensor:
    """The mean squared cosine, shifted and scaled so that unrelated subspaces are at 0 and equal ones at 1.

    Returns:
        `[...]`; 1 where the columns span the whole space.
    """
    n, r = u.shape[-2:]
    mean = mean_squared_cosine(u, v)
    return (mean - r / n) / (1 - r / n) if r < n else torch.ones_like(mean)


def column_cosines(u: Tensor, v: Tensor) -> Tensor:
    """|u_i^T v_i|, column by column; at near-equal eigenvalues they pair wrongly, so read them beside the overlap.

    Returns:
        `[..., r]`.
    """
    return (u * v).sum(-2).abs()


def captured(basis: Tensor, a: Tensor) -> Tensor:
    """|P^T A|_F^2 / |A|_F^2 for orthonormal columns P: the share of the energy that a projection captures.

    Args:
        basis: `[..., m, r]`.
        a: `[..., m, n]`.

    Returns:
        `[...]`, in [0, 1]; NaN for a zero matrix.
    """
    return (basis.mT @ a).square().sum((-2, -1)) / a.square().sum((-2, -1))
