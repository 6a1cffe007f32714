"""Asks refresh policies, once per step: which parameters' costly state is due."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives
from lightning_optim.core.step.work import Job, Refresh, Work, refresh_cost, staleness
from lightning_optim.refresh import RECORD, Clock, View, parse, phases


class Refreshes:
    """What the policies of one optimizer share: who spreads refreshes with whom, and the time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._pools: dict[str, tuple[float, ...]] = {}
        """By policy, the cost of every parameter."""

    def spread(self, jobs: Sequence[Job], group: Any) -> None:
        """Rank the parameters with costly state among those of the same policy, and agree on the time.

        Args:
            jobs: of this step.
            group: process group of replicas that must agree on measured times, if any.

        Raises:
            RuntimeError: times would be needed that replicas do not share.
        """
        pools: defaultdict[str, list[float]] = defaultdict(list)
        costly = [job for job in jobs if job.rule.preconditioners]
        for job in costly:
            costs: dict[tuple[Any, ...], float] = {}
            pool = pools[job.group["refresh"]]
            for w in job.works:
                kind = w.parts, w.param.ndim < 2
                if kind not in costs:
                    costs[kind] = refresh_cost(job.rule, w.parts, vector=kind[1])
                w.cost, w.rank = costs[kind], len(pool)
                pool.append(w.cost)
        self._pools = {text: tuple(costs) for text, costs in pools.items()}
        self.clock.tick()
        if any(parse(text).timed for text in pools):
            params = [w.param for job in costly for w in job.works]
            agreed = collectives.agree_times([self.clock.elapsed, self.clock.rate], params, group)
            self.clock.elapsed, self.clock.rate = agreed

    def decide(
        self,
        job: Job,
        works: Sequence[Work],
        gradient: Callable[[Work], Tensor],
        told: Callable[[Refresh], None] | None,
    ) -> None:
        """Ask the policy of a group which of some works are due.

        Args:
            job: rule and settings.
            works: whole on this rank.
            gradient: gives theirs.
            told: is called with each refresh.
        """
        if not job.rule.preconditioners:
            return
        policy, pool = parse(job.group["refresh"]), self._pools[job.group["refresh"]]
        asked = [w for w in works if w.cost]
        later = [w for w in asked if w.t > 1]
        for w in asked:
            w.due = "first"
            w.note = functools.partial(self._note, told) if told is not None or policy.timed else None
        if not later:
            return
        blank = [[0.0] * len(RECORD)] * len(later)
        records = torch.stack([torch.cat(w.records).amin(0) for w in later]).tolist() if policy.reads else blank
        views = [
            View(w.t, w.cost, functools.partial(_phase, pool, w.rank), dict(zip(RECORD, r, strict=True)))
            for w, r in zip(later, records, strict=True)
        ]
        home = {id(view): w for view, w in zip(views, later, strict=True)}
        known: dict[int, float] = {}

        def measure(some: Sequence[View]) -> list[float]:
            new = [view for view in some if id(view) not in known]
            if new:
                found = torch.stack([staleness(job, home[id(v)], gradient(home[id(v)])) for v in new]).tolist()
                for view, x in zip(new, found, strict=True):
                    home[id(view)].stale = known[id(view)] = x
            return [known[id(view)] for view in some]

        reasons = policy.decide(views, measure, self.clock)
        for w, view, reason in zip(later, views, reasons, strict=True):
            w.due = reason
            if policy.reads:
                kept = [view.record[k] for k in RECORD[2:]]
                for record in w.records:
                    record[:, 2:] = torch.tensor(kept, dtype=record.dtype, device=record.device)

    def _note(self, told: Callable[[Refresh], None] | None, w: Work, event: Refresh) -> None:
        self.clock.spent(w.cost, event.seconds)
        if told is not None:
            told(event)


def _phase(costs: tuple[float, ...], rank: int, interval: int) -> int:
    return phases(costs, interval)[rank]
