"""State of which a rule sees other values than are stored: dequantized before `update`, quantized again after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.parallel import element_positions
from lightning_optim.core.state.formats import QUANTIZED_DTYPES, StateFormat, Storage
from lightning_optim.ops import quantize as codec
from lightning_optim.ops.rounding import indices, stochastic_round


def dequantize(fmt: StateFormat, part: Tensor, scale: Tensor | None, start: int, device: torch.device) -> Tensor:
    """The values of a stored tensor, or of a run of its elements.

    Args:
        fmt: its format.
        part: what is stored.
        scale: of the blocks that `part` touches, if quantized.
        start: index of the first element.
        device: where the values are wanted.

    Returns:
        A copy in the dtype of the arithmetic; `part` itself where it is stored in that dtype.
    """
    if scale is not None:
        flat, signless = part.reshape(-1), fmt.spec.nonnegative
        name = cast("codec.Format", fmt.name)
        values = codec.decode(flat, scale, name, nonnegative=signless, block=fmt.block, start=start)
        return values.view(part.shape).to(fmt.compute_dtype)
    return part.to(device, fmt.compute_dtype, non_blocking=True)


def quantize(
    fmt: StateFormat,
    part: Tensor,
    scale: Tensor | None,
    start: int,
    value: Tensor,
    index: Callable[[], Tensor],
    key: int,
) -> None:
    """Store values in a stored tensor, or in a run of its elements.

    Args:
        fmt: its format.
        part: what is stored, written.
        scale: of the blocks that `part` touches, if quantized; written.
        start: index of the first element.
        value: the values.
        index: gives the global indices of the elements, for stochastic rounding to bfloat16.
        key: of that rounding.
    """
    if scale is not None:
        encode(fmt, value.reshape(-1), part.view(-1), scale, start)
    elif fmt.name == "bf16":
        part.copy_(stochastic_round(value.float(), index(), key))
    else:
        part.copy_(value)


def encode(fmt: StateFormat, value: Tensor, quantized: Tensor, scale: Tensor, start: int) -> None:
    """Quantize values.

    Args:
        fmt: the format.
        value: flat values.
        quantized: written.
        scale: of the blocks that `codes` touches; written.
        start: index of the first element.
    """
    name, signless = cast("codec.Format", fmt.name), fmt.spec.nonnegative
    codec.encode(value.float(), quantized, scale, name, nonnegative=signless, block=fmt.block, start=start)


def convert(
    fmt: StateFormat, old: Tensor, old_scale: Tensor | None, new: Tensor, new_scale: Tensor | None, start: int
) -> None:
    """Store a state tensor in another format.

    Args:
        fmt: the new format; the old one follows from the dtype.
        old: what was stored.
        old_scale: its scales, if it was quantized.
        new: written.
        new_scale: written, if the new format is quantized.
        start: index of the first element.

    Raises:
        RuntimeError: the scales do not belong to the quantized values.
    """
    name = next((k for k, dtype in QUANTIZED_DTYPES.items() if dtype == old.dtype), "fp32")
    before = replace(fmt, name=cast("Storage", name), dtype=old.dtype)
    if before.is_quantized and (old_scale is None or old_scale.numel() != num_scales(fmt, old, start)):
        raise RuntimeError("state was quantized in other blocks than storage_block says; set it as it was")
    value = dequantize(before, old, old_scale if before.is_quantized else None, start, new.device)
    if new_scale is None:
        new.copy_(value)
    else:
        encode(fmt, value.reshape(-1), new.view(-1), new_scale, start)


def num_scales(fmt: StateFormat, quantized: Tensor, start: int) -> int:
    """How many scales this rank's part of a quantized state tensor has.

    Returns:
        The number of blocks that the part touches.
    """
    return codec.blocks_of(quantized.numel(), fmt.block, start)


def scales_at(fmt: StateFormat, scale: Tensor | None, start: int, at: int, count: int) -> Tensor | None:
    """The scales of a run of elements.

    Args:
        fmt: of the state tensor.
        scale: of this rank's part, if quantized.
        start: index of the first element of this rank's part.
        at: where the run begins within the part.
        count: of its elements.

    Returns:
        A view.
    """
    if scale is None:
        return None
    first = (start % fmt.block + at) // fmt.block
    return scale[first : first + codec.blocks_of(count, fmt.block, start + at)]


class ElementIndex:
    """The global index of every element of a block, for stochastic rounding that draws equal bits on every mesh."""

    def __init__(self, part: Tensor, param: Tensor | None = None):
        """Find where a part lies.

        Args:
            part: what blocks are cut from.
            param: the parameter whose local part it is shaped like; a whole tensor if not given.
        """
        self.first = (0 if part.is_contiguous() else None) if param is None else element_positions.first_element(param)
        self.tensors = (
            [] if self.first is not None else [element_positions.element_index(part if param is None else param)]
        )
        """The indices, as a tensor to be cut with the part, where the part is not one contiguous run."""

    def __call__(self, block: Tensor, cut: slice, index: Sequence[Tensor]) -> Tensor:
        """The indices of a block.

        Args:
            block: gives the shape.
            cut: where it lies along the first dimension of the part, flat or not.
            index: the block of `tensors`.

        Returns:
            int32, shaped like the block.
        """
        if index:
            return index[0]
        start = (self.first or 0) + offset(block, cut)
        return indices(start, block.numel(), block.device).view(block.shape)


def offset(block: Tensor, cut: slice) -> int:
    """Index of the first element of a block within its tensor.

    Args:
        block: the block.
        cut: where it lies along the first dimension.

    Returns:
        The index.
    """
    return cut.start * (block.numel() // max(1, cut.stop - cut.start))


def no_index() -> Tensor:
    """Stands for the indices of elements where nothing is rounded stochastically.

    Raises:
        AssertionError: always.
    """
    raise AssertionError("only rounding to bfloat16 asks for indices")


class DividedBlock(NamedTuple):
    """This rank's part of a block of elements that is divided between ranks, whose scale is that of the whole block."""

    fmt: StateFormat
    key: str
    block: int
    """Its index in the whole tensor."""
    value: Tensor
    """Float32 values, flat."""
    quantized: Tensor
    """Where they are stored, flat."""
    scale: Tensor
    """Where the scale is stored, of one element."""

    def size(self) -> Tensor:
        """The largest magnitude on this rank.

        Returns:
            A 0-d tensor.
        """
        return self.value.abs().amax()

    def store(self, size: float) -> None:
        """Store the values again.

        Args:
            size: the largest magnitude on all ranks.
        """
        value = torch.cat([self.value, self.value.new_tensor([size])])
        quantized = self.quantized.new_empty(value.shape)
        encode(self.fmt, value, quantized, self.scale, 0)
        self.quantized.copy_(quantized[:-1])


