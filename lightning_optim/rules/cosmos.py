"""COSMOS: Adam in the leading subspace of the columns, Muon on the rest."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import Rule, zeros
from lightning_optim.ops.eigenbasis import unaligned
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import Fallback, orthonormal
from lightning_optim.ops.lowrank import leading_basis
from lightning_optim.ops.moments import gram
from lightning_optim.ops.norms import norm, normalized
from lightning_optim.ops.orthogonal import DTYPES, IterationDtype, orthogonalize
from lightning_optim.ops.projection import lift, project


@dataclass(frozen=True)
class COSMOS(Rule):
    """COSMOS: Adam in the leading subspace of the columns, Muon on the rest.

    M <- b1 M + G;  N = (G + b1 M) / (1 + b1 w), w = (1 - b1^t) / (1 - b1)
    when due  U' = U, U = qr(b2 U S + (1 - b2) G^T G U), S <- (U'^T U)^T S (U'^T U)
    S <- b2 S + (1 - b2) (G U)^T G U;  V <- b2 V + (1 - b2) (G U)^2
    A = (N U) / (sqrt(V / (1 - b2^t)) + eps) U^T;  B = orthogonalize(N - N U U^T), scaled to RMS 1
    d = lr_ratio (A + gamma B), scaled to RMS lr_ratio

    `lr` is that of the AdamW beside it; matrices move `lr_ratio` as fast, while weight decay uses `lr`. V is not
    rotated with U. `nesterov` forms N as above, `momentum` as M / w, `gradient` as G / w.

    Differs: a rest of rounding size counts as none, where the authors' code scales it up (at full rank, or at the first
    step of a low-rank gradient). Their code forms G / w where Nesterov momentum is off; that is `gradient`. In the
    paper's equations eps is inside the root.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    rank: int = 64
    gamma: float = 0.2
    """Weight of the orthogonalized rest beside the subspace's Adam."""
    lr_ratio: float = 0.1
    """Factor of the learning rate for matrices; weight decay uses `lr` itself."""
    momentum: Literal["nesterov", "momentum", "gradient"] = "nesterov"
    """Which form of the momentum is used: Nesterov's, plain, or the gradient alone."""
    eps: float = 1e-8
    ns_steps: int = 5
    ns_dtype: IterationDtype = "bfloat16"
    weight_decay: float = 0.0
    refresh: str = "fixed:1"

    name: ClassVar = "cosmos"
    source: ClassVar = "Liu et al. 2025, arXiv:2502.17410, Alg. 1; learning rates as in the authors' code"
    family: ClassVar = "orthogonalized"
    state: ClassVar = {
        "exp_avg": zeros("mn"),
        "exp_avg_sq": zeros("mr", nonnegative=True),
        "basis": zeros("nr", exact=True),
        "factor": zeros("rr"),
    }
    vectors: ClassVar = False
    preconditioners: ClassVar = ("basis",)

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a rank, lr_ratio or number of iterations of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.rank < 1 or self.ns_steps < 1 or self.lr_ratio == 0:
            raise ValueError(
                "cosmos: rank, ns_steps and lr_ratio must be positive, "
                f"got {self.rank}, {self.ns_steps}, {self.lr_ratio}"
            )

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return self.lr_ratio

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        b1, b2 = self.betas
        s.exp_avg.mul_(b1).add_(g)
        s.refresh(g)
        inner = project(g, right=s.basis)
        s.factor.lerp_(gram(inner, left=False), 1 - b2)
        s.exp_avg_sq.mul_(b2).addcmul_(inner, inner, value=1 - b2)
        n = self._filtered(g, s.exp_avg, t)
        inner = project(n, right=s.basis)
        rest = n - lift(inner, right=s.basis)
        rest = rest * (norm(rest) > 100 * torch.finfo(n.dtype).eps * norm(n))
        rest = orthogonalize(rest, self.ns_steps, dtype=DTYPES[self.ns_dtype])
        adam = inner / (s.exp_avg_sq.sqrt() / (1 - b2**t) ** 0.5 + self.eps)
        return normalized(lift(adam, right=s.basis).add_(normalized(rest, self.gamma)), self.lr_ratio)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        if t == 1:
            s.basis = leading_basis(g.mT, s.basis.shape[-1])
            return
        old = s.basis
        fallback = Fallback(lambda: old, "a step of a subspace iteration failed; the last good basis is kept")
        s.basis = orthonormal(self._power(g, s), fallback)
        s.factor = project(s.factor, *[product(old.mT, s.basis)] * 2)

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:  # noqa: D102
        return unaligned(self._power(g, s), s.basis)

    def _power(self, g: Tensor, s: SimpleNamespace) -> Tensor:
        """(b2 U S U^T + (1 - b2) G^T G) U."""
        return self.betas[1] * product(s.basis, s.factor) + (1 - self.betas[1]) * product(g.mT, product(g, s.basis))

    def _filtered(self, g: Tensor, m: Tensor, t: int) -> Tensor:
        weight = (1 - self.betas[0] ** t) / (1 - self.betas[0])
        if self.momentum == "nesterov":
            return torch.add(g, m, alpha=self.betas[0]) / (1 + self.betas[0] * weight)
        return (m if self.momentum == "momentum" else g) / weight
