"""SOAP-Muon: a momentum preconditioned in SOAP's eigenbasis, then orthogonalized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, StateSpec, zeros
from lightning_optim.ops.moments import average_square_
from lightning_optim.ops.norms import cosine, gram_norm, norm, normalized, sinkhorn, variance_factor
from lightning_optim.ops.orthogonal import Divisor
from lightning_optim.rules.muon import SCALES, Muon
from lightning_optim.rules.rotated import Decomposition, Factors, Rotated, RotationDtype, Sides, by_side

NORMS = {"fro": norm, "gram": gram_norm}


@dataclass(frozen=True)
class SOAPMuon(Rotated, Muon):
    """SOAP-Muon: a momentum preconditioned in SOAP's eigenbasis, then orthogonalized, for hidden matrices.

    M <- momentum M + (1 - momentum) G;  U = (1 - momentum) G + momentum M
    Y = Q_L^T U Q_R;  V <- beta2 V + (1 - beta2) Y^2;  P = Q_L (Y / max(sqrt(V), inner_eps)) Q_R^T, at the norm of U
    d = scale(m, n) orthogonalize(P);  then L, R from G and, when due, Q and the order of V as in SOAP

    At the first step P is U, for there is no basis yet, and V stays 0; not so with `refresh_first`, which moves L, R
    and Q before their use. `factors_of` forms L and R of the gradient or of U, with a weight of 1 - `shampoo_beta`
    (beta2 if None), `second_moment` V likewise. `sides="short"` rotates the shorter side only, `"none"` leaves V
    elementwise. `inner_eps_added` adds eps to the root, as the first of the published runs do. `sinkhorn` iterations
    scale the rows and columns of Y in the place of V, if not 0 (`ops.norms.sinkhorn`). `restore` is the norm that P
    takes over, which only `trust_gate` and `contra` see. `finish="norm"` scales P to the norm of its polar factor in
    the place of that, `"none"` leaves it. `lines` divides the result as NorMuon does, with a beta of `lines_beta`;
    `"unequal"` is `"longer"`, but squares are left alone.

    `trust_gate` (floor, cap, first, last) goes from U to P by a share g only, and keeps the Schatten-4 norm of U:
    g = clamp((cos(P, U) - 0.2) / 0.8, 0, 1) clamp(cos(P, G) / cos(U, G), 0, 1), within [floor, cap]. The floor falls
    to 0 between the steps first and last, from where on cap is 1. (0.45, 0.85, 1375, 1625) is published, for output
    projections of attention; its benefit is not proven.

    The defaults are those of the record runs, which also set `uw_floor`, `radial_damping` and `pin`. Cheaper, and no
    worse in small runs: `refresh="staggered:10"`, `ns_steps=5` with `ns_coefficients="quintic"`, `sides="short"`.
    """

    lr: float = 0.0375
    ns_steps: int = 12
    ns_coefficients: str | tuple[float, float, float] = "converged"
    ns_divisor: Divisor = "gram"
    beta2: float = 0.9
    """Decay rate of the second moment, and of the factors where `shampoo_beta` is None."""
    shampoo_beta: float | None = None
    inner_eps: float = 1e-8
    """Smallest root of the second moment."""
    inner_eps_added: bool = False
    """Whether `inner_eps` is added to the root instead of bounding it."""
    refresh: str = "fixed:1"
    refresh_first: bool = False
    """Whether bases are moved before their use instead of after it."""
    sides: Sides = "both"
    factors: Factors = "gram"
    factors_of: Literal["gradient", "momentum"] = "gradient"
    """What the factors are formed of."""
    second_moment: Literal["gradient", "momentum"] = "momentum"
    """What the second moment is formed of."""
    decomposition: Decomposition = "qr"
    max_precond_dim: int = 10000
    sinkhorn: int = 0
    """Iterations that balance rows and columns in the place of a second moment; 0 for none."""
    restore: Literal["gram", "fro", "none"] = "gram"
    """The norm that the preconditioned momentum takes over."""
    trust_gate: tuple[float, float, int, int] | None = None
    """(floor, cap, first, last) of a share of the preconditioned momentum; None for all of it."""
    finish: Literal["polar", "norm", "none"] = "polar"
    """Orthogonalize, scale to a polar factor's norm, or leave."""
    lines: Literal["none", "rows", "longer", "unequal"] = "none"
    """Which lines are divided by a second moment of their own in the end."""
    lines_beta: float = 0.95
    """Decay rate of the second moments of lines."""
    rotation_dtype: RotationDtype = "float32"

    name: ClassVar = "soap_muon"
    source: ClassVar = "Jordan et al., modded-nanogpt, records/track_3_optimization: pull requests 278, 321, 328"
    family: ClassVar = "orthogonalized"

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: an average that does not move, a gate that ends before it begins, or what `Muon.validate`
                raises.
        """
        super().validate()
        if max(self.beta2, self.shampoo_beta or 0.0, self.lines_beta) >= 1:
            raise ValueError(f"{self.name}: beta2, shampoo_beta and lines_beta must be below 1")
        if self.trust_gate is not None and self.trust_gate[2] >= self.trust_gate[3]:
            raise ValueError(
                f"{self.name}: trust_gate is (floor, cap, first, last) with first < last, not {self.trust_gate}"
            )

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        out = {**self.state, **({} if self.sinkhorn else {"exp_avg_sq": zeros("mn", nonnegative=True)})}
        if self.lines != "none" and not (self.lines == "unequal" and m == n):
            out["second_momentum"] = zeros("1n" if self.lines != "rows" and m < n else "m1")
        return out | self.rotation(m, n)

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        if self.finish != "none":
            return super().rms(m, n)
        direct = 1.0 if self.second_moment == "momentum" else ADAMW_RMS
        return None if self.sinkhorn or self.restore != "none" else SCALES[self.scale](m, n) * direct

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        u = self.filtered(g, s, t)
        if self.refresh_first:
            self._turn(g, u, s, t)
        x, (m, n) = self._preconditioned(g, u, s, t), g.shape[-2:]
        if self.finish == "polar":
            x = self.polar(x)
        elif self.finish == "norm":
            x = normalized(x, max(m, n) ** -0.5)
        factor: float | Tensor = SCALES[self.scale](m, n)
        if hasattr(s, "second_momentum"):
            factor = variance_factor(x, s.second_momentum, self.lines_beta) * factor
        if not self.refresh_first:
            self._turn(g, u, s, t)
        return x * factor

    def _turn(self, g: Tensor, u: Tensor, s: SimpleNamespace, t: int) -> None:
        if by_side(s, "basis"):
            weight = 1 - (self.beta2 if self.shampoo_beta is None else self.shampoo_beta)
            self.accumulate(g if self.factors_of == "gradient" else u, s, weight, t)
            s.refresh(g)

    def _preconditioned(self, g: Tensor, u: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        bases = by_side(s, "basis")
        if t == 1 and bases and not self.refresh_first:
            return u
        y = self.to_eigenbasis(u, s)
        if self.sinkhorn:
            y = sinkhorn(y, self.sinkhorn, self.inner_eps)
        else:
            second = y if self.second_moment == "momentum" else self.to_eigenbasis(g, s)
            average_square_(s.exp_avg_sq, second, self.beta2)
            root = s.exp_avg_sq.sqrt()
            y = y / (root.add_(self.inner_eps) if self.inner_eps_added else root.clamp_(min=self.inner_eps))
        x = self.from_eigenbasis(y, s)
        if self.restore != "none":
            size = NORMS[self.restore]
            x = x * (size(u) / size(x).clamp_(min=1e-8))
        return self._trusted(x, u, g, t)

    def _trusted(self, x: Tensor, u: Tensor, g: Tensor, t: int) -> Tensor:
        if self.trust_gate is None:
            return x
        floor, cap, first, last = self.trust_gate
        done = min(max((t - 1 - first) / (last - first), 0.0), 1.0)
        gate = ((cosine(x, u) - 0.2) / 0.8).clamp(0, 1) * (cosine(x, g) / cosine(u, g).clamp(min=1e-8)).clamp(0, 1)
        blend = u.lerp(x, gate.clamp(floor * (1 - done), cap if done < 1 else 1.0))
        return blend * (gram_norm(u) / gram_norm(blend).clamp_(min=1e-8))
