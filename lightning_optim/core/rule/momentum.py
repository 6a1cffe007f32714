"""momentum."""

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
    """Base of rules with a running mean M of gradients, which may be several: M = sum_k w_k M_k.

        M_k <- beta_k M_k + (1 - beta_k) x

    `momentum_kernel` is ((beta, weight), ...), from step `kernel_steps[0]` + 1 on: up to there M is the one mean of the
    rule's own momentum or betas[0], where all M_k then start. With ((beta, weight, last weight), ...) the weights
    go linearly from the one to the other between the two `kernel_steps`. `ops.moments` has the published kernels.
    A mean of its own for every beta after the first: `exp_avg_1`, ..., shaped like `exp_avg`.
    """

    momentum_kernel: tuple[tuple[float, ...], ...] | None = None
    kernel_steps: tuple[int, int] = (0, 0)

    first_moment: ClassVar[str] = "exp_avg"
    """The slot of M."""

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a kernel that is none, or what `Rule.validate` raises.
        """
        super().validate()
        kernel, (first, last) = self.momentum_kernel, self.kernel_steps
        if kernel is None:
            return
        what = f"{self.name}: momentum_kernel must be ((beta, weight), ...) or ((beta, weight, last weight), ...)"
        if not kernel or {len(k) for k in kernel} not in ({2}, {3}):
            raise ValueError(f"{what}, got {kernel!r}")
        sums = [math.fsum(weights) for weights in list(zip(*kernel, strict=True))[1:]]
        if max(k[0] for k in kernel) >= 1 or any(abs(total - 1) > 1e-4 for total in sums):
            raise ValueError(f"{what} with betas below 1 and weights that add up to 1, got {kernel!r}")
        if len(kernel[0]) == 3 and first >= last:
            raise ValueError(
                f"{self.name}: kernel_steps must say from when to when weights change, got {(first, last)}"
            )

    def state_specs(self, m: int, n: int, *, vector: bool = False) -> dict[str, StateSpec]:  # noqa: D102
        slots = super().state_specs(m, n, vector=vector)
        if self.first_moment not in slots:
            return slots
        return slots | {name: slots[self.first_moment] for name in self.ema_names()[1:]}

    def ema_names(self) -> list[str]:
        """The slots of the means.

        Returns:
            One name per beta of the kernel.
        """
        count = len(self.momentum_kernel or "1")
        return [f"{self.first_moment}_{k}" if k else self.first_moment for k in range(count)]

    def emas(self, s: SimpleNamespace) -> list[Tensor]:
        """The means in the state.

        Returns:
            In the order of `means`.
        """
        return [getattr(s, name) for name in self.ema_names()]

    def ema_state(self, means: Sequence[Tensor], run: slice | None = None) -> SimpleNamespace:
        """A state of nothing but means.

        Args:
            means: as `held` gives them, or the same rows of each.
            run: take only these rows of them.

        Returns:
            What `update_ema` and `ema` take for the state.
        """
        views = means if run is None else [take_rows(x, run) for x in means]
        return SimpleNamespace(**dict(zip(self.ema_names(), views, strict=True)))

    def update_ema(self, s: SimpleNamespace, x: Tensor, beta: float, t: int) -> Tensor:
        """Take a gradient into the means.

        Args:
            s: state, written.
            x: shaped like M.
            beta: of the one mean.
            t: how often it was done, this time included.

        Returns:
            M: the state itself where it is one mean.
        """
        mean, kernel, first = getattr(s, self.first_moment), self.momentum_kernel, self.kernel_steps[0]
        if kernel is None or t <= first:
            return mean.lerp_(x, 1 - beta)
        start = mean.clone() if t == first + 1 and first else None
        for name, (own, *_) in zip(self.ema_names(), kernel, strict=True):
            part = getattr(s, name)
            if start is not None:
                part.copy_(start)
            part.lerp_(x, 1 - own)
        return self.ema(s, t)

    def ema(self, s: SimpleNamespace, t: int) -> Tensor:
        """M after t gradients.

        Returns:
            The state itself where it is one mean.
        """
        if self.momentum_kernel is None or t <= self.kernel_steps[0]:
            return getattr(s, self.first_moment)
        return weighted_sum([getattr(s, name) for name in self.ema_names()], self._weights(t))

    def bias_correction(self, beta: float, t: int) -> float:
        """The weight of all gradients in M after t of them: what M is divided by to correct its bias.

        Args:
            beta: of the one mean.
            t: number of gradients.

        Returns:
            1 - beta^t for one mean.
        """
        first = self.kernel_steps[0]
        if self.momentum_kernel is None or t <= first:
            return 1 - beta**t
        pairs = zip(self._weights(t), self.momentum_kernel, strict=True)
        return math.fsum(w * (1 - beta**first * k[0] ** (t - first)) for w, k in pairs)

    def _weights(self, t: int) -> list[float]:
        first, last = self.kernel_steps
        done = min((t - first) / max(last - first, 1), 1.0)
        return [k[1] + done * (k[-1] - k[1]) for k in self.momentum_kernel or ()]
