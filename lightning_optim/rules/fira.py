"""Fira: GaLore plus what its projection leaves out, scaled as Adam scales the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.ops.norms import norm, normalized
from lightning_optim.ops.projection import lift
from lightning_optim.rules.projected import Limited


@dataclass(frozen=True)
class Fira(Limited):
    """Fira: GaLore plus what its projection leaves out, scaled as Adam scales the rest.

    x = P^T g, u and c as in GaLore;  E = g - P x, its columns j times |u_j| / |x_j| (rows, where x = g P)
    d = c (alpha P u + eta E), where eta keeps |E| from growing by more than a factor of `limit` per step

    P is refreshed as in GaLore. `limit=None` leaves eta out; without `limiter_restarts` eta is the published one, under
    which a matrix whose gradient was once zero hardly gets a residual again. `residual_uses_alpha` takes
    E = g - alpha P x, as the authors' code does. `normalize` divides d by its root mean square; the adamw learning-rate
    convention sets it, for the residual has no scale of its own.

    Published runs use lr 0.01 with alpha 0.25, 0.0625 from a billion parameters on. For hidden matrices; vectors, and
    all parameters with `rank=0`, take plain Adam steps.

    Differs: signs of P and zero gradients, see GaLore; a residual that is nothing but rounding counts as zero.
    """

    alpha: float = 0.25
    """Factor of the low-rank step."""
    side: Literal["std", "reverse_std", "left", "right"] = "std"
    """Which side of a matrix is projected."""
    residual_uses_alpha: bool = False
    """Whether the residual is what is left of alpha times the projection (the authors' code)."""
    normalize: bool = False

    name: ClassVar = "fira"
    source: ClassVar = "Chen et al. 2024, arXiv:2410.01623, Alg. 1; order of operations of the authors' code"
    family: ClassVar = "low-rank"
    adamw_settings: ClassVar[Mapping[str, Any]] = {"normalize": True}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        if not self.projected_sides(m, n):
            return ADAMW_RMS
        return self.alpha if self.normalize else None

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        basis, x, u, correction = self.projected(g, s, t)
        if basis == (None, None):
            return u.mul_(correction)
        dim = -1 if basis[0] is None else -2
        sizes = vector_norm(u, dim=dim, keepdim=True) / (vector_norm(x, dim=dim, keepdim=True) + 1e-8)
        low = lift(u.mul_(self.alpha), *basis)
        lost = lift(x.mul_(self.alpha) if self.residual_uses_alpha else x, *basis)
        lost = torch.sub(g, lost, out=lost)
        residual = norm(lost) > 100 * torch.finfo(g.dtype).eps * norm(g)  # else it is rounding
        lost.mul_(sizes.mul_(residual))
        d = low.addcmul_(lost, self.compensation(lost, low, s, t)).mul_(correction)
        return normalized(d, self.alpha) if self.normalize else d

    def compensation(self, lost: Tensor, low: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """How much of the residual is added to the low-rank step.

        Args:
            lost: the scaled residual E, `[b, m, n]`.
            low: alpha P u.
            s: state.
            t: step.

        Returns:
            A factor of E, `[b, 1, 1]`.
        """
        return self.growth(lost, s, t)


@dataclass(frozen=True)
class FiraPlus(Fira):
    """Fira+: Fira whose residual has a fixed share of the low-rank step's norm.

    d = c alpha (P u + alpha_c E |P u| / |E|), E as in Fira

    The growth of E is not limited. Its RMS is known, so the adamw learning-rate convention needs no normalization.
    """

    alpha_c: float = 0.4
    """Norm of the residual, relative to that of the low-rank step."""
    limit: float | None = None
    """Largest growth of the residual per step; None, as published, for no limit."""

    name: ClassVar = "fira_plus"
    source: ClassVar = "Gong et al. 2025, arXiv:2502.07752, App. F.7"
    adamw_settings: ClassVar = {}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        if not self.projected_sides(m, n) or self.normalize:
            return super().rms(m, n)
        residual = self.alpha_c if min(self.rank, m, n) < min(m, n) else 0.0
        return ADAMW_RMS * self.alpha * self.share(m, n) * (1 + residual**2) ** 0.5

    def compensation(self, lost: Tensor, low: Tensor, s: SimpleNamespace, t: int) -> Tensor:  # noqa: D102
        return self.alpha_c * norm(low) / (norm(lost) + 1e-8)
