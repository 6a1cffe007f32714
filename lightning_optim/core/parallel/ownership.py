"""Which rank of a team owns a matrix: it keeps the matrix's state and steps it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.core.matrix_views import bucket
from lightning_optim.core.parallel.exchange import Team


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Balance matrices over ranks: the costliest first, each to the rank with the least work.

    Args:
        costs: of each matrix.
        loads: work each rank already has; increased.

    Returns:
        Rank of each matrix; equal on every rank that calls it with equal arguments.
    """
    owners = [0] * len(costs)
    queue = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(queue)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[i] = queue[0]
        heapq.heapreplace(queue, (load + costs[i], owners[i]))
    for load, rank in queue:
        loads[rank] = load
    return owners


class Owners:
    """The owner of each parameter whose matrices are stepped by one rank, as its place in the team."""

    def __init__(self) -> None:
        # no weak references: `Module.to` could not swap a DTensor that has one
        self._owner: dict[Tensor, int] = {}
        self._loads: dict[Any, list[float]] = {}

    def __contains__(self, p: Tensor) -> bool:
        return p in self._owner

    def __getitem__(self, p: Tensor) -> int:
        return self._owner[p]

    def owns(self, p: Tensor, team: Team) -> bool:
        """Whether this rank owns a parameter.

        Args:
            p: the parameter.
            team: its ranks.

        Returns:
            False if another rank does, or none yet.
        """
        return self._owner.get(p) == team.rank

    def assign(self, params: Sequence[tuple[Tensor, Team, float]], known: Iterable[Tensor]) -> None:
        """Give every parameter that has no owner one; work is balanced over all of them together.

        Args:
            params: parameters, their teams and the costs of their steps.
            known: all parameters of the optimizer; owners of others are forgotten.
        """
        new = [x for x in params if x[0] not in self._owner]
        if not new:
            return
        ids = {id(p) for p in known}
        self._owner = {p: owner for p, owner in self._owner.items() if id(p) in ids}
        for run in bucket(new, lambda x: x[1].ranks):
            loads = self._loads.setdefault(run[0][1].ranks, [0.0] * run[0][1].size)
            for (p, _, _), owner in zip(run, assign_owners([cost for *_, cost in run], loads), strict=True):
                self._owner[p] = owner
