"""Alice and Alice-0: Adam in a leading subspace that is tracked, switched and compensated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import MomentumRule, StateSpec, zeros
from lightning_optim.ops.eigenbasis import unaligned
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lowrank import follow_subspace, leading_basis, switch
from lightning_optim.ops.moments import average_square_, gram
from lightning_optim.ops.norms import growth_factor, norm, normalized
from lightning_optim.ops.projection import lift, project


@dataclass(frozen=True)
class Alice(MomentumRule):
    """Alice: Adam in a leading subspace that is tracked, switched and compensated.

    For m <= n (wide; tall matrices through their transpose), U [m, r] with orthonormal columns:
    when due  U = one step of subspace iteration on b3 U Q U^T + (1 - b3) G G^T, from U;
              its first `leading` columns stay, the others become random directions of the complement
    g = U^T G;  Q <- b3 Q + (1 - b3) g g^T;  M <- b1 M + (1 - b1) g;  V <- b2 V + (1 - b2) g^2;  w = M / (sqrt(V) + eps)
    p <- b1 p + (1 - b1) (sums over rows of G^2 - g^2);  C = sqrt(m - r) (G - U g) / sqrt(p)
    d = alpha (U w + alpha_c C), where |C| may grow by a factor of `limit` per step at most

    The first U holds the leading left singular vectors of G. b3 = 0 tracks nothing (`alice0`). `switch=False` keeps the
    whole U, `compensation="none"` leaves C out: without all three it is GaLore with a power step. `fira_plus` is C =
    column norms of w over those of g times G - U g, limited, then scaled to the norm of U w. Neither U, Q, M nor V
    is turned when U changes, and there is no bias correction, as published: warm the learning rate up.
    `normalize` scales d to an RMS of `alpha`; the adamw learning-rate convention sets it.

    Signs of eigenvectors, which the publication leaves open, are those of the columns of the U before.

    Differs: the printed iteration starts from U = 0 and returns the small eigenvectors alone, which cannot be meant.
    eps is ours. All matrices are refreshed at t = 1 and the multiples of 200 there: `refresh="fixed:200:200"`.
    """

    lr: float = 0.02
    betas: tuple[float, float, float] = (0.9, 0.9, 0.999)
    """Decay rates of momentum, second moment and tracked Gram matrix."""
    rank: int = 128
    leading: int = 40
    """Leading columns of the basis that stay at a refresh; the others are drawn from the complement."""
    alpha: float = 0.3
    """Factor of the direction."""
    alpha_c: float = 0.4
    """Factor of the compensation, the part outside the subspace."""
    limit: float = 1.01
    switch: bool = True
    """Whether columns beyond `leading` are replaced by random ones at a refresh."""
    compensation: Literal["optimal", "fira_plus", "none"] = "optimal"
    """What is done with the gradient outside the subspace."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    refresh: str = "staggered:200"
    normalize: bool = False

    name: ClassVar = "alice"
    source: ClassVar = "Gong et al. 2025, arXiv:2502.07752, Alg. 2-4, 10"
    family: ClassVar = "low-rank"
    vectors: ClassVar = False
    preconditioners: ClassVar = ("basis",)
    adamw_settings: ClassVar = {"normalize": True}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a rank or alpha of 0, more leading columns than the rank, or what `Rule.validate` raises.
        """
        super().validate()
        if self.rank < 1 or self.leading > self.rank or self.alpha == 0:
            raise ValueError(
                f"{self.name}: needs rank >= 1, leading <= rank and alpha > 0, "
                f"got {self.rank}, {self.leading}, {self.alpha}"
            )

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        short, long = "mn" if m <= n else "nm"
        out = {
            "exp_avg": zeros(f"r{long}"),
            "exp_avg_sq": zeros(f"r{long}", nonnegative=True),
            "basis": zeros(f"{short}r", exact=True),
        }
        if self.betas[2]:
            out["factor"] = zeros("rr")
        if self.compensation == "optimal":
            out["residual"] = zeros(f"1{long}")
        return out if self.compensation == "none" else out | {"norm": zeros("11")}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return self.alpha if self.normalize else None

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        b1, b2, b3 = self.betas
        x = _wide(g)
        s.refresh(g)
        inner = project(x, s.basis)
        if b3:
            s.factor.lerp_(gram(inner, left=True), 1 - b3)
        m = self.update_ema(s, inner, b1, t)
        average_square_(s.exp_avg_sq, inner, b2)
        w = m / (s.exp_avg_sq.sqrt().add_(self.eps))
        d = lift(w, s.basis)
        if self.compensation != "none" and s.basis.shape[-1] < x.shape[-2]:
            rest = self._compensation(x, inner, w, s)
            if self.compensation == "fira_plus":
                rest = rest * (norm(d) / (norm(rest) + 1e-8))
            d.add_(rest, alpha=self.alpha_c)
        d = normalized(d, self.alpha) if self.normalize else d.mul_(self.alpha)
        return d if x is g else d.mT

    def _compensation(self, x: Tensor, inner: Tensor, w: Tensor, s: SimpleNamespace) -> Tensor:
        """What the subspace misses, scaled by column and limited in its growth."""
        if self.compensation == "optimal":
            missed = vector_norm(x, dim=-2, keepdim=True).square() - vector_norm(inner, dim=-2, keepdim=True).square()
            s.residual.lerp_(missed.clamp(min=0), 1 - self.betas[0])
            scale = torch.where(s.residual > 0, (x.shape[-2] - inner.shape[-2]) ** 0.5 * s.residual.rsqrt(), 0.0)
        else:
            scale = vector_norm(w, dim=-2, keepdim=True) / (vector_norm(inner, dim=-2, keepdim=True) + 1e-8)
        rest = (x - lift(inner, s.basis)).mul_(scale)
        size = norm(rest)
        factor = growth_factor(size, s.norm, self.limit)
        s.norm = factor * size
        return rest.mul_(factor)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        x, old = _wide(g), s.basis
        if t == 1:
            s.basis = leading_basis(x, old.shape[-1])
        else:
            s.basis = follow_subspace(lambda y: self._tracked(y, x, old, s), old)
        if self.switch:
            draw = s.noise("m1" if x is g else "n1")[..., old.shape[-1] :, 0]
            s.basis = switch(s.basis, min(self.leading, old.shape[-1]), draw)

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """What the tracked matrix leaves off the diagonal in the leading columns; the others are drawn, not found.

        Returns:
            `[b]`, in [0, 1].
        """
        leading_basis = s.basis[..., : self.leading] if self.switch else s.basis
        return unaligned(self._tracked(leading_basis, _wide(g), s.basis, s), leading_basis)

    def _tracked(self, y: Tensor, x: Tensor, u: Tensor, s: SimpleNamespace) -> Tensor:
        """(b3 U Q U^T + (1 - b3) G G^T) y."""
        b3, new = self.betas[2], product(x, product(x.mT, y))
        return b3 * lift(product(s.factor, project(y, u)), u) + (1 - b3) * new if b3 else new


def _wide(g: Tensor) -> Tensor:
    return g.mT if g.shape[-2] > g.shape[-1] else g


@dataclass(frozen=True)
class Alice0(Alice):
    """Alice-0: Alice without tracking.

    See `Alice`, with b3 = 0: the subspace is followed by the present gradient alone.
    """

    betas: tuple[float, float, float] = (0.9, 0.9, 0.0)

    name: ClassVar = "alice0"
    source: ClassVar = "Gong et al. 2025, arXiv:2502.07752, Alg. 2-4 with b3 = 0"
