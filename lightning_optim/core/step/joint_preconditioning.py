"""Rules that precondition all their gradients at once, before the step of each parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

from torch import Tensor

from lightning_optim.core.matrix_views import transpose_if
from lightning_optim.core.step.apply import Transaction
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler, refresh_if_due
from lightning_optim.core.step.stacks import (
    copy_aliased,
    quantized_views,
    stacked_gradient,
    stacked_state,
    store_stack,
    with_values,
)


def precondition_jointly(
    groups: Sequence[GroupStep],
    bias_of: Mapping[Tensor, Tensor],
    refreshes: RefreshScheduler,
    transaction: Transaction,
) -> None:
    """Let rules with `needs_all_gradients` replace the gradients of all their parameters.

    Args:
        groups: of this step, with the parameters that have a gradient.
        bias_of: the bias of a layer by its weight.
        refreshes: decides which preconditioners are due.
        transaction: keeps the parameters of a rule that fails as they were.
    """
    groups_together = [
        g for g in groups if g.rule.needs_all_gradients and g.rule.curvature_input != "loss" and g.params
    ]
    for kind in dict.fromkeys(type(group.rule) for group in groups_together):
        mine = [group for group in groups_together if type(group.rule) is kind]
        work = functools.partial(_precondition, mine, bias_of, refreshes)
        transaction.run(work, [s for group in mine for s in group.params])


def _precondition(mine: Sequence[GroupStep], bias_of: Mapping[Tensor, Tensor], refreshes: RefreshScheduler) -> None:
    """Let one rule replace the gradients of its parameters, and store the state it leaves."""
    for group in mine:
        refreshes.decide(group, group.params)
    members = [(s, *_member(group, s)) for group in mine for s in group.params]
    member_of = {s.plan.param: x for s, x, _ in members}
    for s, x, _ in members:
        bias = bias_of.get(s.plan.param)
        x.has_bias, x.bias = bias is not None, None if bias is None else member_of.get(bias)
    mine[0].rule.precondition_jointly([x for _, x, _ in members])
    for s, x, store in members:
        store()
        shape = transpose_if(s.gradient(), s.plan.transposed).shape
        s.grad, s.clip = transpose_if(x.g.reshape(shape), s.plan.transposed), 1.0


def _member(group: GroupStep, step: ParamStep) -> tuple[SimpleNamespace, Callable[[], None]]:
    """What a rule sees of a parameter, and what stores the state it leaves."""
    specs, views, dims = step.plan.specs, quantized_views(group, step), step.plan.dims
    loaded = with_values(step, views)
    entries, before = stacked_state([loaded], specs, dims)
    s = SimpleNamespace(**before)
    s.vector = step.plan.is_vector
    s.refresh = functools.partial(refresh_if_due, group, [step], s)
    x = SimpleNamespace(
        g=stacked_gradient([step], [step.gradient()], dims),
        s=s,
        rule=group.rule,
        lr=group.rule.lr,
        t=step.t,
        bias=None,
        has_bias=False,
    )

    def store() -> None:
        for key, value in copy_aliased(before, {k: getattr(s, k) for k in specs}).items():
            store_stack(entries[key], value)
        for key, view in views.items():
            view.store_all(loaded.state[key])

    return x, store
