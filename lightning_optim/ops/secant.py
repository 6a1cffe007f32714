"""Curvature out of pairs of a step s and the change y of the gradient along it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.ops.lapack import LinAlgError, failures


def names(history: int) -> list[str]:
    """Names of the slots of pairs, oldest first.

    Args:
        history: how many pairs.

    Returns:
        Of the steps, then of the changes.
    """
    return [*(f"step_{i}" for i in range(history)), *(f"change_{i}" for i in range(history))]


def stored_pairs(s: SimpleNamespace, history: int) -> tuple[list[Tensor], list[Tensor]]:
    """The pairs in a rule's state.

    Args:
        s: state by slot name.
        history: how many pairs.

    Returns:
        (steps, changes), oldest first; zeros where there is none yet.
    """
    slots = [getattr(s, name) for name in names(history)]
    return slots[:history], slots[history:]


def push(pairs: tuple[list[Tensor], list[Tensor]], step: Tensor, change: Tensor, where: Tensor | None = None) -> None:
    """Put a pair behind others, in place, whose first one is lost.

    Args:
        pairs: (steps, changes), oldest first.
        step: shaped like each.
        change: likewise.
        where: booleans that broadcast with it, elsewhere nothing changes; everywhere, if not given.
    """
    for some, new in zip(pairs, (step, change), strict=True):
        for old, following in zip(some, [*some[1:], new], strict=True):
            old.copy_(following if where is None else torch.where(where, following, old))


def two_loop(
    g: Tensor,
    steps: Sequence[Tensor],
    changes: Sequence[Tensor],
    *,
    scale: Literal["newest", "mean"] = "newest",
) -> Tensor:
    """The L-BFGS inverse Hessian times every matrix, its elements taken for a vector (Nocedal 1980, Math. Comp. 35).

        q = g;  newest to oldest:  a_i = <s_i, q> / <s_i, y_i>,  q = q - a_i y_i
        r = <s, y> / <y, y> q;     oldest to newest:  r = r + s_i (a_i - <y_i, r> / <s_i, y_i>)

    The factor between the loops is of the newest pair, or the mean over all (Schraudolph et al. 2007). The inverse maps
    the newest y to its s exactly; measured in float32 with ten random pairs of 1000 elements, the result is off by 2e-7
    of its norm.

    Args:
        g: `[b, m, n]`.
        steps: h of them, shaped like `g`, oldest first.
        changes: likewise. Pairs with <s, y> <= 0, zeros and what underflows
            too, are passed over; without pairs the result is g.
        scale: which factor.

    Returns:
        Shaped like `g`; <g, result> > 0 unless g is 0.
    """
    q, pairs, least = g.clone(), [], torch.finfo(g.dtype).tiny  # what is smaller has an infinite reciprocal
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        product = dot(s, y)
        inverse = torch.where(product > least, product.reciprocal(), 0.0)
        a = inverse * dot(s, q)
        q.sub_(a * y)
        pairs.append((s, y, a, inverse))
    some = range(len(steps)) if scale == "mean" else [-1]
    products = torch.stack([dot(steps[i], changes[i]) for i in some])
    squares = torch.stack([dot(changes[i], changes[i]) for i in some])
    used = (products > least) & (squares > least)
    ratios = torch.where(used, products / squares, 0.0)
    count = used.sum(0)
    q.mul_(torch.where(count > 0, ratios.sum(0) / count, 1.0))
    for s, y, a, inverse in reversed(pairs):
        q.add_((a - inverse * dot(y, q)) * s)
    return q


def damped(step: Tensor, change: Tensor, bounds: tuple[float, float], most: float) -> Tensor:
    """A change of gradient drawn towards its step, so that the curvature along the step lies within bounds.

        mu = <s, y> / <s, s>;  y' = tau y + (1 - tau) s
        tau = (1 - low) / (1 - mu) where mu <= low,  (high - 1) / (mu - 1) where mu >= high,  at most `most`

    After it <s, y'> / <s, s> lies in [low, high]. The identity is what curvature is drawn to.

    Args:
        step: `[..., m, n]`.
        change: likewise.
        bounds: low < 1 < high.
        most: largest tau, in (0, 1].

    Returns:
        Shaped like `change`; NaN where a step is zero.
    """
    low, high = bounds
    mu = dot(step, change) / dot(step, step)
    above = torch.where(mu >= high, (high - 1) / (mu - 1), 1.0)
    tau = torch.where(mu <= low, (1 - low) / (1 - mu), above).clamp_(max=most)
    return step.lerp(change, tau)


def sr1(steps: Sequence[Tensor], changes: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Eigenvectors and eigenvalues of a limited-memory SR1 matrix B, which may be indefinite.

        B = c I + sum_i a_i a_i^T / a_i^T s_i,  a_i = y_i - B s_i with the B of the pairs before
        [a_1 a_2 ..] = Q R;  R diag(1 / a_i^T s_i) R^T = V E V^T;  U = Q V:  B = c I + U E U^T

    c is <y, y> / <s, y> of the newest pair where that is positive, 1 if there is none. Nocedal & Wright 2006, equations
    6.24 and 6.26. On a quadratic with as many independent pairs as dimensions B is the Hessian; measured with ten of
    1000 dimensions, B s_i is y_i up to 2e-7 of its norm in float32 and 3e-15 in float64.

    Args:
        steps: h of them, `[n]`, oldest first.
        changes: likewise. Pairs with |<a, s>| <= sqrt(eps) |a| |s|, zeros too, are passed over.

    Returns:
        (U `[n, k]` with k <= h, B's eigenvalues along it, `[k]`, float64, c, its eigenvalue across them). k is 0,
        with a warning, where a decomposition fails.
    """
    c, columns, inverse = 1.0, [], []
    for s, y in zip(steps, changes, strict=True):
        product = float(s.dot(y))
        c = float(y.dot(y)) / product if product > 0 else c
    for s, y in zip(steps, changes, strict=True):
        a = y - c * s
        for other, factor in zip(columns, inverse, strict=True):
            a = a - factor * other.dot(s) * other
        product = float(a.dot(s))
        if abs(product) > torch.finfo(s.dtype).eps ** 0.5 * float(a.norm() * s.norm()):
            columns.append(a)
            inverse.append(1 / product)
    none = steps[0].new_empty(len(steps[0]), 0)
    try:
        q, r = torch.linalg.qr(torch.stack(columns, 1) if columns else none)
        r = r.double()
        extra, v = torch.linalg.eigh(r @ torch.tensor(inverse, dtype=r.dtype, device=r.device).diag() @ r.mT)
    except LinAlgError:
        failures.add("the curvature along earlier steps could not be computed; this step goes without it")
        return none, none.new_empty(0, dtype=torch.float64), c
    return q @ v.to(q.dtype), c + extra, c


