"""collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_optim.core.parallel.sharding import local


def ranks_of(params: Iterable[Tensor]) -> tuple[int, ...]:
    """All ranks of the meshes on which parameters lie.

    Returns:
        Sorted global ranks; none for plain tensors.
    """
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    return tuple(sorted({r for mesh in meshes for r in mesh.mesh.flatten().tolist()}))


def all_reduce_max(
    values: Sequence[float], params: Iterable[Tensor], group: dist.ProcessGroup | None = None
) -> list[float]:
    """The largest of each value over all ranks that share the parameters; no communication without a mesh.

    Args:
        values: one per question.
        params: the parameters concerned.
        group: of replicas that share out the work on plain tensors.

    Returns:
        The maxima, equal on every rank.
    """
    params = list(params)
    meshes = list(dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)))
    out = torch.tensor(values, dtype=torch.float64, device="cpu")
    for mesh in meshes:
        moved = out.to(mesh.device_type)
        for d in range(mesh.ndim):
            dist.all_reduce(moved, dist.ReduceOp.MAX, group=mesh.get_group(d))
        out = moved.cpu()
    if group is not None:
        moved = out.to(next((local(p).device for p in params), out.device))
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
        out = moved.cpu()
    return out.tolist()


def total_norms(sets: Sequence[Sequence[tuple[Tensor, Tensor | None]]]) -> list[float]:
    """The norm of each of several sets of gradients, over the whole mesh; one synchronisation per device.

    Args:
        sets: pairs of a parameter and its gradient on this rank, None where there is none.

    Returns:
        One norm per set, equal on every rank; replicas count once.
    """
    squares: dict[tuple[torch.device, DeviceMesh | None, tuple[int, ...]], Tensor] = {}
    for i, pairs in enumerate(sets):
        for p, g in pairs:
            mesh = p.device_mesh if isinstance(p, DTensor) else None
            cut = tuple(d for d, x in enumerate(p.placements) if not x.is_replicate()) if isinstance(p, DTensor) else ()
            where = local(p).device, mesh, cut
            if where not in squares:
                squares[where] = torch.zeros(len(sets), dtype=torch.float64, device=where[0])
            if g is not None:
                exact = torch.promote_types(g.dtype, torch.float32)
                squares[where][i] += torch.linalg.vector_norm(g, dtype=exact).double().square()
    by_device: dict[torch.device, Tensor] = {}
    for (device, mesh, cut), sums in squares.items():
        for d in cut:
            dist.all_reduce(sums, group=cast("DeviceMesh", mesh).get_group(d))
        by_device[device] = by_device.get(device, 0) + sums
    totals = [found.tolist() for found in by_device.values()]
    return [math.sqrt(sum(x)) for x in zip(*totals, strict=True)] if totals else [0.0] * len(sets)


def norm(p: Tensor, g: Tensor) -> Tensor:
    """The norm of one gradient, over the whole mesh; nothing waits for it.

    Args:
        p: the parameter.
        g: its gradient on this rank.

    Returns:
        A 0-d float64 tensor, equal on every rank.
    """
    square = torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double().square()
    return add_up(square, p).sqrt_()


def add_up(sums: Tensor, p: Tensor) -> Tensor:
    """Add what every rank found in its part of a parameter.

    Args:
        sums: of this rank, overwritten.
        p: the parameter.

    Returns:
        The sums over the whole parameter, equal on every rank.
    """
    for d, x in enumerate(p.placements) if isinstance(p, DTensor) else ():
        if not x.is_replicate():
            dist.all_reduce(sums, group=cast("DTensor", p).device_mesh.get_group(d))
    return sums


def scale_gradient(p: Tensor, factor: Tensor) -> None:
    """Multiply `p.grad`; a copy where it may share memory with another gradient, as views of one sum do.

    Args:
        p: the parameter.
        factor: a 0-d tensor, equal on every rank.
    """
    if isinstance(p.grad, DTensor):
        p.grad.to_local().mul_(factor)
    elif p.grad is not None:
        p.grad = p.grad * factor


def is_replicated(p: Tensor) -> bool:
    """Whether a tensor is whole on each of several ranks, and some other part is to make its gradients equal.

    Returns:
        False for DTensors, and in a process that is alone.
    """
    return not isinstance(p, DTensor) and world_size() > 1


def agree_times(seconds: Sequence[float], params: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Measured times that all ranks doing the same work share: the largest.

    Args:
        seconds: measured on this rank.
        params: the parameters concerned.
        group: of replicas, for parameters that are whole on every rank.

    Returns:
        The times, equal on every rank.

    Raises:
        RuntimeError: replicas that may drift apart, because nothing says which ranks they are.
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
    """Number of processes that train together.

    Args:
        group: those processes; all, if not given.

    Returns:
        1 for a process that is alone.
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors that are whole on every rank by their sum over ranks, in place.

    Args:
        tensors: of the same shapes on every rank.
        group: those ranks; all, if not given.
    """
    if world_size(group) > 1:
        for t in tensors:
            dist.all_reduce(t, group=group)
