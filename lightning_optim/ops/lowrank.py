"""Leading subspaces of large matrices: found by random sketches, followed from step to step, and their complements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import (
    Fallback,
    LinAlgError,
    complement,
    eigh,
    failures,
    first_columns,
    orthonormal,
    unrotated,
)
from lightning_optim.ops.norms import magnitude


def aligned(new: Tensor, old: Tensor) -> Tensor:
    """Vectors with the senses of those before, or, without any, with their largest entries positive.

    Args:
        new: columns, `[..., m, r]`.
        old: likewise, or zeros.

    Returns:
        `new`, some columns negated.
    """
    sense = (new * old).sum(-2, keepdim=True)
    largest = new.gather(-2, new.abs().argmax(-2, keepdim=True))
    return torch.where(torch.where(sense == 0, largest, sense) < 0, -new, new)


def leading_basis(x: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, through the eigenvectors of the smaller Gram matrix.

    Measured in float32 on 64 x 256 matrices, singular values falling from 1 to 1e-3: the projector on the leading 8 is
    off by 3e-6. Directions below 1e-3 of the largest singular value are rounding noise.

    Args:
        x: `[..., m, n]`.
        rank: columns, at most min(m, n).

    Returns:
        Orthonormal columns by falling singular value, `[..., m, rank]`, their largest entries positive.
    """
    gram = product(x, x.mT) if x.shape[-2] <= x.shape[-1] else product(x.mT, x)
    vectors = eigh(gram, unrotated(gram, f"leading singular vectors could not be computed; {UNTURNED}")).vectors
    u = vectors[..., :rank]
    if x.shape[-2] > x.shape[-1]:
        u = _basis(product(x, u))
    return aligned(u, torch.zeros_like(u))


def range_basis(x: Tensor, sketch: Tensor, rank: int, power: int = 1) -> Tensor:
    """Approximate leading left singular vectors by a randomized range finder (Halko et al. 2011, Alg. 4.4, 5.1).

        Q = qr(x sketch);  `power` times: Q = qr(x x^T Q);  U = Q eigenvectors(Q^T x x^T Q)

    Measured on a 256 x 512 matrix with singular values 1 / k, rank 16 and 8 columns more: the captured energy
    is 0.999 of the best possible with one power step and 0.97 without (1 / sqrt(k): 0.97 and 0.7).

    Args:
        x: `[..., m, n]`.
        sketch: standard normal numbers, `[..., n, k]`, rank <= k <= min(m, n); k = rank + 8 is usual.
        rank: columns to keep.
        power: power iterations; each multiplies by x and x^T once more.

    Returns:
        Orthonormal columns by falling singular value, `[..., m, rank]`.
    """
    q = _basis(product(x, sketch))
    for _ in range(power):
        back = product(x.mT, q)
        q = _basis(product(x, back.div_(magnitude(back))))
    inner = product(q.mT, x)
    inner.div_(magnitude(inner))
    return product(q, _turned(product(inner, inner.mT))[..., :rank])


UNTURNED = "axes of the matrix take their place until the next time"


def _basis(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns, or columns of the identity where that fails."""
    what = f"a basis of leading singular vectors could not be computed; {UNTURNED}"
    return orthonormal(x, Fallback(lambda: first_columns(x, x.shape[-1]), what))


def _turned(x: Tensor) -> Tensor:
    """Eigenvectors within a subspace, or the identity where that fails."""
    return eigh(x, unrotated(x, "eigenvectors within a subspace could not be computed; its basis stays")).vectors


def follow_subspace(multiply: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """One step of subspace iteration towards the leading eigenvectors of a symmetric matrix A.

        H = qr(A u);  U = H eigenvectors(H^T A H)

    Args:
        multiply: A times a matrix `[..., m, r]`; A itself is never formed.
        u: an earlier basis, `[..., m, r]`.

    Returns:
        Orthonormal columns by falling eigenvalue of the projected A, `[..., m, r]`, each on the side of the same column
        of u. Where A u is zero, u.
    """
    power = multiply(u)
    h = orthonormal(power, Fallback(lambda: u, "a step of a subspace iteration failed; the last good basis is kept"))
    new = product(h, _turned(product(h.mT, multiply(h))))
    return torch.where(power.any(-1, keepdim=True).any(-2, keepdim=True), aligned(new, u), u)


def switch(u: Tensor, leading: int, draw: Tensor) -> Tensor:
    """Keep the leading columns, replace the others by random directions of the complement of all.

    Gong et al. 2025, arXiv:2502.07752, Alg. 2. Where the complement has too few columns, the next leading ones stay.

    Args:
        u: orthonormal columns by falling importance, `[..., m, r]`.
        leading: how many to keep.
        draw: random numbers, one per direction of the complement, `[..., m - r]`; the smallest are taken.

    Returns:
        Orthonormal columns, `[..., m, r]`.
    """
    count = min(u.shape[-1] - leading, draw.shape[-1])
    if count <= 0:
        return u
    index = draw.argsort(-1)[..., :count].unsqueeze(-2)
    try:
        rest = complement(u)
    except LinAlgError:
        failures.add("the complement of a subspace could not be computed; its basis stays")
        return u
    return torch.cat([u[..., : u.shape[-1] - count], rest.gather(-1, index.expand(*rest.shape[:-1], count))], -1)
