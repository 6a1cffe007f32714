"""What else may be done to singular values, or to rows, around the polar factor of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_optim.ops.norms import gram_norm, norm
from lightning_optim.ops.spectral import norm_by_power

Size = Literal["power", "gram"]


def contra(o: Tensor, x: Tensor, strength: float, size: Size = "gram") -> Tensor:
    """Damp the large singular directions of a polar factor (Contra-Muon).

        y = o - strength / 2 x / size(x);  y |o| / |y|

    A singular value s of x becomes 1 - strength / 2 s / size(x), up to the factor that keeps the norm.

    Args:
        o: polar factor of x, `[..., m, n]`.
        x: what was orthogonalized.
        strength: 0 for o itself; 0.4 is published.
        size: `"power"` divides by the spectral norm as five power iterations find it and keeps the Frobenius norm,
            `"gram"` takes the Schatten-4 norm for both.

    Returns:
        Shaped like `o`.
    """
    if not strength:
        return o
    length, size_of = (norm_by_power, norm) if size == "power" else (gram_norm, gram_norm)
    y = o - x * (0.5 * strength / length(x).clamp_(min=1e-10))
    return y.mul_(size_of(o) / size_of(y).clamp_(min=1e-10))


def aurora(x: Tensor, polar: Callable[[Tensor], Tensor], repeats: int = 2, exponent: float = 0.5) -> Tensor:
    """A polar factor whose rows (of a tall matrix; columns of a wide one) have equal norms (Aurora).

        D_i = 1 / |x_i|;  repeat:  o = polar(D x);  D_i <- D_i (n / m / |o_i|^2)^exponent between the repeats

    A square matrix' polar factor has such rows already. Measured on normal 512 x 256 matrices: row norms are within 7 %
    of sqrt(n / m) after one repeat, 4 % after two and 2 % after three; 8, 2.5 and 0.8 % at 512 x 128. A row of zeros
    stays one.

    Args:
        x: `[..., m, n]`.
        polar: orthogonalizes.
        repeats: calls of `polar`, at least 1.
        exponent: of the correction.

    Returns:
        Shaped like `x`.
    """
    m, n = x.shape[-2:]
    if m == n:
        return polar(x)
    if m < n:
        return aurora(x.mT, polar, repeats, exponent).mT
    scale = vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-7).reciprocal_()
    o = polar(scale * x)
    for _ in range(repeats - 1):
        lengths = vector_norm(o, dim=-1, keepdim=True).square_().clamp_(min=torch.finfo(o.dtype).tiny)
        scale = torch.where(lengths > 1e-12, scale * (n / m / lengths) ** exponent, scale)
        o = polar(scale * x)
    return o
