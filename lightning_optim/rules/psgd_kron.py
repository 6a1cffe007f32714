"""PSGD: a Kronecker-factored preconditioner, fitted by gradient descent on a Lie group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import MomentumRule, StateSpec, zeros
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import LinAlgError, failures
from lightning_optim.ops.moments import gram
from lightning_optim.ops.norms import magnitude, normalized, rms
from lightning_optim.ops.spectral import norm_lower_bound


@dataclass(frozen=True)
class PSGDKron(MomentumRule):
    """PSGD: a Kronecker-factored preconditioner, fitted by gradient descent on a Lie group.

    M <- b M + (1 - b) G;  m = M / (1 - b^t)
    when due, with normal numbers Z:  A = L m R^T;  B = L^-T Z R^-1
      L <- L - step triu(A A^T - B B^T) L / |A A^T + B B^T|;  R <- R - step triu(A^T A - B^T B) R / |A^T A + B^T B|
    d = L^T L m R^T R, made shorter where its RMS exceeds `max_rms`

    L and R are upper triangular; at their fixed point L^T L and R^T R whiten m. They start as `init_scale` I, or, if
    None, as RMS(m)^(-1/4) I, where A and B are of one size: from I, fits of a few percent each take a hundred steps to
    get there. A side above `max_triangular`, or of one element, has a diagonal factor. The norm is a lower bound of the
    spectral one. Before step `start` nothing is fitted. `normalize` gives d an RMS of 1; the adamw learning-rate
    convention sets it.

    Policies that measure staleness are refused: L and R are an average over many fits, each a step of bounded length
    along a gradient that is mostly noise, and the average is right only if the noise does not choose the fits.

    Differs: kron_torch starts from 1. L and R are balanced (|L| = |R|) at every fit, not at random ones, which changes
    no direction. The published probability of a fit falls from 1 after 500 steps to 1 / 33: the default refresh does so
    in one step.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    step_size: float = 0.1
    """Step size of a fit of the preconditioner."""
    init_scale: float | None = None
    """Start of the factors, times the identity; None measures it at the first gradient."""
    max_rms: float = 1.1
    """Largest RMS of the direction."""
    max_triangular: int = 8192
    """Longest side with a triangular factor; longer ones have a diagonal."""
    weight_decay: float = 0.0
    refresh: str = "until(500, fixed:1, staggered:33)"
    start: int = 1
    """First step at which the preconditioner is fitted."""
    normalize: bool = False

    name: ClassVar = "psgd_kron"
    source: ClassVar = "Li 2018, arXiv:1512.04202; Li 2024, arXiv:2402.04553; order of operations of kron_torch"
    family: ClassVar = "structured-fisher"
    first_moment: ClassVar = "momentum_buffer"
    vectors: ClassVar = False
    preconditioners: ClassVar = ("left", "right")
    unmeasurable_reason: ClassVar = "a fit is one step along a noisy gradient, and one chosen by its noise is biased"
    adamw_settings: ClassVar = {"normalize": True}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum of 1 or more, an init_scale of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.momentum >= 1 or self.init_scale == 0:
            raise ValueError(
                f"psgd_kron: needs momentum < 1 and init_scale > 0 or None, got {self.momentum}, {self.init_scale}"
            )

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        left = zeros("mm" if 1 < m <= self.max_triangular else "1m")
        right = zeros("nn" if 1 < n <= self.max_triangular else "1n")
        return {"momentum_buffer": zeros("mn"), "left": left, "right": right}

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return 1.0 if self.normalize else None

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        m = self.update_ema(s, g, self.momentum, t) / self.bias_correction(self.momentum, t)
        if t == 1:
            size = rms(m / magnitude(m)) * magnitude(m)
            scale = size.pow(-0.25).where(size > 0, 1.0) if self.init_scale is None else self.init_scale
            s.left, s.right = _one(s.left) * scale, _one(s.right) * scale
        if t >= self.start:
            s.refresh(m)
        x, left, right, k = _scaled(m, s)
        d = _times(_times(x, left), left, transposed=True)
        d = _times(_times(d.mT, right), right, transposed=True).mT
        if self.normalize:
            return normalized(d)
        longest = self.max_rms / (rms(d) + 1e-6 / k)  # of k d, which may overflow
        return d * torch.minimum(k, longest).clamp(max=torch.finfo(d.dtype).max)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        x, left, right, k = _scaled(g, s)
        a = _times(_times(x, left).mT, right).mT * k.clamp(max=1)
        try:
            b = _solve(_solve(s.noise("mn"), left).mT, right).mT / k.clamp(min=1)
        except LinAlgError:
            failures.add("a triangular system could not be solved; the preconditioner stays as it is")
            return
        scale = torch.maximum(magnitude(a), magnitude(b))  # a fit does not depend on it, and squares stay finite
        a, b = a / scale, b / scale
        left = self._fitted(s.left, a, b)
        right = self._fitted(s.right, a.mT, b.mT)
        ratio = (right.abs().amax((-2, -1), keepdim=True) / left.abs().amax((-2, -1), keepdim=True)).sqrt()
        s.left, s.right = left * ratio, right / ratio

    def _fitted(self, q: Tensor, a: Tensor, b: Tensor) -> Tensor:
        tiny = torch.finfo(a.dtype).tiny
        if q.shape[-2] == 1:
            up, down = a.square().sum(-1).unsqueeze(-2), b.square().sum(-1).unsqueeze(-2)
            return q - self.step_size * (up - down) * q / (up + down).amax(-1, keepdim=True).clamp(min=tiny)
        up, down = gram(a, left=True), gram(b, left=True)
        return q - self.step_size * product(torch.triu(up - down), q) / norm_lower_bound(up + down).clamp(min=tiny)


def _scaled(m: Tensor, s: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divide M, L and R by powers of two.

    L M R^T is then smaller by sqrt(k c), with c the size of M, and L^-T Z R^-1 by sqrt(c / k): their ratio by k.

    Returns:
        (M, L, R, the factor k by which L^T L M R^T R is smaller, and which may overflow by itself).
    """
    (x, c), (left, a), (right, b) = ((y / magnitude(y), magnitude(y)) for y in (m, s.left, s.right))
    return x, left, right, c * (a * b) * (a * b)


def _one(q: Tensor) -> Tensor:
    """The identity, as a whole matrix or a diagonal."""
    return torch.ones_like(q) if q.shape[-2] == 1 else torch.eye(q.shape[-1]).to(q).expand_as(q)


def _times(x: Tensor, q: Tensor, *, transposed: bool = False) -> Tensor:
    """Q x or q^T x, for a triangular or a diagonal q."""
    if q.shape[-2] == 1:
        return q.mT * x
    return product(q.mT if transposed else q, x)


def _solve(x: Tensor, q: Tensor) -> Tensor:
    """q^-T x."""
    if q.shape[-2] == 1:
        return x / q.mT
    return torch.linalg.solve_triangular(q.mT, x, upper=False)
