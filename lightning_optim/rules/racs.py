"""RACS: SGD whose rows and columns are divided by the roots of a rank-one second moment."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import DirectionByRows, Rule, zeros
from lightning_optim.ops.factored import scaled
from lightning_optim.ops.moments import rank_one
from lightning_optim.ops.norms import growth_factor
from lightning_optim.ops.row_chunks import squares, sum_over_row_chunks, take_rows


@dataclass(frozen=True)
class RACS(Rule):
    """RACS: SGD whose rows and columns are divided by the roots of a rank-one second moment.

    q_ s_^T = rank-one fit of g^2, by `iterations` steps of a power iteration from q_ = 1
    s <- beta s + (1 - beta) s_;  q <- beta q + (1 - beta) q_;  u = g / sqrt(q s^T)
    d = alpha u, where |u| may grow by a factor of `limit` per step at most

    `ema=False` uses s_ and q_ themselves. There is no momentum. Without `correct_bias`, as published, the first
    steps are 1 / (1 - beta) times too long, so warm the learning rate up. `normalize` divides u by its root mean
    square instead of limiting its growth; the adamw learning-rate convention sets it, for the RMS of u varies.

    Differs: a row or column without gradient does not move (the publication divides zero by zero).
    """

    lr: float = 0.02
    beta: float = 0.9
    """Decay rate of the scales of rows and columns."""
    ema: bool = True
    """Whether scales are averaged over steps."""
    correct_bias: bool = False
    alpha: float = 0.05
    """Factor of the direction."""
    limit: float = 1.01
    iterations: int = 5
    """Steps of the power iteration of the rank-one fit."""
    normalize: bool = False
    weight_decay: float = 0.0

    name: ClassVar = "racs"
    source: ClassVar = "Gong et al. 2025, arXiv:2502.07752, Alg. 1"
    family: ClassVar = "structured-fisher"
    state: ClassVar = {"row_scale": zeros("m1"), "col_scale": zeros("1n"), "norm": zeros("11")}
    reduces: ClassVar = True
    vectors: ClassVar = False
    adamw_settings: ClassVar = {"normalize": True}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a beta of 1 or more, no iterations, an alpha of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.beta >= 1 or self.iterations < 1 or self.alpha == 0:
            raise ValueError(
                f"{self.name}: needs beta < 1, iterations >= 1 and alpha > 0, "
                f"got {self.beta}, {self.iterations}, {self.alpha}"
            )

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return self.alpha if self.normalize else None

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        rows, columns = rank_one(g, self.iterations, squared=True)
        correction = 1.0
        if self.ema:
            s.row_scale.lerp_(rows, 1 - self.beta)
            s.col_scale.lerp_(columns, 1 - self.beta)
            rows, columns = s.row_scale, s.col_scale
            correction = 1 - self.beta**t if self.correct_bias else 1.0
        else:
            s.row_scale, s.col_scale = rows, columns
        tiny = torch.finfo(g.dtype).tiny
        left, right = (torch.where(x > 0, x.clamp(min=tiny).rsqrt(), 0.0) for x in (rows, columns))
        (total,) = sum_over_row_chunks(lambda g, left: (squares(scaled(g, left, right)),), g, left)
        size = total.sqrt() * correction
        if self.normalize:
            factor = torch.where(size > 0, self.alpha * (g.shape[-2] * g.shape[-1]) ** 0.5 / size, 0.0)
        else:
            limited = growth_factor(size, s.norm, self.limit)
            s.norm = limited * size
            factor = self.alpha * limited
        left = left * (factor * correction)
        return lambda run: scaled(take_rows(g, run), take_rows(left, run), right)
