"""Where a parameter lies on a mesh, and what of it is on this rank.

Plain tensors are whole: every rank that has one does all the work, unless replicas share it out. A DTensor cut along
any of its dimensions, over one or several mesh dimensions (FSDP2, tensor parallelism, both; replicas of HSDP repeat the
work), is worked on in one of three ways:

- elementwise rules take the local shard;
- rules that only reduce get a DTensor around each stack (`StackLayout`), so torch.distributed adds the sums;
- every other rule needs whole matrices: `core.travel` brings each to one owner and the directions back.

Nothing outside this module asks whether a tensor is a DTensor.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def local(t: Tensor) -> Tensor:
    """The part of a tensor on this rank.

    Returns:
        The shard of a DTensor (shared memory), or the tensor itself.
    """
    return t.to_local() if isinstance(t, DTensor) else t


def placement_of(p: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Where a parameter lies on a mesh.

    Returns:
        (mesh, placements) of a DTensor; None for a plain tensor.
    """
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
    """A DTensor cut along one or more dimensions over the ranks of a team: those that have one whole copy together."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def dims(self) -> list[int]:
        """The mesh dimensions that cut."""
        return [d for d, x in enumerate(self.placements) if not isinstance(x, Replicate)]

    @property
    def sizes(self) -> list[int]:
        """How many parts each of them makes."""
        return [self.mesh.size(d) for d in self.dims]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The team, by global rank; a rank's place in it is that of its part."""
        return team_of(self.mesh, tuple(self.dims))

    @property
    def rank(self) -> int:
        """This process's place in the team."""
        at = 0
        for d, size in zip(self.dims, self.sizes, strict=True):
            at = at * size + self.mesh.get_local_rank(d)
        return at

    @property
    def size(self) -> int:
        """Number of ranks in the team."""
        return math.prod(self.sizes)

    @property
    def group(self) -> dist.ProcessGroup:
        """The team's process group; that of several mesh dimensions is made when first asked for, by the whole team."""
        return self.mesh.get_group(self.dims[0]) if len(self.dims) == 1 else _group_of(self.ranks)

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be sent; parameters may be offloaded to the CPU."""
        return torch.device(self.mesh.device_type)

    @property
    def by_rows(self) -> Sharding:
        """The same team with the first dimension cut: how whole matrices rest in a checkpoint."""
        return replace(self, placements=tuple(x if isinstance(x, Replicate) else Shard(0) for x in self.placements))

    @property
    def is_by_rows(self) -> bool:
        """Whether only the first dimension is cut, so that every part is one run of elements."""
        return all(self._dim(d) == 0 for d in self.dims)

    @property
    def is_plain(self) -> bool:
        """Whether every part is what `torch.chunk` gives, mesh dimension after mesh dimension."""
        return all(isinstance(self.placements[d], Shard) for d in self.dims)

    def _dim(self, d: int) -> int:
        return cast("Shard", self.placements[d]).dim

    def shard_slices(self, shape: Sequence[int], rank: int) -> Bounds:
        """The part of one rank: by `torch.chunk`'s rule along every cut dimension.

        FSDP2 cuts what tensor parallelism has cut before, which its placement notes as strided.

        Args:
            shape: of the whole tensor.
            rank: its place in the team.

        Returns:
            Where the part lies.
        """
        at: dict[int, int] = {}
        for d, size in zip(reversed(self.dims), reversed(self.sizes), strict=True):
            rank, at[d] = divmod(rank, size)
        first = [d for d in self.dims if isinstance(self.placements[d], Shard)]
        bounds = [(0, n) for n in shape]
        for d in [*first, *(d for d in reversed(self.dims) if d not in first)]:
            start, end = bounds[self._dim(d)]
            step = -(-(end - start) // self.mesh.size(d))
            bounds[self._dim(d)] = min(start + at[d] * step, end), min(start + (at[d] + 1) * step, end)
        return tuple(bounds)

    def shard(self, whole_shape: Sequence[int], part: Tensor) -> Tensor:
        """Wrap this rank's part of a tensor that is cut so.

        Returns:
            A DTensor of shape `whole_shape`.
        """
        return wrap(self.mesh, self.placements, whole_shape, part)


class _Line:
    """A mesh of one dimension that does not exist yet."""

    ndim = 1

    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self, d: int) -> int:
        return self.ranks


def rows_over(ranks: int) -> Sharding:
    """Rows over so many ranks, as `fully_shard` cuts them, to ask where parts will lie; there is nobody to send to.

    Returns:
        A cut without process groups.
    """
    return Sharding(cast("DeviceMesh", _Line(ranks)), (Shard(0),))


@functools.lru_cache(maxsize=64)
def team_of(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The global ranks along some mesh dimensions, through this process.

    Returns:
        Ranks in the order of their coordinates.
    """
    own = cast("list[int]", mesh.get_coordinate())
    return tuple(mesh.mesh[tuple(slice(None) if d in dims else k for d, k in enumerate(own))].flatten().tolist())


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]
_groups = weakref.WeakKeyDictionary()
"""Process groups of teams that are none of a mesh's own."""


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    known = _groups.setdefault(cast("dist.ProcessGroup", dist.group.WORLD), {})
    if ranks not in known:
        known[ranks] = cast("dist.ProcessGroup", dist.new_group(list(ranks), use_local_synchronization=True))
    return known[ranks]


