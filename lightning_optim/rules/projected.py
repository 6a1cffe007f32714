"""What GaLore, Fira, APOLLO and Flora share: a projection that is renewed, and moments of what it projects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.rule import MomentumRule, Rule, StateSpec, zeros
from lightning_optim.ops.moments import average_square_
from lightning_optim.ops.norms import growth_factor, norm
from lightning_optim.ops.projection import OVERSAMPLING, Method, Side, leading_vectors, left_out, project, sides
from lightning_optim.rules.adafactor import AdafactorHF


@dataclass(frozen=True)
class Subspace(Rule, abstract=True):
    """Base of rules with state in a projection of rank r, `projection_left` [m, r], `projection_right` [n, r] or both.

    The projection holds leading singular vectors of the gradient of the step that refreshes it. Vectors, matrices of
    one row or column, and all parameters if `rank` is 0, are not projected.
    """

    lr: float = 0.01
    weight_decay: float = 0.0
    rank: int = 128
    """Rank of the projection; 0 for none."""
    refresh: str = "staggered:200"
    basis: Method = "svd"

    preconditioners: ClassVar = ("projection_left", "projection_right")
    unmeasurable_reason: ClassVar = "its projection is drawn at random and fits every gradient alike"

    def projected_sides(self, m: int, n: int, *, vector: bool = False) -> tuple[str, ...]:
        """Which sides of a parameter are projected.

        Returns:
            `"left"`, `"right"`, both or none.
        """
        side: Side = getattr(self, "side", "std")
        return () if vector or min(m, n) == 1 or self.rank == 0 else sides(m, n, side)

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        used = self.projected_sides(m, n, vector=vector)
        letters = ("r" if "left" in used else "m") + ("r" if "right" in used else "n")
        out = self.moments(letters, vector=vector)
        out |= {f"projection_{side}": zeros("mr" if side == "left" else "nr", exact=True) for side in used}
        return {**out, "left_out": zeros("11")} if used and self.measures_staleness() else out

    def moments(self, letters: str, *, vector: bool = False) -> dict[str, StateSpec]:
        """State beside the projection.

        Args:
            letters: shape of the projected gradient.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Slot declarations by name.
        """
        raise NotImplementedError

    def share(self, m: int, n: int) -> float:
        """The RMS of a lifted matrix per RMS of its coordinates.

        Returns:
            sqrt(r / k), with k the side that is projected; 1 without a projection.
        """
        lengths = [m if side == "left" else n for side in self.projected_sides(m, n)]
        return math.prod(min(self.rank, m, n) / k for k in lengths) ** 0.5

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        old = {side: x for side, x in zip(("left", "right"), projection(s), strict=True) if x is not None}

        def sketch(side: str) -> Tensor:
            length, stream = ("n", 0) if side == "left" else ("m", 2)
            return torch.cat([s.noise(f"{length}r", stream), s.noise(f"{length}{OVERSAMPLING}", stream + 1)], -1)

        for side, vectors in leading_vectors(g, old, self.basis, sketch, first=t == 1).items():
            setattr(s, f"projection_{side}", vectors)
        s.left_out = left_out(g, project(g, *projection(s)))

    def draw(self, s: SimpleNamespace) -> None:
        """Draw the projection at random, with entries from N(0, 1 / r)."""
        for side, length in (("left", "m"), ("right", "n")):
            if hasattr(s, f"projection_{side}"):
                drawn = s.noise(f"{length}r")
                setattr(s, f"projection_{side}", drawn / drawn.shape[-1] ** 0.5)

    def refresh_cost(self, m: int, n: int, *, vector: bool = False) -> float:  # noqa: D102
        short, rank, count = min(m, n), min(self.rank, m, n), len(self.projected_sides(m, n, vector=vector))
        sketch = 4 * (rank + OVERSAMPLING) * count
        passes = {"svd": 10 * short, "randomized_svd": sketch, "subspace_iteration": 4 * rank}
        return float(m * n * (passes[self.basis] if self.measures_staleness() else 1)) if count else 0.0

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """The share of the gradient's energy that the projection loses, beyond what it lost when it was made.

        Returns:
            `[b]`, in [0, 1].
        """
        return (left_out(g, project(g, *projection(s))) - s.left_out).clamp(min=0).flatten()


@dataclass(frozen=True)
class Projected(MomentumRule, Subspace, abstract=True):
    """Base of rules that take a projected gradient into Adam's moments.

    x = P^T g, or g P where the columns are projected;  m <- b1 m + (1 - b1) x;  v <- b2 v + (1 - b2) x^2
    u = m / (sqrt(v) + eps), times c = sqrt(1 - b2^t) / (1 - b1^t) with `correct_bias`

    m and v are not turned into a new basis. What is not projected takes plain Adam steps u c.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True

    decay: ClassVar = "after"

    def moments(self, letters: str, *, vector: bool = False) -> dict[str, StateSpec]:  # noqa: D102
        return {"exp_avg": zeros(letters), "exp_avg_sq": zeros(letters, nonnegative=True)}

    def ratio(self, x: Tensor, s: SimpleNamespace, t: int) -> tuple[Tensor, float]:
        """Take x into Adam's moments.

        Returns:
            (u, c) of the formulae above.
        """
        b1, b2 = self.betas
        m = self.update_ema(s, x, b1, t)
        average_square_(s.exp_avg_sq, x, b2)
        correction = (1 - b2**t) ** 0.5 / self.bias_correction(b1, t) if self.correct_bias else 1.0
        return m / s.exp_avg_sq.sqrt().add_(self.eps), correction

    def projected(
        self, g: Tensor, s: SimpleNamespace, t: int
    ) -> tuple[tuple[Tensor | None, Tensor | None], Tensor, Tensor, float]:
        """Project a gradient, after a refresh that is due, and take it into Adam's moments.

        Returns:
            (projections of the left and right side or None, x, u, c); without a projection, d = u c.
        """
        s.refresh(g)
        basis = projection(s)
        x = project(g, *basis)
        return basis, x, *self.ratio(x, s, t)


