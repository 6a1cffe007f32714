"""Random numbers that every rank, mesh and resumed run draws alike: a hash of what they are for, no generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.ops.rounding import hash_key, random_bits


def uniform(shape: Sequence[int], key: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), 24 bits each.

    Args:
        shape: of the result.
        key: from `hash_key`.
        device: of the result.

    Returns:
        float32 of that shape.
    """
    index = torch.arange(math.prod(shape), device=device).to(torch.int32)
    return (random_bits(index, key) >> 8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2**-24).view(*shape)


def normal(shape: Sequence[int], key: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers by the Box-Muller transform.

    Args:
        shape: of the result.
        key: from `hash_key`.
        device: of the result.

    Returns:
        float32 of that shape.
    """
    radius = uniform(shape, hash_key(key, 1), device=device).log_().mul_(-2).sqrt_()
    return radius.mul_(uniform(shape, hash_key(key, 2), device=device).mul_(2 * math.pi).cos_())
