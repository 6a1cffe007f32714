"""Global indices of the elements of this rank's shard of a parameter, for stochastic rounding and blocks of scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.parallel.sharding import Bounds, local, local_bounds, placement_of, sharding_of


def first_element(p: Tensor) -> int | None:
    """Global index of the first element of this rank's shard, where the shard is one contiguous range of elements.

    Returns:
        The index in row-major order, or None where the shard is no such range (use `element_index`).
    """
    if isinstance(p, Fragment):
        return p.start
    if not local(p).is_contiguous():
        return None
    if placement_of(p) is None:
        return 0
    if any(local(p).shape[d] != p.shape[d] for d in range(1, p.ndim)):
        return None
    return _first_index(p)


def start_of(p: Tensor, name: str = "parameter") -> int:
    """Global row-major index of the first element of this rank's rows.

    Args:
        p: the parameter.
        name: for the error message.

    Returns:
        The index.

    Raises:
        ValueError: the parameter is sharded along another dimension than its rows.
    """
    sharding = sharding_of(p, name)
    if sharding is not None and not sharding.is_by_rows:
        raise ValueError(
            f"{name}: 8-bit state is sharded by rows (dimension 0), the parameter by {sharding.placements}; "
            "choose state_storage='bf16' or 'fp32' for it"
        )
    return _first_index(p)


def divided_blocks(p: Tensor, block: int) -> tuple[int, ...]:
    """Blocks of consecutive elements that a cut between two ranks divides.

    Args:
        p: the parameter.
        block: elements per block.

    Returns:
        Their indices in the whole tensor, the same on every rank; none for a tensor that is whole, or not sharded by
        rows.
    """
    sharding = sharding_of(p)
    if sharding is None or not sharding.is_by_rows:
        return ()
    unit = math.prod(p.shape[1:])
    starts = {sharding.shard_slices(p.shape, rank)[0][0] * unit for rank in range(sharding.size)}
    return tuple(sorted({start // block for start in starts if start < p.numel() and start % block}))


def _first_index(p: Tensor) -> int:
    if isinstance(p, Fragment):
        return p.start
    return local_bounds(p)[0][0] * math.prod(p.shape[1:]) if p.ndim else 0


def element_index(p: Tensor) -> Tensor:
    """Global row-major index of every element of this rank's shard.

    Returns:
        int32 (wrapped around), shaped like the local shard.
    """
    shard = local(p)
    index = torch.zeros(shard.shape, dtype=torch.int64, device=shard.device)
    for d, (start, _) in enumerate(local_bounds(p)):
        steps = torch.arange(start, start + shard.shape[d], device=shard.device) * math.prod(p.shape[d + 1 :])
        index += steps.view([-1 if k == d else 1 for k in range(p.ndim)])
    return index.to(torch.int32)


def bounds_of_rows(p: Tensor) -> Bounds:
    """Bounds of what `whole_rows` gives: of this rank's shard, or of the rows that the run of a fragment touches.

    Returns:
        First index and one past the last, along every dimension.
    """
    if not isinstance(p, Fragment):
        return local_bounds(p)
    unit = max(1, math.prod(p.shape[1:]))
    ends = (p.start // unit, -(-p.stop // unit)) if p.stop > p.start else (0, 0)
    return tuple([ends, *((0, n) for n in p.shape[1:])][: p.ndim])


def whole_rows(p: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, as whole indices of the first dimension.

    Args:
        p: the parameter.
        part: this rank's part of it, or of a tensor like it.

    Returns:
        The part itself; for a fragment a copy with zeros where other ranks have the elements.
    """
    if not isinstance(p, Fragment):
        return part
    bounds = bounds_of_rows(p)
    out = part.new_zeros([end - first for first, end in bounds])
    first = p.start - (bounds[0][0] * math.prod(p.shape[1:]) if bounds else 0)
    out.view(-1)[first : first + part.numel()] = part.reshape(-1)
    return out


def part_of_rows(p: Tensor, rows: Tensor) -> Tensor:
    """The inverse of `whole_rows`.

    Args:
        p: the parameter.
        rows: shaped like what `whole_rows` gives, or broadcasts to it.

    Returns:
        The values at this rank's elements: a run of a fragment, else `rows` itself.
    """
    if not isinstance(p, Fragment):
        return rows
    bounds = bounds_of_rows(p)
    first = p.start - (bounds[0][0] * math.prod(p.shape[1:]) if bounds else 0)
    flat = rows.expand([end - start for start, end in bounds]).reshape(-1)
    return flat[first : first + p.stop - p.start]
