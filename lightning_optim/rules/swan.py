"""SWAN: the gradient, its rows normalized and then whitened; no state."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.core.rule import Rule
from lightning_optim.ops.kernels.products import product
from lightning_optim.ops.lapack import LinAlgError, failures
from lightning_optim.ops.norms import magnitude, normalized, rms
from lightning_optim.ops.roots import Method, coupled_newton, inverse_power


@dataclass(frozen=True)
class SWAN(Rule):
    """SWAN: the gradient, its rows normalized and then whitened; no state.

    x = (g - mean_cols(g)) / std_cols(g);  d = (x x^T)^(-1/2) x, for m <= n; tall matrices through their transpose

    The root is found by `iterations` steps of the coupled Newton iteration (`newton`; Newton-Schulz with beta 1/2), as
    published, or exactly (`eigh`). `rescale` gives d the norm of x, that is RMS 1 instead of 1 / sqrt(max(m, n)).

    A centered row lacks one direction, so a square x is always singular: the inverse root is that of its range.

    Differs: the beta of 0.8 that is also quoted for the iteration does not converge to the inverse root. A row of
    equal elements does not move (the publication divides zero by zero).
    """

    lr: float = 1e-3
    root: Method = "newton"
    """How the inverse root is computed."""
    iterations: int = 10
    """Newton iterations of the root."""
    rescale: Literal["none", "norm"] = "none"
    """Whether the direction takes over the norm of the normalized gradient."""
    weight_decay: float = 0.0

    name: ClassVar = "swan"
    source: ClassVar = "Ma et al. 2024, arXiv:2412.13148; equations as in Gong et al. 2025, arXiv:2502.07752, 30-32"
    family: ClassVar = "orthogonalized"
    vectors: ClassVar = False

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no iterations, or what `Rule.validate` raises.
        """
        super().validate()
        if self.iterations < 1:
            raise ValueError(f"swan: iterations must be at least 1, got {self.iterations}")

    def rms(self, m: int, n: int) -> float:  # noqa: D102
        return 1.0 if self.rescale == "norm" else max(m, n) ** -0.5

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        tall = g.shape[-2] > g.shape[-1]
        x = g.mT if tall else g
        x = x - x.mean(-1, keepdim=True)
        x.div_(magnitude(x, dim=-1))
        deviation = vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x.div_(torch.where(deviation > 0, deviation, 1.0))
        gram = product(x, x.mT)
        d = product(self._inverse_root(gram), x)
        if self.rescale == "norm":
            d = normalized(d, rms(x))
        return d.mT if tall else d

    def _inverse_root(self, gram: Tensor) -> Tensor:
        if self.root == "eigh":
            try:
                return inverse_power(gram, 0.5)
            except LinAlgError:
                failures.add("eigenvectors could not be computed; the inverse root is found by Newton's iteration")
        return coupled_newton(gram, 2, self.iterations).root
