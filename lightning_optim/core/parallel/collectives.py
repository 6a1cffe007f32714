"""Reductions over the ranks that share parameters: norms, sums and maxima that are equal on every rank.

The mesh of a DTensor says which ranks those are, and the sharding of a fragment; for parameters that are whole on every
rank, a process group does. Without a mesh or a process group nothing is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.parallel.sharding import local


def ranks_of(params: Iterable[Tensor]) -> tuple[int, ...]:
    """Ranks of all device meshes over which parameters are placed.

    Returns:
        Sorted global ranks; an empty tuple for plain tensors.
    """
    params = list(params)
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    ranks = {r for mesh in meshes for r in mesh.mesh.flatten().tolist()}
    shared = {p.sharding.group: p.sharding.ranks for p in params if isinstance(p, Fragment)}
    return tuple(sorted(ranks.union(*shared.values())))


def all_reduce_max(
    values: Sequence[float], params: Iterable[Tensor], group: dist.ProcessGroup | None = None
) -> list[float]:
    """Maximum of each value over all ranks that share the parameters; no communication without a mesh.

    Args:
        values: numbers of this rank.
        params: the parameters whose ranks take part.
        group: process group of replicas that shard the optimizer work on plain tensors.

    Returns:
        The maxima, equal on every rank.
    """
    params = list(params)
    meshes = list(dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)))
    out = torch.tensor(values, dtype=torch.float64, device="cpu")
    for mesh in meshes:
        on_device = out.to(mesh.device_type)
        for d in range(mesh.ndim):
            dist.all_reduce(on_device, dist.ReduceOp.MAX, group=mesh.get_group(d))
        out = on_device.cpu()
    for sharding in {p.sharding.group: p.sharding for p in params if isinstance(p, Fragment)}.values():
        on_device = out.to(sharding.device)
        dist.all_reduce(on_device, dist.ReduceOp.MAX, group=sharding.group)
        out = on_device.cpu()
    if group is not None:
        on_device = out.to(next((local(p).device for p in params), out.device))
        dist.all_reduce(on_device, dist.ReduceOp.MAX, group=group)
        out = on_device.cpu()
    return out.tolist()


def total_norms(sets: Sequence[Sequence[tuple[Tensor, Tensor | None]]]) -> list[float]:
    """The norm of each of several sets of gradients, over the whole mesh; one synchronization per device.

    Args:
        sets: pairs of a parameter and its gradient on this rank, None where there is none.

    Returns:
        One norm per set, equal on every rank; replicas count once.
    """
    squares: dict[Hashable, Tensor] = {}
    like: dict[Hashable, Tensor] = {}
    for i, pairs in enumerate(sets):
        for p, g in pairs:
            key = local(p).device, _summed_over(p)
            if key not in squares:
                squares[key], like[key] = torch.zeros(len(sets), dtype=torch.float64, device=key[0]), p
            if g is not None:
                squares[key][i] += _square(g)
    by_device: dict[torch.device, Tensor] = {}
    for key, partial in squares.items():
        sums = add_up(partial, like[key])
        by_device[sums.device] = by_device.get(sums.device, 0) + sums
    totals = [sums.tolist() for sums in by_device.values()]
    return [math.sqrt(sum(x)) for x in zip(*totals, strict=True)] if totals else [0.0] * len(sets)


def _summed_over(p: Tensor) -> Hashable:
    """The ranks over which sums over a parameter are added up, as a mesh and its dimensions or a process group."""
    if isinstance(p, Fragment):
        return p.sharding.group
    return (p.device_mesh, *(x.is_replicate() for x in p.placements)) if isinstance(p, DTensor) else None


def norm(p: Tensor, g: Tensor) -> Tensor:
    """The norm of one gradient, over the whole mesh, without synchronizing the device.

    Args:
        p: the parameter.
        g: its gradient on this rank.

    Returns:
        A 0-d float64 tensor, equal on every rank.
    """
    return add_up(_square(g), p).sqrt_()


def _square(g: Tensor) -> Tensor:
    """The squared norm of a tensor in float64; of a narrower one it is finite if its elements are."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    size = torch.linalg.vector_norm(g, dtype=dtype).double()
    if g.device.type == "cpu" and size.isinf():
        size = torch.linalg.vector_norm(g, dtype=torch.float64)
    return size.square()


def add_up(sums: Tensor, p: Tensor) -> Tensor:
    """Add up sums that every rank has computed over its shard of a parameter.

    Args:
        sums: partial sums of this rank, overwritten.
        p: the parameter.

    Returns:
        The sums over the whole parameter, equal on every rank.
    """
    if isinstance(p, Fragment):
        on_device = sums.to(p.sharding.device)
        dist.all_reduce(on_device, group=p.sharding.group)
        return sums.copy_(on_device)
    for d, x in enumerate(p.placements) if isinstance(p, DTensor) else ():
        if not x.is_replicate():
            dist.all_reduce(sums, group=cast("DTensor", p).device_mesh.get_group(d))
    return sums


def scale_gradient(p: Tensor, factor: Tensor) -> None:
    """Multiply `p.grad` by a factor.

    Shards are scaled in place. A plain gradient is replaced by a scaled copy, since it may share memory with another
    gradient, as views of one sum do.

    Args:
        p: the parameter.
        factor: a 0-d tensor, equal on every rank.
    """
    if isinstance(p.grad, DTensor):
        p.grad.to_local().mul_(factor)
    elif p.grad is not None:
        p.grad = (p.grad * factor).to(p.grad.dtype)  # of two 0-d tensors, the wider dtype would win


def is_replicated(p: Tensor) -> bool:
    """Whether a tensor is whole on each of several ranks, so that DDP or the like has to reduce its gradients.

    Returns:
        False for DTensors and fragments, and in a single process.
    """
    return not isinstance(p, (DTensor, Fragment)) and world_size() > 1


def agree_times(seconds: Sequence[float], params: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Maximum of measured times over all ranks that do the same work, so that they decide alike.

    Args:
        seconds: measured on this rank.
        params: the parameters whose ranks take part.
        group: process group of the replicas, for parameters that are whole on every rank.

    Returns:
        The times, equal on every rank.

    Raises:
        RuntimeError: parameters are replicated and no process group names the replicas, which could diverge.
    """
    if group is None and any(is_replicated(p) for p in params):
        raise RuntimeError(
            "refresh='time_budget' measures time, which differs between replicas; set optimizer.process_group to "
            "the group of the replicas, or choose another policy"
        )
    return all_reduce_max(seconds, params, group)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors that are whole on every rank by their mean over all ranks, in place.

    Args:
        tensors: of the same shapes on every rank.
    """
    sum_(tensors)
    for t in tensors:
        t /= world_size()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in a process group.

    Args:
        group: the process group; all processes by default.

    Returns:
        The size of the group; 1 where torch.distributed is not initialized.
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors that are whole on every rank by their sum over ranks, in place.

    Args:
        tensors: of the same shapes on every rank.
        group: process group of those ranks; all ranks by default.
    """
    if world_size(group) > 1:
        for t in tensors:
            dist.all_reduce(t, group=group)
