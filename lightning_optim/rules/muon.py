"""Muon: momentum, orthogonalized by Newton-Schulz."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_optim.core.rule import MomentumRule, Rule, nearest, zeros
from lightning_optim.ops.maps import Size, aurora, contra
from lightning_optim.ops.orthogonal import DTYPES, SCHEDULES, SOFT_WEIGHTS, Divisor, IterationDtype, orthogonalize

SCALES = {
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
    "none": lambda m, n: 1.0,
}
"""Published shape scales of the direction: Jordan 2024 and torch's default; Liu et al. 2025 (Moonlight); Dion's; 1."""

Scale = Literal["original", "match_rms_adamw", "spectral", "none"]


@dataclass(frozen=True)
class Muon(MomentumRule):
    """Muon: momentum, orthogonalized by Newton-Schulz, for hidden matrices.

    m <- momentum m + (1 - momentum) g;  x = (1 - momentum) g + momentum m, or m without nesterov
    d = scale(m, n) orthogonalize(x)

    `ns_coefficients` are (a, b, c) of every iteration, or `"quintic"`, `"annealed"`, `"polar_express"`; with 12
    `ns_steps`, `"converged"` or `"polar_express_long"` give the polar factor (see `ops.orthogonal`). Maps around it,
    all off by default: `contra` damps large singular directions (0.4 published), `soft` in [0, 1] goes that far from
    orthogonalize(x) towards singular values to the power 0.1, `aurora` repeats it so often for equal row norms of
    matrices that are not square (2 published). None of them changes the norm, or learning rates.

    Not for embeddings, heads, vectors or biases. Whether the momentum is an average (Jordan, torch) or a sum
    (Moonlight) makes no difference: the iteration does not see the factor.

    Differs: `scale` is applied after the cast back from `ns_dtype`. The published default lr differs by a factor of
    20 between packages of one scale (0.02 here and in Jordan's, 0.001 in torch).
    """

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: str | tuple[float, float, float] = "quintic"
    ns_dtype: IterationDtype = "bfloat16"
    eps: float = 1e-7
    scale: Scale = "original"
    """Factor by the shape of the matrix."""
    weight_decay: float = 0.0
    ns_divisor: Divisor = "fro"
    contra: float = 0.0
    """Damping of large singular directions; 0.4 is published."""
    contra_size: Size = "gram"
    """By which norm `contra` tells large from small."""
    soft: float = 0.0
    """How far to go from the polar factor towards singular values to the power 0.1."""
    aurora: int = 0
    """Repetitions that equalize row norms of matrices that are not square; 2 is published."""

    name: ClassVar = "muon"
    source: ClassVar = "Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982"
    family: ClassVar = "orthogonalized"
    search: ClassVar = Rule.search | {"momentum": (0.95, 0.9)}
    state: ClassVar = {"momentum_buffer": zeros("mn")}
    first_moment: ClassVar = "momentum_buffer"
    vectors: ClassVar = False
    signed: ClassVar = frozenset({"ns_coefficients"})

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a momentum of 1 or more, no iterations, unknown coefficients, maps that do not fit, or what
                `Rule.validate` raises.
        """
        super().validate()
        if self.momentum >= 1 or self.ns_steps < 1:
            raise ValueError(f"{self.name}: needs momentum < 1 and ns_steps >= 1, got {self.momentum}, {self.ns_steps}")
        if isinstance(self.ns_coefficients, str) and self.ns_coefficients not in SCHEDULES:
            hint = nearest(self.ns_coefficients, list(SCHEDULES))
            raise ValueError(f"{self.name}: unknown ns_coefficients {self.ns_coefficients!r}; {hint}")
        fits = self.ns_coefficients == "converged" and self.ns_steps == len(SOFT_WEIGHTS)
        if self.soft > 1 or (self.soft and not fits):
            raise ValueError(
                f"{self.name}: soft must be at most 1 and needs ns_coefficients='converged' with ns_steps="
                f"{len(SOFT_WEIGHTS)}, got {self.soft}, {self.ns_coefficients!r}, {self.ns_steps}"
            )

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of `torch.optim.Muon`.

        Returns:
            The group, with `scale` for `adjust_lr_fn`.
        """
        scale = {"scale": group["adjust_lr_fn"] or "original"} if "adjust_lr_fn" in group else {}
        return super().translate(group) | scale

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return SCALES[self.scale](m, n) / max(m, n) ** 0.5

    def filtered(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """The momentum.

        Returns:
            `[b, m, n]`; the state itself without nesterov.
        """
        m = self.update_ema(s, g, self.momentum, t)
        return g.lerp(m, self.momentum) if self.nesterov else m

    def polar(self, x: Tensor) -> Tensor:
        """Orthogonalize, with the maps that are asked for.

        Returns:
            Shaped like `x`, without a shape scale.
        """
        settings = {"eps": self.eps, "dtype": DTYPES[self.ns_dtype], "divisor": self.ns_divisor, "soft": self.soft}
        iterate = functools.partial(orthogonalize, steps=self.ns_steps, coefficients=self.ns_coefficients, **settings)
        out = aurora(x, iterate, self.aurora) if self.aurora else iterate(x)
        return contra(out, x, self.contra, self.contra_size) if self.contra else out

    def orthogonal(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """The orthogonalized momentum.

        Returns:
            `[b, m, n]`, without a shape scale.
        """
        return self.polar(self.filtered(g, s, t))

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        scale = SCALES[self.scale](*g.shape[-2:])
        d = self.orthogonal(g, s, t)
        return d if scale == 1 else d.mul_(scale)
