"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import ADAMW_RMS, Rule, Slot, eye, zeros
from lightning_optim.ops.eigenbasis import eigenbasis, follow_eigenbasis, off_diagonal


@dataclass(frozen=True)
class SOAP(Rule):
    """SOAP: Adam in the eigenbasis of Shampoo's factors.

    G' = Q_L^T G Q_R;  M <- b1 M + (1 - b1) G';  V <- b2 V + (1 - b2) G'^2
    d = sqrt(1 - b2^k) / (1 - b1^k) Q_L (M / (sqrt(V) + eps)) Q_R^T
    L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G;  when due Q <- qr(L Q), V's order follows, M turns with Q

    The first step only computes L, R and their eigenvectors (k counts from the second); decay multiplies the weight
    after the step. A side longer than `max_precond_dim` is not rotated; vectors are not, unless `precondition_1d`.
    `shampoo_beta` None is b2. Its learning rate is about AdamW's.

    Differs: M is turned into the new basis at refreshes only; in between the reference's two rotations cancel. The
    reference refreshes all matrices in the same step, `refresh="fixed:10"`.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 1e-2
    refresh: str = "staggered:10"
    max_precond_dim: int = 10000
    precondition_1d: bool = False
    normalize_grads: bool = False
    correct_bias: bool = True

    name: ClassVar = "soap"
    source: ClassVar = "Vyas et al. 2024, arXiv:2409.11321, Alg. 3; order of operations of the authors' code"
    decay: ClassVar = "after"
    costly: ClassVar = ("basis_left", "basis_right")

    def slots(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, Slot]:  # noqa: D102
        out = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("mn", nonnegative=True)}
        if m <= self.max_precond_dim and not vector:
            out |= {"factor_left": zeros("mm"), "basis_left": eye("mm")}
        if n <= self.max_precond_dim and (self.precondition_1d or not vector):
            out |= {"factor_right": zeros("nn"), "basis_right": eye("nn")}
        return out

    def rests(self, t: int) -> bool:  # noqa: D102
        return t == 1

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        if t == 1:
            self._observe(g, s)
            s.refresh(g)
            return g
        b1, b2 = self.betas
        turned = _rotate(g, s)
        s.exp_avg.lerp_(turned, 1 - b1)
        s.exp_avg_sq.mul_(b2).addcmul_(turned, turned, value=1 - b2)
        d = _rotate(s.exp_avg / s.exp_avg_sq.sqrt().add_(self.eps), s, back=True)
        if self.normalize_grads:
            d = d / (vector_norm(d, dim=(-2, -1), keepdim=True) / (d.shape[-2] * d.shape[-1]) ** 0.5 + 1e-30)
        if self.correct_bias:
            d = d * ((1 - b2 ** (t - 1)) ** 0.5 / (1 - b1 ** (t - 1)))
        self._observe(g, s)
        s.refresh(g)
        return d

    def rebuild(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        if t == 1:
            for side in _sides(s):
                setattr(s, f"basis_{side}", eigenbasis(getattr(s, f"factor_{side}")))
            return
        m = _rotate(s.exp_avg, s, back=True)
        for side in _sides(s):
            basis, order = follow_eigenbasis(getattr(s, f"factor_{side}"), getattr(s, f"basis_{side}"))
            setattr(s, f"basis_{side}", basis)
            dim, index = (-2, order.unsqueeze(-1)) if side == "left" else (-1, order.unsqueeze(-2))
            s.exp_avg_sq = s.exp_avg_sq.gather(dim, index.expand_as(s.exp_avg_sq))
        s.exp_avg = _rotate(m, s)

    def staleness(self, g: Tensor, s: SimpleNamespace) -> Tensor:  # noqa: D102
        sides = [off_diagonal(getattr(s, f"factor_{x}"), getattr(s, f"basis_{x}")) for x in _sides(s)]
        return torch.stack(sides).amax(0)

    def _observe(self, g: Tensor, s: SimpleNamespace) -> None:
        weight = 1 - (self.betas[1] if self.shampoo_beta is None else self.shampoo_beta)
        for side in _sides(s):
            getattr(s, f"factor_{side}").lerp_(g @ g.mT if side == "left" else g.mT @ g, weight)


def _sides(s: SimpleNamespace) -> list[str]:
    return [side for side in ("left", "right") if hasattr(s, f"basis_{side}")]


def _rotate(x: Tensor, s: SimpleNamespace, *, back: bool = False) -> Tensor:
    """Into the eigenbasis, or back."""
    for side in _sides(s):
        q = getattr(s, f"basis_{side}")
        if side == "left":
            x = (q if back else q.mT) @ x
        else:
            x = x @ (q.mT if back else q)
    return x
