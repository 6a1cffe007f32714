"""What belongs to one step: the parameters that take part, with their plans, state and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.core.options import OPTIONS, has_constraint
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.param_groups import rule_of
from lightning_optim.core.rule import Rule, hyperparameters, lookup
from lightning_optim.core.state.formats import STEP_DTYPE
from lightning_optim.core.state.quantized_view import QuantizedView
from lightning_optim.core.step.plan import GroupPlan, ParamPlan, plan_param, state_key


@dataclass(eq=False)
class ParamStep:
    """One parameter in one step."""

    plan: ParamPlan
    state: dict[str, Tensor]
    grad: Tensor | None
    """The part of the gradient on this rank; what a joint rule or a line search has put in its place."""
    t: int = field(default=0, init=False)
    """Number of this step for the parameter, from 1."""
    clip: float = field(default=1.0, init=False)
    """Factor of the gradient, by `clip_norm`."""
    due: str = field(default="", init=False)
    """Why preconditioners are refreshed in this step; empty where they are not."""
    staleness: float = field(default=math.nan, init=False)
    """Measured in this step, if the refresh policy measures it."""
    views: Mapping[str, QuantizedView] = field(default_factory=dict, init=False)
    """What the rule saw of state that is stored in another form, by key."""
    on_refresh: Callable[[ParamStep, Refresh], None] | None = field(default=None, init=False)
    """Called with a `Refresh` record each time a preconditioner is recomputed."""

    def local(self) -> Tensor:
        """The part of the parameter on this rank.

        Returns:
            The parameter itself, or the shard of a DTensor (shared memory).
        """
        return sharding.local(self.plan.param) if self.plan.is_sharded else self.plan.param

    def local_state(self, key: str) -> Tensor:
        """The part of a state tensor on this rank.

        Returns:
            The state tensor itself, or the shard of a DTensor (shared memory).
        """
        return sharding.local(self.state[key]) if self.plan.is_sharded else self.state[key]

    def gradient(self) -> Tensor:
        """The clipped gradient on this rank.

        Returns:
            The gradient itself if it is not clipped, zeros if there is none.
        """
        if self.grad is None:
            return torch.zeros_like(self.local())
        return self.grad if self.clip == 1 else self.grad * self.clip

    def refresh_records(self) -> list[Tensor]:
        """What the refresh policy keeps of each size of matrix.

        Returns:
            `[matrices, numbers]` per size.
        """
        keys = [key for key in self.plan.specs if key.partition(".")[0] == "refreshed"]
        return [self.local_state(key).flatten(0, -2) for key in keys]

    def split(self, rule: Rule) -> list[ParamStep]:
        """One step per size of matrix.

        Args:
            rule: of the group.

        Returns:
            This step, where all matrices have one size.
        """
        if not self.plan.block_plans:
            return [self]
        out = []
        for i, plan in enumerate(self.plan.block_plans):
            state = {key: self.state[state_key(key, spec, i)] for key, spec in plan.specs.items()}
            step = ParamStep(plan, state, self.grad)
            step.t, step.clip, step.staleness, step.on_refresh = self.t, self.clip, self.staleness, self.on_refresh
            step.due = self.due if plan.refresh_cost else ""
            out.append(step)
        return out


class Refresh(NamedTuple):
    """One refresh of the preconditioners of one parameter."""

    name: str
    t: int
    reason: str
    age: int
    """Steps since the refresh before."""
    seconds: float
    """Its share of the time its stack took."""
    staleness: float
    """Just before, if the policy measured it; else NaN."""
    overlap: float
    """With the preconditioners before: 1 for no change, 0 for chance; NaN for the first."""


class GroupStep(NamedTuple):
    """One param group in one step."""

    rule: Rule
    group: dict[str, Any]
    params: list[ParamStep]
    plan: GroupPlan
    is_complete: bool
    """Every parameter has all of its state, in its shape and format."""

    def only(self, params: list[ParamStep]) -> GroupStep:
        """Some parameters of the group.

        Args:
            params: of this group.

        Returns:
            The same group with these.
        """
        return self._replace(params=params)


class PlanCache:
    """The plans of an optimizer's groups and parameters."""

    def __init__(self) -> None:
        self._groups: list[GroupPlan] = []
        self._ids: dict[Hashable, int] = {}
        self.replicas: Replicas | None = None
        """Replicas that share the work on whole matrices."""
        self.compressing: Replicas | None = None
        """Replicas that reduce less than the gradients of some rules."""

    def clear(self) -> None:
        """Forget all plans, since state was replaced."""
        self._groups.clear()

    def collect(
        self, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Tensor]], *, frozen: bool = False
    ) -> list[GroupStep]:
        """Begin a step: every group with its rule and its trainable parameters.

        Args:
            groups: of the optimizer.
            states: of the optimizer.
            frozen: take parameters that are not trained as well, and no gradients.

        Returns:
            One entry per group.

        Raises:
            ValueError: a group lacks a setting, or the rows of a parameter do not divide into the group's blocks.
            RuntimeError: a gradient does not have its parameter's shape.
        """
        out, index = [], 0
        for i, group in enumerate(groups):
            plan, params = self._plan_group(i, group, index), group["params"]
            plans, steps, complete = plan.params, [], True
            for k, p in enumerate(params):
                grad = p.grad
                of = plans[k]
                if not (frozen or p.requires_grad or is_trained(p)):
                    if of is not None and of.param is not p:
                        plans[k] = None  # a plan keeps its parameter alive
                    continue
                if (
                    of is None
                    or of.param is not p
                    or p.shape != of.shape
                    or p.dtype is not of.dtype
                    or p.device != of.device
                    or p.__class__ is not of.kind
                    or (of.is_sharded and sharding.placement_of(p) != of.placement)
                ):
                    of = plans[k] = self._plan_param(plan, group, k, index + k)
                    if of is None:
                        continue
                if frozen:
                    grad = None
                elif grad is not None and (of.is_sharded or grad.shape != of.shape):
                    grad = _local_gradient(of)
                step = ParamStep(of, states.get(p) or {}, grad)
                state, stored = step.state, of.stored
                if stored is not None:
                    for key, shape, dtype in stored:
                        t = state.get(key)
                        if t is None or t.shape != shape or t.dtype is not dtype:
                            stored = of.stored = None
                            break
                complete = complete and stored is not None
                steps.append(step)
            out.append(GroupStep(plan.rule, group, steps, plan, complete))
            index += max(len(params), len(group.get("param_names", ())))  # one flat tensor may be there for many
        del self._groups[len(groups) :]
        return out

    def _plan_group(self, i: int, group: dict[str, Any], index: int) -> GroupPlan:
        """The plan of a group; the present one, if its settings are the same."""
        plan = self._groups[i] if i < len(self._groups) else None
        kind = plan.settings[0] if plan is not None and plan.rule.name == group["rule"] else lookup(group["rule"])
        try:
            values, options = (read(group) for read in _readers(kind))
        except KeyError:
            rule_of(group)  # raises, with the name of what is missing
            raise
        values = tuple([float(v) if isinstance(v, Tensor) else v for v in values])
        names = group.get("name"), group.get("param_names")
        settings = (kind, index, len(group["params"]), options, names, self.replicas)
        settings += (self.compressing if kind.compresses or kind.votes else None,)
        if plan is not None and plan.settings == settings and plan.values[2:] == values[2:]:
            if plan.values != values:
                plan.rule, plan.values = kind(**dict(zip(_names(kind), values, strict=True))), values
            return plan
        rule = rule_of(group)
        constraint, skips = has_constraint(group), kind.skips_update is not Rule.skips_update
        kernel = kind.kernel is not Rule.kernel and not group["cautious_decay"] and not constraint
        keys = list(rule.state_specs(1, 1)) if kernel else []
        params: list[ParamPlan | None] = [None] * len(group["params"])
        plan = GroupPlan(rule, values, settings, params, constraint, skips, kernel, keys, self._ids)
        self._groups[i : i + 1] = [plan]
        return plan

    def _plan_param(self, plan: GroupPlan, group: dict[str, Any], k: int, index: int) -> ParamPlan | None:
        """The plan of a parameter; None for one without a shape or without elements."""
        p, names = group["params"][k], group.get("param_names", ())
        if is_lazy(p) or not p.numel():
            return None
        name = f"{group['name']}: {names[k] if k < len(names) else f'parameter {k}'}"
        replicas = self.compressing if plan.rule.compresses or plan.rule.votes else None
        return plan_param(plan, group, p, name, index, self.replicas, replicas)


