"""GaLore: Adam, or Adafactor, on the gradient's coordinates in its leading singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.ops.projection import Side, lift, project
from lightning_optim.rules.adafactor import AdafactorHF
from lightning_optim.rules.projected import FactoredSubspace, Projected, projection


@dataclass(frozen=True)
class GaLore(Projected):
    """GaLore: Adam on the gradient's coordinates in its leading singular vectors.

    x = P^T g;  m <- b1 m + (1 - b1) x;  v <- b2 v + (1 - b2) x^2
    d = scale P c m / (sqrt(v) + eps),  c = sqrt(1 - b2^t) / (1 - b1^t)

    When due, P becomes the `rank` leading left singular vectors of g; m and v stay as they are. `side="std"` projects
    the shorter side (a square's columns: x = g P), `"reverse_std"` the longer, `"left"` and `"right"` that side,
    `"full"` both. `basis="randomized_svd"` and `"subspace_iteration"` find P without a decomposition of g. Weight decay
    follows the step. Vectors, and all parameters with `rank=0`, take plain Adam steps.

    Published runs use lr 0.01 with scale 0.25, and 4 with rank 4 to fine-tune. For hidden matrices.

    Differs: columns of P keep their sense from refresh to refresh, where the reference takes LAPACK's signs and its
    momentum meets them at random; a zero gradient leaves P. All matrices are refreshed together in the reference,
    `refresh="fixed:200"`.
    """

    scale: float = 0.25
    """Factor of the direction."""
    side: Side = "std"
    """Which side of a matrix is projected."""

    name: ClassVar = "galore"
    source: ClassVar = "Zhao et al. 2024, arXiv:2403.03507, Alg. 2; order of operations of the authors' code"
    family: ClassVar = "low-rank"

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS * (self.scale * self.share(m, n) if self.projected_sides(m, n) else 1.0)

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        basis, _, u, correction = self.projected(g, s, t)
        scale = 1.0 if basis == (None, None) else self.scale
        return lift(u.mul_(scale * correction), *basis)


@dataclass(frozen=True)
class GaLoreAdafactor(FactoredSubspace):
    """GaLore with Adafactor: `adafactor_hf` on the gradient's coordinates in its leading singular vectors.

    x = P^T g;  step = a scale P u(x), with u, a, momentum and decay as in `adafactor_hf`

    P, `side`, `basis` and `refresh` as in `galore`, RMS(p) of the whole matrix. Without `beta1` nothing depends on the
    signs of P. The defaults are those of Transformers' `galore_adafactor`.
    """

    scale: float = 0.25
    """Factor of the direction."""
    side: Side = "std"
    """Which side of a matrix is projected."""

    name: ClassVar = "galore_adafactor"
    source: ClassVar = "Zhao et al. 2024, arXiv:2403.03507, Sec. 3; order of operations of the authors' code"
    family: ClassVar = "low-rank"

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        whole = AdafactorHF.rms(self, m, n)
        return whole and whole * (self.scale * self.share(m, n) if self.projected_sides(m, n) else 1.0)

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        assert p is not None
        s.refresh(g)
        basis, a = projection(s), self.size(p, t)
        u = self.stepped(self.ratio(project(g, *basis), s, t), a, s)
        d = u if basis == (None, None) else lift(u, *basis).mul_(self.scale)
        return self.decayed(d, p, a)
