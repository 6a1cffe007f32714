"""Rules that work on all their gradients at once, before the step of each parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.state import stacking
from lightning_optim.core.step import work
from lightning_optim.core.step.work import Job, Work, kept_slots, stacked_gradient, stacked_state, with_values


def precondition_jointly(
    jobs: Sequence[Job], bias_of: Mapping[Tensor, Tensor], decide: Callable[[Job, Sequence[Work]], None]
) -> None:
    """Let rules with `joint` replace the gradients of all their parameters.

    Args:
        jobs: of this step.
        bias_of: the bias of a layer by its weight.
        decide: asks the refresh policy of a job.
    """
    for kind in dict.fromkeys(
        type(job.rule) for job in jobs if job.rule.needs_all_gradients and job.rule.curvature_input != "loss"
    ):
        mine = [(job, [w for w in job.works if w.has_gradient]) for job in jobs if type(job.rule) is kind]
        for job, works in mine:
            decide(job, works)
        found = [(w, _member(job, w)) for job, works in mine for w in works]
        by_param = {w.param: x for w, (x, _) in found}
        for w, (x, _) in found:
            bias = bias_of.get(w.param)
            x.has_bias, x.bias = bias is not None, None if bias is None else by_param.get(bias)
        if found:
            mine[0][0].rule.precondition_jointly([x for _, (x, _) in found])
        for w, (x, store) in found:
            store()
            g = w.gradient()
            w.prepared = matrix_views.transpose_if(
                x.g.reshape(matrix_views.transpose_if(g, w.transposed).shape), w.transposed
            )
            w.scale = 1.0


def _member(job: Job, w: Work) -> tuple[SimpleNamespace, Callable[[], None]]:
    """What a rule sees of a parameter, and what stores the state it leaves."""
    slots, kept = w.slots(job.rule), kept_slots(job, w)
    full = with_values(w, kept)
    entries, before = stacked_state([full], slots, w.dims)
    s = SimpleNamespace(**before)
    s.vector = w.param.ndim < 2
    s.refresh = functools.partial(work._refresh, job, [w], s)
    x = SimpleNamespace(
        g=stacked_gradient([w], [w.gradient()], w.dims),
        s=s,
        rule=job.rule,
        lr=job.rule.lr,
        t=w.t,
        bias=None,
        has_bias=False,
    )

    def store() -> None:
        for key, value in stacking.copy_aliased(before, {k: getattr(s, k) for k in slots}).items():
            stacking.store_stack(entries[key], value)
        for key, slot in kept.items():
            slot.close_all(full.state[key])

    return x, store
