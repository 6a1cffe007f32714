"""When preconditioners are recomputed: refresh policies are asked once per step, and rules call what is due."""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives
from lightning_optim.core.rule import StateSpec
from lightning_optim.core.step.records import GroupStep, ParamStep, Refresh
from lightning_optim.core.step.stacks import quantized_views, stacked_gradient, stacked_state, with_values
from lightning_optim.ops.eigenbasis import overlap
from lightning_optim.ops.lapack import failures
from lightning_optim.refresh import RECORD, Clock, Policy, View, parse, phases


class _Pool:
    """The parameters that share a policy, over whose phases refreshes are spread."""

    def __init__(self, costs: tuple[float, ...]):
        self.costs = costs
        self.ranks: dict[int, int] = {}
        """By the identity of a parameter's plan, its place in the pool."""
        self._phases: dict[int, tuple[int, ...]] = {}
        self._next: dict[int, tuple[int, int]] = {}

    def phase(self, rank: int, interval: int) -> int:
        """The phase of a parameter, for an interval."""
        if interval not in self._phases:
            self._phases[interval] = phases(self.costs, interval)
        return self._phases[interval][rank]

    def is_due(self, policy: Policy, rank: int, t: int) -> bool:
        """Whether a periodic policy refreshes a parameter in a step; it is asked once per interval."""
        asked, due = self._next.get(rank, (0, 0))
        if not asked <= t <= due:
            due = policy.next_step(t, functools.partial(self.phase, rank))
            self._next[rank] = t, due
        return due == t


