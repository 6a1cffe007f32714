"""Placement of a parameter on a device mesh, and the shard of it on this rank.

Plain tensors are whole: every rank that has one does all the work, unless replicas shard it. A DTensor may be sharded
along any of its dimensions, over one or several mesh dimensions (FSDP2, tensor parallelism, both; the replicas of HSDP
repeat the work). Its step is computed in one of three ways:

- elementwise rules step the local shard;
- rules that only reduce get a DTensor around each stack (`StackSharding`), so that torch.distributed adds up the sums;
- every other rule needs whole matrices: `parallel.exchange` sends each to its owner and the directions back.

DeepSpeed ZeRO's flat tensors hold runs of elements of parameters; `Fragment` stands for a parameter there. Sums are not
taken over runs: rules that reduce get whole matrices, too.

No module outside `core.parallel` checks whether a tensor is a DTensor or a fragment.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim.core.parallel.fragment import Fragment


def local(t: Tensor) -> Tensor:
    """The shard of a tensor on this rank.

    Returns:
        The shard of a DTensor or the run of a fragment (shared memory), or the tensor itself.
    """
    if isinstance(t, Fragment):
        return t.part
    return t.to_local() if isinstance(t, DTensor) else t


def placement_of(p: Tensor) -> Hashable:
    """Device mesh and placements of a parameter, or the sharding of a fragment.

    Returns:
        Equal for equal placements; None for a plain tensor.
    """
    if isinstance(p, Fragment):
        return p.sharding
    return (p.device_mesh, tuple(p.placements)) if isinstance(p, DTensor) else None


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of a parameter on this rank, in the parameter's placement.

    Returns:
        The local gradient, or None.
    """
    g = p.grad
    if not isinstance(g, DTensor) or not isinstance(p, DTensor):
        return g
    return (g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements)).to_local()


Bounds = tuple[tuple[int, int], ...]
"""First index and one past the last, along every dimension."""


