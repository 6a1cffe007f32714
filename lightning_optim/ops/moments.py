"""Adam's two moments and their ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def update_moments_(m: Tensor, v: Tensor, g: Tensor, betas: tuple[float, float]) -> None:
    """Take a gradient into the running means of gradients and of their squares.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2

    Args:
        m: first moment, written.
        v: second moment, written.
        g: gradient.
        betas: b1 and b2.
    """
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])


def bias_corrections(betas: tuple[float, float], t: int) -> tuple[float, float]:
    """What a mean and a root of running means from zero are divided by after t steps.

    Returns:
        (1 - b1^t, sqrt(1 - b2^t)).
    """
    return 1 - betas[0] ** t, (1 - betas[1] ** t) ** 0.5


def adam_ratio(m: Tensor, v: Tensor, mean: float, root: float, eps: float) -> Tensor:
    """(m / mean) / (sqrt(v) / root + eps), with one temporary.

    Args:
        m: first moment.
        v: second moment, shaped like `m`.
        mean: correction of m.
        root: correction of sqrt(v).
        eps: added to the corrected root.

    Returns:
        The ratio.
    """
    d = v.sqrt().add_(eps * root)
    if mean != root:
        d.mul_(mean / root)
    return torch.div(m, d, out=d)
