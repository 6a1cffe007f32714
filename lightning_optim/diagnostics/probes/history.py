"""Measurements over time, for pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

HISTORY_LIMIT = 120
"""Largest number of measurements in a picture. Beyond it every second one is dropped."""


class ColumnHistory:
    """Columns of a heat map over time."""

    def __init__(self, limit: int = HISTORY_LIMIT) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.columns: list[list[float]] = []

    def add(self, step: int, column: Sequence[float]) -> None:
        """Add a column. A column of another height clears the history.

        Args:
            step: optimizer step of the column.
            column: numbers.
        """
        if self.columns and len(column) != len(self.columns[0]):
            self.steps, self.columns = [], []
        self.steps.append(step)
        self.columns.append(list(column))
        if len(self.steps) > self.limit:
            self.steps, self.columns = self.steps[::2], self.columns[::2]

    def table(self) -> list[list[float]]:
        """The columns side by side.

        Returns:
            Rows.
        """
        return [list(row) for row in zip(*self.columns, strict=True)]


class CurveHistory:
    """Curves over time, one per role."""

    def __init__(self, limit: int = HISTORY_LIMIT) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve.

        Args:
            step: optimizer step of the points.
            values: by role.
        """
        self.steps.append(step)
        self.values.append(dict(values))
        if len(self.steps) > self.limit:
            self.steps, self.values = self.steps[::2], self.values[::2]

    def table(self) -> tuple[list[int], dict[str, list[float]]]:
        """The curves.

        Returns:
            (steps, values by role, NaN where a role had none).
        """
        roles = dict.fromkeys(role for values in self.values for role in values)
        return self.steps, {role: [values.get(role, math.nan) for values in self.values] for role in roles}
