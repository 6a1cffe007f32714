"""Limited-memory SR1 with a cubic model: steps that follow negative curvature, too, taken where the loss agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import GlobalStepRule, Objective, StateSpec, zeros
from lightning_optim.ops.secant import cubic_step, names, push, sr1, stored_pairs


@dataclass(frozen=True)
class SR1Cubic(GlobalStepRule):
    """Limited-memory SR1 with a cubic model, of all parameters as one vector.

    s = argmin m(s),  m(s) = g^T s + 1/2 s^T B s + mu/3 Phi(s)^3;  rho = (f(x) - f(x + s)) / -m(s)
    x <- x + lr s if rho >= eta[0];  D <- |s| / 2 if rho < eta[0],  max(D, 2 |s|) if rho > eta[1],  from `reach` on

    B is the SR1 matrix of the last `history` pairs of a step and the change of the gradient along it on the same batch,
    steps that are not taken included; it may be indefinite. Phi is the norm of B's eigenvectors, which gives s a closed
    form, and mu is doubled from `mu` on until |s| <= D (`lightning_optim.ops.secant`). A pair with
    |<s, y - B s>| <= 1e-8 |s| |y - B s| is left out. Two evaluations per step, by a curvature estimator or the closure
    of a loop of your own; lr is a factor of the step, 1 for the model's. Use large batches, or pairs remember noise.

    Differs: the paper moves mu itself by constant factors as rho tells, which does not keep up with SR1's leaps in
    curvature: with factors from 2 to 30 Rosenbrock's function took 67 to 285 steps or never ended, where this takes 50
    to 60, as many as SR1 in a trust region (Nocedal & Wright 2006, algorithm 6.2), whose radius D is. The defaults are
    ours; the paper's were not at hand.
    """

    lr: float = 1.0
    history: int = 10
    """Pairs that are kept."""
    mu: float = 1.0
    """First weight of the cubic term."""
    reach: float = 1.0
    """First bound of the step's length."""
    eta: tuple[float, float] = (0.1, 0.75)
    """Ratios of actual and predicted change below which a step is refused, and above which it may grow."""
    weight_decay: float = 0.0

    name: ClassVar = "sr1_cubic"
    source: ClassVar = "Ranganath, Singhal & Marcia 2025, arXiv:2502.12298 (ARCs-LSR1)"
    family: ClassVar = "curvature"
    search: ClassVar = {"lr": (1.0, 0.5, 0.25, 2.0, 0.125), "reach": (1.0, 10.0)}

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # the pairs, oldest first, and D
        return {**dict.fromkeys(names(self.history), zeros("mn", exact=True)), "reach": zeros("11", torch.float64)}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no history, no regularization, no reach, or bounds in the wrong order.
        """
        super().validate()
        if self.history < 1 or not min(self.mu, self.reach) > 0:
            raise ValueError(
                f"sr1_cubic: history, mu and reach must be positive, got {self.history}, {self.mu} and {self.reach}"
            )
        if not 0 < self.eta[0] < self.eta[1] < 1:
            raise ValueError(f"sr1_cubic: eta must be (low, high) with 0 < low < high < 1, got {self.eta}")

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:  # noqa: D102
        pairs = stored_pairs(s, self.history)
        reach = float(s.reach) or self.reach
        step, product, least = cubic_step(at.gradient, *sr1(*pairs), mu=self.mu, reach=reach)
        value, g = at.at(at.x + step)
        change = g - at.gradient
        news = change - product
        if bool(change.isfinite().all()) and step.dot(news).abs() > 1e-8 * step.norm() * news.norm():
            push(pairs, step, change)
        rho, size = (at.value - value) / -least if least < 0 else 0.0, float(step.norm())
        low, high = self.eta
        taken = rho >= low
        reach = max(reach, 2 * size) if rho > high else reach if taken else size / 2
        s.reach = torch.full_like(s.reach, reach)
        return -step if taken else torch.zeros_like(step)
