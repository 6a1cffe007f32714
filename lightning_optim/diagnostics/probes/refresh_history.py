"""Which matrix was refreshed in which step, why, and at what cost: two pictures with a row per matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_optim.core.step.records import Refresh
from lightning_optim.diagnostics import figures
from lightning_optim.diagnostics.report import over_ranks

REASONS = ("first", "interval", "stale", "age", "budget", "several")
"""Of refreshes, as the policies say; `several` where a combined policy gives more than one."""
COLUMNS = 120
"""Most columns of a picture. The time it shows ends at the present step and is six times the longest age, or all."""

Table = NDArray[np.float64]


class RefreshHistory:
    """Refreshes by matrix and step, on all ranks."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: dict[int, tuple[Table, Table]] = {}
        """Step with a refresh to reason (index of `REASONS`) and milliseconds by matrix, NaN where there was none."""
        self.longest = 1
        self._last = 0

    def add(self, names: Sequence[str], events: Sequence[tuple[int, Refresh]], step: int, device: torch.device) -> None:
        """Add the refreshes since the last call, which is collective.

        Args:
            names: of all matrices, equal on every rank.
            events: steps and refreshes of this rank.
            step: the present one.
            device: that the process group can reach.
        """
        if list(names) != self.names:
            self.names, self.steps = list(names), {}
        start, rows = max(self._last, step - 20 * COLUMNS), {name: i for i, name in enumerate(names)}
        self._last = step
        flat = torch.zeros(3, step - start, len(names), dtype=torch.float64, device=device)
        for at, event in events:
            if start < at <= step and event.name in rows:
                reason = REASONS.index(event.reason) if event.reason in REASONS else len(REASONS) - 1
                place = at - start - 1, rows[event.name]
                for table, value in zip(flat, (1.0, reason, 1e3 * event.seconds), strict=True):
                    table[place] = value
        summed = over_ranks(flat.flatten()).cpu().view_as(flat).numpy()
        count = np.where(summed[0] > 0, summed[0], math.nan)
        for i in np.flatnonzero((summed[0] > 0).any(1)):
            self.steps[start + 1 + int(i)] = (np.rint(summed[1, i] / count[i]), summed[2, i] / count[i])
        self.longest = max(self.longest, *(event.age for _, event in events), 1)
        self.steps = {at: row for at, row in self.steps.items() if at > step - 20 * COLUMNS}

    def pictures(self) -> dict[str, figures.Picture]:
        """The pictures of the present time.

        Returns:
            `refresh/raster`, colored by reason, and `refresh/cost`, by milliseconds; empty without a refresh.
        """
        if not self.steps:
            return {}
        start = max(0, self._last - max(COLUMNS // 2, 6 * self.longest))
        width = max(1, math.ceil((self._last - start) / COLUMNS))
        shape = len(self.names), math.ceil((self._last - start) / width)
        reasons, cost = np.full(shape, math.nan), np.full(shape, math.nan)
        for at, (reason, ms) in sorted(self.steps.items()):
            if at > start:
                column, there = (at - start - 1) // width, np.isfinite(reason)
                reasons[there, column] = reason[there]
                cost[there, column] = np.nan_to_num(cost[there, column]) + ms[there]
        columns = [str(start + 1 + width * i) for i in range(shape[1])]
        across = "optimizer step" if width == 1 else f"optimizer step, {width} per column"
        rows = figures.short(self.names)
        raster = figures.heat_map(
            reasons,
            "refreshes: when and why",
            rows=rows,
            columns=columns,
            across=across,
            unit="",
            categories=REASONS,
            missing=figures.PAPER,
        )
        costs = figures.heat_map(
            np.log10(np.maximum(cost, 1e-3)),
            "refreshes: when and at what cost (ms)",
            rows=rows,
            columns=columns,
            across=across,
            unit="log10 of ms",
            missing=figures.PAPER,
        )
        return {"refresh/raster": raster, "refresh/cost": costs}
