"""allocate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.state.quantized_view import blocks_here, encode


def allocate(form: StateFormat, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A slot's tensor at its start value; codes of a quantised one.

    Args:
        form: of the slot.
        like: the parameter, or this rank's part of it, for device and, of an `m x n` slot, shape and strides.
        shape: of the tensor, or of this rank's part.

    Returns:
        A tensor that owns its storage.
    """
    slot, device = form.slot, like.device
    if form.is_quantized:
        return torch.full(tuple(shape), start_values(form)[0], dtype=form.dtype, device=device)
    away = not form.direct(device)
    if away and form.kind == "host":
        like, device = torch.empty_like(like, device="cpu"), torch.device("cpu")
    if slot.fill == "eye":
        made = torch.eye(shape[-1], dtype=form.dtype, device=device).expand(*shape).contiguous()
    elif slot.letters == "mn":
        made = torch.full_like(like, slot.fill, dtype=form.dtype, requires_grad=False)
    else:
        made = torch.full(tuple(shape), slot.fill, dtype=form.dtype, device=device)
    return rested(form, made) if away else made


def rested(form: StateFormat, value: Tensor) -> Tensor:
    """A tensor on the device where a slot rests.

    Args:
        form: of the slot, one that a rule does not work on directly.
        value: any.

    Returns:
        A copy in pinned host memory for `"host"`, else the tensor itself.
    """
    return value.cpu().pin_memory() if form.kind == "host" else value


def allocate_scale(form: StateFormat, codes: Tensor, start: int) -> Tensor:
    """The scales of a quantised slot at its start value.

    Args:
        form: of the slot.
        codes: of this rank's part.
        start: index of its first element.

    Returns:
        float32, one per block this rank's part touches.
    """
    return torch.full(
        (blocks_here(form, codes, start),), start_values(form)[1], dtype=torch.float32, device=codes.device
    )


def start_values(form: StateFormat) -> tuple[int, float]:
    """Code and scale of the start value."""
    value = torch.full((1,), float(cast("float", form.slot.fill)))
    codes, scale = torch.empty(1, dtype=form.dtype), torch.empty(1)
    encode(form, value, codes, scale, 0)
    return int(codes), float(scale)
