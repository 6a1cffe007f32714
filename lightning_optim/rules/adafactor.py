"""Adafactor: row and column means instead of a second moment, in torch's and in Transformers' form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, DirectionByRows, Rule, StateSpec, zeros
from lightning_optim.ops.factored import clipping, inverse_roots, mean, over_root, scaled, update_means_
from lightning_optim.ops.norms import clip_rms_, rms
from lightning_optim.ops.row_chunks import sum_over_row_chunks, take_rows


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor: a second moment factored into row and column means, in the form of `torch.optim.Adafactor`.

    b = t^beta2_decay;  r <- (1 - b) r + b mean_cols(g^2);  c <- (1 - b) c + b mean_rows(g^2)
    V = r c / mean(r);  u = g / sqrt(V);  u <- u / max(1, RMS(u) / d)
    step = min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) u

    Vectors keep a full second moment. `scale_parameter=False` leaves the factor max(eps2, RMS(p)) out; the adamw
    learning-rate convention sets it, for then the direction has a fixed scale.

    Differs: eps1 None means float32's machine epsilon, also for bfloat16 weights, whose state is float32 here.
    In a stack (three or more dimensions) RMS is taken per matrix of the last two.
    """

    lr: float = 1e-2
    beta2_decay: float = -0.8
    """The decay rate of the second moment at step t is 1 - t^beta2_decay."""
    eps1: float | None = None
    """Lower bound of the second moment; None for float32's machine epsilon."""
    eps2: float = 1e-3
    """Smallest RMS of the weights that `scale_parameter` counts with."""
    d: float = 1.0
    """Largest RMS of an update before it is scaled."""
    weight_decay: float = 0.0
    scale_parameter: bool = True
    """Whether steps are scaled by the RMS of the weights."""

    name: ClassVar = "adafactor"
    source: ClassVar = "Shazeer & Stern 2018, arXiv:1804.04235, Alg. 4, 5"
    family: ClassVar = "memory-efficient"
    state: ClassVar = {"row_var": zeros("m1"), "col_var": zeros("1n")}
    vector_state: ClassVar = {"variance": zeros("mn", nonnegative=True)}
    reduces: ClassVar = True
    last_two: ClassVar = True
    reads_param: ClassVar = True
    adamw_settings: ClassVar = {"scale_parameter": False}
    signed: ClassVar = frozenset({"beta2_decay"})

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a clipping threshold of 0, a positive exponent, or what `Rule.validate` raises.
        """
        super().validate()
        if self.d == 0 or self.beta2_decay > 0:
            raise ValueError(
                f"{self.name}: needs d > 0 and beta2_decay <= 0, got d={self.d}, beta2_decay={self.beta2_decay}"
            )

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of `torch.optim.Adafactor`.

        Returns:
            The group, with `eps1` and `eps2` for the pair `eps`.
        """
        eps = dict(zip(("eps1", "eps2"), group["eps"], strict=True)) if "eps" in group else {}
        return super().translate(group) | eps

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return None if self.scale_parameter else self.d

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        eps1 = torch.finfo(g.dtype).eps if self.eps1 is None else self.eps1
        weight = t**self.beta2_decay
        if hasattr(s, "variance"):
            row, column = s.variance.lerp_(g * g, weight), g.new_ones(1, 1, 1)
        else:
            update_means_(s.row_var, s.col_var, lambda g: g, weight, of=(g,))
            row, column = s.row_var / mean(s.row_var, -2).clamp(min=eps1), s.col_var

        def ratio(g: Tensor, row: Tensor, factor: Tensor | None = None) -> Tensor:
            return over_root(g, row, column, eps1 * eps1, factor)

        factor = _relative(self.lr, t) / clipping(ratio, self.d, of=(g, row))
        if self.scale_parameter and p is not None:
            factor = factor * rms(p).clamp(min=self.eps2)
        return lambda run: ratio(take_rows(g, run), take_rows(row, run), factor)


