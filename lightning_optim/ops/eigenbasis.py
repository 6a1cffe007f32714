"""Bases of eigenvectors of symmetric positive semi-definite matrices, computed or followed from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import Fallback, eigh, orthonormal
from lightning_optim.ops.moments import gram
from lightning_optim.ops.norms import magnitude, norm
from lightning_optim.ops.projection import project

GOLDEN = (5**0.5 - 1) / 2


def eigenbasis(x: Tensor, shift: float = 1e-30, previous: Tensor | None = None) -> Tensor:
    """Eigenvectors, by falling eigenvalue.

    Args:
        x: `[..., n, n]`, symmetric.
        shift: added to the diagonal.
        previous: per matrix, kept (with a warning) where x is not finite or the decomposition does not converge.

    Returns:
        Orthonormal columns, `[..., n, n]`. Signs, and the order within a null space, are LAPACK's.

    Raises:
        LinAlgError: a decomposition failed and there is no previous one.
    """
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if previous is None:
        return eigh(x + shift * eye).vectors
    fallback = Fallback(
        lambda: (previous[..., 0], previous), "an eigenbasis could not be computed; the last good one is kept"
    )
    return eigh(x + shift * eye, fallback).vectors


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """How much of a basis is left, corrected for chance.

    A square basis is compared column by column: the mean of (q_j . q'_j)^2 of normalized columns. A thin one
    (`[..., n, r]`, or its transpose) is compared as a subspace: ||Q^T Q'||_F^2 / r. Either is x in
    (x - c) / (1 - c), with c = 1 / n or r / n what random bases give.

    Args:
        old: `[..., m, n]`.
        new: likewise.

    Returns:
        The smallest over the stack, a 0-d tensor; 1 for equal bases, about 0 for unrelated ones.
    """
    if old.shape[-2] < old.shape[-1]:
        old, new = old.mT, new.mT
    old, new = (torch.nn.functional.normalize(x, dim=-2) for x in (old, new))
    n, r = old.shape[-2:]
    if n == r:
        overlaps, chance = (old * new).sum(-2).square().mean(-1), 1 / n
    else:
        overlaps, chance = mean_squared_cosine(old, new), r / n
    return ((overlaps - chance) / (1 - chance) if n > 1 else overlaps).amin()


def mean_squared_cosine(u: Tensor, v: Tensor) -> Tensor:
    """||U^T V||_F^2 / r: the mean squared cosine of the principal angles between two subspaces.

    Args:
        u: orthonormal columns, `[..., n, r]`.
        v: likewise.

    Returns:
        `[...]`; 1 for equal subspaces, about r / n for unrelated ones.
    """
    return product(u.mT, v).square().sum((-2, -1)) / u.shape[-1]


def off_diagonal(x: Tensor, q: Tensor, t: int = 0, top: int = 32, others: int = 32) -> Tensor:
    """Share of a matrix that a basis leaves off the diagonal: rho = ||B - diag B||_F / ||B||_F, B = Q^T X Q.

    The first `top` columns of B are taken exactly and stand for themselves, `others` of the rest, evenly spaced, for
    all of the rest. They are shifted by t times the golden ratio of their distance, so that looks at any regular steps
    see all columns in time. Column j contributes ||X q_j||^2 - (q_j^T X q_j)^2.

    Args:
        x: `[b, n, n]`, symmetric.
        q: orthonormal columns, by falling eigenvalue, `[b, n, n]`.
        t: number of the step; decides which columns are looked at.
        top: number of leading columns.
        others: number of columns out of the rest.

    Returns:
        `[b]`, in [0, 1].
    """
    n = x.shape[-1]
    top = min(top, n)
    count = min(others, n - top)
    step = (n - top) / max(count, 1)
    shift = t * GOLDEN % 1
    rest = [top + int((i + shift) * step) for i in range(count)]
    columns = q[..., [*range(top), *rest]]
    x = x / magnitude(x)
    off = _residual(product(x, columns), columns)
    total = off[..., :top].sum(-1) + off[..., top:].sum(-1) * step
    return (total.clamp_min(0) / x.square().sum((-2, -1)).clamp_min(1e-30)).sqrt().clamp_max(1)


def unaligned(power: Tensor, q: Tensor) -> Tensor:
    """Share of a matrix that a part of a basis leaves off the diagonal, from what the matrix makes of that part.

    rho = sqrt(sum_j (||X q_j||^2 - (q_j^T X q_j)^2) / sum_j ||X q_j||^2): 0 where every column is an eigenvector. Of
    a whole basis it is `off_diagonal`; of some columns it counts what leads out of them as well as what mixes them.

    Args:
        power: X q, `[b, n, r]`; X itself is never formed.
        q: orthonormal columns, `[b, n, r]`.

    Returns:
        `[b]`, in [0, 1]; 0 where X q is zero.
    """
    power = power / magnitude(power)
    whole = power.square().sum((-2, -1)).clamp_min(1e-30)
    return (_residual(power, q).sum(-1).clamp_min(0) / whole).sqrt().clamp_max(1)


def _residual(power: Tensor, q: Tensor) -> Tensor:
    """||X q_j||^2 - (q_j^T X q_j)^2 of every column, `[..., r]`."""
    return power.square().sum(-2) - (q * power).sum(-2).square()


def follow_eigenbasis(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from a basis of eigenvectors of an earlier matrix.

    Columns are first put in the order of their present Rayleigh quotients.

    Args:
        x: `[..., n, n]`, symmetric.
        q: the earlier basis, `[..., n, n]`.

    Returns:
        (new basis, order of the old columns `[..., n]`).
    """
    power = product(x, q)
    order = (q * power).sum(-2).argsort(dim=-1, descending=True)
    sorted_power = power.gather(-1, order.unsqueeze(-2).expand_as(power))
    what = "a step towards eigenvectors failed; the last good ones are kept"
    fallback = Fallback(lambda: q.gather(-1, order.unsqueeze(-2).expand_as(q)), what)
    return orthonormal(sorted_power, fallback), order


INITIAL_ROOT = 0.1**-0.5
"""Inverse roots of the eigenvalues that Kullback-Leibler factors start with."""


def average_kl_(
    factors: Mapping[str, Tensor], bases: Mapping[str, Tensor], roots: Mapping[str, Tensor], x: Tensor, weight: float
) -> dict[str, Tensor]:
    """Move Kronecker factors towards those that minimize the Kullback-Leibler divergence (Lin et al. 2025, KL-Shampoo).

        L <- (1 - w) L + w X R^-1 X^T / n;  R <- (1 - w) R + w X^T L^-1 X / m
        l_L <- (1 - w) l_L + w mean_columns((Q_L^T X Q_R / sqrt(l_R))^2), l_R likewise;  1 / sqrt(l) is at most 4000

    where each side is whitened by the other's basis and eigenvalues, R^-1 = Q_R diag(1 / l_R) Q_R^T, as they were
    before. With eigenvalues of one, L and R are the averages of X X^T / n and X^T X / m. A side without a factor does
    not whiten.

    Args:
        factors: by side, `"left"` `[..., m, m]`, `"right"` `[..., n, n]`, written.
        bases: likewise.
        roots: 1 / sqrt(l), `"left"` `[..., m, 1]`, `"right"` `[..., 1, n]`.
        x: `[..., m, n]`.
        weight: w of the new values.

    Returns:
        The new roots.
    """
    m, n = x.shape[-2:]
    most = torch.finfo(x.dtype).max ** 0.5 / 2
    out = {}
    for side, other, dim, size in (("left", "right", -1, n), ("right", "left", -2, m)):
        if side not in factors:
            continue
        white = project(x, **{other: bases[other]}) * roots[other] if other in factors else x
        white = white * (most / norm(white)).clamp(max=1.0)  # the roots may be 4000: squares must stay finite
        factors[side].lerp_(gram(white, left=side == "left") / size, weight)
        diagonal = project(white, **{side: bases[side]}).square().mean(dim, keepdim=True)
        values = roots[side].square().reciprocal().lerp(diagonal, weight)
        out[side] = values.clamp(min=1e-30).rsqrt().clamp(max=4000.0)
    return out
