"""Orthogonalization of stacks of matrices by Newton-Schulz iterations.

An odd polynomial `a x + b x^3 + c x^5` is applied to the singular values, which leaves the singular vectors alone
and drives the values towards one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.ops.norms import gram_norm, magnitude

Coefficients = tuple[float, float, float]
IterationDtype = Literal["bfloat16", "float32", "float64"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024: the steepest slope at zero (3.44 per step) at the price of singular values in [0.68, 1.13]."""

SCHEDULES: dict[str, tuple[Coefficients, ...]] = {
    "quintic": (QUINTIC,),
    "annealed": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "converged": ((2.0, -1.5, 0.5),),
    "polar_express_long": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}
"""Coefficients per iteration; the last ones repeat. `quintic`: Jordan et al. 2024. `annealed`: the five-step table of
microsoft/dion and modded-nanogpt; it ends in [0.97, 1.04] for singular values above 5 % of the norm. `polar_express`:
Amsel et al. 2025, arXiv:2505.16932, with safety 1.02 in the coefficients and in the divisor; it ends in [0.86, 1.14]
above 1 %. The last two have a fixed point at one and converge to the polar factor; twelve steps are usual.
`converged`: modded-nanogpt's track 3. `polar_express_long`: that of Muown there. Accuracy: see `orthogonalize`."""

SAFETY = {"polar_express": 1.02}
"""Factor of the norm that is divided by, where it is not one."""


GRAM_ASPECT, GRAM_ROWS, GRAM_STEPS, GRAM_SCHEDULES = 2.5, 256, 5, ("quintic", "annealed")
"""From this aspect and number of rows on, in bfloat16, up to so many iterations with these coefficients are taken in
pairs through the Gram matrix, which is recomputed for each pair; the first is taken alone.

Measured on one CPU thread: 1.2 x as fast as the plain iteration at aspects 2.7 and 3, 1.25 x at 4. Over 117 matrices
(signal of low rank plus noise, power laws, steps) the largest deviation from float64 is the plain one's, 0.24, where
noise is lifted; where the plain one is off by 0.01, this is off by 0.01 to 0.05. Longer runs between two formations are
up to 1.5 x as fast and not safe: three iterations were off by 0.8, and with `polar_express` by a factor of 1000.
"""


SYMMETRIC_WORK = 2**28
"""Multiplications of a symmetric product from which on half of it is left out."""

Divisor = Literal["fro", "gram"]

SOFT_WEIGHTS = (
    0.1091613623,
    0.07085664498,
    0.05210528973,
    0.05457295795,
    0.05011334061,
    0.03334622198,
    0.05022104481,
    0.1053727358,
    0.1187323776,
    0.1185061091,
    0.1185059576,
    0.1185059576,
)
"""Weights of the matrices before each of the twelve `converged` steps, whose sum maps a singular value x to about x^0.1
(Soft-Muon): off by 3e-4 at most from 0.1 on, by 8e-4 at 0.05, 5e-3 at 0.01, and 0.32 for 0.50 at 0.001 (measured)."""


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: str | Coefficients = "quintic",
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    divisor: Divisor = "fro",
    soft: float = 0.0,
) -> Tensor:
    """Approximate the polar factor U V^T of each matrix x = U S V^T by `steps` quintic Newton-Schulz iterations.

        x <- x / max(safety |x|, eps);  A = x x^T;  x <- a x + (b A + c A A) x

    Accuracy of twelve steps, as what a singular value becomes, given as a share of the divisor (measured in float64):
    `converged` makes 1e-4 0.39, 3e-4 0.88, 1e-3 one within 5e-6, 0.01 and more one to rounding; `polar_express_long`
    3e-5 one within 4e-3, 1e-4 and more one to rounding. float32 adds 1e-7. In bfloat16 the whole factor is off by 5 %
    where singular values reach down to 0.01 of the largest; what is below 1e-3 is lost.

    Args:
        x: `[..., m, n]`; the smaller side is iterated on.
        steps: number of iterations.
        coefficients: (a, b, c) of every iteration, or a name of `SCHEDULES`.
        eps: smallest Frobenius norm that is divided by; zero stays zero.
        dtype: in which the products are taken. bfloat16 deviates from exact arithmetic by 2 to 4 % (measured).
        divisor: `"fro"`, or `"gram"` for |x x^T|^(1/2), which is a smaller bound of the spectral norm and saves about
            one iteration for the price of a product.
        soft: how far towards sum_k w_k x_k, with `SOFT_WEIGHTS` w and the matrices x_k before each of as many
            iterations, scaled to the Schatten-4 norm of the result (Soft-Muon). No further products.

    Returns:
        Shaped like `x`, in the dtype of `x`. Singular values of the input above 1 % of its norm end in
        [0.68, 1.13] with the default coefficients.
    """
    named = isinstance(coefficients, str)
    schedule = SCHEDULES[coefficients] if named else (coefficients,)
    if x.dtype == torch.float64 != dtype:  # beyond the range of narrower ones
        x = x / magnitude(x).clamp_(min=1.0)
    y = x.to(dtype, copy=True)
    is_transposed = y.stride(-2) < y.stride(-1)
    y = y.mT if is_transposed else y  # rows lie in memory: products with the other view are up to half as fast
    size = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) if divisor == "fro" else gram_norm(y)
    y /= size.mul_(SAFETY.get(coefficients, 1.0) if named else 1.0).clamp_(min=eps)
    flat = y.reshape(-1, *y.shape[-2:])
    # bfloat16 on a CPU: a matrix alone and in a batch can round differently; alone, it does not matter who shares
    # its stack. Two dimensions: batches of one are up to half as fast
    each = dtype == torch.bfloat16 and x.device.type == "cpu"
    parts = flat.unbind(0) if each else (flat,)
    short, long = sorted(y.shape[-2:])
    uses_gram = dtype == torch.bfloat16 and short >= GRAM_ROWS and long >= GRAM_ASPECT * short
    uses_gram = uses_gram and coefficients in GRAM_SCHEDULES and steps <= GRAM_STEPS and not soft
    if soft:
        done = [_iterate_softly(part, range(steps), schedule, soft) for part in parts]
    else:
        done = [(_iterate_gram if uses_gram else _iterate)(part, range(steps), schedule) for part in parts]
    y = (done[0] if len(done) == 1 else torch.stack(done)).reshape(y.shape)
    return (y.mT if is_transposed else y).to(x.dtype)


