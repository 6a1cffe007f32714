"""Adam-mini: one second moment per row, head or matrix instead of one per element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import ADAMW_RMS, DirectionByRows, MomentumRule, StateSpec, zeros
from lightning_optim.ops.row_chunks import sum_over_row_chunks, take_rows


@dataclass(frozen=True)
class AdamMini(MomentumRule):
    """Adam-mini: one second moment per row, head or matrix instead of one per element.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) mean_block(g^2);  d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    `statistic` takes the place of the mean: `"max"`, `"min"` or `"l1"`, the sum, as in the ablation of Fig. 15, where
    the mean was best and another diverged. Only the mean has AdamW's scale.

    `block="row"` is one v per output row (embeddings, output layer, values, MLP), `block="matrix"` one per matrix that
    the group's `blocks` cut a parameter into: per attention head for queries and keys, per tensor without them (the
    authors' choice for norms). Vectors keep one v per element under `"row"` (the authors' choice for biases).

    `build_optimizer` partitions as the authors do: queries and keys have one v per head, in separate layers and in
    fused ones whose order is known, everything else one per row. `block="row"` gives them rows, too, and
    `blocks="heads"` gives values heads, too. An optimizer made from parameters alone knows no heads.

    Differs: the authors find blocks by substrings of names and take the head size to be dim / heads; here the
    group says.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    block: Literal["row", "matrix"] = "row"
    """What shares a second moment: a row, or a matrix of the group's `blocks`."""
    statistic: Literal["mean", "max", "min", "l1"] = "mean"
    """What of the squared gradients of a block is averaged over time."""

    name: ClassVar = "adam_mini"
    source: ClassVar = "Zhang et al. 2024, arXiv:2406.16793, Alg. 1"
    family: ClassVar = "memory-efficient"
    state: ClassVar = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("m1", nonnegative=True)}
    reduces: ClassVar = True
    head_settings: ClassVar = {"block": "matrix"}

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        letters = "11" if self.block == "matrix" else "mn" if vector else "m1"
        return {"exp_avg": zeros("mn"), "exp_avg_sq": zeros(letters, nonnegative=True)}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return ADAMW_RMS if self.statistic == "mean" else None

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        b1, b2 = self.betas
        v = s.exp_avg_sq
        dims = [d for d in (-2, -1) if v.shape[d] != g.shape[d]]

        def update_moments(g: Tensor, v: Tensor, *means: Tensor) -> list[Tensor]:
            v.lerp_(self._of_block(g, dims) if dims else g * g, 1 - b2)
            self.update_ema(self.ema_state(means), g, b1, t)
            return []

        if dims == [-1]:
            sum_over_row_chunks(update_moments, g, v, *self.emas(s))
        else:
            update_moments(g, v, *self.emas(s))
        size = (v / (1 - b2**t)).sqrt_().add_(self.eps).mul_(self.bias_correction(b1, t))
        return lambda run: self.ema(self.ema_state(self.emas(s), run), t) / take_rows(size, run)

    def _of_block(self, g: Tensor, dims: list[int]) -> Tensor:
        """The statistic of g^2 over blocks, without squares."""
        if self.statistic in ("max", "min"):
            order = math.inf if self.statistic == "max" else -math.inf
            return vector_norm(g, order, dim=dims, keepdim=True).square()
        size = math.prod([g.shape[d] for d in dims]) if self.statistic == "mean" else 1
        return vector_norm(g, dim=dims, keepdim=True).square() / size
