"""Matrix products in float32 by the library that uses the processor.

torch multiplies float32 matrices on a CPU by the BLAS it was built with, MKL in the published builds. On AMD's
processors MKL leaves AVX-512 out; oneDNN, which torch brings too, does not. Measured on one thread of an EPYC (Zen 5):
100 to 107 GFLOP/s by MKL, 190 to 240 by oneDNN for sides of 256 and more, transposed or not; 98 and 134 at 128, 72 and
35 at 64. Rounding is that of float32 products either way: 4e-7 to 6e-7 of the norm against 2.5e-7.

The choice depends on the processor and on the sizes of the matrices, not on a stack or a measurement: every rank, and a
resumed run, takes the same one. Views that leave gaps between rows and between columns are copied first: a 512 x 512
product of such takes oneDNN 3 s, and 3 ms with the copies.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

SMALLEST, WORK = 64, 2**21
"""A product is taken by oneDNN if no side is shorter, and if it has as many multiplications."""


@functools.cache
def available() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than torch's BLAS: AVX-512, but no Intel."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in vendor:
        return False
    try:  # an operation of torch's own compiler, which another version may not have like this
        return torch.equal(_product(torch.eye(2), torch.eye(2)), torch.eye(2))
    except (AttributeError, RuntimeError):
        return False


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, in float32 on a CPU as fast as may be.

    Args:
        a: `[..., m, k]`.
        b: `[..., k, n]`, of the same leading dimensions, or a single matrix.

    Returns:
        `[..., m, n]`. A matrix of a stack comes out as it does alone.
    """
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    fits = a.dtype == b.dtype == torch.float32 and min(m, k, n) >= SMALLEST and m * k * n >= WORK
    if not fits or a.device.type != "cpu" or b.device.type != "cpu" or not available():
        return a @ b
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b
    if a.ndim == b.ndim == 2:
        return _product(a, b)
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    pairs = zip(a.expand(*leading, m, k).reshape(-1, m, k), b.expand(*leading, k, n).reshape(-1, k, n), strict=True)
    done = [_product(x, y) for x, y in pairs]
    return (done[0] if len(done) == 1 else torch.stack(done)).view(*leading, m, n)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).mT, None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """A matrix whose rows or columns lie one behind the other: of others oneDNN multiplies number by number."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()
