"""RMSprop in torch's form: no bias correction, eps outside the root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from lightning_optim.core.rule import Rule, StateSpec, zeros


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop: the gradient over the root of a running mean of its square, in the form of `torch.optim.RMSprop`.

    v <- alpha v + (1 - alpha) g^2;  d = g / (sqrt(v) + eps), or its heavy-ball sum buf <- momentum buf + d
    centered: a <- alpha a + (1 - alpha) g, and v - a^2 takes the place of v

    Weight decay has the L2 form. Without bias correction the direction starts at an RMS of 1 / sqrt(1 - alpha) and
    falls to 1, so `lr_convention="adamw"` does not apply: lr is RMSprop's.

    Differs: v - a^2, which rounding can make negative when gradients repeat, is at least zero here; torch's is NaN.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    """Decay rate of the running mean of squared gradients."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    """Whether the squared mean gradient is taken off the second moment."""

    name: ClassVar = "rmsprop"
    source: ClassVar = "Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv:1308.0850; as in torch"
    search: ClassVar = {"lr": (0.1, 0.2, 0.05, 0.4, 0.025, 0.8, 1.0)}
    elementwise: ClassVar = True
    decay: ClassVar = "coupled"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: an alpha or a momentum of 1 or more, or what `Rule.validate` raises.
        """
        super().validate()
        if self.alpha >= 1 or self.momentum >= 1:
            raise ValueError(f"rmsprop: needs alpha < 1 and momentum < 1, got {self.alpha}, {self.momentum}")

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        is_needed = {"square_avg": True, "momentum_buffer": self.momentum > 0, "grad_avg": self.centered}
        return {key: zeros("mn", nonnegative=key == "square_avg") for key, keep in is_needed.items() if keep}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d = torch.empty_like(g)  # before anything is written, as all memory
        s.square_avg.mul_(self.alpha).addcmul_(g, g, value=1 - self.alpha)
        if self.centered:
            s.grad_avg.lerp_(g, 1 - self.alpha)
            torch.addcmul(s.square_avg, s.grad_avg, s.grad_avg, value=-1, out=d).clamp_(min=0).sqrt_()
        else:
            torch.sqrt(s.square_avg, out=d)
        d = torch.div(g, d.add_(self.eps), out=d)
        return s.momentum_buffer.mul_(self.momentum).add_(d) if self.momentum else d

    def kernel(  # noqa: D102
        self, p: list[Tensor], g: list[Tensor], s: Mapping[str, list[Tensor]], t: int
    ) -> Literal[True] | None:
        if p[0].device.type == "cpu" or self.centered:  # our blocks stay in a CPU's cache, torch's tensors do not
            return None
        rmsprop(
            p,
            g,
            s["square_avg"],
            [],
            s.get("momentum_buffer", []),
            [torch.tensor(t - 1.0, device="cpu") for _ in p],
            foreach=True,
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            centered=False,
        )
        return True
