"""Conversion of state between its fmt in training and its fmt in a checkpoint.

In training, the owner of a matrix has its whole state; a checkpoint has row shards. In training, quantized state has
one scale per block of consecutive elements; a checkpoint has a table with one row per row of the state tensor, which
holds the scales of the blocks that the row touches. Sharding by rows therefore shards the table, whatever the number of
ranks. Rows of whole blocks keep their bits on any mesh; a block that a shard boundary divides has a scale on each side,
and is requantized where its parts meet again. Rows shorter than a block repeat its scale, which costs 4 bytes per row
(of a
vector: per element) in the checkpoint only.
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


def _runs(entries: Sequence[Entry]) -> list[list[Entry]]:
    return bucket(entries, lambda e: (e.team.ranks, e.dtype))


def scatter(entries: Sequence[Entry], whole: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Shard the owners' whole state tensors by rows, or give them to all replicas. A collective call.

    Args:
        entries: the same on every rank of their teams.
        whole: gives the tensor of an entry this rank owns.

    Returns:
        Every entry with a DTensor whose local part owns its storage, or a plain tensor.
    """
    out: list[tuple[Entry, Tensor]] = []
    for run in _runs(entries):
        exchange = make_exchange([e.team for e in run], [e.shape for e in run], [e.owner for e in run])
        like = torch.empty((), dtype=run[0].dtype, device=local(run[0].param).device)
        parts = exchange.from_owners({i: whole(run[i]) for i in exchange.mine}, like)()
        for e, part in zip(run, parts, strict=True):
            out.append((e, e.team.shard(e.shape, part.clone()) if isinstance(e.team, Sharding) else part.clone()))
    return out


def collect(entries: Sequence[Entry], loaded: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Bring loaded state tensors whole to their owners. A collective call.

    Args:
        entries: the same on every rank of their teams.
        loaded: gives the loaded tensor of an entry, sharded or whole.

    Returns:
        The entries this rank owns, with whole tensors.
    """
    out: list[tuple[Entry, Tensor]] = []
    for run in _runs(entries):
        exchange = make_exchange([e.team for e in run], [e.shape for e in run], [e.owner for e in run])
        cuts = [e.team if isinstance(e.team, Sharding) else None for e in run]
        parts = [local(place(loaded(e), cut)).to(e.param.device, e.dtype) for e, cut in zip(run, cuts, strict=True)]
        out += [(run[i], t.clone()) for i, t in exchange.to_owners(parts)().items()]
    return out


def table_shape(fmt: StateFormat) -> tuple[int, int]:
    """The shape of a quantised slot's table of scales: rows of the slot, most blocks that a row touches.

    Returns:
        (rows, columns).
    """
    row = math.prod(fmt.shape[1:])
    return fmt.shape[0], -(-(fmt.block - math.gcd(row, fmt.block) + row) // fmt.block)


def _touched(fmt: StateFormat, rows: int, start: int, device: torch.device) -> Tensor:
    """For every entry of the table of some rows, the block it belongs to; a row's last block repeats."""
    row, block = math.prod(fmt.shape[1:]), fmt.block
    first = start % block + row * torch.arange(rows, device=device)
    at = (first // block).unsqueeze(1) + torch.arange(table_shape(fmt)[1], device=device)
    return torch.minimum(at, ((first + row - 1) // block).unsqueeze(1))


def table_of(fmt: StateFormat, scale: Tensor, rows: int, start: int) -> Tensor:
    """The table of a run of rows.

    Args:
        fmt: of the slot.
        scale: of the blocks the rows touch.
        rows: how many rows.
        start: index of the first element.

    Returns:
        float32 `[rows, columns]`, see `table_shape`.
    """
    return scale[_touched(fmt, rows, start, scale.device)]


def scales_of(fmt: StateFormat, table: Tensor, codes: Tensor, start: int) -> Tensor:
    """The scales behind the table of a run of rows.

    Args:
        fmt: of the slot.
        table: its table.
        codes: of the rows; those of blocks that were apart when the table was made, and had other scales, are
            quantised anew.
        start: index of the first element.

    Returns:
        float32, one per block the rows touch.
    """
    scale = initial_scale(fmt, codes, start)
    if not codes.numel():
        return scale
    at = _touched(fmt, codes.shape[0], start, codes.device)
    scale.scatter_reduce_(0, at.view(-1), table.reshape(-1), "amax", include_self=False)
    low = torch.empty_like(scale).scatter_reduce_(0, at.view(-1), table.reshape(-1), "amin", include_self=False)
    mixed = scale != low
    if mixed.any():
        block = (start % fmt.block + torch.arange(codes.numel(), device=codes.device)) // fmt.block
        row = torch.arange(codes.numel(), device=codes.device) // math.prod(fmt.shape[1:])
        own = table[row, block - at[row, 0]]
        one = torch.ones_like(scale)
        wide = dequantize(fmt, codes, one, start, codes.device).view(-1) * own
        fresh, fresh_scale = torch.empty_like(codes), torch.empty_like(scale)
        quantize(fmt, fresh, fresh_scale, start, wide, lambda: block, 0)
        codes.view(-1).copy_(torch.where(mixed[block], fresh.view(-1), codes.view(-1)))
        scale = torch.where(mixed, fresh_scale, scale)
    return scale
