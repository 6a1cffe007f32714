"""Parameters as stacks of matrices `[b, m, n]`, blocks of rows as matrices of their own, and cache-sized blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

StackShape = tuple[int, int, int]
Blocks = int | tuple[int, ...] | tuple[tuple[int, int], ...] | None
T = TypeVar("T")

STACK_LIMIT = 2**18
"""Matrices of at least this many elements are stepped as views; smaller ones are copied into a common stack."""
BLOCK = 2**17
"""Number of elements of a block that stays in a CPU's cache."""
SMALL = 2**14
"""Tensors of at most this many elements are concatenated, or stepped in one block."""


def stack_shape(
    shape: Sequence[int], blocks: int | None = None, *, conv: bool = True, transposed: bool = False
) -> StackShape:
    """The shape of a parameter as a stack of matrices.

    A vector of length n is `[1, 1, n]`; three dimensions are a stack; with four or more, the trailing ones are
    flattened (a convolution kernel is out x in*kh*kw) or, without `conv`, the leading ones are stacked.

    Args:
        shape: shape of the parameter.
        blocks: number of blocks into which the rows of each matrix are split (attention heads, a fused QKV); vectors
            stay whole.
        transposed: the matrices are stored columns x rows (two and three dimensions).
        conv: whether four and more dimensions are one matrix.

    Returns:
        (b, m, n).

    Raises:
        ValueError: the rows do not divide into `blocks`.
    """
    if len(shape) < 2:
        b, m, n = 1, 1, math.prod(shape)
    elif len(shape) > 3 and conv:
        b, m, n = 1, shape[0], math.prod(shape[1:])
    else:
        b, m, n = math.prod(shape[:-2]), shape[-2], shape[-1]
        m, n = (n, m) if transposed else (m, n)
    if blocks and blocks > 1 and len(shape) > 1:
        if m % blocks:
            raise ValueError(f"{m} rows do not divide into {blocks} blocks")
        b, m = b * blocks, m // blocks
    return b, m, n


class MatrixBlock(NamedTuple):
    """Equal matrices of a parameter: all of it, or some of its rows."""

    dims: StackShape
    rows: tuple[int, int, int] | None = None
    """(rows of a period, first row taken in each, rows of one matrix in each); None for all rows in their order."""
    apart: bool = False
    """Whether a block is a separate matrix in every period, rather than one with the same block of the others."""
    columns: bool = False
    """Whether `rows` counts columns."""

    def view_of(self, t: Tensor, transposed: bool) -> Tensor:
        """The block's view of a parameter-shaped tensor.

        Args:
            t: the tensor.
            transposed: whether its matrices are stored columns x rows.

        Returns:
            A view that reshapes to `dims`.
        """
        t = transpose_if(t, transposed)
        if self.rows is None:
            return t
        period, first, size = self.rows
        t = t.mT if self.columns else t
        periods = t.shape[-2] // period
        count = self.dims[0] // math.prod(t.shape[:-2]) // (periods if self.apart else 1)
        view = t.unflatten(-2, (-1, period)).narrow(-2, first, count * size).unflatten(-2, (count, size))
        view = view if self.apart else view.transpose(-4, -3)
        return view.movedim(-1, -2 if self.apart else -3) if self.columns else view


