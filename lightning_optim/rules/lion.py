"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import MomentumRule, Rule, zeros


@dataclass(frozen=True)
class Lion(MomentumRule):
    """Lion: the sign of an interpolated momentum.

    d = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g

    With `lr_convention="native"` use a learning rate 3 to 10 times below AdamW's and a weight decay larger by the
    same factor. For language models betas (0.95, 0.98) are also published.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    name: ClassVar = "lion"
    source: ClassVar = "Chen et al. 2023, arXiv:2302.06675, Alg. 2"
    family: ClassVar = "sign"
    search: ClassVar = Rule.search | {"betas": ((0.9, 0.99), (0.95, 0.98))}
    state: ClassVar = {"exp_avg": zeros("mn")}
    elementwise: ClassVar = True

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return 1.0

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d = self.ema(s, t - 1).lerp(g, 1 - self.betas[0]).sign_()
        self.update_ema(s, g, self.betas[1], t)
        return d
