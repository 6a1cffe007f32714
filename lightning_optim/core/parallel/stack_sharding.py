"""Sharding of matrix stacks `[b, m, n]` for rules that only reduce: the shards of a parameter as shards of its stack.

Such a rule gets a DTensor around each stack and each state tensor, so that its sums run over all ranks, and the
parameter stays in its placement. Where a shard boundary does not fall on an axis of the stack, the whole matrices are
exchanged instead (`parallel.exchange`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_optim.core.matrix_views import MatrixBlock, StackShape
from lightning_optim.core.parallel.sharding import Sharding, local, place, sharding_of, to_dtensor
from lightning_optim.core.rule import StateSpec
from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.state.initial_values import initial_value


def _axis(p: Tensor, d: int, dims: StackShape, transposed: bool) -> str:
    """The axis of the stack `[b, m, n]` along which sharding dimension `d` of the parameter shards; "" for none."""
    if p.ndim < 2:
        return "n"
    is_transposed = transposed and p.ndim <= 3
    rows, columns = (p.ndim - 1, p.ndim - 2) if is_transposed else (p.ndim - 2, p.ndim - 1)
    if p.ndim > 3 and dims[2] != p.shape[columns]:  # a convolution: all but the first dimension are columns
        return ("m" if dims[1] == p.shape[0] else "b") if d == 0 else ""
    if d == columns:
        return "n"
    if d == rows and (dims[1] == p.shape[d] or p.ndim > 2):
        return "m" if dims[1] == p.shape[d] else ""
    return "b" if d == 0 or d == rows else ""


def axes_of(p: Tensor, sharding: Sharding, dims: StackShape, transposed: bool) -> tuple[str, ...] | None:
    """The axis of the stack `[b, m, n]` that each mesh dimension shards.

    Args:
        p: the parameter.
        sharding: sharding of the parameter.
        dims: shape of the whole parameter as a stack of matrices.
        transposed: whether the matrices are stored columns x rows.

    Returns:
        "" for a mesh dimension that does not shard; None where sums cannot run over the shards.
    """
    if not sharding.is_plain:
        return None
    axes = tuple(
        _axis(p, sharding._dim(d), dims, transposed) if d in sharding.dims else "" for d in range(sharding.mesh.ndim)
    )
    used = [axes[d] for d in sharding.dims]
    if "" in used or len(set(used)) < len(used) or ("b" in used and len(used) > 1):
        return None
    if used == ["b"]:
        d, (_, m, n) = sharding._dim(sharding.dims[0]), dims
        unit = p.numel() // p.shape[d]
        if any(sharding.shard_slices(p.shape, r)[d][1] * unit % (m * n) for r in range(sharding.size)):
            return None  # blocks of rows that straddle shards
    return axes


def stored_sharding(sharding: Sharding | None, axes: Sequence[str], spec: StateSpec, ndim: int) -> Sharding | None:
    """The sharding of a stored state tensor of a reducing rule.

    Args:
        sharding: sharding of the parameter.
        axes: axis of the stack that each mesh dimension shards.
        spec: declaration of the state tensor.
        ndim: number of dimensions of the stored tensor.

    Returns:
        None where it is whole on every rank.
    """
    if sharding is None or spec.letters == "mn":
        return sharding
    dim_of = {x: ndim - len(spec.letters) + k for k, x in enumerate(spec.letters)} | {"b": 0}
    placements = tuple(Shard(dim_of[x]) if x in dim_of else Replicate() for x in axes)
    return None if all(isinstance(x, Replicate) for x in placements) else replace(sharding, placements=placements)


def sums_on_shards(p: Tensor, blocks: Sequence[MatrixBlock], transposed: bool) -> bool:
    """Whether a rule that only needs sums can step a parameter in its current placement.

    Args:
        p: the parameter.
        blocks: matrices of the whole parameter.
        transposed: whether its matrices are stored columns x rows.

    Returns:
        False where its matrices have to be exchanged, as for other rules.
    """
    sharding = sharding_of(p)
    if sharding is None:
        return True
    return blocks[0].rows is None and len(blocks) == 1 and axes_of(p, sharding, blocks[0].dims, transposed) is not None


class StackSharding:
    """Sharding of the stacks of a reducing rule: wraps shards as DTensors, and leaves whole parameters as they are."""

    def __init__(self, p: Tensor, dims: StackShape, name: str = "parameter", transposed: bool = False):
        """Read the sharding of a parameter for which `sums_on_shards` is true.

        Args:
            p: the parameter.
            dims: shape of the whole parameter as a stack of matrices.
            name: name of the parameter, for error messages.
            transposed: whether the matrices are stored columns x rows.
        """
        self.cut = sharding_of(p, name)
        self.param, self.dims = p, dims
        self.axes: tuple[str, ...] = ()
        self.local_dims = dims
        self._bounds = dict(zip("bmn", ((0, k) for k in dims), strict=True))
        """This rank's range of each axis."""
        if self.cut is not None:
            self.axes = axes_of(p, self.cut, dims, transposed) or ()
            bounds = self.cut.shard_slices(p.shape, self.cut.rank)
            for d in self.cut.dims:
                axis, (first, end) = self.axes[d], bounds[self.cut._dim(d)]
                if axis == "b":
                    unit = p.numel() // p.shape[self.cut._dim(d)]
                    first, end = first * unit // (dims[1] * dims[2]), end * unit // (dims[1] * dims[2])
                self._bounds[axis] = first, end
            b, m, n = (end - first for first, end in self._bounds.values())
            self.local_dims = b, m, n

    @property
    def stackable(self) -> bool:
        """Whether parameters of one shape can be batched into one stack."""
        return "b" not in self.axes

    def allocate(self, fmt: StateFormat) -> Tensor:
        """A state tensor with its start value, sharded like the parameter along the axes that both have.

        Returns:
            A DTensor where the state tensor is sharded, else a plain tensor that is equal on all ranks.
        """
        sharding = stored_sharding(self.cut, self.axes, fmt.spec, len(fmt.shape))
        weights = local(self.param)
        if sharding is None:
            return initial_value(fmt, weights, fmt.shape)
        bounds = sharding.shard_slices(fmt.shape, sharding.rank)
        return sharding.shard(fmt.shape, initial_value(fmt, weights, [end - first for first, end in bounds]))

    def place(self, spec: StateSpec, value: Tensor) -> Tensor:
        """Bring a loaded state tensor into the placement that `allocate` gives it.

        Returns:
            A DTensor where the state tensor is sharded, else a plain tensor.
        """
        return place(value, stored_sharding(self.cut, self.axes, spec, value.ndim))

    def _placements(self, letters: str) -> tuple[Placement, ...]:
        return tuple(Shard(letters.index(x) + 1) if x and x in letters else Replicate() for x in self.axes)

    def to_dtensor(self, stack: Tensor, letters: str = "mn") -> Tensor:
        """Wrap a local stack for the rule.

        torch.distributed does not keep the shards of a dimension with fewer elements than ranks: it would replicate
        the result, which an in-place operation cannot do. A single element broadcasts, with the same result. Every rank
        gets such a stack whole.

        Returns:
            The stack itself, the whole stack, or a DTensor around this rank's shard whose sums run over all ranks.
        """
        if self.cut is None or "b" in self.axes:
            return stack
        sizes = {x: self.dims["bmn".index(x)] for x in self.axes if x}
        shape = [stack.shape[0], *(sizes.get(x, k) for x, k in zip(letters, stack.shape[1:], strict=True))]
        dtensor = to_dtensor(self.cut.mesh, self._placements(letters), shape, stack)
        is_small = any(sizes[x] < max(2, self.cut.mesh.size(d)) for d, x in enumerate(self.axes) if x)
        return dtensor.full_tensor() if is_small else dtensor

    def part(self, whole: Tensor, letters: str) -> Tensor:
        """This rank's shard of a stack that every rank has whole.

        Returns:
            A plain tensor.
        """
        if "b" in self.axes:
            first, end = self._bounds["b"]
            return whole.narrow(0, first, end - first)  # parameters sharded between matrices are not batched
        for x in set(self.axes) & set(letters):
            first, end = self._bounds[x]
            whole = whole.narrow(letters.index(x) + 1, first, end - first)
        return whole

    def to_local(self, value: Tensor, letters: str = "mn") -> Tensor:
        """The local shard of a stack that a rule returned.

        Returns:
            A plain tensor.
        """
        if not isinstance(value, DTensor):
            return value if "b" in self.axes else self.part(value, letters)
        placements = self._placements(letters)
        return (value if value.placements == placements else value.redistribute(None, placements)).to_local()