@lru_cache(4096)
def split_blocks(
    shape: tuple[int, ...], blocks: Blocks = None, *, conv: bool = True, transposed: bool = False
) -> tuple[MatrixBlock, ...]:
    """Split a parameter into matrices of one or more sizes.

    Args:
        shape: shape of the parameter.
        blocks: a number of equal blocks of rows, or the row counts of successive blocks, repeated until the rows are
            used up: (q, k, v) for a fused layer with fewer keys than queries, (d, d, d) for one that keeps query, key
            and value of a head together, (1, 1) for alternate rows. The repetitions of a block form one
            matrix. Pairs of (rows of a block, number of such blocks) are separate matrices at each repetition: ((128,
            2), (1, 128)) for a fused layer with the query, key and value of a head together, the first two whole, the
            last by row. Negative numbers are of columns: -4 for four blocks of columns, (-1, -1, -1, -1) for four
            matrices that take turns.
        conv: see `stack_shape`.
        transposed: see `stack_shape`.

    Returns:
        One `MatrixBlock` per sequence of equally large blocks.

    Raises:
        ValueError: the rows do not divide into these blocks.
    """
    if len(shape) > 1 and counts_columns(blocks):
        return _column_blocks(stack_shape(shape, conv=conv, transposed=transposed), blocks)
    if not isinstance(blocks, tuple) or len(shape) < 2:
        count = None if isinstance(blocks, tuple) else blocks
        return (MatrixBlock(stack_shape(shape, count, conv=conv, transposed=transposed)),)
    b, m, n = stack_shape(shape, conv=conv, transposed=transposed)
    sizes = [x if isinstance(x, tuple) else (x, 1) for x in blocks]
    period = sum(size * count for size, count in sizes)
    if m % period or len(shape) > 3:
        raise ValueError(f"{m} rows of shape {tuple(shape)} do not divide into blocks of {blocks} rows")
    apart = isinstance(blocks[0], tuple)
    if m == period and not apart and len(set(blocks)) == 1:
        return (MatrixBlock((b * len(blocks), sizes[0][0], n)),)
    out: list[MatrixBlock] = []
    first = 0
    for size, same in groupby(sizes, key=lambda x: x[0]):
        count = sum(x[1] for x in same)
        dims = (b * count * (m // period), size, n) if apart else (b * count, m // period * size, n)
        out.append(MatrixBlock(dims, (period, first, size), apart))
        first += count * size
    return tuple(out)


def are_valid(blocks: Blocks) -> bool:
    """Whether the option `blocks` has numbers that can be sizes: none is 0, and only numbers of columns are negative.

    Returns:
        True for None, too.
    """
    if isinstance(blocks, tuple):
        pairs = any(isinstance(x, tuple) for x in blocks)
        numbers = [n for x in blocks for n in (x if isinstance(x, tuple) else (x,))]
        return min(numbers, default=0) > 0 or (max(numbers, default=0) < 0 and not pairs)
    return blocks != 0


def counts_columns(blocks: Blocks) -> bool:
    """Whether the option `blocks` divides columns rather than rows.

    Returns:
        True if its numbers are negative.
    """
    first = blocks[0] if isinstance(blocks, tuple) and blocks else blocks
    return isinstance(first, int) and first < 0


def _column_blocks(dims: StackShape, blocks: Any) -> tuple[MatrixBlock, ...]:
    """Blocks of columns: those of rows of the transposed matrices."""
    b, m, n = dims
    positive = tuple(-x for x in blocks) if isinstance(blocks, tuple) else -blocks
    try:
        cut = split_blocks((b, n, m), positive)
    except ValueError as error:
        raise ValueError(str(error).replace("rows", "columns")) from None
    return tuple(
        MatrixBlock((x.dims[0], x.dims[2], x.dims[1]), x.rows or (n, 0, x.dims[1]), x.apart, columns=True) for x in cut
    )


def frozen(blocks: Any) -> Any:
    """Make the option `blocks` hashable, also where it was read from a file.

    Returns:
        The option, with tuples in place of lists.
    """
    return tuple(frozen(x) for x in blocks) if isinstance(blocks, (list, tuple)) else blocks


def bucket(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items by a key, in order of first appearance.

    Returns:
        Lists of items with equal keys.
    """
    groups: defaultdict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def dense_order(t: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor from the largest stride to the smallest.

    Returns:
        A permutation under which a dense tensor is contiguous.
    """
    return tuple(sorted(range(t.ndim), key=lambda d: (-t.stride(d), d)))


def same_strides(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors have one dtype and one dense memory layout, so that memory order pairs their elements.

    Returns:
        True if a flat kernel may run over them.
    """
    first, is_plain = tensors[0], True
    for t in tensors:  # no generator, which would be slower: every step checks every parameter
        if t.dtype != first.dtype:
            return False
        is_plain = is_plain and t.is_contiguous()
    if is_plain:  # much faster than reading strides
        return True
    return all(t.stride() == first.stride() for t in tensors) and first.permute(dense_order(first)).is_contiguous()


def cache_blocks(tensors: Sequence[Tensor], align: int = 1, start: int = 0) -> Iterator[tuple[list[Tensor], slice]]:
    """Iterate over tensors of one shape in blocks that stay in cache.

    Dense tensors with equal strides are split flat, in memory order; others by rows of the largest stride, or of the
    first dimension if `align` is given.

    Args:
        tensors: tensors of one shape; dtypes may differ.
        align: blocks begin where the index of an element, in row-major order, is a multiple of this.
        start: index of the first element.

    Yields:
        (views of every tensor, the slice of the flat or row range they cover).
    """
    first = tensors[0]
    if not first.is_contiguous() and align == 1:
        order = dense_order(first)
        tensors = [t.permute(order) for t in tensors]
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1) for t in tensors]
    first = tensors[0]
    total, rows = first.numel(), first.shape[0] if first.ndim else 1
    if total <= SMALL or first.device.type != "cpu" or first.ndim == 0:
        yield list(tensors), slice(0, rows)
        return
    unit = align // math.gcd(align, total // rows)
    lead = next((k for k in range(unit) if (start + k * (total // rows)) % align == 0), 0)
    step = -(-max(1, BLOCK * rows // total) // unit) * unit
    for first_row in range(lead - step if lead else 0, rows, step):
        block = slice(max(0, first_row), min(first_row + step, rows))
        yield [t[block] for t in tensors], block


def transpose_if(t: Tensor, transposed: bool) -> Tensor:
    """Exchange rows and columns of a parameter-shaped tensor that is stored columns x rows; its own inverse.

    Returns:
        A view.
    """
    return t.mT if transposed and 2 <= t.ndim <= 3 else t
