"""The step of rules that evaluate the loss at other weights (`GlobalStepRule`): all their parameters are one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.rule import GlobalStepRule, StateSpec
from lightning_optim.core.state import formats
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import copy_aliased, quantized_views, with_values


class LossOracle(Protocol):
    """Source of the loss and its derivatives."""

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss at the current values of parameters, and its gradients.

        Args:
            params: parameters of the optimizer.

        Returns:
            (loss, one tensor per parameter), the same on every rank.
        """
        ...

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """The Gauss-Newton matrix at the current values of parameters times a vector.

        Args:
            params: parameters of the optimizer.
            v: one tensor per parameter.

        Returns:
            One tensor per parameter, the same on every rank.
        """
        ...


class ClosureOracle:
    """The loss by the closure of the user's training loop, which sets the gradients.

    Args:
        closure: argument of `step`, which has been called once already.
        value: the loss that this call returned.
        name: name of the rule, for messages.
    """

    def __init__(self, closure: Callable[[], Any], value: Any, name: str) -> None:
        if value is None:
            raise ValueError(
                f"{name} needs the loss of the batch at other weights, and the closure of this step returns none; "
                "nothing was updated. Return it, or add a curvature estimator: under Lightning's manual optimization "
                "Trainer(callbacks=[CurvatureCallback(loss=...)])"
            )
        if collectives.world_size() > 1:
            raise RuntimeError(
                f"{name}: each process's closure computes the loss of its own batch only; nothing was updated. Add "
                "a curvature estimator, which averages it"
            )
        self.closure, self.name, self.first = closure, name, _number(value)
        self.is_first = True

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """See `LossOracle`."""
        if self.is_first:
            value, self.is_first = self.first, False
        else:
            with torch.enable_grad():
                value = _number(self.closure())
        return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """See `LossOracle`.

        Raises:
            RuntimeError: a closure gives no such products.
        """
        raise RuntimeError(
            f"{self.name} needs products with the Gauss-Newton matrix, which a closure cannot give; nothing was "
            "updated. Add a curvature estimator: in your own loop, lightning_optim.curvature.CurvatureEstimator"
        )


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


