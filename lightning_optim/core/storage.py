"""How state is kept between steps: allocation from a rule's declaration, reading into a stack, writing back.

`state[p][slot]` is an ordinary tensor and the only store. An `m x n` slot has the parameter's shape; every other slot
rests as one matrix, or as a stack of them for a parameter that is one. A group's `state_storage` says what a slot rests
as (`Form`): the values themselves, bfloat16, 8-bit codes beside `state[p][slot + "_scale"]`, or values in host memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lightning_optim.core.chunks import Dims, stack
from lightning_optim.core.rule import Slot
from lightning_optim.ops import quantize
from lightning_optim.ops.rounding import stochastic_round

Storage = Literal["fp32", "bf16", "int8", "int8_grid", "fp8", "host"]

COMPENSATION = "compensation"
"""The state entry that holds what rounding left of a narrow weight, under `param_rounding="kahan"`."""
RADIUS = "radius"
"""The state entry that holds the norms of narrow matrices under `"hyperball"`, which rounding would raise."""
CODES = {"int8": torch.uint8, "int8_grid": torch.uint8, "fp8": torch.int8}
"""Dtype of the codes at rest; e4m3 as its bit patterns, which every collective can move."""


@functools.cache
def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a rule's arithmetic and state: float32, or float64 for float64 parameters.

    Returns:
        The dtype.
    """
    return torch.promote_types(dtype, torch.float32)


def rest_shape(slot: Slot, shape: Sequence[int], dims: Dims) -> tuple[int, ...]:
    """The shape in which a slot rests in `state[p]`.

    The matrices of a stack stay apart along the leading dimensions, so that a cut of the parameter's first dimension
    by `torch.chunk`'s rule cuts the slot between the same matrices.

    Args:
        slot: its declaration.
        shape: of the parameter.
        dims: of the parameter as a stack of matrices, unless the slot says which it is for.

    Returns:
        The parameter's shape for an `m x n` slot, else ([leading dimensions, blocks,] rows, columns).
    """
    if slot.letters == "mn":
        return tuple(shape)
    b, m, n = slot.dims or dims
    leading = tuple(shape[:-2]) if len(shape) > 2 and b % math.prod(shape[:-2]) == 0 else ()
    blocks = b // math.prod(leading)
    return (*leading, *((blocks,) if blocks > 1 else ()), *slot.shape(m, n))


@dataclass(frozen=True)
class Form:
    """How one slot of one parameter rests."""

    slot: Slot
    shape: tuple[int, ...]
    """Of the whole slot at rest."""
    kind: Storage
    dtype: torch.dtype
    """Of `state[p][slot]`."""
    wide: torch.dtype
    """Of the values a rule sees."""
    block: int
    """Elements per scale."""

    @property
    def quantised(self) -> bool:
        """Whether it rests as codes and scales."""
        return self.kind in CODES

    @property
    def scales(self) -> int:
        """Number of scales of the whole slot."""
        return quantize.blocks_of(math.prod(self.shape), self.block) if self.quantised else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole slot."""
        return math.prod(self.shape) * self.dtype.itemsize + 4 * self.scales

    def direct(self, device: torch.device) -> bool:
        """Whether a rule works on the resting tensor itself.

        Args:
            device: of the parameter.

        Returns:
            False where values are to be made of it first.
        """
        return self.kind == "fp32" or (self.kind == "host" and device.type == "cpu")


def scale_key(key: str) -> str:
    """The state entry with the scales of a quantised slot.

    Returns:
        Its key.
    """
    return f"{key}_scale"


def form_of(
    slot: Slot, shape: Sequence[int], dims: Dims, dtype: torch.dtype, group: Mapping[str, Any], *, sums: bool = False
) -> Form:
    """How a slot rests under the settings of a group.

    Values of a declared dtype, start values of an identity, square and `exact` slots (factors, bases), those with one
    row or column per matrix, and those with fewer than `storage_min` elements are not narrowed.

    Args:
        slot: its declaration.
        shape: of the parameter.
        dims: of the parameter as a stack of matrices.
        dtype: of the parameter.
        group: gives `state_storage`, `storage_block` and `storage_min`.
        sums: whether the rule reduces; only its `m x n` slots are narrowed then, which are cut like the parameter.

    Returns:
        The form.
    """
    kind, wide, rest = group["state_storage"], slot.dtype or work_dtype(dtype), rest_shape(slot, shape, dims)
    block = group["storage_block"]
    plain = Form(slot, rest, "fp32", wide, wide, block)
    if kind == "fp32" or math.prod(rest) < group["storage_min"]:
        return plain
    if kind == "host":
        return Form(slot, rest, kind, wide, wide, block)
    letters = slot.letters
    square, statistic = letters[0] == letters[1], any(x.isdigit() for x in letters)
    if slot.dtype or slot.exact or square or statistic or (sums and letters != "mn"):
        return plain
    if kind == "bf16":
        return Form(slot, rest, kind, torch.bfloat16, wide, block)
    return Form(slot, rest, kind, CODES[kind], wide, block)


def compensated(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether what rounding leaves of a weight is kept in `state[p]["compensation"]`.

    Args:
        dtype: of the parameter.
        group: gives `param_rounding`.

    Returns:
        True for narrow weights under `"kahan"`.
    """
    return group["param_rounding"] == "kahan" and dtype != work_dtype(dtype)


