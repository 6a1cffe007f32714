"""Curvature estimates for rules that need more than gradients: when they are due, and how they update the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import copy_aliased, quantized_views, share_scales, with_values
from lightning_optim.refresh import Clock, View, parse


class Estimator(Protocol):
    """Source of what rules need beside gradients."""

    def estimate(self) -> dict[str, float]:
        """Measure what is due and has not been measured, and hand it to the optimizer."""
        ...


Estimate = SimpleNamespace
"""Curvature estimate of one parameter; `Rule.update_curvature` lists the fields."""


def estimate_first(
    estimator: Callable[[], Estimator | None], closure: Callable[[], Any] | None
) -> Callable[[], Any] | None:
    """Have an estimator measure what is due once the gradients of a step are there.

    Args:
        estimator: returns the optimizer's; the first training step, which a closure runs, may attach it.
        closure: of the step.

    Returns:
        A closure that measures after every call what is still due; None without a closure, after measuring at once.
    """
    if closure is None:
        _estimate(estimator())
        return None

    def measured_closure() -> Any:
        loss = closure()
        _estimate(estimator())
        return loss

    return measured_closure


@torch.no_grad()
def _estimate(estimator: Estimator | None) -> None:
    if estimator is not None:
        estimator.estimate()


def pending(groups: Iterable[GroupStep]) -> dict[str, list[Tensor]]:
    """The parameters whose curvature must be estimated before the next step.

    Args:
        groups: groups of the step.

    Returns:
        Parameters by the `curvature_input` of their rules.
    """
    out: dict[str, list[Tensor]] = {}
    for group in groups:
        rule, steps = group.rule, group.params
        if not rule.curvature_input or not steps:
            continue
        if rule.curvature_input != "loss":
            t = 1 + max(int(s.state["step"]) if "step" in s.state else 0 for s in steps)
            view = View(t, 1.0, lambda interval: 0, {})
            policy = parse(getattr(rule, rule.curvature_schedule))
            if not policy.decide([view], lambda views: [0.0] * len(views), Clock())[0]:
                continue
        out.setdefault(rule.curvature_input, []).extend(s.plan.param for s in steps)
    return out


def measured(groups: Iterable[GroupStep], estimates: Mapping[Tensor, Estimate]) -> list[GroupStep]:
    """Restrict groups to the parameters with an estimate.

    Args:
        groups: groups of the step.
        estimates: estimates by parameter.

    Returns:
        Groups with those parameters only.

    Raises:
        ValueError: a parameter whose rule needs no curvature.
    """
    out = [group.only([s for s in group.params if s.plan.param in estimates]) for group in groups]
    for group in out:
        if group.params and group.rule.curvature_input in (None, "loss"):
            raise ValueError(f"{group.params[0].plan.name}: {group.rule.name} uses no curvature estimate")
    return [group for group in out if group.params]


def update_curvature(groups: Sequence[GroupStep], estimates: Mapping[Tensor, Estimate]) -> dict[str, float]:
    """Update the state of rules by their estimates.

    Args:
        groups: groups with the parameters that have an estimate, whose state is allocated.
        estimates: estimates by parameter.

    Returns:
        The rules' metrics, averaged over all elements.
    """
    sums: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for group in groups:
        for s in group.params:
            for key, metric in _update(group, s, estimates[s.plan.param]).items():
                sums[key] = sums.get(key, 0.0) + metric.sum(dtype=torch.float64)
                sizes[key] = sizes.get(key, 0) + metric.numel()
        share_scales(group.params)
    return {key: float(total) / max(1, sizes[key]) for key, total in sums.items()}


def _update(group: GroupStep, step: ParamStep, estimate: Estimate) -> Mapping[str, Tensor]:
    """Update the state of one parameter by its estimate; returns the rule's metrics."""
    step.t = ~int(step.state["step"])  # draws other random numbers for rounding than the step itself
    views = quantized_views(group, step)
    loaded = with_values(step, views)
    values = {k: loaded.local_state(k) for k in step.plan.formats}
    s = SimpleNamespace(**values)
    local_estimate = {k: sharding.local(x) if isinstance(x, Tensor) else x for k, x in vars(estimate).items()}
    metrics = group.rule.update_curvature(SimpleNamespace(**local_estimate, t=-step.t), s)
    for key, value in copy_aliased(values, {k: getattr(s, k) for k in values}).items():
        if value is not values[key]:
            values[key].copy_(value)
    for key, view in views.items():
        view.store_all(values[key])
    return metrics


def require_curvature(groups: Sequence[GroupStep], has_curvature: bool, *, has_oracle: bool) -> None:
    """Check that rules with `curvature_input` get it.

    Args:
        groups: groups of this step.
        has_curvature: whether a curvature estimator is attached.
        has_oracle: whether the loss can be evaluated at other weights in this step.

    Raises:
        RuntimeError: a rule needs curvature or the loss, and nothing provides it; the message names the remedy.
    """
    for group in groups:
        rule = group.rule
        available = has_oracle if rule.curvature_input == "loss" else has_curvature
        if not rule.curvature_input or available or not any(s.grad is not None for s in group.params):
            continue
        needs_loss = rule.curvature_input == "loss"
        need = "the loss of the batch at other weights" if needs_loss else "more than gradients"
        if has_curvature:
            raise RuntimeError(
                f"group {group.group['name']!r}: {rule.name} needs {need}: call estimate() of the curvature estimator "
                "before step()"
            )
        raise RuntimeError(
            f"group {group.group['name']!r}: {rule.name} needs {need}, but no curvature estimator is attached; "
            "nothing was updated. Add one: Trainer(callbacks=[CurvatureCallback()]) with "
            "hf_integration.CurvatureCallback or lightning_optim.callbacks.CurvatureCallback; in your own loop, "
            f"lightning_optim.curvature.CurvatureEstimator{', or step(closure)' if needs_loss else ''}"
        )