class QuantizedView:
    """One state tensor of one parameter, of which a rule sees other values than are stored."""

    def __init__(
        self,
        fmt: StateFormat,
        part: Tensor,
        scale: Tensor | None,
        *,
        start: int,
        key: int,
        device: torch.device,
        param: Tensor | None,
        divided: Sequence[int] = (),
        name: str = "",
    ):
        """Bind the parts on this rank.

        Args:
            fmt: storage format.
            part: what is stored.
            scale: its scales, if quantized.
            start: index of the first element.
            key: of stochastic rounding.
            device: of the parameter.
            param: the parameter that the tensor is sharded like; None for a whole one.
            divided: blocks that are divided between ranks.
            name: key of the state tensor.
        """
        self.divided, self.name = divided, name
        self.divided_parts: list[DividedBlock] = []
        """What was stored of divided blocks, by a scale of this rank alone."""
        self.fmt, self.part, self.scale, self.start = fmt, part, scale, start
        self.key, self.device, self.param = key, device, param

    def scales_of(self, part: Tensor, at: int = 0) -> Tensor | None:
        """The scales of a block.

        Args:
            part: the block of the stored tensor.
            at: its first element.

        Returns:
            A view; None where nothing is quantized.
        """
        return scales_at(self.fmt, self.scale, self.start, at, part.numel())

    def load(self, part: Tensor, at: int = 0) -> Tensor:
        """The values of a block.

        Args:
            part: the block of the stored tensor.
            at: its first element.

        Returns:
            In the dtype of the arithmetic.
        """
        scale = self.scales_of(part, at)
        return dequantize(self.fmt, part, scale, self.start + at, self.device)

    def store(self, part: Tensor, value: Tensor, index: Callable[[], Tensor], at: int = 0) -> None:
        """Store the values of a block.

        Args:
            part: the block of the stored tensor, written.
            value: the values.
            index: gives the global indices of its elements.
            at: its first element.
        """
        scale = self.scales_of(part, at)
        quantize(self.fmt, part, scale, self.start + at, value, index, self.key)
        if self.divided and scale is not None:
            self._keep_divided(part.view(-1), value.reshape(-1), scale, self.start + at)

    def _keep_divided(self, part: Tensor, value: Tensor, scale: Tensor, start: int) -> None:
        """Keep the values of divided blocks until their scales are known."""
        size, end = self.fmt.block, start + part.numel()
        for block in self.divided:
            first, last = max(start, block * size), min(end, (block + 1) * size)
            if first < last:
                at, k = slice(first - start, last - start), block - start // size
                part_of_block = value[at].float().clone(), part[at], scale[k : k + 1]
                self.divided_parts.append(DividedBlock(self.fmt, self.name, block, *part_of_block))

    def store_all(self, value: Tensor) -> None:
        """Store all values, block by block if they are rounded stochastically.

        Args:
            value: shaped like the stored tensor.
        """
        if self.fmt.name != "bf16":
            self.store(self.part, value, no_index)
            return
        where = ElementIndex(self.part, self.param)
        for (part, values, *index), cut in matrix_views.cache_blocks([self.part, value, *where.tensors]):
            self.store(part, values, functools.partial(where, part, cut, index))
