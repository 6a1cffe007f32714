"""Muon^2: a momentum over the root of the gradient's second moment, then orthogonalized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_optim.ops.orthogonal import Divisor
from lightning_optim.rules.rotated import Sides
from lightning_optim.rules.soap_muon import SOAPMuon


@dataclass(frozen=True)
class MuonSq(SOAPMuon):
    """Muon^2: a momentum over the root of the gradient's second moment, then orthogonalized, for hidden matrices.

    V <- beta2 V + (1 - beta2) G^2;  d = scale(m, n) orthogonalize(U / (sqrt(V) + inner_eps)), U as in Muon

    SOAP-Muon without a basis. The iteration does not see the scale, so nothing is corrected for bias. Published with lr
    0.1 and a weight decay of 0.0125.
    """

    lr: float = 0.02
    ns_divisor: Divisor = "fro"
    beta2: float = 0.95
    inner_eps: float = 1e-10
    inner_eps_added: bool = True
    sides: Sides = "none"
    second_moment: Literal["gradient", "momentum"] = "gradient"
    restore: Literal["gram", "fro", "none"] = "none"

    name: ClassVar = "muon_sq"
    source: ClassVar = "2026, arXiv:2604.09967; modded-nanogpt, records/track_3_optimization: pull request 266"
