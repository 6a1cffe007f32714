"""LARS: momentum SGD whose every layer moves by a fixed fraction of its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import Rule, StateSpec, zeros
from lightning_optim.ops.norms import norm, quotient


@dataclass(frozen=True)
class LARS(Rule):
    """LARS: momentum SGD whose every layer moves by a fixed fraction of its norm, for large batches.

    rate = trust_coefficient |p| / (|g| + weight_decay |p|);  buf <- momentum buf + rate (g + weight_decay p)
    d = buf, or rate (g + weight_decay p) + momentum buf (nesterov)

    The rate is 1 where it would be 0/0. A layer is a matrix, each matrix of a stack (experts), or a whole convolution.
    Vectors are neither adapted nor decayed, unless `exclude_vectors=False`. The step has no scale of its own, so
    `lr_convention="adamw"` does not apply: lr is LARS's.

    Differs: the paper's buffer holds lr rate (g + weight_decay p), which matters while lr changes, most code's does
    not; `lr_in_momentum=True` is the paper's, but a step with lr 0 moves nothing, where the paper's coasts on. Where g
    is zero the formula's rate is trust_coefficient / weight_decay; `zero_gradient_rate="one"` is LARC's and timm's.
    """

    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    """Norm of a step, relative to that of the weights, per unit lr."""
    nesterov: bool = False
    exclude_vectors: bool = True
    lr_in_momentum: bool = False
    """Whether the momentum holds steps with their learning rate (the paper's form)."""
    zero_gradient_rate: Literal["formula", "one"] = "formula"
    """The rate where the gradient is zero: the formula's, or one."""

    name: ClassVar = "lars"
    source: ClassVar = "You et al. 2017, arXiv:1708.03888, Alg. 1"
    search: ClassVar = {"lr": (10.0, 30.0, 3.0, 100.0, 1.0, 300.0, 0.3)}
    reduces: ClassVar = True
    reads_param: ClassVar = True
    decay: ClassVar = "own"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum of 1 or more, Nesterov's without any, or what `Rule.validate` raises.
        """
        super().validate()
        if self.momentum >= 1 or (self.nesterov and not self.momentum):
            raise ValueError(f"lars: momentum must be below 1, and above 0 with nesterov, got {self.momentum}")

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        return {"momentum_buffer": zeros("mn")} if self.momentum else {}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        assert p is not None
        inside = self.lr if self.lr_in_momentum and self.momentum else 1.0
        if inside == 0:
            s.momentum_buffer.mul_(self.momentum)
            return torch.zeros_like(g)
        excluded = self.exclude_vectors and s.vector
        weight_decay = 0.0 if excluded else self.weight_decay
        rate = g.new_ones(1, 1, 1) if excluded else self._rate(norm(p), norm(g))

        def with_step_(x: Tensor) -> Tensor:
            x.addcmul_(g, rate, value=inside)
            return x.addcmul_(p, rate, value=inside * weight_decay) if weight_decay else x

        if not self.momentum:
            return with_step_(torch.zeros_like(g))
        buffer = with_step_(s.momentum_buffer.mul_(self.momentum))
        d = with_step_(buffer * self.momentum) if self.nesterov else buffer
        return d if inside == 1 else d / inside

    def _rate(self, p: Tensor, g: Tensor) -> Tensor:
        guard = g if self.zero_gradient_rate == "one" else None
        return quotient(self.trust_coefficient * p, g + self.weight_decay * p, guard)
