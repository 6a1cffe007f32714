"""NorMuon: Muon whose rows are divided by the root of a second moment of their own."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import zeros
from lightning_optim.rules.muon import SCALES, Muon


@dataclass(frozen=True)
class NorMuon(Muon):
    """NorMuon: Muon whose rows (output neurons) are divided by the root of a second moment of their own.

    O = orthogonalize(x) as in Muon;  v <- beta2 v + (1 - beta2) mean_cols(O^2);  u = O / (sqrt(v) + 1e-8)
    d = scale(m, n) u |O| / |u|

    The Frobenius norm is Muon's, so its learning rates hold; v needs no bias correction for the same reason.

    Differs: the paper scales the direction to RMS 0.2 itself; `lr_convention="adamw"` does.
    """

    beta2: float = 0.95

    name: ClassVar = "normuon"
    source: ClassVar = "Li et al. 2025, arXiv:2510.05491, Alg. 1; norm as in the authors' code"
    state: ClassVar = {"momentum_buffer": zeros("mn"), "second_momentum": zeros("m1")}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        o = self.orthogonal(g, s)
        rows = vector_norm(o, dim=-1, keepdim=True)
        s.second_momentum.lerp_(rows.square() / o.shape[-1], 1 - self.beta2)
        inverse = 1 / (s.second_momentum.sqrt() + 1e-8)
        before = vector_norm(rows, dim=-2, keepdim=True)
        after = vector_norm(rows * inverse, dim=-2, keepdim=True).clamp_(min=1e-8)
        return o.mul_(inverse * (before / after * SCALES[self.scale](*g.shape[-2:])))