def wrap(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], part: Tensor) -> DTensor:
    """A DTensor around this rank's part of a tensor.

    Args:
        mesh: the device mesh.
        placements: one per mesh dimension.
        shape: of the whole tensor.
        part: this rank's part.

    Returns:
        The DTensor; it shares memory with the part.
    """
    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def sharding_of(p: Tensor, name: str = "parameter") -> Sharding | None:
    """How a parameter is cut.

    Args:
        p: the parameter.
        name: for the error message.

    Returns:
        None for a tensor that is whole on this rank.

    Raises:
        ValueError: a DTensor that is neither cut nor replicated along some mesh dimension.
    """
    if not isinstance(p, DTensor) or all(isinstance(x, Replicate) for x in p.placements):
        return None
    if not all(isinstance(x, (Shard, _StridedShard, Replicate)) for x in p.placements):
        raise ValueError(f"{name}: placements {p.placements} are neither shards nor replicas of a parameter")
    return Sharding(p.device_mesh, tuple(p.placements))


def local_bounds(p: Tensor) -> Bounds:
    """Where this rank's part of a parameter lies.

    Returns:
        First index and one past the last, along every dimension.
    """
    cut = sharding_of(p)
    return tuple((0, n) for n in p.shape) if cut is None else cut.shard_slices(p.shape, cut.rank)


def within(t: Tensor, box: Bounds) -> Tensor:
    """The part of a whole tensor.

    Returns:
        A view.
    """
    return t[tuple(slice(*bounds) for bounds in box)]


def place(value: Tensor, cut: Sharding | None) -> Tensor:
    """Bring a loaded state tensor into the placement in which it rests.

    Args:
        value: a whole tensor, equal on all ranks, or a DTensor.
        cut: how it rests; None if it is whole on every rank.

    Returns:
        A DTensor whose local part owns its storage, or a plain tensor.
    """
    if cut is None:
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor) and value.placements != cut.placements:
        plain = cut.is_plain and all(isinstance(x, (Shard, Replicate)) for x in value.placements)
        value = value.redistribute(cut.mesh, cut.placements) if plain else value.full_tensor()
    part = value.to_local() if isinstance(value, DTensor) else within(value, cut.shard_slices(value.shape, cut.rank))
    return cut.shard(value.shape, part.clone(memory_format=torch.contiguous_format))


def place_like(value: Tensor, p: Tensor) -> Tensor:
    """Bring a loaded tensor of a parameter's shape into the parameter's placement.

    Returns:
        A DTensor for a DTensor, else a plain tensor.
    """
    placed = place(value, sharding_of(p))
    return placed if isinstance(placed, DTensor) else wrapped_like(placed, p)


def wrapped_like(part: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, in the parameter's placement.

    Returns:
        A DTensor for a DTensor, else the part itself.
    """
    return wrap(p.device_mesh, p.placements, p.shape, part) if isinstance(p, DTensor) else part


def num_shards(p: Tensor) -> int:
    """Over how many ranks the elements of a parameter are spread.

    Returns:
        1 for a tensor that is whole on this rank.
    """
    cut = sharding_of(p)
    return 1 if cut is None else cut.size


def is_tensor_parallel(p: Tensor, model: torch.nn.Module) -> bool:
    """Whether ranks that hold parts of a parameter see the same batches.

    Args:
        p: of the model.
        model: the model.

    Returns:
        True for a DTensor that is cut over more than the ranks of `fully_shard`.
    """
    if not isinstance(p, DTensor):
        return False
    from torch.distributed.fsdp import FSDPModule  # only here, as it takes time to import

    cut = sum(not isinstance(x, Replicate) for x in p.placements)
    return cut > 1 or (cut == 1 and not any(isinstance(m, FSDPModule) for m in model.modules()))
