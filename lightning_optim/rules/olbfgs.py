"""oLBFGS: L-BFGS whose pairs are differences of gradients of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import GlobalStepRule, Objective, StateSpec, zeros
from lightning_optim.ops.secant import names, push, stored_pairs, two_loop


@dataclass(frozen=True)
class OLBFGS(GlobalStepRule):
    """oLBFGS: L-BFGS of all parameters as one vector, whose pairs are differences of gradients of one batch.

    s = -lr H g(x);  x <- x + s;  y = g(x + s) - g(x) + damping s, both gradients of the same batch

    H is the two-loop recursion's inverse Hessian of the last `history` pairs, with the mean of <s, y> / <y, y> over
    them between the loops, and min(1, 1 / |g|_1) I before the first. Pairs with <s, y> <= 1e-8 |s| |y| are left out.
    There is no line search: lr is a factor of Newton's step, at most 1, and is to fall as the noise tells (the paper's
    eta_0 tau / (tau + t) is a schedule). The second gradient comes from a curvature estimator, which then takes the
    first again, too, without dropout, or from the closure of a loop of one's own.

    Differs: the first step is not 1e-10 g, of which float32 weights would notice nothing.
    """

    lr: float = 0.1
    history: int = 10
    """Pairs that are kept."""
    damping: float = 1e-4
    """Multiple of the step that is added to its gradient change."""
    weight_decay: float = 0.0

    name: ClassVar = "olbfgs"
    source: ClassVar = "Schraudolph, Yu & Guenter 2007, A stochastic quasi-Newton method for online convex optimization"
    family: ClassVar = "curvature"

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # the pairs, oldest first
        return dict.fromkeys(names(self.history), zeros("mn", exact=True))

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no history.
        """
        super().validate()
        if self.history < 1:
            raise ValueError(f"olbfgs: history must be >= 1, got {self.history}")

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:  # noqa: D102
        g = at.gradient
        pairs = stored_pairs(s, self.history)
        if pairs[0][-1].any():
            steps, changes = ([x.view(1, 1, -1) for x in some] for some in pairs)
            d = two_loop(g.view(1, 1, -1), steps, changes, scale="mean").view(-1)
        else:
            d = g / g.abs().sum().clamp(min=1.0)
        step = -self.lr * d
        change = at.at(at.x + step)[1] - g + self.damping * step
        if step.dot(change) > 1e-8 * step.norm() * change.norm():
            push(pairs, step, change)
        return d
