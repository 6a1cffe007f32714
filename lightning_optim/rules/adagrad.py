"""Adagrad: torch's kernels, with float32 state also for bfloat16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad

from lightning_optim.core.rule import Rule, StateSpec


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad: the gradient over the root of the sum of all squared gradients.

    v <- v + g^2, from `initial_accumulator_value`;  d = g / ((sqrt(v) + eps) (1 + (t - 1) lr_decay))

    Weight decay has the L2 form. The direction shrinks like 1 / sqrt(t), so `lr_convention="adamw"` does not apply:
    lr is Adagrad's.
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    """The learning rate at step t is divided by 1 + (t - 1) lr_decay."""
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    """Start of the sum of squared gradients."""
    eps: float = 1e-10

    name: ClassVar = "adagrad"
    source: ClassVar = "Duchi et al. 2011, jmlr.org/papers/v12/duchi11a.html, Fig. 1; eps and lr_decay as in torch"
    elementwise: ClassVar = True
    decay: ClassVar = "coupled"

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        return {"sum": StateSpec("mn", self.initial_accumulator_value, nonnegative=True)}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d = torch.empty_like(g)  # before anything is written, as all memory
        s.sum.addcmul_(g, g)
        torch.sqrt(s.sum, out=d).add_(self.eps)
        if self.lr_decay:
            d.mul_(1 + (t - 1) * self.lr_decay)
        return torch.div(g, d, out=d)

    def kernel(  # noqa: D102
        self, p: list[Tensor], g: list[Tensor], s: Mapping[str, list[Tensor]], t: int
    ) -> Literal[True]:
        arguments: dict[str, Any] = {
            "lr": self.lr,
            "lr_decay": self.lr_decay,
            "weight_decay": self.weight_decay,
            "eps": self.eps,
            "maximize": False,
        }
        if p[0].is_cpu:
            torch.ops.aten._fused_adagrad_(p, g, s["sum"], [torch.tensor(float(t), device="cpu")] * len(p), **arguments)
        else:  # counts up inside
            adagrad(p, g, s["sum"], [torch.tensor(t - 1.0, device="cpu") for _ in p], foreach=True, **arguments)
        return True
