"""State tensors at their start values, in their storage formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.state.quantized_view import encode, num_scales


def initial_value(fmt: StateFormat, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A state tensor at its start value; quantized values of a quantized one.

    Args:
        fmt: its format.
        like: the parameter, or this rank's part of it, for device and, of an `m x n` tensor, shape and strides.
        shape: of the tensor, or of this rank's part.

    Returns:
        A tensor that owns its storage.
    """
    spec, device = fmt.spec, like.device
    if fmt.is_quantized:
        return torch.full(tuple(shape), _quantized_fill(fmt)[0], dtype=fmt.dtype, device=device)
    away = not fmt.is_compute_format(device)
    if away and fmt.name == "host":
        like, device = torch.empty_like(like, device="cpu"), torch.device("cpu")
    if spec.fill == "eye":
        out = torch.eye(shape[-1], dtype=fmt.dtype, device=device).expand(*shape).contiguous()
    elif spec.letters == "mn":
        out = torch.full_like(like, spec.fill, dtype=fmt.dtype, requires_grad=False)
    else:
        out = torch.full(tuple(shape), spec.fill, dtype=fmt.dtype, device=device)
    return to_storage_device(fmt, out) if away else out


def to_storage_device(fmt: StateFormat, value: Tensor) -> Tensor:
    """Move a tensor to the device where it is stored.

    Args:
        fmt: its format, one that a rule does not work on directly.
        value: the tensor.

    Returns:
        A copy in pinned host memory for `"host"`, else the tensor itself.
    """
    return value.cpu().pin_memory() if fmt.name == "host" else value


def initial_scale(fmt: StateFormat, quantized: Tensor, start: int) -> Tensor:
    """The scales of a quantized state tensor at its start value.

    Args:
        fmt: its format.
        quantized: quantized values of this rank's part.
        start: index of its first element.

    Returns:
        float32, one per block that this rank's part touches.
    """
    size, fill = num_scales(fmt, quantized, start), _quantized_fill(fmt)[1]
    return torch.full((size,), fill, dtype=torch.float32, device=quantized.device)


def _quantized_fill(fmt: StateFormat) -> tuple[int, float]:
    """Quantized value and scale of the start value."""
    value = torch.full((1,), float(cast("float", fmt.spec.fill)))
    quantized, scale = torch.empty(1, dtype=fmt.dtype), torch.empty(1)
    encode(fmt, value, quantized, scale, 0)
    return int(quantized), float(scale)
