"""SignSGD and Signum: the sign of the gradient, or of its running mean."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import MomentumRule, Rule, zeros


@dataclass(frozen=True)
class SignSGD(Rule):
    """SignSGD: the sign of the gradient; zero stays zero.

    d = sign(g)

    With `lr_convention="native"` use a learning rate like Lion's, 3 to 10 times below AdamW's. Ranks average their
    gradients first, as for every rule, or vote on the signs, one byte per element (`RuleOptimizer.compress`, Alg. 3).
    """

    lr: float = 1e-4
    weight_decay: float = 0.0

    name: ClassVar = "signsgd"
    source: ClassVar = "Bernstein et al. 2018, arXiv:1802.04434, Alg. 1"
    family: ClassVar = "sign"
    elementwise: ClassVar = True
    votes: ClassVar = True

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return 1.0

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        return s.vote(g)


@dataclass(frozen=True)
class Signum(MomentumRule, SignSGD):
    """Signum: the sign of a running mean of the gradients.

    m <- momentum m + (1 - momentum) g;  d = sign(m)

    Lion with equal betas. Learning rate as for SignSGD. Where ranks vote, each has the momentum of its own gradients,
    and a checkpoint their mean.
    """

    momentum: float = 0.9

    name: ClassVar = "signum"
    source: ClassVar = "Bernstein et al. 2018, arXiv:1802.04434, Alg. 2"
    state: ClassVar = {"momentum_buffer": zeros("mn")}
    first_moment: ClassVar = "momentum_buffer"
    compresses: ClassVar = ("momentum_buffer",)

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum of 1 or more, or what `Rule.validate` raises.
        """
        super().validate()
        if self.momentum >= 1:
            raise ValueError(f"signum: momentum must be below 1, got {self.momentum}")

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        signs = torch.empty_like(g)  # before anything is written, as all memory
        return s.vote(self.update_ema(s, g, self.momentum, t), out=signs)