def _local_gradient(plan: ParamPlan) -> Tensor | None:
    """The part of a gradient on this rank, which must have the shape of the parameter."""
    g = sharding.local_gradient(plan.param)
    if g is not None and g.shape != (sharding.local(plan.param).shape if plan.is_sharded else plan.shape):
        raise RuntimeError(
            f"{plan.name} has shape {tuple(plan.shape)}, its gradient {tuple(g.shape)}: it was resized after the "
            "backward pass; nothing was updated. Call zero_grad() and take the gradient again"
        )
    return g


def is_trained(p: Tensor) -> bool:
    """Whether a tensor takes part in steps.

    Returns:
        True if it requires a gradient, or is no Parameter (a copy, say) and was given one.
    """
    return p.requires_grad or (p.grad is not None and not isinstance(p, torch.nn.Parameter))


@functools.cache
def _names(kind: type[Rule]) -> tuple[str, ...]:
    """Hyperparameters of a rule, the ones that schedules change first."""
    return tuple(sorted(hyperparameters(kind), key=lambda k: ("lr", "weight_decay", k).index(k)))


@functools.cache
def _readers(kind: type[Rule]) -> tuple[Callable[[Mapping[str, Any]], tuple[Any, ...]], ...]:
    """Read the hyperparameters of a rule, and the options, from a group."""
    return itemgetter(*_names(kind)), itemgetter(*OPTIONS)


def number_steps(steps: Sequence[ParamStep]) -> None:
    """Number the coming step of each parameter; it is counted when it has been taken.

    Counters are on the CPU: Lightning moves all loaded state to the device, where reading it would wait.

    Args:
        steps: parameters with complete state.
    """
    for s in steps:
        counter = s.state["step"]
        if not counter.is_cpu:
            counter = s.state["step"] = counter.cpu()
        s.t = int(counter.item()) + 1


ONE = torch.ones((), dtype=STEP_DTYPE, device="cpu")


def count_steps(steps: Sequence[ParamStep]) -> None:
    """Count one step of each parameter.

    Args:
        steps: parameters that have taken one.
    """
    if counters := [s.state["step"] for s in steps]:
        cast("Any", torch)._foreach_add_(counters, ONE, alpha=1.0)  # a number is four times slower


def state_of(step: ParamStep) -> list[Tensor]:
    """The state tensors of a parameter on this rank that its rule writes.

    Args:
        step: the parameter.

    Returns:
        All but the count of steps, which is written at the end of a step.
    """
    return [step.local_state(key) for key in step.state if key != "step"]


class Backup:
    """Copies of tensors, to be written back without any allocation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs = [(t, t.clone()) for t in tensors]

    def restore(self) -> None:
        """Write the copies back."""
        for t, copy in self._pairs:
            t.copy_(copy)
