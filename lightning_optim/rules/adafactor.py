"""Adafactor in torch's form: row and column means instead of a second moment."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import Rule, zeros


def _rms(x: Tensor) -> Tensor:
    return vector_norm(x, dim=(-2, -1), keepdim=True) / (x.shape[-2] * x.shape[-1]) ** 0.5


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor: a second moment factored into row and column means, in the form of `torch.optim.Adafactor`.

    b = t^beta2_decay;  r <- (1 - b) r + b mean_cols(g^2);  c <- (1 - b) c + b mean_rows(g^2)
    V = r c / mean(r);  u = g / sqrt(V);  u <- u / max(1, RMS(u) / d)
    step = min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) u

    Vectors keep a full second moment. `scale_parameter=False` leaves the factor max(eps2, RMS(p)) out; the adamw
    learning-rate convention sets it, for then the direction has a fixed scale.

    Differs: eps1 None means float32's machine epsilon, also for bfloat16 weights, whose state is float32 here.
    In a stack (three or more dimensions) RMS is taken per matrix of the last two.
    """

    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps1: float | None = None
    eps2: float = 1e-3
    d: float = 1.0
    weight_decay: float = 0.0
    scale_parameter: bool = True

    name: ClassVar = "adafactor"
    source: ClassVar = "Shazeer & Stern 2018, arXiv:1804.04235, Alg. 4, 5"
    state: ClassVar = {"row_var": zeros("m1"), "col_var": zeros("1n")}
    vector_state: ClassVar = {"variance": zeros("mn", nonnegative=True)}
    reduces: ClassVar = True
    reads_param: ClassVar = True
    adamw_settings: ClassVar = {"scale_parameter": False}
    signed: ClassVar = frozenset({"beta2_decay"})

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of `torch.optim.Adafactor`.

        Returns:
            The group, with `eps1` and `eps2` for the pair `eps`.
        """
        eps = dict(zip(("eps1", "eps2"), group["eps"], strict=True)) if "eps" in group else {}
        return super().translate(group) | eps

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return None if self.scale_parameter else self.d

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        eps1 = torch.finfo(g.dtype).eps if self.eps1 is None else self.eps1
        weight = t**self.beta2_decay
        if hasattr(s, "variance"):
            s.variance.lerp_(g * g, weight)
            u = s.variance.clamp(min=eps1 * eps1)
        else:
            s.row_var.lerp_(vector_norm(g, dim=-1, keepdim=True).square() / g.shape[-1], weight)
            s.col_var.lerp_(vector_norm(g, dim=-2, keepdim=True).square() / g.shape[-2], weight)
            row = s.row_var / s.row_var.mean(dim=-2, keepdim=True).clamp(min=eps1)
            u = (row * s.col_var).clamp_(min=eps1 * eps1)
        u.rsqrt_().mul_(g)
        scale = min(1.0, t**-0.5 / self.lr) if self.lr else 1.0
        factor = scale / (_rms(u) / self.d).clamp(min=1.0)
        if self.scale_parameter and p is not None:
            factor = factor * _rms(p).clamp(min=self.eps2)
        return u.mul_(factor)