class FlatObjective:
    """The loss as a function of one vector (`core.rule.Objective`); changes the weights and restores them bitwise."""

    def __init__(self, steps: Sequence[ParamStep], decays: Sequence[float], oracle: LossOracle) -> None:
        self.params, self.oracle = [s.plan.param for s in steps], oracle
        self.dtype = formats.compute_dtype_of(self.params[0].dtype)
        self.start = [p.detach().clone() for p in self.params]
        self.x = self.vector(self.start)
        sizes = torch.tensor([p.numel() for p in self.params], device=self.x.device)
        self.decay = torch.tensor(decays, dtype=self.dtype, device=self.x.device).repeat_interleave(sizes)
        self.is_moved = False
        self.value, self.gradient = self._evaluate(self.x)

    @torch.no_grad()
    def at(self, x: Tensor) -> tuple[float, Tensor]:
        """See `Objective`."""
        if torch.equal(x, self.x):
            return self.value, self.gradient.clone()
        self.is_moved = True
        for p, values in zip(self.params, self.parts(x), strict=True):
            p.copy_(values)
        return self._evaluate(x)

    def product(self, v: Tensor) -> Tensor:
        """See `Objective`."""
        self.restore()
        return self.vector(self.oracle.product(self.params, self.parts(v))) + self.decay * v

    def restore(self) -> None:
        """Restore the weights if they were changed; writing them without need would invalidate autograd graphs."""
        for p, start in zip(self.params, self.start, strict=True) if self.is_moved else ():
            p.copy_(start)
        self.is_moved = False

    def vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate tensors that are shaped like the parameters."""
        return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])

    def parts(self, x: Tensor) -> list[Tensor]:
        """Split a vector into tensors that are shaped like the parameters."""
        flat = x.split([p.numel() for p in self.params])
        return [values.view(p.shape) for p, values in zip(self.params, flat, strict=True)]

    def _evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradients = self.oracle.gradient(self.params)
        penalty = 0.5 * float((self.decay * x).dot(x))
        return value + penalty, self.vector(gradients).addcmul_(self.decay, x)


def search(groups: Sequence[GroupStep], oracle: LossOracle) -> None:
    """Replace the gradients of every `GlobalStepRule` by the direction it computes.

    State is stored once all such rules have a direction. A closure leaves the gradients of its last call, as with
    torch.optim.LBFGS; a curvature estimator leaves them unchanged.

    Args:
        groups: groups of this step.
        oracle: source of the loss.

    Raises:
        ValueError: groups of one such rule whose settings differ.
        FloatingPointError: the direction is not finite; weights and state are as before.
    """
    stores: list[Callable[[], None]] = []
    for cls in dict.fromkeys(type(group.rule) for group in groups if isinstance(group.rule, GlobalStepRule)):
        steps = [(group, s) for group in groups if type(group.rule) is cls for s in group.params if s.grad is not None]
        if steps:
            stores.append(_search([group for group, _ in steps], [s for _, s in steps], oracle))
    for store in stores:
        store()
    for group in groups:
        for s in group.params if not isinstance(group.rule, GlobalStepRule) else ():
            if s.grad is not None:
                grad = sharding.local_gradient(s.plan.param)
                s.grad = torch.zeros_like(s.local()) if grad is None else grad


def _search(groups: Sequence[GroupStep], steps: Sequence[ParamStep], oracle: LossOracle) -> Callable[[], None]:
    """Compute a direction; returns a function that stores it and the new state."""
    rules = [cast("GlobalStepRule", group.rule) for group in groups]
    for group in groups:
        if replace(cast("Any", group.rule), weight_decay=0.0) != replace(cast("Any", rules[0]), weight_decay=0.0):
            raise ValueError(
                f"group {group.group['name']!r}: {group.rule.name} takes one step of all its parameters, so its groups "
                "may differ in weight_decay only; leave out lr_factor and the like, or give parameters to another rule"
            )
    if len({s.plan.param.device for s in steps}) > 1:
        raise ValueError(f"{rules[0].name}: all parameters must be on one device, as they are one vector")
    views = [quantized_views(group, s) for group, s in zip(groups, steps, strict=True)]
    loaded = [with_values(s, s_views) for s, s_views in zip(steps, views, strict=True)]
    ages, specs = [int(s.state["step"]) for s in steps], steps[0].plan.specs
    oldest = ages.index(max(ages))  # a parameter that was added later has less history
    at: FlatObjective | None = None
    before: dict[str, Tensor] = {}
    after: Mapping[str, Tensor] = {}
    try:
        if rules[0].lr:
            at = FlatObjective(steps, [rule.weight_decay for rule in rules], oracle)
            for key, spec in specs.items():
                tensors = [s.state[key] for s in loaded]
                row = tensors[oldest].reshape(-1)[: spec.shape(1, 1)[1]].clone()
                before[key] = at.vector(tensors) if spec.letters == "mn" else row
            s = SimpleNamespace(**before)
            d = rules[0].direction(at, s)
            if not bool(d.isfinite().all()):
                raise FloatingPointError(
                    f"{rules[0].name}: no finite step was found; nothing was updated. A lower lr may help"
                )
            directions = at.parts(d)
            after = copy_aliased(before, {k: getattr(s, k) for k in before})
        else:
            directions = [torch.zeros_like(s.plan.param) for s in steps]
    finally:
        if at is not None:
            at.restore()

    def store() -> None:
        if at is not None:
            _store(loaded, at, specs, after)
        for s, d, s_views, values in zip(steps, directions, views, loaded, strict=True):
            s.grad, s.clip = d, 1.0
            for key, view in s_views.items():
                view.store_all(values.state[key])

    return store


def _store(
    steps: Sequence[ParamStep], at: FlatObjective, specs: Mapping[str, StateSpec], after: Mapping[str, Tensor]
) -> None:
    """Store vectors over all parameters, and rows that belong to all of them."""
    for key, value in after.items():
        values = at.parts(value) if specs[key].letters == "mn" else [value] * len(steps)
        for s, new in zip(steps, values, strict=True):
            stored = s.state[key]
            stored.copy_(new if new.shape == stored.shape else new.expand(stored.shape))
