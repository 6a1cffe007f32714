"""Decompositions of stacks of matrices: one by one on a CPU, again in float64 where float32 fails, and then a fallback.

On a CPU, LAPACK's batched calls depend on a matrix's place in the stack; one by one, it does not matter who shares it.

A step that has begun must end: other parameters have moved by then. So whoever decomposes within a step gives a
`fallback` for each matrix, which takes the place of what could not be computed, and the failure becomes a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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


class Failures:
    """What could not be computed within one step; the warning comes when the step is whole, even where it is an error.

    While `depth` is 0 every failure is a warning at once.
    """

    def __init__(self) -> None:
        self.depth = 0
        """Number of steps that are under way, one within the other."""
        self.unnamed: list[str] = []
        """Failures of which the parameters are not known yet."""
        self.named: list[str] = []

    def add(self, what: str) -> None:
        """Note a failure.

        Args:
            what: could not be computed, and what takes its place.
        """
        if self.depth:
            self.unnamed.append(what)
        else:
            warnings.warn(what, RuntimeWarning, stacklevel=3)

    def name(self, names: Sequence[str]) -> None:
        """Say whose matrices the last failures were of, if there were any.

        Args:
            names: of the parameters.
        """
        if self.unnamed:
            label = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            self.named += [f"{label}: {what}" for what in dict.fromkeys(self.unnamed)]
            self.unnamed.clear()

    def warn(self) -> None:
        """Warn of all failures of a step at once, and forget them."""
        messages, self.named, self.unnamed = [*self.named, *self.unnamed], [], []
        if messages:
            warnings.warn("; ".join(dict.fromkeys(messages)), RuntimeWarning, stacklevel=2)


failures = Failures()


class Fallback(NamedTuple):
    """What takes the place of a decomposition that failed."""

    make: Callable[[], Tensor | tuple[Tensor, ...]]
    """Gives results for all matrices of the stack, of which those of failed ones are taken."""
    what: str
    """The warning: what could not be computed, and what takes its place."""


def first_columns(x: Tensor, columns: int) -> Tensor:
    """The first columns of the identity, for every matrix of a stack.

    Args:
        x: `[..., m, n]`.
        columns: how many, at most m.

    Returns:
        `[..., m, columns]`.
    """
    eye = torch.eye(x.shape[-2], columns, dtype=x.dtype, device=x.device)
    return eye.expand(*x.shape[:-2], *eye.shape)


def unrotated(x: Tensor, what: str) -> Fallback:
    """Identities in the place of eigenvectors.

    Args:
        x: what is decomposed, `[..., n, n]`.
        what: the warning.

    Returns:
        A fallback of `eigh`, with the diagonal for eigenvalues.
    """
    return Fallback(lambda: (x.diagonal(dim1=-2, dim2=-1), first_columns(x, x.shape[-1])), what)


def eigh(x: Tensor, fallback: Fallback | None = None) -> Eigen:
    """Eigenvalues and eigenvectors of symmetric matrices, by falling eigenvalue.

    Args:
        x: `[..., n, n]`, float32 or float64; only one triangle is read.
        fallback: (values, vectors) of matrices without convergence.

    Returns:
        Values and vectors in the dtype of `x`. Signs, and the order within a null space, are LAPACK's.

    Raises:
        LinAlgError: no convergence in float64 either, and no fallback; the matrix is not finite, say.
    """

    def decompose(a: Tensor) -> tuple[Tensor, ...]:
        values, vectors = torch.linalg.eigh(a)
        return values.flip(-1), vectors.flip(-1)

    return Eigen(*_with_retry(decompose, x, fallback))


def orthonormal(x: Tensor, fallback: Fallback | None = None) -> Tensor:
    """An orthonormal basis of the columns: Q of the QR decomposition by Householder reflections.

    Args:
        x: `[..., m, r]`, r <= m, float32 or float64. Where the rank is lower, LAPACK completes the basis.
        fallback: of matrices that could not be decomposed.

    Returns:
        `[..., m, r]`. Signs are LAPACK's.

    Raises:
        LinAlgError: a decomposition failed, and there is no fallback.
    """
    return _with_retry(lambda a: torch.linalg.qr(a)[0:1], x, fallback)[0]


def singular_vectors(x: Tensor, fallback: Fallback | None = None) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors, by falling singular value.

    Args:
        x: `[..., m, n]`, float32 or float64.
        fallback: (left, transposed right) of matrices without convergence.

    Returns:
        (orthonormal columns `[..., m, k]`, likewise `[..., n, k]`), k = min(m, n). Signs are LAPACK's.

    Raises:
        LinAlgError: no convergence in float64 either, and no fallback; the matrix is not finite, say.
    """

    def decompose(a: Tensor) -> tuple[Tensor, ...]:
        left, _, right = torch.linalg.svd(a, full_matrices=False)
        return left, right

    left, right = _with_retry(decompose, x, fallback)
    return left, right.mT


def complement(q: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the columns: the rest of a complete QR decomposition.

    Args:
        q: `[..., m, r]`, r <= m.

    Returns:
        `[..., m, m - r]`.

    Raises:
        LinAlgError: a decomposition failed.
    """
    rank = q.shape[-1]
    return _with_retry(lambda a: (torch.linalg.qr(a, mode="complete").Q[..., rank:],), q, None)[0]


def inverse(x: Tensor, fallback: Fallback | None = None) -> Tensor:
    """The inverse of square matrices.

    Args:
        x: `[..., n, n]`.
        fallback: of singular matrices.

    Returns:
        `[..., n, n]`.

    Raises:
        LinAlgError: a matrix is singular, and there is no fallback.
    """
    try:
        return torch.linalg.inv(x)
    except LinAlgError:
        return _one_by_one(lambda a: (torch.linalg.inv(a),), x, fallback)[0]


def _with_retry(
    function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, fallback: Fallback | None
) -> tuple[Tensor, ...]:
    try:
        return _each(function, x)
    except LinAlgError:
        return _one_by_one(function, x, fallback)


def _each(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    if x.device.type != "cpu" or x.ndim == 2:
        return tuple(function(x))
    parts = [function(matrix) for matrix in x.flatten(0, -3)]
    return tuple(torch.stack(some).unflatten(0, x.shape[:-2]) for some in zip(*parts, strict=True))


def _one_by_one(
    function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, fallback: Fallback | None
) -> tuple[Tensor, ...]:
    """Every matrix as it is, else in float64, else by the fallback."""
    matrices = x.reshape(-1, *x.shape[-2:])
    results = [_tried(function, matrix, strict=fallback is None) for matrix in matrices]
    if fallback is not None and not all(results):
        replacement = fallback.make()
        replacement = (replacement,) if isinstance(replacement, Tensor) else replacement
        other = list(zip(*(t.reshape(len(results), *t.shape[x.ndim - 2 :]) for t in replacement), strict=True))
        results = [some or tuple(t.to(x.dtype) for t in other[i]) for i, some in enumerate(results)]
        failures.add(fallback.what)
    return tuple(torch.stack(some).reshape(*x.shape[:-2], *some[0].shape) for some in zip(*results, strict=True))


def _tried(function: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor, *, strict: bool) -> tuple[Tensor, ...]:
    """One decomposition, again in float64 if it fails; nothing where that fails, too."""
    try:
        return tuple(function(matrix))
    except LinAlgError:
        try:
            return tuple(t.to(matrix.dtype) for t in function(matrix.double()))
        except LinAlgError:
            if strict:
                raise
            return ()