def cubic_step(g: Tensor, u: Tensor, e: Tensor, c: float, *, mu: float, reach: float) -> tuple[Tensor, Tensor, float]:
    """The minimizer of a cubic model in the norm of the eigenvectors of its matrix B.

        min g^T s + 1/2 s^T B s + mu/3 (sum_i |u_i^T s|^3 + |s'|^3),  s' = s - U U^T s
        u_i^T s = -2 g_i / (e_i + sqrt(e_i^2 + 4 mu |g_i|)),  s' = -2 g' / (c + sqrt(c^2 + 4 mu |g'|))

    mu is doubled until |s| <= reach. Along negative curvature |u_i^T s| >= |e_i| / mu, however small g_i is, unless it
    is 0. Ranganath et al. 2025, arXiv:2502.12298. Exact but for rounding.

    Args:
        g: `[n]`.
        u: orthonormal columns, `[n, k]`.
        e: B's eigenvalues along them, `[k]`, float64.
        c: its eigenvalue across them.
        mu: > 0.
        reach: > 0.

    Returns:
        (s, B s, the least value of the model, cubic term included).
    """
    along = u.mT @ g
    rest = g - u @ along
    size = rest.norm()
    parts = torch.cat([along, size.view(1)]).double()
    values = torch.cat([e, e.new_tensor([c])])
    while True:
        root = (values.square() + 4 * mu * parts.abs()).sqrt()
        beyond = -parts.sign() * (root - values) / (2 * mu)  # the same; neither cancels on its side of zero
        z = torch.where(values > 0, -2 * parts / (values + root), beyond)
        if not z.norm() > reach:
            break
        mu *= 2
    least = parts.dot(z) + 0.5 * values.dot(z * z) + mu / 3 * z.abs().pow(3).sum()
    z = z.to(g.dtype)
    beside = rest * (z[-1] / size.clamp(min=torch.finfo(g.dtype).tiny))
    return u @ z[:-1] + beside, u @ (e.to(g.dtype) * z[:-1]) + c * beside, float(least)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of matrices.

    Args:
        a: `[..., m, n]`.
        b: likewise.

    Returns:
        `[..., 1, 1]`.
    """
    return (a * b).sum((-2, -1), keepdim=True)
