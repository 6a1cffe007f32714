"""Dion: a low-rank orthonormal step by one power iteration on a momentum with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import Rule, zeros
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import Fallback, orthonormal

REST = "an orthonormal basis could not be computed; the matrix does not move and its momentum keeps the gradient"


@dataclass(frozen=True)
class Dion(Rule):
    """Dion: a low-rank orthonormal step by one power iteration on a momentum with error feedback.

    M <- M + G;  P = qr(M Q);  R = M^T P;  M <- M - (1 - momentum) P R^T;  Q <- R / (|R|_columns + eps)
    d = sqrt(m / n) P Q^T

    What the step of rank `rank` misses stays in M (error feedback). Q starts with normal numbers. The columns of R are
    normalized, not orthogonalized, so full rank is not Muon. For hidden matrices; the published runs use a
    rank of a quarter of the shorter side and more.

    Replicas need only exchange M Q and M^T P, (m + n) rank numbers instead of m n (`RuleOptimizer.compress`, Sec. 3.2
    of the paper): both are linear in M, so that every replica may keep the M of its own gradients.

    Differs: P comes from Householder QR (the distributed code uses a randomized Cholesky QR).
    """

    lr: float = 0.01
    momentum: float = 0.95
    """1 less the share of the step's part of the momentum that is removed after a step."""
    rank: int = 256
    """Rank of a step; a quarter of the shorter side and more is published."""
    eps: float = 1e-8
    weight_decay: float = 0.01

    name: ClassVar = "dion"
    source: ClassVar = "Ahn et al. 2025, arXiv:2504.05295, Alg. 1; order of operations of the authors' dion_simple"
    family: ClassVar = "orthogonalized"
    state: ClassVar = {"momentum_buffer": zeros("mn"), "basis": zeros("nr", exact=True)}
    vectors: ClassVar = False
    compresses: ClassVar = ("momentum_buffer",)

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum above 1, a rank of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.momentum > 1 or self.rank < 1:
            raise ValueError(f"dion: needs momentum <= 1 and rank >= 1, got {self.momentum}, {self.rank}")

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return (m / n) ** 0.5 * (min(self.rank, m, n) / (m * n)) ** 0.5

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        m, n = g.shape[-2:]
        q = s.noise("nr") if t == 1 else s.basis
        s.momentum_buffer.add_(g)
        power = s.mean(product(s.momentum_buffer, q))
        left = orthonormal(power, Fallback(lambda: torch.zeros_like(power), REST))
        r = s.mean(product(s.momentum_buffer.mT, left))
        s.momentum_buffer.baddbmm_(left, r.mT, alpha=self.momentum - 1)
        length = vector_norm(r, dim=-2, keepdim=True)
        s.basis = (r / (length + self.eps)).where(length > 0, q)
        return product(left * (length > 0), s.basis.mT) * (m / n) ** 0.5
