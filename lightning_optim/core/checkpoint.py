"""State of whole-matrix rules between its two forms: whole on an owner while training, row shards in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim.core.chunks import bucket
from lightning_optim.core.layout import Cut, Exchange, local, place


@dataclass(frozen=True)
class Entry:
    """One slot of one parameter whose matrices travel to an owner."""

    param: Tensor
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut
    owner: int


def _runs(entries: Sequence[Entry]) -> list[list[Entry]]:
    return bucket(entries, lambda e: (e.cut.group, e.dtype))


def spread(entries: Sequence[Entry], whole: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Cut owners' whole slots into row shards. Collective.

    Args:
        entries: the same on every rank of their groups.
        whole: gives the tensor of an entry this rank owns.

    Returns:
        Every entry with a DTensor whose local part owns its storage.
    """
    out = []
    for run in _runs(entries):
        cut = run[0].cut
        exchange = Exchange(cut, [e.shape for e in run], [e.owner for e in run])
        like = torch.empty((), dtype=run[0].dtype, device=local(run[0].param).device)
        parts = exchange.from_owners({i: whole(run[i]) for i in exchange.mine}, like)
        out += [(e, cut.shard(e.shape, part.clone())) for e, part in zip(run, parts, strict=True)]
    return out


def collect(entries: Sequence[Entry], loaded: Callable[[Entry], Tensor]) -> list[tuple[Entry, Tensor]]:
    """Bring loaded slots whole to their owners. Collective.

    Args:
        entries: the same on every rank of their groups.
        loaded: gives the loaded tensor of an entry, sharded or whole.

    Returns:
        The entries this rank owns, with whole tensors.
    """
    out = []
    for run in _runs(entries):
        exchange = Exchange(run[0].cut, [e.shape for e in run], [e.owner for e in run])
        parts = [local(place(loaded(e), e.cut, 0)).to(e.dtype) for e in run]
        out += [(run[i], t.clone()) for i, t in exchange.to_owners(parts).items()]
    return out
