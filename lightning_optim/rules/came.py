"""CAME: Adafactor with momentum, divided by the root of how far the momentum is from the steps."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, DirectionByRows, MomentumRule, zeros
from lightning_optim.ops.factored import clipping, inverse_roots, scaled, update_means_
from lightning_optim.ops.norms import clip_rms_
from lightning_optim.ops.row_chunks import take_rows


@dataclass(frozen=True)
class CAME(MomentumRule):
    """CAME: Adafactor with momentum, divided by the root of how far the momentum is from the steps.

    r <- b2 r + (1 - b2) mean_cols(g^2 + eps1), c likewise;  u = g / sqrt(r c / mean(r)), clipped to RMS clip_threshold
    m <- b1 m + (1 - b1) u;  R <- b3 R + (1 - b3) mean_cols((u - m)^2 + eps2), C likewise;  d = m / sqrt(R C / mean(R))

    Vectors keep a full second moment and step by m. Its learning rate is 0.5 to 0.9 of AdamW's. Nothing is corrected
    for its start from zero: the first direction has an RMS of 11 and the tenth of 9, so warm up over hundreds of steps.
    """

    lr: float = 2e-4
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    """Decay rates of momentum, second moment and the momentum's confidence."""
    eps: tuple[float, float] = (1e-30, 1e-16)
    """Added to squared gradients and to squared differences of updates and momentum."""
    clip_threshold: float = 1.0
    weight_decay: float = 0.0

    name: ClassVar = "came"
    source: ClassVar = "Luo et al. 2023, arXiv:2307.02047, Alg. 2; vectors as in the authors' code"
    family: ClassVar = "memory-efficient"
    state: ClassVar = {
        "exp_avg": zeros("mn"),
        "exp_avg_sq_row": zeros("m1"),
        "exp_avg_sq_col": zeros("1n"),
        "exp_avg_res_row": zeros("m1"),
        "exp_avg_res_col": zeros("1n"),
    }
    vector_state: ClassVar = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("mn", nonnegative=True)}
    reduces: ClassVar = True
    last_two: ClassVar = True

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        b1, b2, b3 = self.betas
        if hasattr(s, "exp_avg_sq"):
            s.exp_avg_sq.lerp_((g * g).add_(self.eps[0]), 1 - b2)
            return self.update_ema(s, clip_rms_(g * s.exp_avg_sq.rsqrt(), self.clip_threshold), b1, t)
        update_means_(s.exp_avg_sq_row, s.exp_avg_sq_col, lambda g: g, 1 - b2, self.eps[0], of=(g,))
        left, right = inverse_roots(s.exp_avg_sq_row, s.exp_avg_sq_col)
        left = left / clipping(lambda g, left: scaled(g, left, right), self.clip_threshold, of=(g, left))

        def residual(g: Tensor, left: Tensor, *means: Tensor) -> Tensor:
            u = scaled(g, left, right)
            return u.sub_(self.update_ema(self.ema_state(means), u, b1, t))

        of = g, left, *self.emas(s)
        update_means_(s.exp_avg_res_row, s.exp_avg_res_col, residual, 1 - b3, self.eps[1], of=of)
        rows, columns = inverse_roots(s.exp_avg_res_row, s.exp_avg_res_col)
        return lambda run: scaled(self.ema(self.ema_state(self.emas(s), run), t), take_rows(rows, run), columns)
