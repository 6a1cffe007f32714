"""stack_sharding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_optim.core.matrix_views import MatrixBlock, StackShape
from lightning_optim.core.parallel.sharding import Sharding, local, place, sharding_of, wrap
from lightning_optim.core.rule import StateSpec
from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.state.initial_values import initial_value


def _axis(p: Tensor, d: int, dims: StackShape, transposed: bool) -> str:
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


def axes_of(p: Tensor, cut: Sharding, dims: StackShape, transposed: bool) -> tuple[str, ...] | None:
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
        if any(cut.shard_slices(p.shape, r)[d][1] * unit % (m * n) for r in range(cut.size)):
            return None  # blocks of rows that straddle shards
    return axes


def stored_sharding(cut: Sharding | None, axes: Sequence[str], slot: StateSpec, ndim: int) -> Sharding | None:
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


def sums_on_shards(p: Tensor, parts: Sequence[MatrixBlock], transposed: bool) -> bool:
    """Whether a rule that only needs sums can work on a parameter as it lies.

    Args:
        p: the parameter.
        parts: of the whole parameter.
        transposed: whether its matrices are stored columns x rows.

    Returns:
        False where its matrices have to travel, as those of other rules do.
    """
    cut = sharding_of(p)
    if cut is None:
        return True
    return parts[0].rows is None and len(parts) == 1 and axes_of(p, cut, parts[0].dims, transposed) is not None


class StackSharding:
    """How the tensors of a reducing rule are cut: the identity for whole parameters, DTensors for shards."""

    def __init__(self, p: Tensor, dims: StackShape, name: str = "parameter", transposed: bool = False):
        """Read the cut of a parameter, for which `sums_on_shards` is true.

        Args:
            p: the parameter.
            dims: of the whole parameter as a stack of matrices.
            name: for error messages.
            transposed: whether the matrices are stored columns x rows.
        """
        self.cut = sharding_of(p, name)
        self.param, self.dims = p, dims
        self.axes: tuple[str, ...] = ()
        self.local_dims = dims
        self._bounds = dict(zip("bmn", ((0, k) for k in dims), strict=True))
        """This rank's part of each axis."""
        if self.cut is not None:
            self.axes = axes_of(p, self.cut, dims, transposed) or ()
            box = self.cut.shard_slices(p.shape, self.cut.rank)
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

    def allocate(self, fmt: StateFormat) -> Tensor:
        """A slot's tensor at its start value, cut like the parameter where its letters are.

        Returns:
            A DTensor where the slot is cut, else a plain tensor that is equal on all ranks.
        """
        cut, whole, part = (
            stored_sharding(self.cut, self.axes, fmt.spec, len(fmt.shape)),
            fmt.shape,
            local(self.param),
        )
        if cut is None:
            return initial_value(fmt, part, whole)
        box = cut.shard_slices(whole, cut.rank)
        return cut.shard(whole, initial_value(fmt, part, [end - first for first, end in box]))

    def place(self, slot: StateSpec, value: Tensor) -> Tensor:
        """Bring a loaded slot into the placement `allocate` would give it.

        Returns:
            A DTensor where the slot is cut, else a plain tensor.
        """
        return place(value, stored_sharding(self.cut, self.axes, slot, value.ndim))

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
        wrapped = wrap(self.cut.mesh, self._placements(letters), shape, part)
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
