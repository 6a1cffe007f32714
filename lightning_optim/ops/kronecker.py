"""Division by Kronecker products of symmetric positive semi-definite factors, damped."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.ops.lapack import Fallback, inverse


def divided(g: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Matrices divided by `scale` in two eigenbases: `left ((left^T g right) / scale) right^T`.

    With scale = d_L d_R^T + damping it is the solution of (R x L + damping I) vec D = vec g, exact up to rounding:
    measured in float32 on 32 x 48 with damping 1e-3 and factors of mean 1, 2e-6 of the norm.

    Args:
        g: `[b, m, n]`.
        left: eigenvectors as columns, `[b, m, m]`.
        right: likewise, `[b, n, n]`.
        scale: positive, `[b, m, n]`.

    Returns:
        `[b, m, n]`.
    """
    return left @ ((left.mT @ g @ right) / scale) @ right.mT


def damped_inverse(x: Tensor, damping: Tensor | float, previous: Tensor | None = None) -> Tensor:
    """(x + damping I)^-1.

    Args:
        x: symmetric and positive semi-definite, `[b, n, n]`.
        damping: positive, a number or `[b, 1, 1]`.
        previous: per matrix, kept (with a warning) where there is no inverse.

    Returns:
        `[b, n, n]`.

    Raises:
        LinAlgError: a matrix is singular and there is no previous inverse.
    """
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if previous is None:
        return inverse(x + damping * eye)
    fallback = Fallback(lambda: previous, "an inverse could not be computed; the last good one is kept")
    return inverse(x + damping * eye, fallback)


def factored_damping(left: Tensor, right: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damping shared out over two factors by their size (Martens & Grosse 2015, section 6.3).

        pi^2 = right / left;  (sqrt(damping) / pi, sqrt(damping) pi), pi = 1 where one of them is 0

    Args:
        left: mean eigenvalue of the left factor, `[b, 1, 1]`.
        right: of the right one.
        damping: of the product.

    Returns:
        (of the left, of the right factor), `[b, 1, 1]`.
    """
    pi = (right / left).sqrt()
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1.0)
    return damping**0.5 / pi, damping**0.5 * pi


def mean_eigenvalue(x: Tensor) -> Tensor:
    """The mean of the diagonal.

    Args:
        x: `[b, n, n]`.

    Returns:
        `[b, 1, 1]`.
    """
    return x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
