"""Eigen-Adam: Adam in the eigenbasis of the Gram matrix of the shorter side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, MomentumRule, StateSpec, eye, zeros
from lightning_optim.ops.eigenbasis import eigenbasis, off_diagonal
from lightning_optim.ops.moments import average_square_, gram
from lightning_optim.ops.projection import lift, project


@dataclass(frozen=True)
class EigenAdam(MomentumRule):
    """Eigen-Adam: Adam in the eigenbasis of the Gram matrix of the shorter side.

    Q <- b3 Q + (1 - b3) G G^T;  M <- b1 M + (1 - b1) G;  when due U = eigenvectors(Q)
    V <- b2 V + (1 - b2) (U^T G)^2;  d = U (U^T M / (sqrt(V) + eps))

    for m <= n; G^T G and the columns otherwise. V stays as it is when U changes. Without `correct_bias`, as
    published, the first steps have an RMS of (1 - b1) / sqrt(1 - b2).

    Differs: eps is ours (the publication divides by sqrt(V)). It refreshes all matrices in the same step, every t that
    is a multiple of 200, which is `refresh="fixed:200:200"`.
    """

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    refresh: str = "staggered:200"
    correct_bias: bool = False

    name: ClassVar = "eigen_adam"
    source: ClassVar = "Gong et al. 2025, arXiv:2502.07752, Alg. 7"
    family: ClassVar = "structured-fisher"
    vectors: ClassVar = False
    preconditioners: ClassVar = ("basis",)

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        side = "mm" if m <= n else "nn"
        return {
            "exp_avg": zeros("mn"),
            "exp_avg_sq": zeros("mn", nonnegative=True),
            "factor": zeros(side),
            "basis": eye(side),
        }

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        b1, b2, b3 = self.betas
        left = g.shape[-2] <= g.shape[-1]
        s.factor.lerp_(gram(g, left=left), 1 - b3)
        s.refresh(g)
        sides = (s.basis, None) if left else (None, s.basis)
        m = self.update_ema(s, g, b1, t)
        average_square_(s.exp_avg_sq, project(g, *sides), b2)
        d = lift(project(m, *sides).div_(s.exp_avg_sq.sqrt().add_(self.eps)), *sides)
        return d.mul_((1 - b2**t) ** 0.5 / self.bias_correction(b1, t)) if self.correct_bias else d

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        s.basis = eigenbasis(s.factor, previous=s.basis)

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:  # noqa: D102
        return off_diagonal(s.factor, s.basis, t)
