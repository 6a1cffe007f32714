"""Storage format of each state tensor between steps: shape, dtype, quantization and bytes.

`state[p][key]` is an ordinary tensor and the only copy. An `m x n` state tensor has the parameter's shape; any other is
stored as one matrix, or as a stack of matrices where the parameter is a stack. A group's `state_storage` selects the
format (`StateFormat`): the values themselves, bfloat16, 8-bit quantized values with `state[p][key + "_scale"]`, or
values in host memory.
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
"""Key of the rounding errors of low-precision weights, under `param_rounding="kahan"`."""
RADIUS = "radius"
"""Key of the norms of low-precision matrices under `"hyperball"`, which rounding would increase."""
STEP_DTYPE = torch.float64
"""Of `state[p]["step"]`: float32, torch's, counts to 2^24 only, and refreshes and random numbers follow the count."""
TRAINED = "train_weight"
"""Key of the training weights while the parameter holds averaged weights."""
QUANTIZED_DTYPES = {"int8": torch.uint8, "int8_grid": torch.uint8, "fp8": torch.int8}
"""Dtype in which quantized values are stored; e4m3 as bit patterns, which every collective supports."""


@functools.cache
def compute_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a rule's arithmetic and state: float32, or float64 for float64 parameters.

    Returns:
        The dtype.
    """
    return torch.promote_types(dtype, torch.float32)


def stored_shape(spec: StateSpec, shape: Sequence[int], dims: StackShape) -> tuple[int, ...]:
    """The shape in which a state tensor is stored in `state[p]`.

    The matrices of a stack stay separate along the leading dimensions, so that sharding the parameter's first dimension
    by `torch.chunk`'s rule shards the state tensor between the same matrices.

    Args:
        spec: declaration of the state tensor.
        shape: shape of the parameter.
        dims: shape of the parameter as a stack of matrices, used where the spec has no `dims`.

    Returns:
        The parameter's shape for an `m x n` state tensor, else ([leading dimensions, blocks,] rows, columns).
    """
    if spec.letters == "mn":
        return tuple(shape)
    b, m, n = spec.dims or dims
    leading = tuple(shape[:-2]) if len(shape) > 2 and b % math.prod(shape[:-2]) == 0 else ()
    blocks = b // math.prod(leading)
    return (*leading, *((blocks,) if blocks > 1 else ()), *spec.shape(m, n))


@dataclass(frozen=True)
class StateFormat:
    """Storage format of one state tensor of one parameter."""

    spec: StateSpec
    shape: tuple[int, ...]
    """Shape of the whole stored tensor."""
    name: Storage
    dtype: torch.dtype
    """Dtype of `state[p][key]`."""
    compute_dtype: torch.dtype
    """Dtype of the values that a rule gets."""
    block: int
    """Number of elements per scale."""

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored as quantized values and scales."""
        return self.name in QUANTIZED_DTYPES

    @property
    def scales(self) -> int:
        """Number of scales of the whole state tensor."""
        return quantize.blocks_of(math.prod(self.shape), self.block) if self.is_quantized else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state tensor, with its scales."""
        return math.prod(self.shape) * self.dtype.itemsize + 4 * self.scales

    def is_compute_format(self, device: torch.device) -> bool:
        """Whether a rule can update the stored tensor in place.

        Args:
            device: device of the parameter.

        Returns:
            False where the stored tensor must be converted first.
        """
        return self.name == "fp32" or (self.name == "host" and device.type == "cpu")


def scale_key(key: str) -> str:
    """The key of the scales of a quantized state tensor.

    Returns:
        The key.
    """
    return f"{key}_scale"


def format_of(
    spec: StateSpec,
    shape: Sequence[int],
    dims: StackShape,
    dtype: torch.dtype,
    group: Mapping[str, Any],
    *,
    sums: bool = False,
) -> StateFormat:
    """The storage format of a state tensor under the settings of a group.

    State tensors with a declared dtype, an identity as start value, square or `exact` ones (factors, bases), those with
    one row or column per matrix, and those with fewer than `storage_min` elements keep full precision.

    Args:
        spec: declaration of the state tensor.
        shape: shape of the parameter.
        dims: shape of the parameter as a stack of matrices.
        dtype: dtype of the parameter.
        group: settings, of which `state_storage`, `storage_block` and `storage_min` are used.
        sums: whether the rule reduces. Only its `m x n` state tensors, which are sharded like the parameter, are then
            stored in low precision.

    Returns:
        The format.
    """
    storage, block = group["state_storage"], group["storage_block"]
    compute_dtype, storage_shape = spec.dtype or compute_dtype_of(dtype), stored_shape(spec, shape, dims)
    full_precision = StateFormat(spec, storage_shape, "fp32", compute_dtype, compute_dtype, block)
    if storage == "fp32" or math.prod(storage_shape) < group["storage_min"]:
        return full_precision
    if storage == "host":
        return StateFormat(spec, storage_shape, storage, compute_dtype, compute_dtype, block)
    letters = spec.letters
    is_square, is_statistic = letters[0] == letters[1], any(x.isdigit() for x in letters)
    if spec.dtype or spec.exact or is_square or is_statistic or (sums and letters != "mn"):
        return full_precision
    stored_dtype = torch.bfloat16 if storage == "bf16" else QUANTIZED_DTYPES[storage]
    return StateFormat(spec, storage_shape, storage, stored_dtype, compute_dtype, block)


def compensated(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether the rounding error of a weight is stored in `state[p]["compensation"]`.

    Args:
        dtype: dtype of the parameter.
        group: settings, of which `param_rounding` is used.

    Returns:
        True for low-precision weights under `"kahan"`.
    """
    return group["param_rounding"] == "kahan" and dtype != compute_dtype_of(dtype)


def keeps_radius(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether the norms of a parameter's matrices are stored in `state[p]["radius"]`.

    Args:
        dtype: dtype of the parameter.
        group: settings, of which `constraint` and `param_rounding` are used.

    Returns:
        True for low-precision weights under `"hyperball"`, unless their rounding error is stored.
    """
    return group["constraint"] == "hyperball" and dtype != compute_dtype_of(dtype) and not compensated(dtype, group)
