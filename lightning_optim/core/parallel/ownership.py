"""ownership."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Spread matrices over ranks: largest first, each to the rank with the least work.

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
