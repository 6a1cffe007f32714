"""LAMB: Adam whose every layer moves by a fixed fraction of its norm."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import DirectionByRows, MomentumRule, zeros
from lightning_optim.ops.moments import adam_ratio, average_square_
from lightning_optim.ops.norms import quotient
from lightning_optim.ops.row_chunks import squares, sum_over_row_chunks, take_rows


@dataclass(frozen=True)
class LAMB(MomentumRule):
    """LAMB: Adam whose every layer moves by a fixed fraction of its norm, for large batches.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p;  d = u phi(|p|) / |u|

    The ratio is 1 where a norm is zero. phi is the identity, or clamps the norm to `norm_bounds` (the paper's; 10 is
    a published upper bound, and a lower one lets matrices that start at zero grow); `trust_clip` bounds the ratio
    itself (1 in timm). A layer is a matrix, each matrix of a stack (experts), or a whole convolution. Vectors are
    neither adapted nor decayed, as in the authors' BERT, unless `exclude_vectors=False`.

    A step has the norm lr |p|, whatever the gradient, so `lr_convention="adamw"` does not apply: lr is LAMB's. The
    authors first clip the gradient's global norm to 1; the trainers do that.

    Differs: `correct_bias=False` is the authors' code, the default their algorithm.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    norm_bounds: tuple[float, float] | None = None
    """Bounds of the norm of the weights that scales a step; None for none."""
    trust_clip: float | None = None
    """Largest ratio of the norms of weights and update; None for no bound."""
    exclude_vectors: bool = True
    correct_bias: bool = True

    name: ClassVar = "lamb"
    source: ClassVar = "You et al. 2020, arXiv:1904.00962, Alg. 2"
    search: ClassVar = {"lr": (10.0, 20.0, 5.0, 40.0, 2.5, 80.0, 1.25)}
    state: ClassVar = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("mn", nonnegative=True)}
    reduces: ClassVar = True
    reads_param: ClassVar = True
    decay: ClassVar = "own"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: bounds in the wrong order, or what `Rule.validate` raises.
        """
        super().validate()
        if self.norm_bounds is not None and self.norm_bounds[0] > self.norm_bounds[1]:
            raise ValueError(f"lamb: norm_bounds must be (lower, upper), got {self.norm_bounds!r}")

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        assert p is not None
        b1, b2 = self.betas
        mean, root = (self.bias_correction(b1, t), (1 - b2**t) ** 0.5) if self.correct_bias else (1.0, 1.0)
        adapted = not (self.exclude_vectors and s.vector)

        def step(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            u = adam_ratio(m, v, mean, root, self.eps)
            return u.add_(p, alpha=self.weight_decay) if self.weight_decay and adapted else u

        def lengths(g: Tensor, v: Tensor, p: Tensor, *means: Tensor) -> tuple[Tensor, Tensor]:
            m = self.update_ema(self.ema_state(means), g, b1, t)
            average_square_(v, g, b2)
            return squares(p), squares(step(m, v, p))

        length, size = (x.sqrt() for x in sum_over_row_chunks(lengths, g, s.exp_avg_sq, p, *self.emas(s)))
        ratio = quotient(length if self.norm_bounds is None else length.clamp_(*self.norm_bounds), size)
        ratio = ratio if self.trust_clip is None else ratio.clamp_(max=self.trust_clip)

        def direction(run: slice) -> Tensor:
            m = self.ema(self.ema_state(self.emas(s), run), t)
            u = step(m, take_rows(s.exp_avg_sq, run), take_rows(p, run))
            return u.mul_(ratio) if adapted else u

        return direction
