"""Sophia: momentum over an estimate of the Hessian's diagonal, every coordinate clipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, CurvatureInput, MomentumRule, Rule, zeros


@dataclass(frozen=True)
class SophiaH(MomentumRule):
    """Sophia-H: momentum over Hutchinson's estimate of the Hessian's diagonal, clipped.

    m <- b1 m + (1 - b1) g;  d = clip(m / max(rho h, eps), 1);  h <- b2 h + (1 - b2) u * (H u), every k steps

    Where h is not positive the step is a sign. `rho` is the paper's gamma, `refresh` says when h is measured:
    `fixed:10` is the paper's k = 10, at steps 1, 11, 21, before the step. Use `rho` so that the logged win rate, the
    share of coordinates that are not clipped, lies between 0.1 and 0.5, and 0.8 of AdamW's learning rate; a third of it
    where most steps are signs, which are five times as long as AdamW's.

    Needs a curvature estimator and attention with a second derivative (the estimator switches kernels for the
    measurement). Not under FSDP2: there is no double backward pass over sharded parameters.

    Differs: u are random signs, of lower variance than the paper's normal numbers.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.96, 0.99)
    """Decay rates of the momentum and of the Hessian's diagonal."""
    rho: float = 0.01
    """Factor of the Hessian's diagonal; larger values clip fewer coordinates."""
    eps: float = 1e-12
    weight_decay: float = 0.1
    refresh: str = "fixed:10"
    """Policy that says at which steps the Hessian's diagonal is measured."""

    name: ClassVar = "sophia_h"
    source: ClassVar = "Liu et al. 2023, arXiv:2305.14342, Alg. 3 with Alg. 1"
    family: ClassVar = "curvature"
    state: ClassVar = {"exp_avg": zeros("mn"), "hessian": zeros("mn")}
    elementwise: ClassVar = True
    curvature_input: ClassVar[CurvatureInput | None] = "hutchinson"
    search: ClassVar = Rule.search | {"rho": (0.01, 0.1)}

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        scale = self._scale(s.hessian)
        return torch.div(self.update_ema(s, g, self.betas[0], t), scale, out=scale).clamp_(-1, 1)

    def update_curvature(self, estimate: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:  # noqa: D102
        s.hessian.lerp_(self._estimate(estimate).to(s.hessian.dtype), 1 - self.betas[1])
        return {"win_rate": s.exp_avg.abs() < self._scale(s.hessian)}

    def _scale(self, h: Tensor) -> Tensor:
        return (self.rho * h).clamp_(min=self.eps)

    def _estimate(self, estimate: SimpleNamespace) -> Tensor:
        return estimate.value


@dataclass(frozen=True)
class SophiaG(SophiaH):
    """Sophia-G: momentum over the Gauss-Newton-Bartlett estimate of the Hessian's diagonal, clipped.

    m <- b1 m + (1 - b1) g;  d = clip(m / (rho h + eps), 1);  h <- b2 h + (1 - b2) B q^2, every k steps

    q is the gradient of the mean loss with labels drawn from the model's own predictions, B the number of labels:
    `tokens` if given (the reference's `bs`), else as many as the estimator counted. `form="paper"` divides by
    max(rho h, eps) instead, with the paper's eps of 1e-12. Published for GPT-2: lr 6e-4, rho 0.05, decay 0.2 (125M);
    7e-4, 0.08, 0.2 (355M); 3e-4, 0.05, 0.2 (770M).

    `refresh="fixed:10"` measures h before steps 1, 11, 21, as the paper; the authors' script does so after every tenth
    step, so that its first ten are signs (`"fixed:10:10"` measures before steps 10, 20, 30). Needs a curvature
    estimator and a loss that ends in torch's cross-entropy; where the loss calls none (a fused kernel, say), the
    estimator measures Hutchinson's estimate instead, says so once, and h is kept at or above zero.

    Differs: B multiplies the estimate when it is made, not h when it is used (the same unless B changes).
    """

    betas: tuple[float, float] = (0.965, 0.99)
    rho: float = 0.04
    eps: float = 1e-15
    form: Literal["reference", "paper"] = "reference"
    """Whether eps is added (the reference) or bounds the denominator (the paper)."""
    tokens: float | None = None
    """Labels per estimate; None counts them."""

    name: ClassVar = "sophia_g"
    source: ClassVar = "Liu et al. 2023, arXiv:2305.14342, Alg. 3 with Alg. 2; step as in the authors' code"
    state: ClassVar = {"exp_avg": zeros("mn"), "hessian": zeros("mn", nonnegative=True)}
    curvature_input: ClassVar[CurvatureInput | None] = "gauss_newton"
    search: ClassVar = Rule.search | {"rho": (0.04, 0.1)}

    def update_curvature(self, estimate: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:  # noqa: D102
        metrics = super().update_curvature(estimate, s)
        s.hessian.clamp_(min=0)  # Hutchinson's estimate can be negative
        return metrics

    def _scale(self, h: Tensor) -> Tensor:
        return (self.rho * h).add_(self.eps) if self.form == "reference" else super()._scale(h)

    def _estimate(self, estimate: SimpleNamespace) -> Tensor:
        if getattr(estimate, "diagonal", False):
            return estimate.value
        tokens = estimate.count if self.tokens is None else self.tokens
        return torch.square(estimate.value).mul_(tokens)
