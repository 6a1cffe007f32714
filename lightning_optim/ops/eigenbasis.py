"""Bases of eigenvectors of symmetric positive semi-definite matrices, computed or followed from step to step."""

from __future__ import annotations

import torch
from torch import Tensor


def _each(function, x: Tensor) -> Tensor:
    """LAPACK matrix by matrix on a CPU, where its batched calls depend on a matrix's place in the stack."""
    if x.device.type != "cpu":
        return function(x)
    return torch.stack([function(matrix) for matrix in x.flatten(0, -3)]).view(x.shape)


def eigenbasis(x: Tensor, shift: float = 1e-30) -> Tensor:
    """Eigenvectors, by falling eigenvalue.

    Args:
        x: `[..., n, n]`, symmetric.
        shift: added to the diagonal.

    Returns:
        Orthonormal columns, `[..., n, n]`. Signs, and the order within a null space, are LAPACK's.
    """
    shifted = x + shift * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return _each(lambda a: torch.linalg.eigh(a).eigenvectors, shifted).flip(-1)


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
    return _each(lambda a: torch.linalg.qr(a).Q, sorted_power), order
