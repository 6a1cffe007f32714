"""Running means of gradients for rules with momentum: one exponential moving average, or a weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule.base import Rule
from lightning_optim.core.rule.state_spec import StateSpec
from lightning_optim.ops.moments import weighted_sum
from lightning_optim.ops.row_chunks import take_rows


@dataclass(frozen=True, kw_only=True)
class MomentumRule(Rule, abstract=True):
    """Base of rules with a running mean M of gradients, which may be a weighted sum of several: M = sum_k w_k M_k.

        M_k <- beta_k M_k + (1 - beta_k) x

    `momentum_kernel` is ((beta, weight), ...) and applies from step `kernel_steps[0]` + 1 on. Before that, M is a
    single mean with the rule's momentum or betas[0], from which all M_k then start. With ((beta, weight, last weight),
    ...) the weights change linearly from the first to the last between the two `kernel_steps`. `ops.moments` has the
    published kernels. Every beta after the first has its own state tensor: `exp_avg_1`, ..., shaped like `exp_avg`.
    """

    momentum_kernel: tuple[tuple[float, ...], ...] | None = None
    kernel_steps: tuple[int, int] = (0, 0)

    first_moment: ClassVar[str] = "exp_avg"
    """State tensor of M."""

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: an invalid kernel, or another invalid hyperparameter (see `Rule.validate`).
        """
        super().validate()
        kernel, (first, last) = self.momentum_kernel, self.kernel_steps
        if kernel is None:
            return
        message = f"{self.name}: momentum_kernel must be ((beta, weight), ...) or ((beta, weight, last weight), ...)"
        if not kernel or {len(k) for k in kernel} not in ({2}, {3}):
            raise ValueError(f"{message}, got {kernel!r}")
        sums = [math.fsum(weights) for weights in list(zip(*kernel, strict=True))[1:]]
        if max(k[0] for k in kernel) >= 1 or any(abs(total - 1) > 1e-4 for total in sums):
            raise ValueError(f"{message} with betas below 1 and weights that add up to 1, got {kernel!r}")
        if len(kernel[0]) == 3 and first >= last:
            raise ValueError(
                f"{self.name}: kernel_steps must be the steps between which weights change, got {(first, last)}"
            )

    def state_specs(self, m: int, n: int, *, vector: bool = False) -> dict[str, StateSpec]:  # noqa: D102
        specs = super().state_specs(m, n, vector=vector)
        if self.first_moment not in specs:
            return specs
        return specs | {name: specs[self.first_moment] for name in self.ema_names()[1:]}

    def ema_names(self) -> list[str]:
        """Names of the state tensors of the means.

        Returns:
            One name per beta of the kernel.
        """
        count = len(self.momentum_kernel or "1")
        return [f"{self.first_moment}_{k}" if k else self.first_moment for k in range(count)]

    def emas(self, s: SimpleNamespace) -> list[Tensor]:
        """The means in the state.

        Returns:
            The means, in the order of `ema_names`.
        """
        return [getattr(s, name) for name in self.ema_names()]

    def ema_state(self, emas: Sequence[Tensor], rows: slice | None = None) -> SimpleNamespace:
        """A state that consists of the means only.

        Args:
            emas: the means in the order of `ema_names`, or the same rows of each.
            rows: rows of the means to take; all by default.

        Returns:
            A namespace that `update_ema` and `ema` accept as the state.
        """
        views = emas if rows is None else [take_rows(x, rows) for x in emas]
        return SimpleNamespace(**dict(zip(self.ema_names(), views, strict=True)))

    def update_ema(self, s: SimpleNamespace, x: Tensor, beta: float, t: int) -> Tensor:
        """Add a gradient to the means.

        Args:
            s: state, written in place.
            x: the gradient, shaped like M.
            beta: decay of the mean where it is a single one.
            t: number of gradients, this one included.

        Returns:
            M: the state tensor itself where it is a single mean.
        """
        mean, kernel, first = getattr(s, self.first_moment), self.momentum_kernel, self.kernel_steps[0]
        if kernel is None or t <= first:
            return mean.lerp_(x, 1 - beta)
        start = mean.clone() if t == first + 1 and first else None
        for name, (beta_k, *_) in zip(self.ema_names(), kernel, strict=True):
            mean_k = getattr(s, name)
            if start is not None:
                mean_k.copy_(start)
            mean_k.lerp_(x, 1 - beta_k)
        return self.ema(s, t)

    def ema(self, s: SimpleNamespace, t: int) -> Tensor:
        """M after t gradients.

        Returns:
            The state tensor itself where it is a single mean.
        """
        if self.momentum_kernel is None or t <= self.kernel_steps[0]:
            return getattr(s, self.first_moment)
        return weighted_sum([getattr(s, name) for name in self.ema_names()], self._weights(t))

    def bias_correction(self, beta: float, t: int) -> float:
        """Total weight of all gradients in M after t of them, by which M is divided to correct its bias.

        Args:
            beta: decay of the mean where it is a single one.
            t: number of gradients.

        Returns:
            The weight; 1 - beta^t for a single mean.
        """
        first = self.kernel_steps[0]
        if self.momentum_kernel is None or t <= first:
            return 1 - beta**t
        pairs = zip(self._weights(t), self.momentum_kernel, strict=True)
        return math.fsum(w * (1 - beta**first * k[0] ** (t - first)) for w, k in pairs)

    def _weights(self, t: int) -> list[float]:
        first, last = self.kernel_steps
        fraction = min((t - first) / max(last - first, 1), 1.0)
        return [k[1] + fraction * (k[-1] - k[1]) for k in self.momentum_kernel or ()]
