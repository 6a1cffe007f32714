"""What operators that depend on values give for tensors without values: one hit, zero, or the tensor as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def answer(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The invented result of an operator on meta tensors.

    Args:
        name: of the operator.
        args: its positional arguments.
        kwargs: the others.

    Returns:
        None for operators that need no values.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        return None
    if name == "_local_scalar_dense":
        return 0.0 if x.is_floating_point() else False if x.dtype == torch.bool else 0
    if name in ("nonzero", "argwhere"):
        return x.new_empty((1, x.ndim), dtype=torch.long)
    if name == "masked_select":
        return x.new_empty((1,))
    if name == "unique_consecutive":
        return x.flatten()[:1], x.new_empty(x.shape, dtype=torch.long), x.new_empty((1,), dtype=torch.long)
    if name == "equal":
        return True
    if name == "_to_copy" and x.is_meta:  # to the device of the inputs
        return x.clone().to(kwargs.get("dtype") or x.dtype)
    if name == "copy_" and not x.is_meta:
        return x
    if name == "_grouped_mm":  # torch 2.13's shape function takes bfloat16 only
        return x.new_empty((x.shape[0], args[1].shape[-1]))
    if name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
        return torch.ops.aten.index.Tensor(x, [one for i in args[1] for one in _indices(i)])
    return None


def _indices(index: Any) -> list[Any]:
    """A mask as indices of one element."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return [index.new_empty((1,), dtype=torch.long) for _ in range(index.ndim)]
    return [index]
