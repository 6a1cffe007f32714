"""Assignment of matrices to the ranks of their team: the owner of a matrix has its state and computes its update."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.core.matrix_views import bucket
from lightning_optim.core.parallel.exchange import Team


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Balance matrices over ranks, in order of falling cost, each to the rank with the least load.

    Args:
        costs: cost of a step of each matrix.
        loads: load that each rank already has; increased in place.

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
    """The owner of each parameter whose matrices are stepped by one rank, as its index in the team."""

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
            team: the ranks that share the parameter.

        Returns:
            False if another rank does, or if no owner has been assigned.
        """
        return self._owner.get(p) == team.rank

    def assign(self, params: Sequence[tuple[Tensor, Team, float]], all_params: Iterable[Tensor]) -> None:
        """Assign an owner to every parameter without one, balancing the load over all of them together.

        Args:
            params: parameters, their teams and the costs of their steps.
            all_params: all parameters of the optimizer; owners of others are dropped.
        """
        new = [x for x in params if x[0] not in self._owner]
        if not new:
            return
        ids = {id(p) for p in all_params}
        self._owner = {p: owner for p, owner in self._owner.items() if id(p) in ids}
        for same_team in bucket(new, lambda x: x[1].ranks):
            loads = self._loads.setdefault(same_team[0][1].ranks, [0.0] * same_team[0][1].size)
            owners = assign_owners([cost for *_, cost in same_team], loads)
            for (p, _, _), owner in zip(same_team, owners, strict=True):
                self._owner[p] = owner

    def give(self, p: Tensor, team: Team, owner: int, cost: float) -> None:
        """Assign an owner that is known.

        Args:
            p: the parameter.
            team: the ranks that share it.
            owner: index in the team.
            cost: of its step.
        """
        loads = self._loads.setdefault(team.ranks, [0.0] * team.size)
        if p in self._owner:
            loads[self._owner[p]] -= cost
        loads[owner] += cost
        self._owner[p] = owner
