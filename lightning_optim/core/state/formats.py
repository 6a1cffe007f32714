"""How state is kept between steps: allocation from a rule's declaration, reading into a stack, writing back.

`state[p][slot]` is an ordinary tensor and the only store. An `m x n` slot has the parameter's shape; every other slot
rests as one matrix, or as a stack of them for a parameter that is one. A group's `state_storage` says what a slot rests
as (`StateFormat`): the values themselves, bfloat16, 8-bit codes beside `state[p][slot + "_scale"]`, or values in host
memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_optim.core.matrix_views import StackShape
from lightning_optim.core.rule import StateSpec
from lightning_optim.ops import quantize

Storage = Literal["fp32", "bf16", "int8", "int8_grid", "fp8", "host"]

COMPENSATION = "compensation"
"""The state entry that holds what rounding left of a narrow weight, under `param_rounding="kahan"`."""
RADIUS = "radius"
"""The state entry that holds the norms of narrow matrices under `"hyperball"`, which rounding would raise."""
TRAINED = "train_weight"
"""The state entry that holds the training weights while the parameter has averaged ones."""
CODES = {"int8": torch.uint8, "int8_grid": torch.uint8, "fp8": torch.int8}
"""Dtype of the codes at rest; e4m3 as its bit patterns, which every collective can move."""


@functools.cache
def compute_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a rule's arithmetic and state: float32, or float64 for float64 parameters.

    Returns:
        The dtype.
    """
    return torch.promote_types(dtype, torch.float32)


def stored_shape(slot: StateSpec, shape: Sequence[int], dims: StackShape) -> tuple[int, ...]:
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
class StateFormat:
    """How one slot of one parameter rests."""

    spec: StateSpec
    shape: tuple[int, ...]
    """Of the whole slot at rest."""
    name: Storage
    dtype: torch.dtype
    """Of `state[p][slot]`."""
    compute_dtype: torch.dtype
    """Of the values a rule sees."""
    block: int
    """Elements per scale."""

    @property
    def is_quantized(self) -> bool:
        """Whether it rests as codes and scales."""
        return self.name in CODES

    @property
    def scales(self) -> int:
        """Number of scales of the whole slot."""
        return quantize.blocks_of(math.prod(self.shape), self.block) if self.is_quantized else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole slot."""
        return math.prod(self.shape) * self.dtype.itemsize + 4 * self.scales

    def is_compute_format(self, device: torch.device) -> bool:
        """Whether a rule works on the resting tensor itself.

        Args:
            device: of the parameter.

        Returns:
            False where values are to be made of it first.
        """
        return self.name == "fp32" or (self.name == "host" and device.type == "cpu")


def scale_key(key: str) -> str:
    """The state entry with the scales of a quantised slot.

    Returns:
        Its key.
    """
    return f"{key}_scale"


def format_of(
    slot: StateSpec,
    shape: Sequence[int],
    dims: StackShape,
    dtype: torch.dtype,
    group: Mapping[str, Any],
    *,
    sums: bool = False,
) -> StateFormat:
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
    kind, wide, rest = group["state_storage"], slot.dtype or compute_dtype_of(dtype), stored_shape(slot, shape, dims)
    block = group["storage_block"]
    plain = StateFormat(slot, rest, "fp32", wide, wide, block)
    if kind == "fp32" or math.prod(rest) < group["storage_min"]:
        return plain
    if kind == "host":
        return StateFormat(slot, rest, kind, wide, wide, block)
    letters = slot.letters
    square, statistic = letters[0] == letters[1], any(x.isdigit() for x in letters)
    if slot.dtype or slot.exact or square or statistic or (sums and letters != "mn"):
        return plain
    if kind == "bf16":
        return StateFormat(slot, rest, kind, torch.bfloat16, wide, block)
    return StateFormat(slot, rest, kind, CODES[kind], wide, block)


def compensated(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether what rounding leaves of a weight is kept in `state[p]["compensation"]`.

    Args:
        dtype: of the parameter.
        group: gives `param_rounding`.

    Returns:
        True for narrow weights under `"kahan"`.
    """
    return group["param_rounding"] == "kahan" and dtype != compute_dtype_of(dtype)


def keeps_radius(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether the norms of a parameter's matrices are kept in `state[p]["radius"]`.

    Args:
        dtype: of the parameter.
        group: gives `constraint` and `param_rounding`.

    Returns:
        True for narrow weights under `"hyperball"`, unless what rounding leaves of them is kept.
    """
    return group["constraint"] == "hyperball" and dtype != compute_dtype_of(dtype) and not compensated(dtype, group)
