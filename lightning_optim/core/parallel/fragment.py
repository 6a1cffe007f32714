"""A tensor of which this rank holds one run of elements in a flat tensor, as engines like DeepSpeed ZeRO leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten
_BY_ELEMENT = {
    getattr(_aten, name).default
    for name in ("clone", "detach", "_to_copy", "empty_like", "zeros_like", "ones_like", "full_like")
}
"""Functions that take the run for the whole and give a fragment."""


class Fragment(Tensor):
    """A tensor with the shape of a whole one, of which this rank holds the elements `[start, stop)` in row-major order.

    It requires a gradient while the engine has put its flat tensor into a group, and its gradient is that tensor's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    flat: Tensor
    """Holds the run, and those of other parameters."""
    offset: int
    """Where the run begins in it."""
    sharding: Any
    """Which run is on which rank, a `FlatSharding`."""
    start: int
    stop: int

    @staticmethod
    def __new__(cls, shape: Sequence[int], flat: Tensor, offset: int, sharding: Any) -> Fragment:
        """Make a fragment that shares memory with a flat tensor."""
        out = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=flat.dtype, device=flat.device)
        out.flat, out.offset, out.sharding = flat, offset, sharding
        ((out.start, out.stop),) = sharding.shard_slices(shape, sharding.rank)
        return out

    @property
    def part(self) -> Tensor:
        """The run on this rank, one-dimensional."""
        return self.flat.detach()[self.offset : self.offset + self.stop - self.start]

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The gradient of the run, one-dimensional; None where none is required, though offloading keeps an old one."""
        grad = self.flat.grad if self.requires_grad else None
        return None if grad is None else grad[self.offset : self.offset + self.stop - self.start]

    def like(self, run: Tensor) -> Fragment:
        """A fragment in the same place.

        Args:
            run: its elements, one-dimensional.

        Returns:
            A fragment around them.
        """
        return Fragment(self.shape, run, 0, self.sharding)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Fragment({tuple(self.shape)}, elements {self.start} to {self.stop})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Compute on the run what is done element by element.

        Returns:
            A fragment around the result.

        Raises:
            NotImplementedError: anything else, which would need the elements of other ranks.
        """
        if func not in _BY_ELEMENT:
            raise NotImplementedError(f"{func} on a fragment, of which other ranks have the rest")
        first, *more = args
        return first.like(func(first.part, *more, **kwargs or {}))
