"""Decompositions of stacks of matrices: one by one on a CPU, and again in float64 where float32 fails.

On a CPU, LAPACK's batched calls depend on a matrix's place in the stack; one by one, it does not matter who shares it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
"""What decompositions raise that do not converge."""


class Eigen(NamedTuple):
    """Eigenvalues and eigenvectors, by falling eigenvalue."""

    values: Tensor
    """`[..., n]`."""
    vectors: Tensor
    """Orthonormal columns, `[..., n, n]`."""


def eigh(x: Tensor) -> Eigen:
    """Eigenvalues and eigenvectors of symmetric matrices, by falling eigenvalue.

    Args:
        x: `[..., n, n]`, float32 or float64; only one triangle is read.

    Returns:
        Values and vectors in the dtype of `x`. Signs, and the order within a null space, are LAPACK's.

    Raises:
        LinAlgError: no convergence in float64 either; the matrix is not finite, say.
    """
    values, vectors = _with_retry(torch.linalg.eigh, x)
    return Eigen(values.flip(-1), vectors.flip(-1))


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns: Q of the QR decomposition by Householder reflections.

    Args:
        x: `[..., m, r]`, r <= m, float32 or float64. Where the rank is lower, LAPACK completes the basis.

    Returns:
        `[..., m, r]`. Signs are LAPACK's.
    """
    return _each(lambda a: torch.linalg.qr(a)[0:1], x)[0]


def singular_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors, by falling singular value.

    Args:
        x: `[..., m, n]`, float32 or float64.

    Returns:
        (orthonormal columns `[..., m, k]`, likewise `[..., n, k]`), k = min(m, n). Signs are LAPACK's.

    Raises:
        LinAlgError: no convergence in float64 either; the matrix is not finite, say.
    """
    left, _, right = _with_retry(lambda a: torch.linalg.svd(a, full_matrices=False), x)
    return left, right.mT


def complement(q: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the columns: the rest of a complete QR decomposition.

    Args:
        q: `[..., m, r]`, r <= m.

    Returns:
        `[..., m, m - r]`.
    """
    rank = q.shape[-1]
    return _each(lambda a: (torch.linalg.qr(a, mode="complete").Q[..., rank:],), q)[0]


def _with_retry(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    try:
        return _each(function, x)
    except LinAlgError:
        return tuple(t.to(x.dtype) for t in _each(function, x.double()))


def _each(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    if x.device.type != "cpu" or x.ndim == 2:
        return tuple(function(x))
    parts = [function(matrix) for matrix in x.flatten(0, -3)]
    return tuple(torch.stack(some).unflatten(0, x.shape[:-2]) for some in zip(*parts, strict=True))
