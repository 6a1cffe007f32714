"""How state is kept between steps: allocation from a rule's declaration, reading into a stack, writing back.

`state[p][slot]` is an ordinary tensor and the only store. An `m x n` slot has the parameter's shape; every other slot
rests as one matrix, or as a stack of them for a parameter that is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_optim.core.chunks import Dims, stack
from lightning_optim.core.rule import Slot


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a rule's arithmetic and state: float32, or float64 for float64 parameters.

    Returns:
        The dtype.
    """
    return torch.promote_types(dtype, torch.float32)


def rest_dtype(slot: Slot, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a slot rests.

    Args:
        slot: its declaration.
        dtype: of the parameter.

    Returns:
        The declared dtype, or that of the arithmetic.
    """
    return slot.dtype or work_dtype(dtype)


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


def allocate(slot: Slot, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A slot's tensor at its start value.

    Args:
        slot: its declaration.
        like: the parameter, or this rank's part of it, for dtype, device and, of an `m x n` slot, shape and strides.
        shape: of the tensor, or of this rank's part.

    Returns:
        A tensor that owns its storage.
    """
    dtype = rest_dtype(slot, like.dtype)
    if slot.fill == "eye":
        return torch.eye(shape[-1], dtype=dtype, device=like.device).expand(*shape).contiguous()
    if slot.letters == "mn":
        return torch.full_like(like, slot.fill, dtype=dtype, requires_grad=False)
    return torch.full(tuple(shape), slot.fill, dtype=dtype, device=like.device)


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
