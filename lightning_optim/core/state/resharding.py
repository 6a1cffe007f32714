"""Conversion of state between its layout in training and its layout in a checkpoint.

In training, the owner of a matrix has its whole state; a checkpoint has row shards. In training, quantized state has
one scale per block of consecutive elements; a checkpoint has a table with one row per row of the state tensor, which
holds the scales of the blocks that the row touches. Sharding by rows therefore shards the table, whatever the number of
ranks. Rows of whole blocks keep their bits on any mesh; a block that a shard boundary divides has a scale on each side,
and is requantized when both sides are on one rank again. Rows shorter than a block repeat its scale, which costs 4
bytes per row (of a vector: per element) in the checkpoint only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import bucket
from lightning_optim.core.parallel.exchange import Team, make_exchange
from lightning_optim.core.parallel.sharding import Sharding, local, place
from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.state.initial_values import initial_scale
from lightning_optim.core.state.quantized_view import dequantize, quantize


@dataclass(frozen=True)
class Entry:
    """One state tensor of one parameter that has an owner."""

    param: Tensor
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    team: Team
    """Sharded by rows, where the parameter is sharded."""
    owner: int


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    return bucket(entries, lambda e: (e.team.ranks, e.dtype))


def scatter(entries: Sequence[Entry], whole: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Shard the owners' whole state tensors by rows, or give them to all replicas. A collective call.

    Args:
        entries: the same on every rank of their teams.
        whole: returns the tensor of an entry that this rank owns.

    Returns:
        Every entry, with a DTensor whose local shard has storage of its own, or a plain tensor.
    """
    out: list[tuple[Entry, Tensor]] = []
    for batch in _batches(entries):
        exchange = make_exchange([e.team for e in batch], [e.shape for e in batch], [e.owner for e in batch])
        like = torch.empty((), dtype=batch[0].dtype, device=local(batch[0].param).device)
        shards = exchange.from_owners({i: whole(batch[i]) for i in exchange.mine}, like)()
        for e, shard in zip(batch, shards, strict=True):
            out.append((e, e.team.shard(e.shape, shard.clone()) if isinstance(e.team, Sharding) else shard.clone()))
    return out


def collect(entries: Sequence[Entry], loaded: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Send loaded state tensors to their owners, which get them whole. A collective call.

    Args:
        entries: the same on every rank of their teams.
        loaded: returns the loaded tensor of an entry, sharded or whole.

    Returns:
        The entries that this rank owns, with whole tensors.
    """
    out: list[tuple[Entry, Tensor]] = []
    for batch in _batches(entries):
        if batch[0].team.is_saved_by_rank:  # loaded whole
            mine = [e for e in batch if e.owner == e.team.rank]
            out += [(e, loaded(e).to(e.param.device, e.dtype, copy=True)) for e in mine]
            continue
        exchange = make_exchange([e.team for e in batch], [e.shape for e in batch], [e.owner for e in batch])
        shardings = [e.team if isinstance(e.team, Sharding) else None for e in batch]
        tensors = [place(loaded(e), sharding) for e, sharding in zip(batch, shardings, strict=True)]
        shards = [local(t).to(e.param.device, e.dtype) for e, t in zip(batch, tensors, strict=True)]
        out += [(batch[i], t.clone()) for i, t in exchange.to_owners(shards)().items()]
    return out


def table_shape(fmt: StateFormat) -> tuple[int, int]:
    """The shape of the table of scales of a quantized state tensor: its rows x the most blocks that a row touches.

    Returns:
        (rows, columns).
    """
    row = math.prod(fmt.shape[1:])
    return (fmt.shape or (1,))[0], -(-(fmt.block - math.gcd(row, fmt.block) + row) // fmt.block)


def _block_index(fmt: StateFormat, rows: int, start: int, device: torch.device) -> Tensor:
    """The block index of every entry of the table of some rows; the last block of a row repeats."""
    row, block = math.prod(fmt.shape[1:]), fmt.block
    first = start % block + row * torch.arange(rows, device=device)
    blocks = (first // block).unsqueeze(1) + torch.arange(table_shape(fmt)[1], device=device)
    return torch.minimum(blocks, ((first + row - 1) // block).unsqueeze(1))


def table_of(fmt: StateFormat, scale: Tensor, rows: int, start: int) -> Tensor:
    """The table of scales of consecutive rows.

    Args:
        fmt: format of the state tensor.
        scale: scales of the blocks that the rows touch.
        rows: number of rows.
        start: global index of the first element.

    Returns:
        float32 `[rows, columns]`, see `table_shape`.
    """
    return scale[_block_index(fmt, rows, start, scale.device)]


def scales_of(fmt: StateFormat, table: Tensor, quantized: Tensor, start: int) -> Tensor:
    """The scales of consecutive rows, from their table.

    Args:
        fmt: format of the state tensor.
        table: table of scales of the rows.
        quantized: quantized values of the rows. A block that was divided between shards with different scales when the
            table was made is requantized in place.
        start: global index of the first element.

    Returns:
        float32, one per block that the rows touch.
    """
    scale = initial_scale(fmt, quantized, start)
    if not quantized.numel():
        return scale
    index = _block_index(fmt, len(torch.atleast_1d(quantized)), start, quantized.device)
    scale.scatter_reduce_(0, index.view(-1), table.reshape(-1), "amax", include_self=False)
    smallest = torch.empty_like(scale).scatter_reduce_(0, index.view(-1), table.reshape(-1), "amin", include_self=False)
    is_mixed = scale != smallest
    if is_mixed.any():
        block = (start % fmt.block + torch.arange(quantized.numel(), device=quantized.device)) // fmt.block
        row = torch.arange(quantized.numel(), device=quantized.device) // math.prod(fmt.shape[1:])
        element_scale = table[row, block - index[row, 0]]
        ones = torch.ones_like(scale)
        values = dequantize(fmt, quantized, ones, start, quantized.device).view(-1) * element_scale
        new_codes, new_scale = torch.empty_like(quantized), torch.empty_like(scale)
        quantize(fmt, new_codes, new_scale, start, values, lambda: block, 0)
        quantized.view(-1).copy_(torch.where(is_mixed[block], new_codes.view(-1), quantized.view(-1)))
        scale = torch.where(is_mixed, new_scale, scale)
    return scale
