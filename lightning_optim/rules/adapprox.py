"""Adapprox: a second moment of low rank, computed at every step by a random sketch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, MomentumRule, StateSpec, zeros
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lowrank import range_basis
from lightning_optim.ops.norms import clip_rms_


@dataclass(frozen=True)
class Adapprox(MomentumRule):
    """Adapprox: a second moment of low rank, computed at every step by a random sketch.

    V = b2 max(Q U^T, 0) + (1 - b2) g^2;  Q = leading left singular vectors of V;  U = V^T Q
    u = g / (sqrt(V) + eps), clipped to RMS clip_threshold;  m <- b1 m + (1 - b1) u;  d = m, or u where b1 is 0

    `iterations` products with V and V^T and `oversampling` columns more than `rank` find Q. The sketch depends on
    the seed, the step and the matrix only. Nothing is corrected for the start from zero; the clip bounds the first
    steps. Its learning rate is about AdamW's.

    Differs: the rank is fixed, where the publication lets it grow while the error exceeds 1 %; state is allocated
    for the largest rank either way. Columns are turned to the singular vectors inside the sketch.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    rank: int = 32
    """Rank of the stored second moment."""
    iterations: int = 5
    """Products with the second moment that find its leading vectors."""
    oversampling: int = 5
    """Columns of the random sketch beyond `rank`."""
    clip_threshold: float = 1.0

    name: ClassVar = "adapprox"
    source: ClassVar = "Zhao et al. 2024, arXiv:2403.14958"
    family: ClassVar = "memory-efficient"
    vectors: ClassVar = False

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no rank, no iterations, or what `Rule.validate` raises.
        """
        super().validate()
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(f"adapprox: needs rank >= 1 and iterations >= 1, got {self.rank}, {self.iterations}")

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        factors = {"factor_left": zeros("mr", exact=True), "factor_right": zeros("nr", exact=True)}
        return {"exp_avg": zeros("mn"), **factors} if self.betas[0] else factors

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS if self.betas[0] else self.clip_threshold

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        b1, b2 = self.betas
        v = product(s.factor_left, s.factor_right.mT).clamp_(min=0).mul_(b2).addcmul_(g, g, value=1 - b2)
        s.factor_left = range_basis(v, self._sketch(g, s), s.factor_left.shape[-1], power=self.iterations - 1)
        s.factor_right = product(v.mT, s.factor_left)
        u = clip_rms_(torch.div(g, v.sqrt_().add_(self.eps), out=v), self.clip_threshold)
        return self.update_ema(s, u, b1, t) if b1 else u

    def _sketch(self, g: Tensor, s: SimpleNamespace) -> Tensor:
        rank = s.factor_left.shape[-1]
        count = min(rank + self.oversampling, *g.shape[-2:])
        return torch.cat([s.noise("nr", stream=i) for i in range(math.ceil(count / rank))], -1)[..., :count]