def _halves(like: Tensor, long: int) -> bool:
    """Whether half of a symmetric product of small side s and length `long` may be left out: where it pays.

    Measured in bfloat16 on one thread: 768 x 3072 in 0.64 of the time of the whole product, 512 x 1376 in 0.73, the
    square of a 768 x 768 matrix in 0.75, of 512 x 512 in 0.97.

    Returns:
        True for large products in bfloat16 on a CPU.
    """
    size = min(like.shape[-2:])
    return like.dtype == torch.bfloat16 and like.device.type == "cpu" and size * size * long >= SYMMETRIC_WORK


def _symmetric(like: Tensor, panel: Callable[[slice, slice], Tensor]) -> Tensor:
    """A symmetric product: block rows up to the diagonal, mirrored.

    Args:
        like: gives dtype, device, leading dimensions and, as its smaller side s, the size.
        panel: gives some rows and columns of the result.

    Returns:
        `[..., s, s]`.
    """
    size = min(like.shape[-2:])
    out = like.new_empty(*like.shape[:-2], size, size)
    step = -(-size // 4)
    for i in range(0, size, step):
        end = min(i + step, size)
        out[..., i:end, :end] = tile = panel(slice(i, end), slice(0, end))
        out[..., :i, i:end] = tile[..., :i].mT
    return out


def _gram(y: Tensor) -> Tensor:
    """The Gram matrix of the smaller side."""
    y = y.mT if y.shape[-2] > y.shape[-1] else y
    return _symmetric(y, lambda i, j: y[..., i, :] @ y[..., j, :].mT) if _halves(y, y.shape[-1]) else y @ y.mT


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """B gram + c gram^2."""
    add = torch.addmm if gram.ndim == 2 else torch.baddbmm
    if not _halves(gram, gram.shape[-1]):
        return add(gram, gram, gram, beta=b, alpha=c)
    return _symmetric(gram, lambda i, j: add(gram[..., i, j], gram[..., i, :], gram[..., j], beta=b, alpha=c))


def _commuting(a: Tensor, b: Tensor) -> Tensor:
    """A b of symmetric matrices that commute, which is symmetric."""
    return _symmetric(a, lambda i, j: a[..., i, :] @ b[..., j]) if _halves(a, a.shape[-1]) else a @ b


def _iterate(y: Tensor, steps: range, schedule: tuple[Coefficients, ...]) -> Tensor:
    add, is_tall = torch.addmm if y.ndim == 2 else torch.baddbmm, y.shape[-2] > y.shape[-1]
    halves = _halves(y, max(y.shape[-2:]))
    for i in steps:
        a, b, c = schedule[min(i, len(schedule) - 1)]
        if halves:
            poly = _polynomial(_gram(y), b, c)
        else:
            gram = y.mT @ y if is_tall else y @ y.mT
            poly = add(gram, gram, gram, beta=b, alpha=c)
        y = add(y, y, poly, beta=a) if is_tall else add(y, poly, y, beta=a)
    return y


def _iterate_softly(y: Tensor, steps: range, schedule: tuple[Coefficients, ...], soft: float) -> Tensor:
    total = torch.zeros_like(y)
    for i in steps:
        total.add_(y, alpha=SOFT_WEIGHTS[i])
        y = _iterate(y, range(i, i + 1), schedule)
    total *= gram_norm(y) / gram_norm(total).clamp_(min=torch.finfo(y.dtype).tiny)
    return y.lerp(total, soft)


def _iterate_gram(y: Tensor, steps: range, schedule: tuple[Coefficients, ...]) -> Tensor:
    """The same, but two iterations are one product (Q P) y, with polynomials P of R = y y^T and Q of P R P."""
    eye = torch.eye(min(y.shape[-2:]), dtype=y.dtype, device=y.device)

    def polynomial(gram: Tensor, i: int) -> Tensor:
        a, b, c = schedule[min(i, len(schedule) - 1)]
        return _polynomial(gram, b, c) + a * eye

    y = _iterate(y, steps[:1], schedule)
    for i in steps[1:-1:2]:
        gram = _gram(y)
        p = polynomial(gram, i)
        q = polynomial(_commuting(p, gram @ p), i + 1)
        both = _commuting(q, p)
        y = y @ both if y.shape[-2] > y.shape[-1] else both @ y
    return _iterate(y, steps[len(steps) - 1 + len(steps) % 2 :], schedule)
