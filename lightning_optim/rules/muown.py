"""Muown: Muon on the directions of rows, Adam on their lengths."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import Rule, nearest, zeros
from lightning_optim.ops.moments import adam_ratio, average_square_
from lightning_optim.ops.orthogonal import DTYPES, SCHEDULES, IterationDtype, orthogonalize


@dataclass(frozen=True)
class Muown(Rule):
    """Muown: Muon on the directions of rows, Adam on their lengths, for hidden matrices.

    W_i = a_i u_i, |u_i| = 1, v = r u;  da_i = <G_i, u_i>;  dv = a / r (G - da u);  M <- momentum M + dv
    v <- v - lr direction_scale sqrt(max(m, n)) orthogonalize(dv + momentum M)
    a <- a - lr (Adam(da) + weight_decay a);  W_i <- a_i v_i / |v_i|

    r goes from the start's row lengths to `length` along 3 p^2 - 2 p^3, p = (t - 2) / (schedule_steps - 1), and is
    `length` from the second step on where `schedule_steps` is at most 1. Only v's direction survives a step, so a
    growing r is a decay of the angle. Rows of zeros have a length of sqrt(0.33) from the first step on.

    The rule finds the weights themselves; its direction is (W - W_new) / lr, so options that change directions do not
    fit it, and lr is its own under each convention. Published with 3.333 times the length for down-projections.

    Differs: a is kept from 0 by 1e-12 where W is divided by it. Weight decay, which the authors' code lacks, shrinks a.
    """

    lr: float = 0.0035
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    direction_scale: float = 0.2
    """Factor of the step of the rows' directions."""
    length: float = 2.688
    """Length of the rows' auxiliary vectors at the end; longer ones turn more slowly."""
    schedule_steps: int = 0
    """Steps over which the length is reached."""
    ns_steps: int = 12
    ns_coefficients: str = "polar_express_long"
    ns_dtype: IterationDtype = "bfloat16"

    name: ClassVar = "muown"
    source: ClassVar = "2026, arXiv:2605.10797; modded-nanogpt, records/track_3_optimization: pull request 288"
    family: ClassVar = "orthogonalized"
    state: ClassVar = {
        "momentum_buffer": zeros("mn"),
        "gain": zeros("m1"),
        "start": zeros("m1"),
        "exp_avg": zeros("m1"),
        "exp_avg_sq": zeros("m1", nonnegative=True),
    }
    vectors: ClassVar = False
    reads_param: ClassVar = True
    tracks_weights: ClassVar = True
    decay: ClassVar = "own"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum of 1 or more, no iterations, a length of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.momentum >= 1 or self.ns_steps < 1 or self.length == 0:
            raise ValueError(
                "muown: needs momentum < 1, ns_steps >= 1 and length > 0, "
                f"got {self.momentum}, {self.ns_steps}, {self.length}"
            )
        if self.ns_coefficients not in SCHEDULES:
            hint = nearest(self.ns_coefficients, list(SCHEDULES))
            raise ValueError(f"muown: unknown ns_coefficients {self.ns_coefficients!r}; {hint}")

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        assert p is not None
        (m, n), (b1, b2) = g.shape[-2:], self.betas
        if t == 1:
            lengths = vector_norm(p, dim=-1, keepdim=True)
            s.gain = s.start = torch.where(lengths > 0, lengths, 0.33**0.5)
        gain, r = s.gain, self._length(s.start, t)
        u = p / torch.where(gain.abs() < 1e-12, 1e-12, gain)
        along = (g * u).sum(-1, keepdim=True)
        across = (gain / r) * (g - u * along)
        s.momentum_buffer.mul_(self.momentum).add_(across)
        x = across.add_(s.momentum_buffer, alpha=self.momentum)
        o = orthogonalize(x, self.ns_steps, coefficients=self.ns_coefficients, dtype=DTYPES[self.ns_dtype])
        v = u * r - o * (self.lr * self.direction_scale * max(m, n) ** 0.5)
        s.exp_avg.lerp_(along, 1 - b1)
        average_square_(s.exp_avg_sq, along, b2)
        ratio = adam_ratio(s.exp_avg, s.exp_avg_sq, 1 - b1**t, (1 - b2**t) ** 0.5, self.eps)
        s.gain = gain - self.lr * (ratio + self.weight_decay * gain)
        new = s.gain * (v / vector_norm(v, dim=-1, keepdim=True).clamp_(min=1e-12))
        return (p - new) / self.lr if self.lr else torch.zeros_like(p)

    def _length(self, start: Tensor, t: int) -> Tensor:
        if t == 1:
            return start
        p = min((t - 2) / (self.schedule_steps - 1), 1.0) if self.schedule_steps > 1 else 1.0
        return start + p * p * (3 - 2 * p) * (self.length - start)
