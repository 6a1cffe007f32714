"""What SOAP, SOAP-Muon and their relatives share: eigenbases of averaged Gram matrices of rows, columns or both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import Rule, StateSpec, eye, zeros
from lightning_optim.ops.eigenbasis import INITIAL_ROOT, average_kl_, eigenbasis, follow_eigenbasis, off_diagonal
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import Fallback, first_columns, orthonormal
from lightning_optim.ops.moments import gram, gram_sides

Sides = Literal["both", "left", "right", "short", "none"]
Factors = Literal["gram", "kl"]
Decomposition = Literal["qr", "eigh"]
RotationDtype = Literal["float32", "bfloat16"]


class Rotated(Rule, abstract=True):
    """Base of rules that work in eigenbases `basis_left` [m, m], `basis_right` [n, n] or both.

    L <- (1 - w) L + w X X^T;  R <- (1 - w) R + w X^T X;  at first Q = eigenvectors(L), later, when due, Q <- qr(L Q)

    in the order of the present Rayleigh quotients, which the rows or columns of `exp_avg_sq` follow. A side longer than
    `max_precond_dim` is not rotated. `factors="kl"` whitens X by the other side (`ops.eigenbasis.average_kl_`; the
    first factors are X X^T / n and X^T X / m) and leaves the columns of Q in their places. `decomposition="eigh"` takes
    eigenvectors again, which `exp_avg_sq` cannot follow. `rotation_dtype="bfloat16"` turns matrices into the basis and
    back by products in bfloat16, two to four times as fast on processors that have them and off by 4e-3 of the norm;
    factors, bases and moments stay float32.
    """

    refresh: str
    max_precond_dim: int
    sides: Sides = "both"
    factors: Factors = "gram"
    """Factors as Gram matrices, or whitened by each other (kl)."""
    decomposition: Decomposition = "qr"
    """How a basis is found again: one QR step, or eigenvectors."""
    rotation_dtype: RotationDtype = "float32"

    preconditioners: ClassVar = ("basis_left", "basis_right")

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: settings that contradict each other, or what `Rule.validate` raises.
        """
        super().validate()
        if self.factors == "kl" and self.decomposition == "eigh":
            raise ValueError(
                f"{self.name}: decomposition='eigh' sorts the columns of the basis, but factors='kl' keeps an "
                "eigenvalue for each in its place; take decomposition='qr'"
            )

    def rotated_sides(self, m: int, n: int, *, vector: bool = False) -> tuple[str, ...]:
        """Which sides of a parameter have a basis.

        Returns:
            `"left"`, `"right"`, both or none.
        """
        sides = () if self.sides == "none" else gram_sides(m, n, self.sides)
        fits = {"left": m <= self.max_precond_dim, "right": n <= self.max_precond_dim}
        return () if vector else tuple(side for side in sides if fits[side])

    def rotation(self, m: int, n: int, *, vector: bool = False) -> dict[str, StateSpec]:
        """State of the bases.

        Returns:
            Slot declarations by name.
        """
        out = {}
        for side in self.rotated_sides(m, n, vector=vector):
            letters, line = ("mm", "m1") if side == "left" else ("nn", "1n")
            out |= {f"factor_{side}": zeros(letters), f"basis_{side}": eye(letters)}
            if self.factors == "kl":
                out[f"root_{side}"] = zeros(line)
        return out

    def to_eigenbasis(self, x: Tensor, s: SimpleNamespace) -> Tensor:
        """A matrix in the basis.

        Args:
            x: `[b, m, n]`.
            s: state.

        Returns:
            Q_L^T x Q_R.
        """
        bases = by_side(s, "basis")
        return self._rotated(x, bases.get("left"), bases.get("right"), transpose_left=True)

    def from_eigenbasis(self, y: Tensor, s: SimpleNamespace) -> Tensor:
        """A matrix out of the basis.

        Args:
            y: `[b, m, n]`.
            s: state.

        Returns:
            Q_L y Q_R^T.
        """
        bases = by_side(s, "basis")
        return self._rotated(y, bases.get("left"), bases.get("right"), transpose_left=False)

    def _rotated(self, x: Tensor, left: Tensor | None, right: Tensor | None, *, transpose_left: bool) -> Tensor:
        dtype = x.dtype
        if self.rotation_dtype == "bfloat16" and (left is not None or right is not None):
            x, left, right = x.bfloat16(), _bfloat16(left), _bfloat16(right)
        if left is not None:
            x = product(left.mT if transpose_left else left, x)
        if right is not None:
            x = product(x, right if transpose_left else right.mT)
        return x.to(dtype)

    def accumulate(self, x: Tensor, s: SimpleNamespace, weight: float, t: int) -> None:
        """Take a matrix into the factors.

        Args:
            x: `[b, m, n]`.
            s: state.
            weight: w of the formulae.
            t: step; at 1 there are no eigenvalues yet.
        """
        factors, bases = by_side(s, "factor"), by_side(s, "basis")
        if self.factors == "gram":
            for side, factor in factors.items():
                factor.lerp_(product(x, x.mT) if side == "left" else product(x.mT, x), weight)
        elif t == 1:
            for side, factor in factors.items():
                factor.copy_(gram(x, left=side == "left") / x.shape[-1 if side == "left" else -2])
                getattr(s, f"root_{side}").fill_(INITIAL_ROOT)
        else:
            for side, root in average_kl_(factors, bases, by_side(s, "root"), x, weight).items():
                setattr(s, f"root_{side}", root)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        for side, old in by_side(s, "basis").items():
            factor, order = getattr(s, f"factor_{side}"), None
            if t == 1 or self.decomposition == "eigh":
                basis = eigenbasis(factor, previous=old if t > 1 else first_columns(old, old.shape[-1]))
            elif self.factors == "kl":
                fallback = Fallback(
                    lambda old=old: old, "a step towards eigenvectors failed; the last good ones are kept"
                )
                basis = orthonormal(factor @ old, fallback)
            else:
                basis, order = follow_eigenbasis(factor, old)
            setattr(s, f"basis_{side}", basis)
            if order is not None and hasattr(s, "exp_avg_sq"):
                dim, index = (-2, order.unsqueeze(-1)) if side == "left" else (-1, order.unsqueeze(-2))
                s.exp_avg_sq = s.exp_avg_sq.gather(dim, index.expand_as(s.exp_avg_sq))

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:  # noqa: D102
        bases = by_side(s, "basis")
        return torch.stack([off_diagonal(getattr(s, f"factor_{side}"), q, t) for side, q in bases.items()]).amax(0)


def _bfloat16(q: Tensor | None) -> Tensor | None:
    return None if q is None else q.bfloat16()


def by_side(s: SimpleNamespace, kind: str) -> dict[str, Tensor]:
    """Factors, bases or roots by side, as `ops.projection` takes them; one that is not kept is missing.

    Returns:
        Tensors by `"left"` and `"right"`.
    """
    return {side: getattr(s, f"{kind}_{side}") for side in ("left", "right") if hasattr(s, f"{kind}_{side}")}
