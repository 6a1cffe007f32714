"""Lanczos recursions on a symmetric operator: extreme eigenvalues, spectral densities and their distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ritz:
    """The spectrum as a Lanczos recursion of m steps approximates it."""

    values: Tensor
    """Ritz values, rising, `[m]`, float64 on the CPU."""
    weights: Tensor
    """Of the start vector's spectral measure, `[m]`, summing to one."""
    residuals: Tensor
    """|A x - value x| of every Ritz pair, `[m]`."""
    size: int
    """Dimension of the operator."""


def lanczos(matvec: MatVec, start: Tensor, steps: int) -> Ritz:
    """Run the recursion with full reorthogonalization; stops early in an invariant subspace.

    Args:
        matvec: the symmetric operator on vectors `[n]`.
        start: any vector but zero.
        steps: at most so many products.

    Returns:
        The Ritz values of the Krylov space.
    """
    n = start.numel()
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(min(steps, n)):
        w = matvec(basis[-1])
        alphas.append(torch.dot(w, basis[-1]))
        for _ in range(2):  # once is not enough in float32
            q = torch.stack(basis)
            w = w - q.mT @ (q @ w)
        betas.append(w.norm())
        scale = max(float(x.abs()) for x in alphas + betas[:-1])
        eps = torch.finfo(w.dtype).eps
        if len(alphas) == min(steps, n) or float(betas[-1]) <= max(1e-10, 10 * eps * math.sqrt(n)) * scale:
            break
        basis.append(w / betas[-1])
    m = len(alphas)
    alpha, beta = (torch.stack(x).double().cpu() for x in (alphas, betas))
    t = torch.diag(alpha) + torch.diag(beta[: m - 1], 1) + torch.diag(beta[: m - 1], -1)
    values, vectors = torch.linalg.eigh(t)
    return Ritz(values, vectors[0].square(), beta[m - 1] * vectors[-1].abs(), n)


def grid_of(spectra: Sequence[Sequence[Ritz]], points: int = 2000) -> tuple[Tensor, float]:
    """A common grid for densities, and the width of its bumps.

    Args:
        spectra: runs (one per start vector) of every block.
        points: of the grid.

    Returns:
        (grid over the union of the Ritz ranges, four widths wider on both sides; width, a fiftieth of the range).
    """
    values = torch.cat([run.values for runs in spectra for run in runs])
    low, high = float(values.min()), float(values.max())
    sigma = max((high - low) / 50, 1e-12 * max(abs(low), abs(high)), 1e-30)
    return torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64), sigma


def density(runs: Sequence[Ritz], grid: Tensor, sigma: float) -> Tensor:
    """Spectral density by stochastic Lanczos quadrature: the mean of sum_k weight_k N(grid; value_k, sigma^2).

    Args:
        runs: one per random start vector.
        grid: `[points]`.
        sigma: width of the bumps.

    Returns:
        `[points]`, integrating to one where the grid covers the bumps.
    """
    bumps = [
        torch.exp(-0.5 * ((grid[:, None] - run.values) / sigma).square()) @ run.weights / (sigma * math.tau**0.5)
        for run in runs
    ]
    return torch.stack(bumps).mean(0)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence in base 2 of two densities on one grid.

    Args:
        p: `[points]`, not negative; scaled to sum one.
        q: likewise.

    Returns:
        A scalar, 0 for equal, 1 for disjoint densities.
    """
    p, q = p / p.sum(), q / q.sum()
    mean = ((p + q) / 2).clamp(min=1e-30)  # tails underflow to zero

    def entropy(x: Tensor) -> Tensor:
        return torch.where(x > 0, x * torch.log2(x.clamp(min=1e-300) / mean), 0.0).sum()

    return ((entropy(p) + entropy(q)) / 2).clamp(min=0.0).sqrt()


def js_matrix(spectra: Sequence[Sequence[Ritz]], *, shape: bool) -> Tensor:
    """Jensen-Shannon distances between the spectra of blocks (heterogeneity, arXiv:2402.16788; the grid is ours).

    Args:
        spectra: runs of every block.
        shape: compare spectra divided by their largest absolute value, not as they are.

    Returns:
        `[blocks, blocks]`.
    """
    if shape:
        spectra = [_scaled(runs) for runs in spectra]
    grid, sigma = grid_of(spectra)
    densities = [density(runs, grid, sigma) for runs in spectra]
    out = torch.zeros(len(spectra), len(spectra), dtype=torch.float64)
    for i, p in enumerate(densities):
        for j in range(i):
            out[i, j] = out[j, i] = js_distance(p, densities[j])
    return out


def _scaled(runs: Sequence[Ritz]) -> list[Ritz]:
    largest = max(float(run.values.abs().max()) for run in runs) or 1.0
    return [Ritz(run.values / largest, run.weights, run.residuals / largest, run.size) for run in runs]


def mean_distance(matrix: Tensor) -> float:
    """The mean over all pairs of different blocks.

    Returns:
        NaN for a single block.
    """
    n = len(matrix)
    return float(matrix.sum()) / (n * (n - 1)) if n > 1 else math.nan
