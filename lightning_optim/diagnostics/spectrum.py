"""Rank and scale of matrices, from their singular values.

Singular values are square roots of the eigenvalues of the small side's Gram matrix, in float64 (float32 on devices
that have no float64, never bfloat16). Every measure takes singular values `[..., k]`, largest first, and is NaN for a
zero matrix and for one that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.ops.moments import gram

LIMIT = 2048
"""The longest small side of which the whole spectrum is computed; larger matrices are sketched."""
NEWTON_SCHULZ_BAND = (0.68, 1.14)
"""Where five quintic iterations bring singular values above 1 % of the Frobenius norm."""


def _gram(a: Tensor) -> Tensor:
    """The Gram matrix of the smaller side, in float64 where the device has it."""
    return gram(a.to(torch.float32 if a.device.type == "mps" else torch.float64), left=a.shape[-2] <= a.shape[-1])


def singular_values(a: Tensor) -> Tensor:
    """All singular values, largest first; NaN for a matrix that is not finite.

    Args:
        a: `[..., m, n]`.

    Returns:
        `[..., k]`, accurate to about 1e-7 of the largest.
    """
    product = _gram(a)
    bad = ~product.isfinite().flatten(-2).all(-1)
    values = torch.linalg.eigvalsh(product.masked_fill(bad[..., None, None], 0.0)).flip(-1).clamp_(min=0.0).sqrt_()
    return values.masked_fill(bad.unsqueeze(-1), math.nan)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, math.nan)


def _entropy_rank(weights: Tensor) -> Tensor:
    total = weights.sum(-1)
    p = weights / total.unsqueeze(-1)
    return torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), math.nan)


def stable_rank(s: Tensor) -> Tensor:
    """|A|_F^2 / s_1^2, in [1, k].

    Returns:
        `[...]`.
    """
    return _share(s.square().sum(-1), s[..., 0].square())


def effective_rank(s: Tensor) -> Tensor:
    """Exponential of the entropy of s_i / sum s (Roy & Vetterli 2007), in [1, k].

    Returns:
        `[...]`.
    """
    return _entropy_rank(s)


def participation(s: Tensor) -> Tensor:
    """|A|_F^4 / sum s_i^4, in [1, k].

    Returns:
        `[...]`.
    """
    return _share(s.square().sum(-1).square(), s.pow(4).sum(-1))


def nuclear_rank(s: Tensor) -> Tensor:
    """(sum s)^2 / |A|_F^2, in [1, k].

    Returns:
        `[...]`.
    """
    return _share(s.sum(-1).square(), s.square().sum(-1))


def energy(s: Tensor, rank: int) -> Tensor:
    """The share of |A|_F^2 in the `rank` largest singular values.

    Returns:
        `[...]`, in (0, 1].
    """
    return _share(s[..., :rank].square().sum(-1), s.square().sum(-1))


def rank_at(s: Tensor, share: float = 0.9) -> Tensor:
    """The smallest rank that captures this share of |A|_F^2.

    Returns:
        `[...]`, floating-point.
    """
    total = s.square().sum(-1, keepdim=True)
    below = (s.square().cumsum(-1) < share * total * (1 - 1e-12)).sum(-1) + 1
    return torch.where(total[..., 0] > 0, below.to(s.dtype), math.nan)


def condition(s: Tensor) -> Tensor:
    """s_1 / s_k; infinite above 1e7, where the Gram matrix no longer resolves s_k.

    Returns:
        `[...]`.
    """
    ratio = _share(s[..., 0], s[..., -1].clamp(min=1e-300))
    ratio = torch.where(ratio > 1e7, math.inf, ratio)
    return torch.where(s[..., 0] > 0, ratio, math.nan)


def gaussian_stable_rank(m: int, n: int) -> float:
    """Stable rank of an `m x n` matrix of independent normal numbers: the line that "low rank" is compared with.

    Returns:
        m n / (sqrt(m) + sqrt(n))^2.
    """
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2


def orthogonality_error(s: Tensor) -> Tensor:
    """|O O^T - I|_F / sqrt(k) on the smaller side, from the singular values of O.

    Returns:
        `[...]`: the root mean square of s^2 - 1; 0.35 to 0.65 is normal after Newton-Schulz.
    """
    return (s.square() - 1).square().mean(-1).sqrt()


def outside_band(s: Tensor, band: tuple[float, float] = NEWTON_SCHULZ_BAND) -> Tensor:
    """The share of singular values outside a band.

    Returns:
        `[...]`, in [0, 1].
    """
    return ((s < band[0]) | (s > band[1])).to(s.dtype).mean(-1)


def sketch(a: Tensor, rank: int, generator: torch.Generator, *, power: int = 2, oversample: int = 8) -> Tensor:
    """The largest singular values by a randomized range finder with power iterations (Halko et al. 2011).

    Always below the true values; with power 2, energy@r is at least 0.84 of the true one even for Gaussian matrices.

    Args:
        a: `[m, n]`.
        rank: how many.
        generator: of the random test matrix, on the device of `a`.
        power: number of power iterations.
        oversample: extra columns.

    Returns:
        `[min(rank, k)]`, largest first.
    """
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    width = min(rank + oversample, *a.shape)
    x = torch.randn(a.shape[1], width, generator=generator, device=a.device, dtype=a.dtype)
    q = torch.linalg.qr(a @ x).Q
    for _ in range(power):
        q = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ q).Q).Q
    return singular_values(q.mT @ a)[:rank]


def measures(
    a: Tensor, generator: torch.Generator, *, ranks: Sequence[int] = (8, 32, 128), limit: int = LIMIT
) -> dict[str, Tensor]:
    """Every measure of one matrix.

    Args:
        a: `[m, n]`.
        generator: for the sketch of a matrix whose smaller side exceeds `limit`.
        ranks: of `energy@r`, cut to min(m, n).
        limit: longest small side of which the whole spectrum is computed.

    Returns:
        Name to scalar: `fro`, `rms`, `spec`, `stable_rank`, `participation`, `energy@r` and, from a whole spectrum,
        `eff_rank`, `nuc_rank`, `rank@90`, `rank@99`, `cond`; from a sketch, which under-estimates the energies and
        over-estimates the stable rank, `rank@90` where the sketch reaches it.
    """
    m, n = a.shape
    k = min(m, n)
    if k <= limit:
        s = singular_values(a)
        square = s.square().sum()
        out = {"stable_rank": stable_rank(s), "participation": participation(s), "eff_rank": effective_rank(s)}
        out |= {"nuc_rank": nuclear_rank(s), "cond": condition(s), "rank@99": rank_at(s, 0.99)}
        out["rank@90"] = rank_at(s)
        out |= {f"energy@{r}": energy(s, r) for r in sorted({min(r, k) for r in ranks})}
    else:
        s = sketch(a, max(ranks), generator)
        square = a.to(torch.promote_types(a.dtype, torch.float32)).square().sum(dtype=s.dtype)
        product = _gram(a)
        out = {
            "stable_rank": _share(square, s[0].square()),
            "participation": _share(square.square(), product.square().sum()),
        }
        captured = s.square().cumsum(-1) / square
        out["rank@90"] = torch.where(captured[-1] >= 0.9, (captured < 0.9).sum() + 1.0, math.nan)
        out |= {f"energy@{r}": captured[r - 1] for r in sorted({min(r, k) for r in ranks})}
    return {"fro": square.sqrt(), "rms": (square / (m * n)).sqrt(), "spec": s[0], **out}
