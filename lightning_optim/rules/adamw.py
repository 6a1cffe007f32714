"""AdamW and Adam: torch's fused kernels, with float32 state also for bfloat16 weights.

m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, MomentumRule, Rule, StateSpec, zeros
from lightning_optim.ops.moments import adam_ratio, average_square_


@dataclass(frozen=True)
class AdamW(MomentumRule):
    """AdamW: Adam with decoupled weight decay.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    `amsgrad` divides by the running maximum of v instead. `eps_mode="uncorrected"` adds eps to sqrt(v) before the
    bias correction, as Transformers' former AdamW, GaLore and Moonlight do. `correct_bias=False` takes m and v as they
    are. Runs torch's fused kernel where dtypes and strides allow.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    """Whether to divide by the largest second moment so far."""
    eps_mode: Literal["corrected", "uncorrected"] = "corrected"
    """Whether eps is added after or before the bias correction of the second moment."""
    correct_bias: bool = True

    name: ClassVar = "adamw"
    source: ClassVar = "Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2"
    search: ClassVar = Rule.search | {"betas": ((0.9, 0.999), (0.9, 0.95))}
    state: ClassVar = {"exp_avg": zeros("mn"), "exp_avg_sq": zeros("mn", nonnegative=True)}
    elementwise: ClassVar = True

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of `torch.optim.AdamW` or `Adam`.

        Args:
            group: a saved param group without `rule`.

        Returns:
            The group.

        Raises:
            ValueError: weight decay in the other form than this rule's.
        """
        decoupled = group.get("decoupled_weight_decay", cls.decay == "before")
        if decoupled != (cls.decay == "before") and group.get("weight_decay"):
            form, other = ("decoupled", "adamw") if decoupled else ("L2", "adam")
            raise ValueError(f"the checkpoint's weight decay has the {form} form, which is {other}'s, not {cls.name}'s")
        return super().translate(group)

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        return {**self.state, "max_exp_avg_sq": zeros("mn", nonnegative=True)} if self.amsgrad else self.state

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return ADAMW_RMS

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d, (b1, b2) = torch.empty_like(g), self.betas  # memory, before anything is written
        m = self.update_ema(s, g, b1, t)
        average_square_(s.exp_avg_sq, g, b2)
        v = s.exp_avg_sq
        if self.amsgrad:
            v = torch.maximum(s.max_exp_avg_sq, v, out=s.max_exp_avg_sq)
        mean, root = (self.bias_correction(b1, t), (1 - b2**t) ** 0.5) if self.correct_bias else (1.0, 1.0)
        eps = self.eps if self.eps_mode == "corrected" else self.eps / root
        return adam_ratio(m, v, mean, root, eps, d)

    def kernel(  # noqa: D102
        self, p: list[Tensor], g: list[Tensor], s: Mapping[str, list[Tensor]], t: int
    ) -> Literal[True] | None:
        if self.eps_mode != "corrected" or self.momentum_kernel is not None:
            return None
        step = float(t) if self.correct_bias else math.inf  # where both corrections are one
        fused = torch.ops.aten._fused_adamw_ if self.decay == "before" else torch.ops.aten._fused_adam_
        fused(
            p,
            g,
            s["exp_avg"],
            s["exp_avg_sq"],
            s.get("max_exp_avg_sq", []),
            [torch.full((), step, dtype=torch.float32, device=p[0].device)] * len(p),
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=False,
        )
        return True


@dataclass(frozen=True)
class Adam(AdamW):
    """Adam, with weight decay in the L2 form (added to the gradient), as in `torch.optim.Adam`."""

    weight_decay: float = 0.0

    name: ClassVar = "adam"
    source: ClassVar = "Kingma & Ba 2015, arXiv:1412.6980, Alg. 1"
    decay: ClassVar = "coupled"


@dataclass(frozen=True)
class AMSGrad(Adam):
    """AMSGrad: Adam that divides by the largest v so far, so that no step size grows again.

    As `torch.optim.Adam` with `amsgrad=True`, whose checkpoints load; the maximum is taken before the bias correction.
    """

    amsgrad: bool = True

    name: ClassVar = "amsgrad"
    source: ClassVar = "Reddi et al. 2018, arXiv:1904.09237, Alg. 2"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: without the maximum, or what `Rule.validate` raises.
        """
        super().validate()
        if not self.amsgrad:
            raise ValueError("amsgrad: amsgrad=False is adam")
