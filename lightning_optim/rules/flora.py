"""Flora: Adafactor whose momentum is stored in a random projection."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, DirectionByRows, StateSpec, zeros
from lightning_optim.ops.norms import clip_rms_
from lightning_optim.ops.projection import lift, project
from lightning_optim.rules.projected import FactoredSubspace, projection


@dataclass(frozen=True)
class Flora(FactoredSubspace):
    """Flora: Adafactor whose momentum is stored in a random projection.

    u = g / sqrt(r c / mean(r)), as in `adafactor_hf`;  w = (1 - beta1) u + beta1 P C;  C <- beta1 C + (1 - beta1) P^T u
    step = a w / max(1, RMS(w) / clip_threshold);  p <- p - weight_decay a p - step

    P has entries from N(0, 1 / rank), so that P P^T is the identity on average; when due it is drawn again and
    C <- P_new^T P C. The shorter side is projected (u P of tall and square matrices). a is `adafactor_hf`'s. Vectors
    and small matrices keep a whole momentum, as do all with `rank=0`; without `beta1` it is `adafactor_hf`.

    Differs: P is stored beside C, where the authors draw it again in every step from a seed (min(m, n) rank elements
    more), all matrices are refreshed together there, `refresh="fixed:1000:1000"`, and those of a ratio above four are
    left out to spare embeddings, which their role tells here.
    """

    beta1: float | None = 0.9
    refresh: str = "staggered:1000"

    name: ClassVar = "flora"
    source: ClassVar = "Hao et al. 2024, arXiv:2402.03293, Alg. 2; order of operations of the authors' code"
    family: ClassVar = "low-rank"

    def measures_staleness(self) -> bool:  # noqa: D102
        return False

    def projected_sides(self, m: int, n: int, *, vector: bool = False) -> tuple[str, ...]:  # noqa: D102
        small = self.beta1 is None or min(m, n) <= self.rank
        return () if small else super().projected_sides(m, n, vector=vector)

    def moments(self, letters: str, *, vector: bool = False) -> dict[str, StateSpec]:  # noqa: D102
        out = super().moments(letters, vector=vector)
        return out if vector else {**out, "row_var": zeros("m1"), "col_var": zeros("1n")}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        whole = super().rms(m, n)
        noisy = self.projected_sides(m, n) and not self.scale_parameter
        return ADAMW_RMS * (1 + self.share(m, n) ** -2) ** 0.5 if noisy else whole  # P P^T x is longer than x

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        momentum = lift(s.exp_avg, *projection(s)) if t > 1 else None
        self.draw(s)
        if momentum is not None:
            s.exp_avg = project(momentum, *projection(s))

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        if self.beta1 is None:
            return super().update(g, s, p, t)
        assert p is not None
        a, u = self.size(p, t), self.ratio(g, s, t)
        momentum = lift(s.exp_avg, *projection(s)) if t > 1 else 0.0
        w = u * (1 - self.beta1) + self.beta1 * momentum
        s.refresh(g)
        s.exp_avg.mul_(self.beta1).add_(project(u, *projection(s)), alpha=1 - self.beta1)
        return self.decayed(clip_rms_(w, self.clip_threshold).mul_(a), p, a)
