"""Shampoo: inverse roots of Kronecker factors of the gradient's second moment, as published and as run at scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import ADAMW_RMS, MomentumRule, StateSpec, zeros
from lightning_optim.ops.eigenbasis import eigenbasis, off_diagonal
from lightning_optim.ops.moments import Sides, gram, gram_sides
from lightning_optim.ops.norms import norm
from lightning_optim.ops.projection import lift, project
from lightning_optim.ops.roots import Method, inverse_root, root_error
from lightning_optim.ops.tiles import filled, joined, tiles


@dataclass(frozen=True)
class Shampoo(MomentumRule):
    """Shampoo: inverse roots of Kronecker factors of the gradient's second moment.

    L <- b2 L + (1 - b2) G G^T;  R <- b2 R + (1 - b2) G^T G, or sums
    when due  L' = (L / (1 - b2^t) + eps I)^-e;  R' = (R / (1 - b2^t) + eps I)^-e
    N = (b3 M + (1 - b3) G) / (1 - b3 b1^(t-1));  M <- b1 M + (1 - b1) G;  P = L' N R'
    d = P |A| / |P|, A = N / (sqrt(V / (1 - graft_beta2^t)) + graft_eps), V the average of G^2

    e is 1 / (2 k) for k preconditioned sides, or `exponent`. The paper's form is `accumulate="sum"`, betas (0, 0),
    graft "none" and no `max_dim`. Matrices are cut into tiles of at most `max_dim` rows and columns, each with factors
    and a grafted norm of its own; no side is too long. With `target_dims=1`, the default of Distributed Shampoo, a
    matrix of at most `max_dim` elements is one vector with a full factor. `graft`: "adam" as above, "rmsprop" without
    bias correction, "adagrad" with a sum V, "sgd" A = N, "none" d = P. Steps before `start` take A, or leave the
    weights to decay (`early="decay"`). `preconditioner="eigenvalue"` is Adam in the eigenbases Q_L, Q_R, N and V turned
    by them, with eps beside the root of V. `beta3` None is b1. A root that cannot be computed stays what it was, with a
    warning.

    Differs: vectors are of order 1 (one factor, e = 1 / 2), all else of order 2: experts are a matrix each, and a
    convolution is the matrix (out, in x kernel) that it applies to patches, which is also what Distributed Shampoo's
    merging of small dimensions to two makes of it. The paper's form with a factor per dimension is not offered.
    The published epsilon of 1e-12 is below float32's rounding of the factors.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    """Weight of the momentum in the direction; None for betas[0]."""
    eps: float = 1e-8
    """Added to the eigenvalues of the factors before the root."""
    weight_decay: float = 0.0
    refresh: str = "staggered:10"
    start: int = 1
    """First preconditioned step; earlier ones take the grafted step."""
    accumulate: Literal["average", "sum"] = "average"
    """Whether factors are averages or sums."""
    correct_bias: bool = True
    sides: Sides = "both"
    """Which sides have a factor."""
    exponent: float | None = None
    """Exponent of the inverse roots; None for 1 / (2 x sides)."""
    root: Method = "eigh"
    """How inverse roots are computed."""
    preconditioner: Literal["root", "eigenvalue"] = "root"
    """Inverse roots, or Adam in the eigenbases."""
    graft: Literal["none", "sgd", "adagrad", "rmsprop", "adam"] = "adam"
    """Method whose step norm is taken over."""
    graft_beta2: float = 0.999
    """Decay rate of the grafted method's second moment."""
    graft_eps: float = 1e-8
    """Added to the grafted method's denominator."""
    early: Literal["graft", "decay"] = "graft"
    """What steps before `start` do: the grafted step, or decay only."""
    max_dim: int | None = 1024
    """Longest side of a tile; None for no tiles."""
    target_dims: Literal[1, 2] = 2
    """Whether small matrices are taken as one vector (1) or as matrices (2)."""
    decay: Literal["before", "coupled"] = "before"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Weight decay before the step, or added to the gradient."""

    name: ClassVar = "shampoo"
    source: ClassVar = "Gupta et al. 2018, arXiv:1802.09568, Alg. 1, 2; Shi et al. 2023, arXiv:2309.06497"
    family: ClassVar = "structured-fisher"
    preconditioners: ClassVar = ("root_left", "root_right")
    unmeasurable_reason: ClassVar = "a root is tested by products of matrices, for exponent = 1 / integer only"
    adamw_settings: ClassVar = {"graft": "adam"}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a Newton iteration for a root that is no integer, or what `Rule.validate` raises.
        """
        super().validate()
        if self.root == "newton" and self.exponent and (1 / self.exponent) % 1:
            raise ValueError(f"shampoo: root='newton' needs exponent = 1 / integer, got {self.exponent}")
        if self.max_dim == 0:
            raise ValueError("shampoo: max_dim must be positive")

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        out = {"exp_avg": zeros("mn")} if self.betas[0] or self.beta3 else {}
        if self.graft in ("adagrad", "rmsprop", "adam"):
            out["graft_sq"] = zeros("mn", nonnegative=True)
        rows, columns, count = self._tile(m, n)
        if self.preconditioner == "eigenvalue":
            out["exp_avg_sq"] = (
                zeros("mn", nonnegative=True)
                if (rows, columns) == (m, n)
                else StateSpec("kk", size=(count * rows, columns))
            )
        for side in self._sides(m, n):
            size = rows if side == "left" else columns
            letters = {m: "mm", n: "nn"}.get(size) if count == 1 else None
            slot = zeros(letters) if letters else StateSpec("kk", size=(count * size, size))
            out |= {f"factor_{side}": slot, f"root_{side}": slot}
        return out

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return ADAMW_RMS if self.graft in ("rmsprop", "adam") or self.preconditioner == "eigenvalue" else None

    def refresh_cost(self, m: int, n: int, *, vector: bool = False) -> float:  # noqa: D102
        sizes = self._sizes(m, n)
        return float(sum(size**3 for side in self._sides(m, n) for size in sizes[side]))

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        x, summed, b2 = self._cut(g), self.accumulate == "sum", self.betas[1]
        for side, factor in _stored(s, "factor").items():
            outer = gram(x, left=side == "left")
            _ = factor.add_(outer) if summed else factor.lerp_(outer, 1 - b2)
        if t == 1:
            for root in _stored(s, "root").values():
                root.copy_(torch.eye(root.shape[-1]))
        if t > self.start or t == self.start == 1:
            s.refresh(g)
        elif t == self.start:
            self.refresh_preconditioner(g, s, t)
        if self.preconditioner == "eigenvalue":
            inner = project(x, **_stored(s, "root"))
            _second(s.exp_avg_sq.unflatten(-2, (-1, x.shape[-2])), inner, b2, summed)
        if hasattr(s, "graft_sq"):
            _second(s.graft_sq, g, self.graft_beta2, self.graft == "adagrad")
        n = self._filtered(g, s, t)
        grafted = self._grafted(n, s, t)
        if t < self.start and self.preconditioner == "root":
            return grafted if self.early == "graft" else torch.zeros_like(g)
        d = self._preconditioned(self._cut(n), s, t)
        if self.graft != "none":
            d = d * (norm(self._cut(grafted)) / (norm(d) + 1e-16))
        return joined(d, *self._merged(*g.shape[-2:])).reshape(g.shape)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        roots, sizes = _stored(s, "root"), self._sizes(*g.shape[-2:])
        for side, factors in self._factors(g, s, t).items():
            for i, size in enumerate(sizes[side]):
                factor, root = factors[:, i], roots[side][:, i]
                self._decompose(factor[:, :size, :size], root[:, :size, :size], len(roots))
                if self.preconditioner == "root":  # what only fills a tile up is diagonal
                    edge = factor.diagonal(dim1=-2, dim2=-1)[:, size:] + self.eps
                    root.diagonal(dim1=-2, dim2=-1)[:, size:] = edge.pow(-self._exponent(len(roots)))

    def _decompose(self, factor: Tensor, root: Tensor, sides: int) -> None:
        """Compute the root, or the basis, of one tile's factor."""
        if self.preconditioner == "eigenvalue":
            root.copy_(eigenbasis(factor, previous=root.flip(-1)).flip(-1))
        else:
            order = 1 / self._exponent(sides)
            root.copy_(inverse_root(factor, order, eps=self.eps, method=self.root, previous=root))

    def measures_staleness(self) -> bool:  # noqa: D102
        return self.preconditioner == "eigenvalue" or not self.exponent or (1 / self.exponent) % 1 == 0

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:  # noqa: D102
        roots, errors = _stored(s, "root"), []
        for side, factor in self._factors(g, s, t - 1).items():
            if self.preconditioner == "eigenvalue":
                off = off_diagonal(factor.flatten(0, 1), roots[side].flatten(0, 1).flip(-1), t)
                errors.append(off.unflatten(0, factor.shape[:2]))
            else:
                damped = factor + self.eps * torch.eye(factor.shape[-1]).to(factor)
                errors.append(root_error(damped, roots[side], round(1 / self._exponent(len(roots)))))
        return torch.cat(errors, -1).amax(-1)

    def _factors(self, g: Tensor, s: SimpleNamespace, t: int) -> dict[str, Tensor]:
        """What is decomposed after t steps: what fills up tiles is beside the others, not among the smallest."""
        rows, columns, _ = self._tile(*g.shape[-2:])
        edges = filled(*self._merged(*g.shape[-2:]), rows, columns, g.device)
        factors = {side: x / self._correction(t) for side, x in _stored(s, "factor").items()}
        traces = {side: x.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) for side, x in factors.items()}
        return {side: x + torch.diag_embed(traces[side] * edges[side == "right"]) for side, x in factors.items()}

    def _exponent(self, sides: int) -> float:
        return self.exponent or 1 / (2 * sides)

    def _correction(self, t: int) -> float:
        return 1 - self.betas[1] ** t if self.correct_bias and self.accumulate == "average" else 1.0

    def _filtered(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        b1, b3 = self.betas[0], self.betas[0] if self.beta3 is None else self.beta3
        if not hasattr(s, "exp_avg"):
            return g
        n = g.lerp(self.ema(s, t - 1), b3)
        self.update_ema(s, g, b1, t)
        return n / (1 - b3 * (1 - self.bias_correction(b1, t - 1))) if self.correct_bias else n

    def _grafted(self, n: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        if not hasattr(s, "graft_sq"):
            return n
        correction = 1 - self.graft_beta2**t if self.graft == "adam" else 1.0
        return n / ((s.graft_sq / correction).sqrt_().add_(self.graft_eps))

    def _preconditioned(self, x: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        roots = _stored(s, "root")
        if self.preconditioner == "root":
            return project(x, **roots)
        second = s.exp_avg_sq.unflatten(-2, (-1, x.shape[-2])) / self._correction(t)
        return lift(project(x, **roots) / second.sqrt_().add_(self.eps), **roots)

    def _merged(self, m: int, n: int) -> tuple[int, int]:
        """Rows and columns of what is preconditioned: a small matrix may be one vector."""
        return (1, m * n) if self.target_dims == 1 and self.max_dim and m * n <= self.max_dim else (m, n)

    def _tile(self, m: int, n: int) -> tuple[int, int, int]:
        """Rows and columns of a tile, and their number."""
        m, n = self._merged(m, n)
        rows, columns = (min(x, self.max_dim or x) for x in (m, n))
        return rows, columns, -(-m // rows) * -(-n // columns)

    def _sizes(self, m: int, n: int) -> dict[str, list[int]]:
        """How many rows (left) and columns (right) of each tile are not only filled up."""
        rows, columns, _ = self._tile(m, n)
        m, n = self._merged(m, n)
        down = [min(rows, m - i) for i in range(0, m, rows)]
        across = [min(columns, n - j) for j in range(0, n, columns)]
        return {"left": [x for x in down for _ in across], "right": across * len(down)}

    def _sides(self, m: int, n: int) -> tuple[str, ...]:
        """Which sides have factors; one of a single row or column has none."""
        m, n = self._merged(m, n)
        if m == 1 or n == 1:
            return ("right",) if m == 1 else ("left",)
        return gram_sides(m, n, self.sides)

    def _cut(self, x: Tensor) -> Tensor:
        m, n = x.shape[-2:]
        rows, columns, _ = self._tile(m, n)
        return tiles(x.reshape(-1, *self._merged(m, n)), rows, columns)


def _stored(s: SimpleNamespace, kind: str) -> dict[str, Tensor]:
    """Factors or roots by side, as views `[b, tiles, k, k]`."""
    tensors = {side: getattr(s, f"{kind}_{side}", None) for side in ("left", "right")}
    return {side: x.unflatten(-2, (-1, x.shape[-1])) for side, x in tensors.items() if x is not None}


def _second(v: Tensor, x: Tensor, beta: float, summed: bool) -> None:
    v.mul_(1.0 if summed else beta).addcmul_(x, x, value=1.0 if summed else 1 - beta)
