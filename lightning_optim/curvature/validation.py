"""Checks of what a curvature estimator is given: its settings, its loss and its optimizer's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.flat_parameters import is_flat
from lightning_optim.core.rule import REGISTRY


def needs_curvature(optimizer: Any) -> bool:
    """Whether an optimizer needs a curvature estimator.

    Returns:
        True for an optimizer of this package that has a rule with `curvature_input`.
    """
    return isinstance(optimizer, RuleOptimizer) and any(
        REGISTRY[g["rule"]].curvature_input for g in optimizer.param_groups
    )


def check_settings(share: float | None, method: str) -> None:
    """Check the settings of an estimator.

    Args:
        share: see `CurvatureEstimator`.
        method: see `CurvatureEstimator`.

    Raises:
        ValueError: one of them is out of range.
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if method not in ("auto", "exact", "difference"):
        raise ValueError(f"method must be 'auto', 'exact' or 'difference', got {method!r}")


def compare_losses(measured: float, trained: float, dtypes: Iterable[torch.dtype]) -> None:
    """Check that the loss that is measured is the one that is trained.

    Args:
        measured: the estimator's loss of a batch.
        trained: the trainer's loss of the same batch, in the same mode and with the same random numbers.
        dtypes: the dtypes of the weights and of the computation; the narrowest sets the tolerance.

    Raises:
        ValueError: they differ.
    """
    tolerance = max([torch.finfo(dtype).eps for dtype in dtypes], default=1e-7) ** 0.5
    if not math.isclose(measured, trained, rel_tol=tolerance, abs_tol=tolerance * 1e-3) and measured == measured:
        raise ValueError(
            f"CurvatureCallback(loss=...) is not the loss that is trained: on the first batch it is {measured:.6g}, "
            f"and the trainer's is {trained:.6g}; leave loss out, or give the trainer's own. Nothing was updated"
        )


def check_params(model: nn.Module, optimizer: RuleOptimizer) -> None:
    """Check that curvature can be measured for the parameters whose rules need it.

    Args:
        model: the module with these parameters.
        optimizer: the optimizer whose groups are checked.

    Raises:
        ValueError: a parameter is stored or sharded so that its curvature cannot be measured.
    """
    for group in optimizer.group_steps():
        if not group.rule.curvature_input:
            continue
        flat = optimizer.known_params.flat_tensors(group.group)
        for plan in (s.plan for s in group.params):
            if is_flat(plan.param) or any(plan.param is p for p in flat):
                raise ValueError(
                    f"{plan.name}: {group.rule.name} cannot be measured in the flat parameters of FSDP1 and ZeRO; "
                    f"use DDP{' or FSDP2 (fully_shard)' if group.rule.curvature_input == 'gauss_newton' else ''}"
                )
            if group.rule.curvature_input != "gauss_newton" and sharding.local(plan.param) is not plan.param:
                raise ValueError(
                    f"{plan.name}: {group.rule.name} needs a double backward pass, which FSDP2 does not support; "
                    "use DDP, or sophia_g"
                )
            if sharding.is_tensor_parallel(plan.param, model):
                raise ValueError(
                    f"{plan.name}: {group.rule.name} counts the labels of all ranks, which see the same batches under "
                    "tensor parallelism; use DDP or FSDP2 alone"
                )