def keeps_radius(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether the norms of a parameter's matrices are kept in `state[p]["radius"]`.

    Args:
        dtype: of the parameter.
        group: gives `constraint` and `param_rounding`.

    Returns:
        True for narrow weights under `"hyperball"`, unless what rounding leaves of them is kept.
    """
    return group["constraint"] == "hyperball" and dtype != work_dtype(dtype) and not compensated(dtype, group)


def allocate(form: Form, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A slot's tensor at its start value; codes of a quantised one.

    Args:
        form: of the slot.
        like: the parameter, or this rank's part of it, for device and, of an `m x n` slot, shape and strides.
        shape: of the tensor, or of this rank's part.

    Returns:
        A tensor that owns its storage.
    """
    slot, device = form.slot, like.device
    if form.quantised:
        return torch.full(tuple(shape), _start(form)[0], dtype=form.dtype, device=device)
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


def rested(form: Form, value: Tensor) -> Tensor:
    """A tensor on the device where a slot rests.

    Args:
        form: of the slot, one that a rule does not work on directly.
        value: any.

    Returns:
        A copy in pinned host memory for `"host"`, else the tensor itself.
    """
    return value.cpu().pin_memory() if form.kind == "host" else value


def allocate_scale(form: Form, codes: Tensor, start: int) -> Tensor:
    """The scales of a quantised slot at its start value.

    Args:
        form: of the slot.
        codes: of this rank's part.
        start: index of its first element.

    Returns:
        float32, one per block this rank's part touches.
    """
    return torch.full((blocks_here(form, codes, start),), _start(form)[1], dtype=torch.float32, device=codes.device)


def _start(form: Form) -> tuple[int, float]:
    """Code and scale of the start value."""
    value = torch.full((1,), float(cast("float", form.slot.fill)))
    codes, scale = torch.empty(1, dtype=form.dtype), torch.empty(1)
    _encode(form, value, codes, scale, 0)
    return int(codes), float(scale)


def widen(form: Form, part: Tensor, scale: Tensor | None, start: int, device: torch.device) -> Tensor:
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
        kind = cast("quantize.Format", form.kind)
        values = quantize.decode(flat, scale, kind, nonnegative=signless, block=form.block, start=start)
        return values.view(part.shape).to(form.wide)
    return part.to(device, form.wide, non_blocking=True)


def narrow(
    form: Form, part: Tensor, scale: Tensor | None, start: int, value: Tensor, index: Callable[[], Tensor], key: int
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
        _encode(form, value.reshape(-1), part.view(-1), scale, start)
    elif form.kind == "bf16":
        part.copy_(stochastic_round(value.float(), index(), key))
    else:
        part.copy_(value)


def _encode(form: Form, value: Tensor, codes: Tensor, scale: Tensor, start: int) -> None:
    kind, signless = cast("quantize.Format", form.kind), form.slot.nonnegative
    quantize.encode(value.float(), codes, scale, kind, nonnegative=signless, block=form.block, start=start)


def convert(
    form: Form, old: Tensor, old_scale: Tensor | None, new: Tensor, new_scale: Tensor | None, start: int
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
    if before.quantised and (old_scale is None or old_scale.numel() != blocks_here(form, old, start)):
        raise RuntimeError("state rests as codes of other blocks than storage_block says; set it as it was")
    value = widen(before, old, old_scale if before.quantised else None, start, new.device)
    if new_scale is None:
        new.copy_(value)
    else:
        _encode(form, value.reshape(-1), new.view(-1), new_scale, start)


def blocks_here(form: Form, codes: Tensor, start: int) -> int:
    """How many blocks this rank's part of a quantised slot touches.

    Returns:
        The number of its scales.
    """
    return quantize.blocks_of(codes.numel(), form.block, start)


def scales_at(form: Form, scale: Tensor | None, start: int, at: int, count: int) -> Tensor | None:
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
    return scale[first : first + quantize.blocks_of(count, form.block, start + at)]


def read(entries: Sequence[Tensor], dims: Dims) -> Tensor:
    """One stack out of the resting tensors of a slot.

    Args:
        entries: one per parameter of the chunk.
        dims: (matrices per parameter, rows, columns) of the slot.

    Returns:
        `[len(entries) * matrices, rows, columns]`; shares memory with a single entry.
    """
    return stack(entries, dims, entries[0].dtype)


def untangled(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rule left, safe to write slot by slot: `s.prev = s.cur` must not see the new `cur`.

    Args:
        before: the stored tensors, or stacks of them, by slot.
        after: what the rule left in each slot.

    Returns:
        `after`, with copies of tensors that lie in another slot's memory.
    """
    homes = {k: t.untyped_storage().data_ptr() for k, t in before.items()}
    out = {}
    for key, value in after.items():
        home = value.untyped_storage().data_ptr()
        foreign = any(home == other for k, other in homes.items() if k != key)
        out[key] = value.clone() if foreign else value
    return out


def version(t: Tensor) -> int | None:
    """How often a tensor, or another view of its memory, has been written in place.

    Args:
        t: any.

    Returns:
        torch's count; None for a tensor of inference mode, which has none.
    """
    return None if t.is_inference() else t._version


def write(entries: Sequence[Tensor], after: Tensor) -> None:
    """Store what a rule left in a slot.

    Args:
        entries: one per parameter of the chunk.
        after: what `read` gave, mutated in place, or another tensor.
    """
    if len(entries) == 1 and after.data_ptr() == entries[0].data_ptr():
        return
    for entry, piece in zip(entries, after.split(after.shape[0] // len(entries)), strict=True):
        entry.copy_(piece.reshape(entry.shape))
