"""Hessian-free optimization: Newton's step with the Gauss-Newton matrix, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import GlobalStepRule, Objective, StateSpec, zeros
from lightning_optim.ops.krylov import conjugate_gradients


@dataclass(frozen=True)
class HessianFree(GlobalStepRule):
    """Hessian-free optimization: Newton's step with the Gauss-Newton matrix, by conjugate gradients.

    s = argmin q(s) + lambda/2 |s|^2,  q(s) = g^T s + 1/2 s^T G s, by at most `cg_iter` iterations from cg_decay s'
    s <- the best of the last iterates that the loss f tells;  x <- x + lr a s, a = 1, 0.8, ... until f falls enough
    lambda <- 3/2 lambda where (f(x + s) - f(x)) / q(s) < 1/4,  2/3 lambda where it is > 3/4, from `damping` on

    s' is the solution of the step before, G the Gauss-Newton matrix of the batch, which only a curvature estimator
    knows; a product with it costs two to four gradients, so that a step costs as much as a hundred of AdamW's. Batches
    should be large; lr is a factor of the step, 1 for Newton's. `damping=0` stays 0: one step solves a linear
    least-squares problem.

    Differs: no preconditioner; the ratio takes q without its damping (Martens & Sutskever 2012).
    """

    lr: float = 1.0
    damping: float = 0.1
    """First weight of the quadratic penalty; it adapts to how well the model predicts."""
    cg_iter: int = 50
    """Most iterations of conjugate gradients per step."""
    cg_decay: float = 0.95
    """Factor of the last solution, from which conjugate gradients start."""
    tolerance: float = 5e-4
    """Relative progress below which conjugate gradients stop."""
    weight_decay: float = 0.0

    name: ClassVar = "hessian_free"
    source: ClassVar = "Martens 2010, Deep learning via Hessian-free optimization (ICML), sections 4.1 to 4.6"
    family: ClassVar = "curvature"

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # the last solution, and lambda
        return {"solution": zeros("mn", exact=True), "damping": zeros("11", torch.float64)}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no iterations, or a decay above 1.
        """
        super().validate()
        if self.cg_iter < 1 or self.cg_decay > 1:
            raise ValueError(
                f"hessian_free: cg_iter must be >= 1 and cg_decay <= 1, got {self.cg_iter} and {self.cg_decay}"
            )

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:  # noqa: D102
        damping = float(s.damping) or self.damping
        iterates = conjugate_gradients(
            lambda v: at.product(v) + damping * v,
            -at.gradient,
            self.cg_decay * s.solution,
            iterations=self.cg_iter,
            tolerance=self.tolerance,
        )
        step, q = iterates.pop()
        s.solution = step
        value = at.at(at.x + step)[0]
        for earlier, model in reversed(iterates):
            other = at.at(at.x + earlier)[0]
            if not other < value:
                break
            step, q, value = earlier, model, other
        expected = q - 0.5 * damping * float(step.dot(step))
        ratio = (value - at.value) / expected if expected < 0 else 0.0
        factor = 1.5 if not ratio >= 0.25 else 2 / 3 if ratio > 0.75 else 1.0
        s.damping = torch.full_like(s.damping, damping * factor)
        slope, a = float(at.gradient.dot(step)), 1.0
        while not value <= at.value + 1e-2 * a * slope and a > 1e-6:
            a *= 0.8
            value = at.at(at.x + a * step)[0]
        return -a * step if value <= at.value else torch.zeros_like(step)
