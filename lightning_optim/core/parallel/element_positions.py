"""Global indices of the elements of this rank's part of a parameter: stochastic rounding and blocks of scales use
them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_optim.core.parallel.sharding import local, local_bounds, placement_of, sharding_of


def first_element(p: Tensor) -> int | None:
    """Global index of the first element of this rank's part, where the part is one contiguous run of elements.

    Returns:
        The index in row-major order, or None where the part is not such a run (`element_index` then).
    """
    if not local(p).is_contiguous():
        return None
    if not placement_of(p) is not None:
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
    cut = sharding_of(p, name)
    if cut is not None and not cut.is_by_rows:
        raise ValueError(
            f"{name}: state in 8 bits is cut by rows (dimension 0), the parameter is {cut.placements}; "
            "choose state_storage='bf16' or 'fp32' for it"
        )
    return _first(p)


def _first(p: Tensor) -> int:
    return local_bounds(p)[0][0] * math.prod(p.shape[1:]) if p.ndim else 0


def element_index(p: Tensor) -> Tensor:
    """Global row-major index of every element of this rank's part.

    Returns:
        int32 (wrapped around), shaped like the local part.
    """
    part = local(p)
    index = torch.zeros(part.shape, dtype=torch.int64, device=part.device)
    for d, (start, _) in enumerate(local_bounds(p)):
        steps = torch.arange(start, start + part.shape[d], device=part.device) * math.prod(p.shape[d + 1 :])
        index += steps.view([-1 if k == d else 1 for k in range(p.ndim)])
    return index.to(torch.int32)
