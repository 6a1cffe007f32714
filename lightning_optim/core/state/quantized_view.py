"""quantized_view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lightning_optim.core.state.formats import CODES, StateFormat, Storage
from lightning_optim.ops import quantize as codec
from lightning_optim.ops.rounding import stochastic_round


def dequantize(form: StateFormat, part: Tensor, scale: Tensor | None, start: int, device: torch.device) -> Tensor:
    """The values of a resting tensor, or of a run of its elements.

    Args:
        form: of the slot.
        part: what rests.
        scale: of the blocks that `part` touches, if quantised.
        start: index of the first element.
        device: where the values are wanted.

    Returns:
        A copy in the dtype of the arithmetic; `part` itself where it rests so.
    """
    if scale is not None:
        flat, signless = part.reshape(-1), form.slot.nonnegative
        kind = cast("codec.Format", form.kind)
        values = codec.decode(flat, scale, kind, nonnegative=signless, block=form.block, start=start)
        return values.view(part.shape).to(form.wide)
    return part.to(device, form.wide, non_blocking=True)


def quantize(
    form: StateFormat,
    part: Tensor,
    scale: Tensor | None,
    start: int,
    value: Tensor,
    index: Callable[[], Tensor],
    key: int,
) -> None:
    """Store values in a resting tensor, or in a run of its elements.

    Args:
        form: of the slot.
        part: what rests, written.
        scale: of the blocks that `part` touches, if quantised; written.
        start: index of the first element.
        value: the values.
        index: gives the global indices of the elements, for stochastic rounding to bfloat16.
        key: of that rounding.
    """
    if scale is not None:
        encode(form, value.reshape(-1), part.view(-1), scale, start)
    elif form.kind == "bf16":
        part.copy_(stochastic_round(value.float(), index(), key))
    else:
        part.copy_(value)


def encode(form: StateFormat, value: Tensor, codes: Tensor, scale: Tensor, start: int) -> None:
    """Quantize values.

    Args:
        form: of the state tensor.
        value: flat values.
        codes: written.
        scale: of the blocks that `codes` touches; written.
        start: index of the first element.
    """
    kind, signless = cast("codec.Format", form.kind), form.slot.nonnegative
    codec.encode(value.float(), codes, scale, kind, nonnegative=signless, block=form.block, start=start)


def convert(
    form: StateFormat, old: Tensor, old_scale: Tensor | None, new: Tensor, new_scale: Tensor | None, start: int
) -> None:
    """Store in a slot what it held in another form.

    Args:
        form: the new one; the old one is seen from its dtype.
        old: what rested.
        old_scale: its scales, if it was quantised.
        new: written.
        new_scale: written, if the new form is quantised.
        start: index of the first element.

    Raises:
        RuntimeError: codes without the scales that belong to them.
    """
    kind = next((k for k, dtype in CODES.items() if dtype == old.dtype), "fp32")
    before = replace(form, kind=cast("Storage", kind), dtype=old.dtype)
    if before.is_quantized and (old_scale is None or old_scale.numel() != blocks_here(form, old, start)):
        raise RuntimeError("state rests as codes of other blocks than storage_block says; set it as it was")
    value = dequantize(before, old, old_scale if before.is_quantized else None, start, new.device)
    if new_scale is None:
        new.copy_(value)
    else:
        encode(form, value.reshape(-1), new.view(-1), new_scale, start)


def blocks_here(form: StateFormat, codes: Tensor, start: int) -> int:
    """How many blocks this rank's part of a quantised slot touches.

    Returns:
        The number of its scales.
    """
    return codec.blocks_of(codes.numel(), form.block, start)


def scales_at(form: StateFormat, scale: Tensor | None, start: int, at: int, count: int) -> Tensor | None:
    """The scales of a run of elements.

    Args:
        form: of the slot.
        scale: of this rank's part, if quantised.
        start: index of the first element of this rank's part.
        at: where the run begins within the part.
        count: of its elements.

    Returns:
        A view.
    """
    if scale is None:
        return None
    first = (start % form.block + at) // form.block
    return scale[first : first + codec.blocks_of(count, form.block, start + at)]
