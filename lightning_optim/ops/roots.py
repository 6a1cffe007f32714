"""Inverse roots of symmetric positive semi-definite matrices."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import LinAlgError, eigh, failures
from lightning_optim.ops.norms import magnitude

Method = Literal["eigh", "newton"]


class Newton(NamedTuple):
    """Result of a coupled Newton iteration."""

    root: Tensor
    """`[..., n, n]`."""
    error: Tensor
    """Largest entry of |M - I| per matrix, `[..., 1, 1]`: 0 where it has converged."""


def coupled_newton(x: Tensor, root: int, iterations: int = 100, tolerance: float = 0.0) -> Newton:
    """x^(-1/root) by the coupled Newton iteration (Guo & Higham 2006; Iannazzo 2006): matrix products only.

        z = (root + 1) / (2 |x|);  X = z^(1/root) I;  M = z x
        repeat  T = ((root + 1) I - M) / root;  X <- X T;  M <- T^root M

    A matrix stops when it has converged, whoever shares its stack. An eigenvalue below
    (1 + 1 / root)^(-root * iterations) of the norm is not reached in so many iterations: its power stays finite
    where the exact one is not, as in Newton-Schulz (which this is for root 2, but for z).

    Args:
        x: `[..., n, n]`, symmetric, positive semi-definite, float32 or float64.
        root: 1, 2, 4, ...
        iterations: at most.
        tolerance: of |M - I|, at which a matrix stops.

    Returns:
        The root and the remaining |M - I|.
    """
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    z = (root + 1) / (2 * size)
    result, m = z ** (1 / root) * eye, z * x
    for _ in range(iterations):
        step = ((root + 1) * eye - m) / root
        later, rest = product(result, step), product(_power(step, root), m)
        if tolerance:
            active = _largest(m - eye) > tolerance
            if not active.any():
                break
            later, rest = torch.where(active, later, result), torch.where(active, rest, m)
        result, m = later, rest
    return Newton(result, _largest(m - eye))


def _power(x: Tensor, exponent: int) -> Tensor:
    """An integer power of at least 1, by squaring."""
    if exponent == 1:
        return x
    half = _power(x, exponent // 2)
    square = product(half, half)
    return product(square, x) if exponent % 2 else square


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax((-2, -1), keepdim=True)


def inverse_power(x: Tensor, exponent: float, eps: float = 0.0) -> Tensor:
    """(x + eps I)^(-exponent) by eigendecomposition.

    Eigenvalues that come out below eps are lifted to it together with all others, so that the smallest is eps
    (Shi et al. 2023, arXiv:2309.06497). With eps 0 the inverse is that of the range: eigenvalues below the rounding of
    the largest, n finfo.eps lambda_max, count as zeros.

    Args:
        x: `[..., n, n]`, symmetric, positive semi-definite, float32 or float64.
        exponent: 1/4, say.
        eps: added to the diagonal.

    Returns:
        `[..., n, n]`.
    """
    size, kind = x.shape[-1], torch.finfo(x.dtype)
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    values, vectors = eigh(x + eps * eye if eps else x)
    if eps:
        lifted = values + (eps - values[..., -1:]).clamp(min=0)
        if x.dtype == torch.float64:  # the last try: eps may be lost in the rounding of the others
            lifted = lifted.clamp(min=eps / 2)
        powers = lifted.pow(-exponent)
    else:
        floor = (size * kind.eps * values[..., :1]).clamp(min=kind.tiny)
        powers = torch.where(values > floor, values.clamp(min=kind.tiny).pow(-exponent), 0.0)
    return product(vectors * powers.unsqueeze(-2), vectors.mT)


def inverse_root(
    x: Tensor,
    root: float,
    *,
    eps: float = 0.0,
    method: Method = "eigh",
    previous: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x + eps I)^(-1/root), again in float64 where that fails, and the last good root where that fails too.

    Measured in float32 against float64 (n = 256, spectrum falling from 1 to 1e-12, relative Frobenius error, root 4):
    eps 1e-2: eigh 5e-6, newton 1e-6; eps 1e-4: 5e-4 and 6e-5; eps 1e-6: 2e-2 and 5e-3; twice that for root 2. It grows
    with the condition number; most of eigh's is the lifting of its eigenvalues.

    Args:
        x: `[..., n, n]`, symmetric, positive semi-definite, float32 or float64.
        root: any positive number by `eigh`, an integer by `newton`.
        eps: added to the diagonal.
        method: `eigh`, or `newton` for the coupled Newton iteration, to |M - I| of 1e-6 (1e-12 in float64); a matrix
            that is not below 0.1 after 100 steps has failed.
        previous: per matrix, kept (with a warning) where no finite root was found.
        dtype: of the arithmetic; None for that of `x`.

    Returns:
        `[..., n, n]`, in the dtype of `x`.

    Raises:
        LinAlgError: no root was found and there is no previous one.
    """
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    clean = x if finite.all() else torch.where(finite, x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    power = torch.full_like(x, torch.nan)
    for precision in dict.fromkeys((dtype or x.dtype, torch.float64)):
        try:
            tried = _root(clean.to(precision), root, eps, method).to(x.dtype)
        except LinAlgError:
            continue
        power = torch.where(finite & ~power.isfinite(), tried, power)
        if power.isfinite().all():
            return power
    if previous is None:
        raise LinAlgError(f"no finite inverse root (order {root}) of a {tuple(x.shape)} stack was found")
    failures.add("an inverse root could not be computed; the last good one is kept")
    return torch.where(power.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), power, previous)


def root_error(x: Tensor, r: Tensor, root: int) -> Tensor:
    """How far r is from x^(-1/root), without computing a root.

        rho = ||x r^root x - x||_F / (||x r^root x||_F + ||x||_F)

    Large eigenvalues of x count most, as in a test of its eigenvectors; a matrix that has grown by a factor c since
    gives |c - 1| / (c + 1). For root 4 it takes 3 products of n x n matrices.

    Measured in float32 for roots of `inverse_power` (n = 256, spectrum falling from 1 to 1e-8): below 1e-4 for root 2
    to 4; 0.15 for root 1, and 2e-3 where the spectrum ends at 1e-6, for r alone is then as large as 1 / x.

    Args:
        x: `[..., n, n]`, symmetric, positive semi-definite.
        r: what was x^(-1/root), `[..., n, n]`, symmetric.
        root: a positive integer.

    Returns:
        `[...]`, in [0, 1]; 0 for a zero x.
    """
    left = x @ torch.linalg.matrix_power(r, root // 2)
    right = left if root % 2 == 0 else left @ r
    product, tiny = left @ right.mT, torch.finfo(x.dtype).tiny
    scale = magnitude(x)
    product, x = product / scale, x / scale
    sizes = torch.linalg.matrix_norm(product) + torch.linalg.matrix_norm(x)
    return torch.linalg.matrix_norm(product - x) / sizes.clamp(min=tiny)


def _root(x: Tensor, root: float, eps: float, method: Method) -> Tensor:
    if method == "eigh":
        return inverse_power(x, 1 / root, eps)
    shifted = x + eps * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    result, error = coupled_newton(shifted, int(root), tolerance=1e-12 if x.dtype == torch.float64 else 1e-6)
    return torch.where(error < 0.1, result, torch.nan)