class RefreshScheduler:
    """What the refresh policies of one optimizer share: the pools of parameters, and the clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.callback: Callable[[Refresh], None] | None = None
        """Called with a `Refresh` record each time a preconditioner is recomputed."""
        self._pools: dict[str, _Pool] = {}

    def begin_step(self, groups: Sequence[GroupStep], process_group: Any) -> None:
        """Rank the parameters with preconditioners among those of the same policy, and agree on the time.

        Args:
            groups: of this step.
            process_group: of replicas that must agree on measured times, if any.

        Raises:
            RuntimeError: the policy needs times, and replicas do not share theirs.
        """
        refreshed = [group for group in groups if group.rule.preconditioners]
        if not refreshed:
            return
        members: defaultdict[str, list[ParamStep]] = defaultdict(list)
        for group in refreshed:
            members[group.group["refresh"]] += group.params
        for text, steps in members.items():
            costs, pool = tuple([s.plan.refresh_cost for s in steps]), self._pools.get(text)
            if pool is None or pool.costs != costs:
                pool = self._pools[text] = _Pool(costs)
            pool.ranks = {id(s.plan): rank for rank, s in enumerate(steps)}
        if any(parse(text).timed for text in members):
            self.clock.tick()
            params = [s.plan.param for steps in members.values() for s in steps]
            times = collectives.agree_times([self.clock.elapsed, self.clock.rate], params, process_group)
            self.clock.elapsed, self.clock.rate = times

    def decide(
        self, group: GroupStep, steps: Sequence[ParamStep], gradient: Callable[[ParamStep], Tensor] = ParamStep.gradient
    ) -> None:
        """Ask the policy of a group which of its parameters are due; `due` of their steps says why.

        Args:
            group: of the parameters.
            steps: parameters that are whole on this rank.
            gradient: gives their gradients, for policies that measure staleness.
        """
        if not group.rule.preconditioners:
            return
        policy = parse(group.group["refresh"])
        steps = [s for s in steps if s.plan.refresh_cost]
        for s in steps:
            s.due = "first"
            s.on_refresh = self._record if self.callback is not None or policy.timed else None
        later = [s for s in steps if s.t > 1]
        if later:
            self._ask(policy, group, later, gradient)

    def _ask(
        self, policy: Policy, group: GroupStep, steps: Sequence[ParamStep], gradient: Callable[[ParamStep], Tensor]
    ) -> None:
        """Ask a policy about parameters that have preconditioners already."""
        pool = self._pools[group.group["refresh"]]
        if policy.is_periodic:
            for s in steps:
                s.due = "interval" if pool.is_due(policy, pool.ranks[id(s.plan)], s.t) else ""
            return
        records = [[0.0] * len(RECORD)] * len(steps)
        if policy.reads:
            records = torch.stack([torch.cat(s.refresh_records()).amin(0) for s in steps]).tolist()
        views = [
            View(s.t, s.plan.refresh_cost, functools.partial(pool.phase, pool.ranks[id(s.plan)]), dict(zip(RECORD, r)))  # noqa: B905
            for s, r in zip(steps, records, strict=True)
        ]
        step_of = {id(view): s for view, s in zip(views, steps, strict=True)}
        measured: dict[int, float] = {}

        def measure(some: Sequence[View]) -> list[float]:
            new = [view for view in some if id(view) not in measured]
            if new:
                values = [staleness(group, step_of[id(v)], gradient(step_of[id(v)])) for v in new]
                for view, x in zip(new, torch.stack(values).tolist(), strict=True):
                    step_of[id(view)].staleness = measured[id(view)] = x
            return [measured[id(view)] for view in some]

        reasons = policy.decide(views, measure, self.clock)
        for s, view, reason in zip(steps, views, reasons, strict=True):
            s.due = reason
            if policy.reads:
                numbers = [view.record[k] for k in RECORD[2:]]
                for record in s.refresh_records():
                    record[:, 2:] = torch.tensor(numbers, dtype=record.dtype, device=record.device)

    def _record(self, step: ParamStep, event: Refresh) -> None:
        self.clock.spent(step.plan.refresh_cost, event.seconds)
        if self.callback is not None:
            self.callback(event)


def refresh_if_due(group: GroupStep, chunk: Sequence[ParamStep], s: SimpleNamespace, g: Tensor) -> None:
    """Recompute the preconditioners of a stack if they are due, and report it: `s.refresh(g)` of a rule.

    Args:
        group: of the parameters.
        chunk: the parameters of the stack.
        s: the state that the rule sees.
        g: gradients `[b, m, n]`.
    """
    first = chunk[0]
    if not first.due:
        return
    names = [k for k in group.rule.preconditioners if hasattr(s, k)]
    compares = first.t > 1 and (first.on_refresh is not None or parse(group.group["refresh"]).reads)
    old = {k: getattr(s, k).clone() for k in names if compares}
    started = time.perf_counter()
    group.rule.refresh_preconditioner(g, s, first.t)
    if failures.unnamed:
        failures.name([x.plan.name for x in chunk])
    seconds = (time.perf_counter() - started) / len(chunk)
    if old:
        specs = first.plan.specs
        shared = [overlap(_square_matrices(old[k], specs[k]), _square_matrices(getattr(s, k), specs[k])) for k in names]
        s.refreshed[..., 0, 1] = torch.stack(shared).amin(0)
    if first.on_refresh is not None:
        records = s.refreshed[:, 0].unflatten(0, (len(chunk), -1)).amin(1).tolist()
        for x, (age, same, *_) in zip(chunk, records, strict=True):
            same = same if old else math.nan
            first.on_refresh(x, Refresh(x.plan.name, x.t, x.due, int(age), seconds, x.staleness, same))


def _square_matrices(x: Tensor, spec: StateSpec) -> Tensor:
    """The matrices that are stored one below the other in a state tensor."""
    return x.unflatten(-2, (-1, x.shape[-1])) if spec.letters == "kk" else x


def staleness(group: GroupStep, step: ParamStep, gradient: Tensor) -> Tensor:
    """The largest staleness among the matrices of one parameter that is whole on this rank.

    Args:
        group: of the parameter.
        step: the parameter.
        gradient: its gradient.

    Returns:
        A 0-d tensor in [0, 1].
    """
    values = []
    for piece in with_values(step, quantized_views(group, step)).split(group.rule):
        if piece.plan.refresh_cost:
            _, state = stacked_state([piece], piece.plan.specs, piece.plan.dims)
            g = stacked_gradient([piece], [gradient], piece.plan.dims)
            values.append(group.rule.staleness(g, SimpleNamespace(**state), step.t).amax())
    return torch.stack(values).amax()
