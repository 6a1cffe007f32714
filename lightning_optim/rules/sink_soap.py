"""SinkSOAP: a momentum whose rows and columns are balanced in SOAP's eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_optim.rules.rotated import Decomposition
from lightning_optim.rules.soap_muon import SOAPMuon


@dataclass(frozen=True)
class SinkSOAP(SOAPMuon):
    """SinkSOAP: a momentum whose rows and columns are balanced in SOAP's eigenbasis, for hidden matrices.

    L <- beta L + (1 - beta) G G^T;  R likewise;  Q_L, Q_R their eigenvectors, recomputed;  A = sinkhorn(Q_L^T U Q_R)
    d = scale(m, n) Q_L A Q_R^T, at the norm of a polar factor;  its longer lines as in NorMuon, squares excepted

    with beta = `shampoo_beta` (`beta2` if None) and U as in Muon. SOAP-Muon with Sinkhorn's iteration for the second
    moment and no orthogonalization. Two eigendecompositions at every step: the most expensive rule of its family.

    inner_eps is absolute: where gradients have a root mean square below 1e-3, it flattens what is balanced.
    """

    lr: float = 0.04
    beta2: float = 0.95
    weight_decay: float = 0.0
    refresh_first: bool = True
    decomposition: Decomposition = "eigh"
    sinkhorn: int = 10
    restore: Literal["gram", "fro", "none"] = "none"
    finish: Literal["polar", "norm", "none"] = "norm"
    lines: Literal["none", "rows", "longer", "unequal"] = "unequal"

    name: ClassVar = "sink_soap"
    source: ClassVar = "Jordan et al., modded-nanogpt, records/track_3_optimization: pull request 298"
