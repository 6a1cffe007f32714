"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, MomentumRule, Rule, StateSpec, zeros
from lightning_optim.ops.norms import normalized, rms
from lightning_optim.ops.projection import lift, project
from lightning_optim.rules.rotated import Factors, Rotated, RotationDtype, Sides, by_side


@dataclass(frozen=True)
class SOAP(MomentumRule, Rotated):
    """SOAP: Adam in the eigenbasis of Shampoo's factors.

    G' = Q_L^T G Q_R;  M <- b1 M + (1 - b1) G';  V <- b2 V + (1 - b2) G'^2
    d = sqrt(1 - b2^k) / (1 - b1^k) Q_L (M / (sqrt(V) + eps)) Q_R^T
    L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G;  when due Q <- qr(L Q), V's order follows, M turns with Q

    The first step only computes L, R and their eigenvectors (k counts from the second); without `skip_first` it is
    taken as well, in that basis. Decay multiplies the weight after the step. A side longer than `max_precond_dim` is
    not rotated, nor is one that `sides` leaves out; vectors are not, unless `precondition_1d`. `shampoo_beta` None is
    b2. `refresh="fixed:1"` follows the bases by one QR per step. `normalize_grads` scales d to an RMS of 1 before its
    correction, published for rare refreshes. `factors="kl"` are those of `kl_soap`. Its learning rate is about AdamW's.

    Where gradients lack directions, M and V hold rounding there, whose ratio is a full step: finite, and the same in
    every run, but not on every machine. `floor` adds that share of the RMS of sqrt(V) to eps. (8 x 12 gradients of
    rank 2: float32 is off by 13 times the displacement without it, by 0.17 with 1e-3, by 0.02 with 1e-2.)

    Differs: M is turned into the new basis at refreshes only; in between the reference's two rotations cancel. The
    reference refreshes all matrices in the same step, `refresh="fixed:10"`. `skip_first`, `sides` and `floor` are ours.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 1e-2
    refresh: str = "staggered:10"
    max_precond_dim: int = 10000
    precondition_1d: bool = False
    """Whether vectors are rotated, too."""
    normalize_grads: bool = False
    """Whether the direction is scaled to an RMS of 1."""
    correct_bias: bool = True
    factors: Factors = "gram"
    sides: Sides = "both"
    skip_first: bool = True
    """Whether the first step only computes the bases."""
    floor: float = 0.0
    """Share of the RMS of the second moment's root that is added to eps."""
    rotation_dtype: RotationDtype = "float32"

    name: ClassVar = "soap"
    source: ClassVar = "Vyas et al. 2024, arXiv:2409.11321, Alg. 3; order of operations of the authors' code"
    family: ClassVar = "structured-fisher"
    search: ClassVar = Rule.search | {"betas": ((0.95, 0.95), (0.9, 0.95))}
    decay: ClassVar = "after"

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        moments = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("mn", nonnegative=True)}
        return moments | self.rotation(m, n, vector=vector)

    def rotated_sides(self, m: int, n: int, *, vector: bool = False) -> tuple[str, ...]:  # noqa: D102
        sides = super().rotated_sides(m, n)
        return tuple(x for x in sides if x == "right" and self.precondition_1d) if vector else sides

    def skips_update(self, t: int) -> bool:  # noqa: D102
        return t == 1 and self.skip_first

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return 1.0 if self.normalize_grads else ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        weight = 1 - (self.betas[1] if self.shampoo_beta is None else self.shampoo_beta)
        if t == 1:
            self.accumulate(g, s, weight, t)
            s.refresh(g)
            if self.skip_first:
                return g
        rotated = self.to_eigenbasis(g, s)
        (b1, b2), k = self.betas, t - self.skip_first
        m = self.update_ema(s, rotated, b1, k)
        s.exp_avg_sq.mul_(b2).addcmul_(rotated, rotated, value=1 - b2)
        scale = s.exp_avg_sq.sqrt()
        scale += self.eps + (self.floor * rms(scale) if self.floor else 0.0)
        d = self.from_eigenbasis(m / scale, s)
        if self.normalize_grads:
            d = normalized(d)
        if self.correct_bias:
            d = d * ((1 - b2**k) ** 0.5 / self.bias_correction(b1, k))
        if t > 1:
            self.accumulate(g, s, weight, t)
            s.refresh(g)
        return d

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        outside = {name: lift(getattr(s, name), **by_side(s, "basis")) for name in self.ema_names()}
        super().refresh_preconditioner(g, s, t)
        for name, m in outside.items():
            setattr(s, name, project(m, **by_side(s, "basis")))