@dataclass(frozen=True)
class Sharding:
    """Sharding of a DTensor along one or more dimensions, over a team: the ranks that hold one whole copy together."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def dims(self) -> list[int]:
        """Mesh dimensions along which the tensor is sharded."""
        return [d for d, x in enumerate(self.placements) if not isinstance(x, Replicate)]

    @property
    def sizes(self) -> list[int]:
        """Number of shards along each of these mesh dimensions."""
        return [self.mesh.size(d) for d in self.dims]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the team, in the order of their shards."""
        return team_of(self.mesh, tuple(self.dims))

    @property
    def rank(self) -> int:
        """Index of this process in the team."""
        index = 0
        for d, size in zip(self.dims, self.sizes, strict=True):
            index = index * size + self.mesh.get_local_rank(d)
        return index

    @property
    def size(self) -> int:
        """Number of ranks in the team."""
        return math.prod(self.sizes)

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group of the team; over several mesh dimensions it is created by its first use, a collective call."""
        return self.mesh.get_group(self.dims[0]) if len(self.dims) == 1 else _group_of(self.ranks)

    @property
    def device(self) -> torch.device:
        """Device from which tensors can be sent; parameters may be offloaded to the CPU."""
        return torch.device(self.mesh.device_type)

    @property
    def by_rows(self) -> Sharding:
        """The same team, sharded along the first dimension: the placement of whole matrices in a checkpoint."""
        return replace(self, placements=tuple(x if isinstance(x, Replicate) else Shard(0) for x in self.placements))

    @property
    def is_by_rows(self) -> bool:
        """Whether only the first dimension is sharded, so that every shard is one contiguous range of elements."""
        return all(self._dim(d) == 0 for d in self.dims)

    @property
    def is_saved_by_rank(self) -> bool:
        """Whether checkpoints hold what each rank has, and not DTensors."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether the shards are those of `torch.chunk`, applied mesh dimension by mesh dimension."""
        return all(isinstance(self.placements[d], Shard) for d in self.dims)

    def _dim(self, d: int) -> int:
        return cast("Shard", self.placements[d]).dim

    def shard_slices(self, shape: Sequence[int], rank: int) -> Bounds:
        """Bounds of the shard of one rank, by `torch.chunk`'s rule along every sharded dimension.

        FSDP2 shards a dimension that tensor parallelism has sharded before; its placement is then `_StridedShard`.

        Args:
            shape: shape of the whole tensor.
            rank: index of the rank in the team.

        Returns:
            First index and one past the last, along every dimension.
        """
        coordinates: dict[int, int] = {}
        for d, size in zip(reversed(self.dims), reversed(self.sizes), strict=True):
            rank, coordinates[d] = divmod(rank, size)
        unstrided = [d for d in self.dims if isinstance(self.placements[d], Shard)]
        bounds = [(0, n) for n in shape]
        for d in [*unstrided, *(d for d in reversed(self.dims) if d not in unstrided)]:
            start, end = bounds[self._dim(d)]
            step = -(-(end - start) // self.mesh.size(d))
            first = start + coordinates[d] * step
            bounds[self._dim(d)] = min(first, end), min(first + step, end)
        return tuple(bounds)

    def shard(self, whole_shape: Sequence[int], shard: Tensor) -> Tensor:
        """Wrap this rank's shard of a tensor with this sharding.

        Returns:
            A DTensor of shape `whole_shape`.
        """
        return to_dtensor(self.mesh, self.placements, whole_shape, shard)


@functools.lru_cache(maxsize=64)
def team_of(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Global ranks along some mesh dimensions, through the coordinates of this process.

    Returns:
        Ranks in the order of their coordinates.
    """
    coordinate = cast("list[int]", mesh.get_coordinate())
    index = tuple(slice(None) if d in dims else k for d, k in enumerate(coordinate))
    return tuple(mesh.mesh[index].flatten().tolist())


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]
_groups = weakref.WeakKeyDictionary()
"""Process groups of teams over several mesh dimensions, which a mesh does not have itself."""


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    groups = _groups.setdefault(cast("dist.ProcessGroup", dist.group.WORLD), {})
    if ranks not in groups:
        groups[ranks] = cast("dist.ProcessGroup", dist.new_group(list(ranks), use_local_synchronization=True))
    return groups[ranks]


def to_dtensor(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], shard: Tensor) -> DTensor:
    """A DTensor around this rank's shard of a tensor.

    Args:
        mesh: the device mesh.
        placements: one per mesh dimension.
        shape: shape of the whole tensor.
        shard: this rank's shard.

    Returns:
        The DTensor; it shares memory with the shard.
    """
    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def sharding_of(p: Tensor, name: str = "parameter") -> Sharding | None:
    """The sharding of a parameter.

    Args:
        p: the parameter.
        name: for the error message.

    Returns:
        None for a tensor that is whole on this rank.

    Raises:
        ValueError: a DTensor is neither sharded nor replicated along some mesh dimension.
    """
    if isinstance(p, Fragment):
        return p.sharding
    if not isinstance(p, DTensor) or all(isinstance(x, Replicate) for x in p.placements):
        return None
    if not all(isinstance(x, (Shard, _StridedShard, Replicate)) for x in p.placements):
        raise ValueError(f"{name}: placements {p.placements} are neither Shard nor Replicate")
    return Sharding(p.device_mesh, tuple(p.placements))


def local_bounds(p: Tensor) -> Bounds:
    """Bounds of this rank's shard of a parameter.

    Returns:
        First index and one past the last, along every dimension.
    """
    sharding = sharding_of(p)
    return tuple((0, n) for n in p.shape) if sharding is None else sharding.shard_slices(p.shape, sharding.rank)


def within(t: Tensor, bounds: Bounds) -> Tensor:
    """The part of a whole tensor within bounds.

    Returns:
        A view, if the tensor is contiguous.
    """
    if len(bounds) != t.ndim:  # a run of elements
        return t.reshape(-1)[slice(*bounds[0])]
    return t[tuple(slice(first, end) for first, end in bounds)]


def place(value: Tensor, sharding: Sharding | None) -> Tensor:
    """Bring a loaded state tensor into the placement in which it is stored.

    Args:
        value: a whole tensor, equal on all ranks, a DTensor, or a fragment of this sharding.
        sharding: how it is stored; None if it is whole on every rank.

    Returns:
        A DTensor whose local shard has storage of its own, or a plain tensor.
    """
    if isinstance(value, Fragment):
        return value
    if sharding is None:
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor) and value.placements != sharding.placements:
        is_plain = sharding.is_plain and all(isinstance(x, (Shard, Replicate)) for x in value.placements)
        value = value.redistribute(sharding.mesh, sharding.placements) if is_plain else value.full_tensor()
    if isinstance(value, DTensor):
        shard = value.to_local()
    else:
        shard = within(value, sharding.shard_slices(value.shape, sharding.rank))
    return sharding.shard(value.shape, shard.clone(memory_format=torch.contiguous_format))


def place_like(value: Tensor, p: Tensor) -> Tensor:
    """Bring a loaded tensor of a parameter's shape into the parameter's placement.

    Returns:
        A DTensor for a DTensor, a fragment for a fragment, else a plain tensor.
    """
    placed = place(value, sharding_of(p))
    return placed if isinstance(placed, (DTensor, Fragment)) else placed_like(placed, p)


def placed_like(shard: Tensor, p: Tensor) -> Tensor:
    """Wrap this rank's shard of a tensor of a parameter's shape in the parameter's placement.

    Returns:
        A DTensor for a DTensor, a fragment for a fragment, else the shard itself.
    """
    if isinstance(p, Fragment):
        return p.like(shard)
    return to_dtensor(p.device_mesh, p.placements, p.shape, shard) if isinstance(p, DTensor) else shard


def num_shards(p: Tensor) -> int:
    """Number of ranks over which the elements of a parameter are sharded.

    Returns:
        1 for a tensor that is whole on this rank.
    """
    sharding = sharding_of(p)
    return 1 if sharding is None else sharding.size


def is_tensor_parallel(p: Tensor, model: torch.nn.Module) -> bool:
    """Whether the ranks that hold shards of a parameter process the same batches.

    Args:
        p: a parameter of the model.
        model: the model.

    Returns:
        True for a DTensor that is sharded over more mesh dimensions than that of `fully_shard`.
    """
    if not isinstance(p, DTensor):
        return False
    from torch.distributed.fsdp import FSDPModule  # only here, as it takes time to import

    count = sum(not isinstance(x, Replicate) for x in p.placements)
    return count > 1 or (count == 1 and not any(isinstance(m, FSDPModule) for m in model.modules()))


def unsharded_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a module before `fully_shard` derived another one from it.

    Args:
        module: any module.

    Returns:
        Its class, where it is not the root of a shard.
    """
    mro = type(module).__mro__
    sharded = next(
        (c for c in mro if c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed")), None
    )
    return next(c for c in mro if sharded is None or not issubclass(c, sharded))