@dataclass(frozen=True)
class AdafactorHF(Rule):
    """Adafactor in the form of `transformers.Adafactor`: eps inside the means, decay scaled like the step, momentum.

    b = t^decay_rate;  r <- (1 - b) r + b mean_cols(g^2 + eps1);  c <- (1 - b) c + b mean_rows(g^2 + eps1)
    u = g / sqrt(r c / mean(r));  u <- u / max(1, RMS(u) / clip_threshold)
    step = a u, or m <- beta1 m + (1 - beta1) a u (beta1);  p <- p - weight_decay a p - step
    a = lr max(eps2, RMS(p)) (scale_parameter), where min(lr, 1 / sqrt(t)) takes the place of lr (relative_step)

    Vectors keep a full second moment. T5 was pretrained with the defaults' scale and relative step; fine-tuning uses
    lr 1e-3 without both. The adamw learning-rate convention switches both off.

    Differs: Transformers' lr of None, with relative_step, is the default lr of 0.01, and its warm-up of 1e-6 t is
    1e-4 lr t. m holds steps with their learning rate, as there, but a step with lr 0 moves nothing. RMS is taken per
    matrix of the last two dimensions.
    """

    lr: float = 1e-2
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to squared gradients; smallest RMS of the weights that `scale_parameter` counts with."""
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    """Decay rate of a running mean of steps; None for none."""
    weight_decay: float = 0.0
    scale_parameter: bool = True
    relative_step: bool = True
    """Whether 1 / sqrt(t) bounds the learning rate."""
    warmup_init: bool = False
    """Whether the relative step starts with a linear warm-up."""

    name: ClassVar = "adafactor_hf"
    source: ClassVar = "Shazeer & Stern 2018, arXiv:1804.04235, Alg. 4, 5; as transformers.Adafactor"
    family: ClassVar = "memory-efficient"
    state: ClassVar = Adafactor.state
    vector_state: ClassVar = Adafactor.vector_state
    reduces: ClassVar = True
    last_two: ClassVar = True
    reads_param: ClassVar = True
    decay: ClassVar = "own"
    adamw_settings: ClassVar = {"scale_parameter": False, "relative_step": False}
    signed: ClassVar = frozenset({"decay_rate"})

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a beta1 of 1 or more, a warm-up without relative steps, or what `Rule.validate` raises.
        """
        super().validate()
        if self.beta1 is not None and self.beta1 >= 1:
            raise ValueError(f"adafactor_hf: beta1 must be below 1, got {self.beta1}")
        if self.warmup_init and not self.relative_step:
            raise ValueError("adafactor_hf: warmup_init needs relative_step=True")

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        second = super().declare_state(m, n, vector=vector)
        return {**second, "exp_avg": zeros("mn")} if self.beta1 is not None else second

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return None if self.scale_parameter else self.clip_threshold if self.beta1 is None else ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        assert p is not None
        a = self.size(p, t)
        if hasattr(s, "variance"):
            return self.decayed(self.stepped(self.ratio(g, s, t), a, s), p, a)
        left, right = self._factors(g, s, t)
        left = left * (a / clipping(lambda g, left: scaled(g, left, right), self.clip_threshold, of=(g, left)))
        if self.beta1 is None:
            return lambda run: self.decayed(
                scaled(take_rows(g, run), take_rows(left, run), right), take_rows(p, run), a
            )

        def average(g: Tensor, m: Tensor, left: Tensor) -> list[Tensor]:
            self._averaged(m, scaled(g, left, right))
            return []

        sum_over_row_chunks(average, g, s.exp_avg, left)
        return lambda run: self.decayed(self._per_lr(take_rows(s.exp_avg, run)), take_rows(p, run), a)

    def ratio(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """Take g into the second moment.

        Returns:
            u before it is clipped, a new tensor.
        """
        if hasattr(s, "variance"):
            return g * s.variance.lerp_((g * g).add_(self.eps[0]), t**self.decay_rate).rsqrt()
        return scaled(g, *self._factors(g, s, t))

    def _factors(self, g: Tensor, s: SimpleNamespace, t: int) -> tuple[Tensor, Tensor]:
        """Take g into the means of rows and columns, and give the factors of u."""
        update_means_(s.row_var, s.col_var, lambda g: g, t**self.decay_rate, self.eps[0], of=(g,))
        return inverse_roots(s.row_var, s.col_var)

    def size(self, p: Tensor, t: int) -> Tensor:
        """The size of a step per unit lr.

        Returns:
            a / lr, `[b, 1, 1]`.
        """
        scale = _relative(self.lr, t, 1e-4 * t if self.warmup_init else 1.0) if self.relative_step else 1.0
        return scale * (rms(p).clamp(min=self.eps[1]) if self.scale_parameter else p.new_ones(1, 1, 1))

    def stepped(self, u: Tensor, a: Tensor, s: SimpleNamespace) -> Tensor:
        """Clip u, scale it by a, and take it into the momentum if there is one.

        Returns:
            The direction without decay; `u` is written.
        """
        clip_rms_(u, self.clip_threshold).mul_(a)
        return u if self.beta1 is None else self._per_lr(self._averaged(s.exp_avg, u))

    def _averaged(self, m: Tensor, u: Tensor) -> Tensor:
        """Take a step into the momentum, which holds it with its lr."""
        beta1 = self.beta1 or 0.0
        return m.mul_(beta1).add_(u, alpha=(1 - beta1) * self.lr)

    def _per_lr(self, m: Tensor) -> Tensor:
        return m / self.lr if self.lr else torch.zeros_like(m)

    def decayed(self, u: Tensor, p: Tensor, a: Tensor) -> Tensor:
        """Add the decay, which is scaled like the step.

        Returns:
            The direction.
        """
        return u.addcmul_(p, a, value=self.weight_decay) if self.weight_decay else u


def _relative(lr: float, t: int, most: float = 1.0) -> float:
    """What makes lr min(most lr, 1 / sqrt(t))."""
    ratio = t**-0.5 / (lr + 1e-300)
    if isinstance(ratio, Tensor):  # as numbers are in a graph
        return cast("float", ratio.clamp(max=most))
    return min(most, ratio)