@dataclass(frozen=True)
class FactoredSubspace(Subspace, AdafactorHF, abstract=True):
    """Base of rules that take a projected gradient, or its momentum only, through Adafactor.

    What is not projected is `adafactor_hf`'s.
    """

    scale_parameter: bool = False
    relative_step: bool = False

    reduces: ClassVar = False
    last_two: ClassVar = False

    def moments(self, letters: str, *, vector: bool = False) -> dict[str, StateSpec]:  # noqa: D102
        second = {"row_var": zeros(f"{letters[0]}1"), "col_var": zeros(f"1{letters[1]}")}
        first = {"exp_avg": zeros(letters)} if self.beta1 is not None else {}
        return {**({"variance": zeros("mn", nonnegative=True)} if vector else second), **first}


@dataclass(frozen=True)
class Limited(Projected, abstract=True):
    """Base of projected rules that limit how much a norm grows per step: eta = min(1, limit phi / |x|); phi <- eta |x|.

    phi is the norm after the step before. With `limiter_restarts`, a norm that grows from zero is not limited; without,
    it grows from 1e-8, as in the authors' code.
    """

    limit: float | None = 1.01
    limiter_restarts: bool = True

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        out = super().declare_state(m, n, vector=vector)
        limits = self.limit is not None and self.projected_sides(m, n, vector=vector)
        return {**out, "norm": zeros("11")} if limits else out

    def growth(self, x: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """Limit the growth of a norm.

        Returns:
            What to multiply `x` by, `[b, 1, 1]`.
        """
        if self.limit is None:
            return x.new_ones(x.shape[0], 1, 1)
        size = norm(x)
        factor = growth_factor(size, s.norm if self.limiter_restarts or t == 1 else s.norm + 1e-8, self.limit)
        s.norm = factor * size
        return factor


def projection(s: SimpleNamespace) -> tuple[Tensor | None, Tensor | None]:
    """The projection in the state, as `ops.projection` takes it.

    Returns:
        (left, right); None where a side is not projected.
    """
    return getattr(s, "projection_left", None), getattr(s, "projection_right", None)
