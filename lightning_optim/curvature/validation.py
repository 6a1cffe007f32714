"""Checks of what a curvature estimator is given: its settings, its loss and its optimizer's parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.flat_parameters import is_flat
from lightning_optim.core.rule import REGISTRY


def inputs_of(optimizer: Any) -> set[str]:
    """What the rules of an optimizer need beside gradients.

    Args:
        optimizer: any optimizer.

    Returns:
        The `curvature_input` of its rules that have one; nothing for optimizers of other packages.
    """
    groups = optimizer.param_groups if isinstance(optimizer, RuleOptimizer) else ()
    return {kind for g in groups if (kind := REGISTRY[g["rule"]].curvature_input)}


def needs_curvature(optimizer: Any) -> bool:
    """Whether an optimizer needs a curvature estimator.

    Args:
        optimizer: any optimizer.

    Returns:
        True for an optimizer of this package that has a rule with `curvature_input`.
    """
    return bool(inputs_of(optimizer))


def searches(optimizer: Any) -> bool:
    """Whether an optimizer has a rule that searches by the loss.

    Args:
        optimizer: any optimizer.

    Returns:
        True if one of its groups has such a rule.
    """
    return "loss" in inputs_of(optimizer)


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
