"""Bases of eigenvectors of symmetric positive semi-definite matrices, computed or followed from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.ops.lapack import eigh, orthonormal


def eigenbasis(x: Tensor, shift: float = 1e-30) -> Tensor:
    """Eigenvectors, by falling eigenvalue.

    Args:
        x: `[..., n, n]`, symmetric.
        shift: added to the diagonal.

    Returns:
        Orthonormal columns, `[..., n, n]`. Signs, and the order within a null space, are LAPACK's.
    """
    return eigh(x + shift * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).vectors


def follow_eigenbasis(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from a basis of eigenvectors of an earlier matrix.

    Columns are first put in the order of their present Rayleigh quotients.

    Args:
        x: `[..., n, n]`, symmetric.
        q: the earlier basis, `[..., n, n]`.

    Returns:
        (new basis, order of the old columns `[..., n]`).
    """
    power = x @ q
    order = (q * power).sum(-2).argsort(dim=-1, descending=True)
    sorted_power = power.gather(-1, order.unsqueeze(-2).expand_as(power))
    return orthonormal(sorted_power), order
