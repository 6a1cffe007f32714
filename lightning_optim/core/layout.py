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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim.core.chunks import Dims, Part
from lightning_optim.core.rule import Slot
from lightning_optim.core.storage import Form, allocate


def local(t: Tensor) -> Tensor:
    """The part of a tensor on this rank.

    Returns:
        The shard of a DTensor (shared memory), or the tensor itself.
    """
    return t.to_local() if isinstance(t, DTensor) else t


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of a parameter on this rank, in the parameter's placement.

    Returns:
        The local gradient, or None.
    """
    g = p.grad
    if not isinstance(g, DTensor) or not isinstance(p, DTensor):
        return g
    return (g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements)).to_local()


Box = tuple[tuple[int, int], ...]
"""First index and one past the last, along every dimension."""


@dataclass(frozen=True)
class Cut:
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
        return _team(self.mesh, tuple(self.dims))

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
    def by_rows(self) -> Cut:
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

    def box(self, shape: Sequence[int], rank: int) -> Box:
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
        return _wrap(self.mesh, self.placements, whole_shape, part)


class _Line:
    """A mesh of one dimension that does not exist yet."""

    ndim = 1

    def __init__(self, ranks: int):
        self.ranks = ranks

    def size(self, d: int) -> int:
        return self.ranks


def rows_over(ranks: int) -> Cut:
    """Rows over so many ranks, as `fully_shard` cuts them, to ask where parts will lie; there is nobody to send to.

    Returns:
        A cut without process groups.
    """
    return Cut(cast("DeviceMesh", _Line(ranks)), (Shard(0),))


@functools.lru_cache(maxsize=64)
def _team(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[int, ...]:
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


def _wrap(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], part: Tensor) -> DTensor:
    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def cut_of(p: Tensor, name: str = "parameter") -> Cut | None:
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
    return Cut(p.device_mesh, tuple(p.placements))


def box_of(p: Tensor) -> Box:
    """Where this rank's part of a parameter lies.

    Returns:
        First index and one past the last, along every dimension.
    """
    cut = cut_of(p)
    return tuple((0, n) for n in p.shape) if cut is None else cut.box(p.shape, cut.rank)


def within(t: Tensor, box: Box) -> Tensor:
    """The part of a whole tensor.

    Returns:
        A view.
    """
    return t[tuple(slice(*bounds) for bounds in box)]


def first_element(p: Tensor) -> int | None:
    """Global index of the first element of this rank's part, where the part is one contiguous run of elements.

    Returns:
        The index in row-major order, or None where the part is not such a run (`element_index` then).
    """
    if not local(p).is_contiguous():
        return None
    if not isinstance(p, DTensor):
        return 0
    if any(local(p).shape[d] != p.shape[d] for d in range(1, p.ndim)):
        return None
    return _first(p)


def start_of(p: Tensor, name: str = "parameter") -> int:
    """Global row-major index of the first element of this rank's rows.

    Args:
        p: the parameter.
        name: for the error message.

    Returns:
        The index.

    Raises:
        ValueError: the parameter is not cut by rows.
    """
    cut = cut_of(p, name)
    if cut is not None and not cut.is_by_rows:
        raise ValueError(
            f"{name}: state in 8 bits is cut by rows (dimension 0), the parameter is {cut.placements}; "
            "choose state_storage='bf16' or 'fp32' for it"
        )
    return _first(p)


def _first(p: Tensor) -> int:
    return box_of(p)[0][0] * math.prod(p.shape[1:]) if p.ndim else 0


def element_index(p: Tensor) -> Tensor:
    """Global row-major index of every element of this rank's part.

    Returns:
        int32 (wrapped around), shaped like the local part.
    """
    part = local(p)
    index = torch.zeros(part.shape, dtype=torch.int64, device=part.device)
    for d, (start, _) in enumerate(box_of(p)):
        steps = torch.arange(start, start + part.shape[d], device=part.device) * math.prod(p.shape[d + 1 :])
        index += steps.view([-1 if k == d else 1 for k in range(p.ndim)])
    return index.to(torch.int32)


def _axis(p: Tensor, d: int, dims: Dims, transposed: bool) -> str:
    """On which axis of the stack `[b, m, n]` a cut of dimension `d` of the parameter falls; "" for none."""
    if p.ndim < 2:
        return "n"
    turned = transposed and p.ndim <= 3
    rows, columns = (p.ndim - 1, p.ndim - 2) if turned else (p.ndim - 2, p.ndim - 1)
    if p.ndim > 3 and dims[2] != p.shape[columns]:  # a convolution: all but the first dimension are columns
        return ("m" if dims[1] == p.shape[0] else "b") if d == 0 else ""
    if d == columns:
        return "n"
    if d == rows and (dims[1] == p.shape[d] or p.ndim > 2):
        return "m" if dims[1] == p.shape[d] else ""
    return "b" if d == 0 or d == rows else ""


def axes_of(p: Tensor, cut: Cut, dims: Dims, transposed: bool) -> tuple[str, ...] | None:
    """Which axis of the stack `[b, m, n]` each mesh dimension cuts.

    Args:
        p: the parameter.
        cut: how it is cut.
        dims: of the whole parameter as a stack of matrices.
        transposed: whether the matrices are stored columns x rows.

    Returns:
        "" for a mesh dimension that does not cut; None where sums cannot run over the shards.
    """
    axes = tuple("" if d not in cut.dims else _axis(p, cut._dim(d), dims, transposed) for d in range(cut.mesh.ndim))
    cutting = [axes[d] for d in cut.dims]
    if not cut.is_plain or "" in cutting or len(set(cutting)) < len(cutting) or ("b" in cutting and len(cutting) > 1):
        return None
    if cutting == ["b"]:
        d, (_, m, n) = cut._dim(cut.dims[0]), dims
        unit = p.numel() // p.shape[d]
        if any(cut.box(p.shape, r)[d][1] * unit % (m * n) for r in range(cut.size)):
            return None  # blocks of rows that straddle shards
    return axes


def rest_of(cut: Cut | None, axes: Sequence[str], slot: Slot, ndim: int) -> Cut | None:
    """How a slot of a reducing rule is cut at rest.

    Args:
        cut: of the parameter.
        axes: of the stack, that each mesh dimension cuts.
        slot: its declaration.
        ndim: the number of its dimensions at rest.

    Returns:
        None where it is whole on every rank.
    """
    if cut is None or slot.letters == "mn":
        return cut
    at = {x: ndim - len(slot.letters) + k for k, x in enumerate(slot.letters)} | {"b": 0}
    placements = tuple(Shard(at[x]) if x in at else Replicate() for x in axes)
    return None if all(isinstance(x, Replicate) for x in placements) else replace(cut, placements=placements)


def sums_on_shards(p: Tensor, parts: Sequence[Part], transposed: bool) -> bool:
    """Whether a rule that only needs sums can work on a parameter as it lies.

    Args:
        p: the parameter.
        parts: of the whole parameter.
        transposed: whether its matrices are stored columns x rows.

    Returns:
        False where its matrices have to travel, as those of other rules do.
    """
    cut = cut_of(p)
    if cut is None:
        return True
    return parts[0].rows is None and len(parts) == 1 and axes_of(p, cut, parts[0].dims, transposed) is not None


class StackLayout:
    """How the tensors of a reducing rule are cut: the identity for whole parameters, DTensors for shards."""

    def __init__(self, p: Tensor, dims: Dims, name: str = "parameter", transposed: bool = False):
        """Read the cut of a parameter, for which `sums_on_shards` is true.

        Args:
            p: the parameter.
            dims: of the whole parameter as a stack of matrices.
            name: for error messages.
            transposed: whether the matrices are stored columns x rows.
        """
        self.cut = cut_of(p, name)
        self.param, self.dims = p, dims
        self.axes: tuple[str, ...] = ()
        self.local_dims = dims
        self._bounds = dict(zip("bmn", ((0, k) for k in dims), strict=True))
        """This rank's part of each axis."""
        if self.cut is not None:
            self.axes = axes_of(p, self.cut, dims, transposed) or ()
            box = self.cut.box(p.shape, self.cut.rank)
            for d in self.cut.dims:
                axis, bounds = self.axes[d], box[self.cut._dim(d)]
                if axis == "b":
                    unit = p.numel() // p.shape[self.cut._dim(d)]
                    bounds = bounds[0] * unit // (dims[1] * dims[2]), bounds[1] * unit // (dims[1] * dims[2])
                self._bounds[axis] = bounds
            b, m, n = (end - first for first, end in self._bounds.values())
            self.local_dims = b, m, n

    @property
    def stackable(self) -> bool:
        """Whether parameters of one shape may share a stack."""
        return "b" not in self.axes

    def allocate(self, form: Form) -> Tensor:
        """A slot's tensor at its start value, cut like the parameter where its letters are.

        Returns:
            A DTensor where the slot is cut, else a plain tensor that is equal on all ranks.
        """
        cut, whole, part = rest_of(self.cut, self.axes, form.slot, len(form.shape)), form.shape, local(self.param)
        if cut is None:
            return allocate(form, part, whole)
        box = cut.box(whole, cut.rank)
        return cut.shard(whole, allocate(form, part, [end - first for first, end in box]))

    def place(self, slot: Slot, value: Tensor) -> Tensor:
        """Bring a loaded slot into the placement `allocate` would give it.

        Returns:
            A DTensor where the slot is cut, else a plain tensor.
        """
        return place(value, rest_of(self.cut, self.axes, slot, value.ndim))

    def _placements(self, letters: str) -> tuple[Placement, ...]:
        return tuple(Shard(letters.index(x) + 1) if x and x in letters else Replicate() for x in self.axes)

    def wrap(self, part: Tensor, letters: str = "mn") -> Tensor:
        """A local stack as the rule sees it.

        torch.distributed does not keep the shards of a dimension with fewer elements than ranks: it would replicate
        the result, which an operation in place cannot. A single element broadcasts, which has the same end. Every rank
        gets such a stack whole.

        Returns:
            The stack itself, the whole stack, or a DTensor around this rank's part whose sums run over all ranks.
        """
        if self.cut is None or "b" in self.axes:
            return part
        sizes = {x: self.dims["bmn".index(x)] for x in self.axes if x}
        shape = [part.shape[0], *(sizes.get(x, k) for x, k in zip(letters, part.shape[1:], strict=True))]
        wrapped = _wrap(self.cut.mesh, self._placements(letters), shape, part)
        few = any(sizes[x] < max(2, self.cut.mesh.size(d)) for d, x in enumerate(self.axes) if x)
        return wrapped.full_tensor() if few else wrapped

    def part(self, whole: Tensor, letters: str) -> Tensor:
        """This rank's part of a stack that every rank has whole.

        Returns:
            A plain tensor.
        """
        if "b" in self.axes:
            first, end = self._bounds["b"]
            return whole.narrow(0, first, end - first)  # parameters cut between matrices share no stack
        for x in set(self.axes) & set(letters):
            first, end = self._bounds[x]
            whole = whole.narrow(letters.index(x) + 1, first, end - first)
        return whole

    def unwrap(self, value: Tensor, letters: str = "mn") -> Tensor:
        """The local part of what a rule returned.

        Returns:
            A plain tensor.
        """
        if not isinstance(value, DTensor):
            return value if "b" in self.axes else self.part(value, letters)
        placements = self._placements(letters)
        return (value if value.placements == placements else value.redistribute(None, placements)).to_local()


