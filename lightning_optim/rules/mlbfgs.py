"""mL-BFGS: L-BFGS of every layer on running means of weights and gradients, so that noise makes no curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import Rule, StateSpec, zeros
from lightning_optim.ops.norms import norm
from lightning_optim.ops.secant import damped, dot, names, push, stored_pairs, two_loop


@dataclass(frozen=True)
class MLBFGS(Rule):
    """mL-BFGS: L-BFGS of every layer on running means of weights and gradients.

    P <- beta P + (1 - beta) p;  G <- beta G + (1 - beta) g
    every `interval` steps:  s = P - P';  y = tau (G - G') + (1 - tau) s;  P' = P;  G' = G
    D = H g;  buf <- momentum buf + min(1, sqrt(kl_clip / <g, D>)) D;  d = buf

    H is the L-BFGS inverse Hessian of the last `history` pairs of a matrix (vectors are matrices of one row), the
    identity before the first; tau keeps the curvature <s, y> / <s, s> within `bounds` and is at most 1 - damping
    (`lightning_optim.ops.secant`). P and G begin with the first weights and gradients. A pair whose <s, y> is below
    1e-8 |s| |y| is left out. `beta=0, interval=1, bounds=None, momentum=0, kl_clip=None, lr=1` is L-BFGS itself, whose
    steps need a line search. Weight decay is part of the gradient. The direction has no scale of its own: lr is
    mL-BFGS's. Published for images only; memory is 2 history + 5 weights.

    Differs: in the authors' code, which has no licence and was not used, a block is several layers, averages are not
    normalized, y is multiplied by the ratio of the learning rate to its first value, and pairs are left out by an
    absolute size.
    """

    lr: float = 0.1
    momentum: float = 0.9
    beta: float = 0.99
    """Decay rate of the running means of weights and gradients."""
    history: int = 10
    """Pairs per matrix that are kept."""
    interval: int = 100
    """Steps between two pairs."""
    bounds: tuple[float, float] | None = (0.01, 1.5)
    """Bounds of the curvature of a pair; None for none."""
    damping: float = 0.01
    """How far a pair's gradient change is moved towards its step at least."""
    kl_clip: float | None = 0.005
    weight_decay: float = 0.0

    name: ClassVar = "mlbfgs"
    source: ClassVar = "Niu et al. 2023, arXiv:2307.13744; blocks of one matrix"
    family: ClassVar = "curvature"
    reduces: ClassVar = True
    reads_param: ClassVar = True
    decay: ClassVar = "coupled"
    search: ClassVar = {"lr": (1.0, 3.0, 10.0, 0.3, 30.0), "interval": (100, 20)}

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # running means, those of the last pair, and the pairs, oldest first
        exact = zeros("mn", exact=True)
        means = ("mean_param", "mean_grad", "last_param", "last_grad")
        momentum = {"momentum_buffer": zeros("mn")} if self.momentum else {}
        return {**dict.fromkeys((*means, *names(self.history)), exact), **momentum}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no pairs, an average of nothing but the past, or bounds that do not hold 1.
        """
        super().validate()
        if self.history < 1 or self.interval < 1:
            raise ValueError(f"mlbfgs: history and interval must be >= 1, got {self.history} and {self.interval}")
        if not self.beta < 1 or not self.damping < 1:
            raise ValueError(f"mlbfgs: beta and damping must lie in [0, 1), got {self.beta} and {self.damping}")
        if self.bounds is not None and not 0 < self.bounds[0] < 1 < self.bounds[1]:
            raise ValueError(f"mlbfgs: bounds must be (low, high) with 0 < low < 1 < high, got {self.bounds}")
        if self.kl_clip == 0:
            raise ValueError("mlbfgs: kl_clip must be positive, or None for no limit")

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        assert p is not None
        for mean, last, x in ((s.mean_param, s.last_param, p), (s.mean_grad, s.last_grad, g)):
            if t == 1:
                last.copy_(x)
            mean.lerp_(x, 1.0 if t == 1 else 1 - self.beta)
        pairs = stored_pairs(s, self.history)
        if t > 1 and (t - 1) % self.interval == 0:
            self._remember(s, pairs)
        d = two_loop(g, *pairs)
        if self.kl_clip is not None:
            d.mul_((self.kl_clip / dot(g, d)).sqrt_().clamp_(max=1.0))
        return s.momentum_buffer.mul_(self.momentum).add_(d) if self.momentum else d

    def _remember(self, s: SimpleNamespace, pairs: tuple[list[Tensor], list[Tensor]]) -> None:
        step, change = s.mean_param - s.last_param, s.mean_grad - s.last_grad
        if self.bounds is not None:
            change = damped(step, change, self.bounds, 1 - self.damping)
        push(pairs, step, change, dot(step, change) > 1e-8 * norm(step) * norm(change))
        s.last_param.copy_(s.mean_param)
        s.last_grad.copy_(s.mean_grad)
