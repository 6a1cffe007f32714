"""MOSO: one-sided SOAP of the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

from torch import Tensor

from lightning_optim.ops.norms import clip_rms_
from lightning_optim.rules.muon import Scale
from lightning_optim.rules.rotated import Sides
from lightning_optim.rules.soap_muon import SOAPMuon


@dataclass(frozen=True)
class MOSO(SOAPMuon):
    """MOSO: one-sided SOAP of the momentum, for hidden matrices.

    M <- momentum M + (1 - momentum) G;  C <- b C + (1 - b) M M^T;  Q <- qr(C Q) and V's order follows, before use
    Y = Q^T M;  V <- beta2 V + (1 - beta2) Y^2;  d = Q (Y / (sqrt(V) + inner_eps))

    for m <= n, with b = `shampoo_beta`; M^T M and the columns otherwise. SOAP-Muon on one side, of the momentum itself
    and without orthogonalization. `clip_rms` bounds the root mean square of d, which is 1 / sqrt(1 - beta2) at first.

    Differs: C is not corrected for bias, which its eigenvectors do not see.
    """

    lr: float = 3e-4
    nesterov: bool = False
    scale: Scale = "none"
    weight_decay: float = 0.01
    beta2: float = 0.95
    inner_eps_added: bool = True
    refresh_first: bool = True
    sides: Sides = "short"
    factors_of: Literal["gradient", "momentum"] = "momentum"
    restore: Literal["gram", "fro", "none"] = "none"
    finish: Literal["polar", "norm", "none"] = "none"
    clip_rms: float | None = None
    """Largest RMS of the direction; None for no bound."""

    name: ClassVar = "moso"
    source: ClassVar = "NVIDIA-NeMo/Emerging-Optimizers, emerging_optimizers/soap/moso.py, commit bc7ba66"
    family: ClassVar = "structured-fisher"

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d = super().update(g, s, p, t)
        return d if self.clip_rms is None else clip_rms_(d, self.clip_rms)
