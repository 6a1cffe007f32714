"""What rules with `curvature_input` are shown beside gradients: when it is due, and how it gets into their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.state import stacking
from lightning_optim.core.step.work import Job, Work, kept_slots, with_values
from lightning_optim.refresh import Clock, View, parse

Estimate = SimpleNamespace
"""What was measured of one parameter; `Rule.observe` lists the fields."""


def due(jobs: Iterable[Job]) -> dict[str, list[Tensor]]:
    """What is to be measured before the next step.

    Returns:
        Parameters by what their rules observe.
    """
    out: dict[str, list[Tensor]] = {}
    for rule, _, works in jobs:
        if rule.curvature_input == "loss" and works:
            out.setdefault(rule.curvature_input, []).extend(w.param for w in works)
        elif rule.curvature_input and works:
            t = 1 + max(int(w.state["step"]) if "step" in w.state else 0 for w in works)
            view = View(t, 1.0, lambda interval: 0, {})
            policy = parse(getattr(rule, rule.curvature_schedule))
            if policy.decide([view], lambda views: [0.0] * len(views), Clock())[0]:
                out.setdefault(rule.curvature_input, []).extend(w.param for w in works)
    return out


def chosen(jobs: Iterable[Job], seen: Mapping[Tensor, Estimate]) -> list[Job]:
    """The jobs of what was measured.

    Returns:
        Jobs with those parameters only.

    Raises:
        ValueError: a parameter whose rule observes nothing.
    """
    out = [Job(rule, group, [w for w in works if w.param in seen]) for rule, group, works in jobs]
    for rule, _, works in out:
        if works and rule.curvature_input in (None, "loss"):
            raise ValueError(f"{works[0].name}: {rule.name} observes nothing but the gradient")
    return [job for job in out if job.works]


def update_curvature(jobs: Sequence[Job], seen: Mapping[Tensor, Estimate]) -> dict[str, float]:
    """Show rules what was measured; their state is complete.

    Returns:
        Means of what they say, over all elements.
    """
    sums: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for job in jobs:
        for w in job.works:
            for key, said in _observe(job, w, seen[w.param]).items():
                sums[key] = sums.get(key, 0.0) + said.sum(dtype=torch.float64)
                sizes[key] = sizes.get(key, 0) + said.numel()
    return {key: float(total) / max(1, sizes[key]) for key, total in sums.items()}


def _observe(job: Job, w: Work, seen: Estimate) -> Mapping[str, Tensor]:
    w.t = ~int(w.state["step"])  # rounds by other random numbers than the step
    kept = kept_slots(job, w)
    values = {k: sharding.local(t) for k, t in with_values(w, kept).state.items() if k in w.forms}
    s = SimpleNamespace(**values)
    here = {k: sharding.local(x) if isinstance(x, Tensor) else x for k, x in vars(seen).items()}
    said = job.rule.update_curvature(SimpleNamespace(**here, t=-w.t), s)
    for key, value in stacking.copy_aliased(values, vars(s)).items():
        if value is not values[key]:
            values[key].copy_(value)
    for key, x in kept.items():
        x.close_all(values[key])
    return said


def require_curvature(jobs: Sequence[Job], *, fed: bool, look: bool) -> None:
    """Check that no rule waits for what nobody measures.

    Args:
        jobs: of this step.
        fed: whether there is a curvature feed.
        look: whether the loss of this step can be asked for.

    Raises:
        RuntimeError: one does; the message says what to add.
    """
    for rule, group, works in jobs:
        if (
            not rule.curvature_input
            or (look if rule.curvature_input == "loss" else fed)
            or not any(w.has_gradient for w in works)
        ):
            continue
        what = "more than gradients"
        if rule.curvature_input == "loss":
            what = "the loss of the batch at other weights"
        if fed:
            raise RuntimeError(
                f"group {group['name']!r}: {rule.name} needs {what}: call ready() of the feed before step()"
            )
        raise RuntimeError(
            f"group {group['name']!r}: {rule.name} needs {what}, and nobody measures it; nothing was "
            "updated. Add a curvature feed: Trainer(callbacks=[CurvatureFeed()]) with hf_integration.CurvatureFeed "
            "or lightning_optim.callbacks.CurvatureFeed; in your own loop, lightning_optim.curvature.Feed"
            f"{', or step(closure)' if rule.curvature_input == 'loss' else ''}"
        )
