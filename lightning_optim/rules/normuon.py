"""NorMuon: Muon whose rows are divided by the root of a second moment of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

from torch import Tensor

from lightning_optim.core.rule import StateSpec, zeros
from lightning_optim.ops.norms import variance_factor
from lightning_optim.rules.muon import SCALES, Muon

Lines = Literal["rows", "longer"]


@dataclass(frozen=True)
class NorMuon(Muon):
    """NorMuon: Muon whose rows (output neurons) are divided by the root of a second moment of their own.

    O = orthogonalize(x) as in Muon;  v <- beta2 v + (1 - beta2) mean_cols(O^2);  u = O / max(sqrt(v), 1e-8)
    d = scale(m, n) u |O| / |u|

    The Frobenius norm is Muon's, so its learning rates hold; v needs no bias correction for the same reason.
    `lines="longer"` takes the columns of wide matrices in the place of their rows. With that, `contra=0.4` and a
    converged iteration it is Contra-Muon.

    Differs: the paper scales the direction to RMS 0.2 itself; `lr_convention="adamw"` does. The code adds 1e-8 to
    the root, or clamps it at 1e-5 (Contra-Muon): the same but for rows of that size.
    """

    beta2: float = 0.95
    """Decay rate of the second moments of rows."""
    lines: Lines = "rows"
    """Which lines have a second moment of their own."""

    name: ClassVar = "normuon"
    source: ClassVar = "Li et al. 2025, arXiv:2510.05491, Alg. 1; norm as in the authors' code"

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        letters = "1n" if self.lines == "longer" and m < n else "m1"
        return {**self.state, "second_momentum": zeros(letters)}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        o = self.orthogonal(g, s, t)
        return o.mul_(variance_factor(o, s.second_momentum, self.beta2) * SCALES[self.scale](*g.shape[-2:]))
