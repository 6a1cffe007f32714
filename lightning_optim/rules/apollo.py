"""APOLLO: the gradient, its columns scaled as Adam scales them in a random projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.ops.norms import normalized
from lightning_optim.rules.projected import Limited


@dataclass(frozen=True)
class APOLLO(Limited):
    """APOLLO: the gradient, its columns scaled as Adam scales them in a random projection.

    x = P^T g, u and c as in GaLore, P with entries from N(0, 1 / r);  y = g, its columns j times |u_j| / |x_j|
    d = c sqrt(scale) eta y, where eta keeps |y| from growing by more than a factor of `limit` per step

    The shorter side is projected; of a tall or square matrix x = g P, and rows are scaled. `scale_type="tensor"` scales
    the matrix by |u| / |x|. `scale_front` limits the growth of sqrt(scale) y. When due, P is drawn again or, with
    `projection="svd"`, taken from the gradient as `basis` says, see GaLore. `limit` and `limiter_restarts` are Fira's.
    `normalize` divides y by its root mean square.

    Published runs use lr 0.01 and a rank of a quarter of the hidden size. For hidden matrices; vectors, and all
    parameters with `rank=0`, take plain Adam steps. Where the adamw learning-rate convention is not `normalize`d, it
    takes |x| for |g|, which holds on average.

    Differs: signs of singular vectors and zero gradients, see GaLore. Random numbers are a hash of seed, step and
    matrix.
    """

    projection: Literal["random", "svd"] = "random"
    """Whether the projection is random or holds leading singular vectors."""
    scale: float = 1.0
    """The direction is multiplied by the root of it."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """Whether each column or row (channel) or the whole matrix (tensor) has a factor."""
    scale_front: bool = False
    """Whether the growth is limited after `scale` is applied."""
    normalize: bool = False

    name: ClassVar = "apollo"
    source: ClassVar = "Zhu et al. 2024, arXiv:2412.05270, Alg. 1"
    family: ClassVar = "low-rank"

    def measures_staleness(self) -> bool:  # noqa: D102
        return self.projection == "svd"

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        if not self.projected_sides(m, n):
            return ADAMW_RMS
        if self.normalize:
            return self.scale**0.5
        return ADAMW_RMS * self.share(m, n) * self.scale**0.5 if self.projection == "random" else None

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        if self.projection == "svd":
            return super().refresh_preconditioner(g, s, t)
        self.draw(s)

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        basis, x, u, correction = self.projected(g, s, t)
        if basis == (None, None):
            return u.mul_(correction)
        dim = (-2, -1) if self.scale_type == "tensor" else -1 if basis[0] is None else -2
        y = g * (vector_norm(u, dim=dim, keepdim=True) / (vector_norm(x, dim=dim, keepdim=True) + 1e-8))
        root = self.scale**0.5
        if self.normalize:
            return normalized(y, root)
        if self.scale_front:
            y.mul_(root)
            return y.mul_(self.growth(y, s, t) * correction)
        return y.mul_(self.growth(y, s, t) * (correction * root))


@dataclass(frozen=True)
class APOLLOMini(APOLLO):
    """APOLLO-Mini: APOLLO of rank one, with one factor for a whole matrix."""

    rank: int = 1
    scale: float = 128.0
    scale_type: Literal["channel", "tensor"] = "tensor"

    name: ClassVar = "apollo_mini"


@dataclass(frozen=True)
class APOLLOSVD(APOLLO):
    """APOLLO-SVD: APOLLO in the leading singular vectors of the gradient, as in GaLore.

    How much of the gradient they hold varies, and with it the scale: the adamw learning-rate convention normalizes.
    """

    projection: Literal["random", "svd"] = "svd"

    name: ClassVar = "apollo_svd"
    adamw_settings: ClassVar[Mapping[str, Any]] = {"normalize": True}
