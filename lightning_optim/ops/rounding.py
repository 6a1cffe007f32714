"""Rounding float32 values to bfloat16 without bias.

Nearest rounding loses every update below half a unit in the last place (2^-9 of the weight). Stochastic rounding
goes up with a probability equal to the discarded fraction, so its expectation is exact. The random bits are a hash
of (seed, step, parameter, element), not a generator: every mesh, and a resumed run, draws the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WRAP = 1 << 32
_EXPONENT = 0x7F800000


def _int32(x: int) -> int:
    x %= _WRAP
    return x - _WRAP if x >= _WRAP // 2 else x


def indices(start: int, count: int, device: torch.device) -> Tensor:
    """Consecutive element indices, wrapped around.

    Args:
        start: the first.
        count: how many.
        device: where.

    Returns:
        int32 `[count]`.
    """
    first = _int32(start)
    if first + count < _WRAP // 2:
        return torch.arange(first, first + count, dtype=torch.int32, device=device)
    return torch.arange(start, start + count, device=device).to(torch.int32)


def hash_key(*values: int) -> int:
    """Mix integers into one signed 32-bit key (FNV-1a over the values, then a finaliser).

    Args:
        *values: integers such as seed, step and parameter index.

    Returns:
        The key, in [-2^31, 2^31).
    """
    h = 0x811C9DC5
    for value in values:
        h = ((h ^ (value % _WRAP)) * 0x01000193) % _WRAP
        h ^= h >> 15
        h = (h * 0x85EBCA6B) % _WRAP
    return _int32(h ^ (h >> 13))


def random_bits(index: Tensor, key: int) -> Tensor:
    """32 pseudo-random bits per element, from a multiply-xorshift finaliser (murmur3's constants).

    Args:
        index: int32 element indices; products wrap around.
        key: from `hash_key`.

    Returns:
        int32, shaped like `index`.
    """
    z = index * _int32(0x9E3779B1)
    z += key
    z ^= (z >> 16).bitwise_and_(0xFFFF)
    z *= _int32(0x85EBCA6B)
    z ^= (z >> 13).bitwise_and_(0x7FFFF)
    z *= _int32(0xC2B2AE35)
    z ^= (z >> 16).bitwise_and_(0xFFFF)
    return z


def stochastic_round(x: Tensor, index: Tensor, key: int) -> Tensor:
    """Round float32 to bfloat16, up with a probability equal to the discarded fraction; NaN stays NaN.

    Args:
        x: float32 values.
        index: int32 global element indices, shaped like `x`.
        key: from `hash_key`.

    Returns:
        bfloat16, shaped like `x`.
    """
    bits = x.view(torch.int32)
    exponent = bits.bitwise_and(_EXPONENT)
    cut = exponent.sub_(_EXPONENT).bitwise_right_shift_(31).bitwise_and_(0xFFFF)  # bits to cut: none of NaN or infinity
    rounded = random_bits(index, key).bitwise_and_(cut).add_(bits).bitwise_and_(cut.bitwise_not_())
    return rounded.view(torch.float32).to(torch.bfloat16)
