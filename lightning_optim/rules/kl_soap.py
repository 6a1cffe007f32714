"""KL-SOAP: SOAP whose factors are whitened by each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_optim.rules.rotated import Factors
from lightning_optim.rules.soap import SOAP


@dataclass(frozen=True)
class KLSOAP(SOAP):
    """KL-SOAP: SOAP whose factors are whitened by each other, which minimizes the Kullback-Leibler divergence.

    L <- b L + (1 - b) G R^-1 G^T / n;  R <- b R + (1 - b) G^T L^-1 G / m;  when due Q <- qr(L Q), V stays as it is

    The inverses are those of eigenvalues kept beside Q (`ops.eigenbasis.average_kl_`), which start at 0.1; the first
    step takes G G^T / n and G^T G / m. M, V and the step as in SOAP, without bias correction. Published with
    `constraint="hyperball"` and lr 0.018.

    The eigenvalues are at least 6e-8 (an inverse root of 4000), so gradients far below that in root mean square are
    whitened less.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.9)
    weight_decay: float = 0.0
    refresh: str = "fixed:1"
    correct_bias: bool = False
    factors: Factors = "kl"
    """Factors whitened by each other; see SOAP."""

    name: ClassVar = "kl_soap"
    source: ClassVar = (
        "Lin et al. 2025, arXiv:2509.03378; modded-nanogpt, records/track_3_optimization: pull request 293"
    )