def place(value: Tensor, cut: Cut | None) -> Tensor:
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
    part = value.to_local() if isinstance(value, DTensor) else within(value, cut.box(value.shape, cut.rank))
    return cut.shard(value.shape, part.clone(memory_format=torch.contiguous_format))


def place_like(value: Tensor, p: Tensor) -> Tensor:
    """Bring a loaded tensor of a parameter's shape into the parameter's placement.

    Returns:
        A DTensor for a DTensor, else a plain tensor.
    """
    placed = place(value, cut_of(p))
    return placed if isinstance(placed, DTensor) else wrapped_like(placed, p)


def wrapped_like(part: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor of a parameter's shape, in the parameter's placement.

    Returns:
        A DTensor for a DTensor, else the part itself.
    """
    return _wrap(p.device_mesh, p.placements, p.shape, part) if isinstance(p, DTensor) else part


def ranks_of(params: Iterable[Tensor]) -> tuple[int, ...]:
    """All ranks of the meshes on which parameters lie.

    Returns:
        Sorted global ranks; none for plain tensors.
    """
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    return tuple(sorted({r for mesh in meshes for r in mesh.mesh.flatten().tolist()}))


def parts_of_whole(p: Tensor) -> int:
    """Over how many ranks the elements of a parameter are spread.

    Returns:
        1 for a tensor that is whole on this rank.
    """
    cut = cut_of(p)
    return 1 if cut is None else cut.size


def agree_max(values: Sequence[float], params: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> list[float]:
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
    return not isinstance(p, DTensor) and replicas() > 1


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
    return agree_max(seconds, params, group)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors that are whole on every rank by their mean over all ranks, in place.

    Args:
        tensors: of the same shapes on every rank.
    """
    sum_(tensors)
    for t in tensors:
        t /= replicas()


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


def replicas(group: dist.ProcessGroup | None = None) -> int:
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
    if replicas(group) > 1:
        for t in tensors:
            dist.all_reduce(t, group=group)
