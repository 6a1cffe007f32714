"""The numbers of a report: crossings, means with standard errors, orders, Pareto fronts and fits, on plain lists."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torchmetrics.functional.regression import kendall_rank_corrcoef


@dataclass(frozen=True)
class MeanWithError:
    """Mean of a number over seeds, with its standard error."""

    mean: float
    error: float
    """nan with one seed."""
    count: int

    def __str__(self) -> str:
        """Mean and standard error, as a table prints them."""
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"


def mean_with_error(values: Sequence[float]) -> MeanWithError:
    """Mean and standard error.

    Args:
        values: at least one.

    Returns:
        The error is the standard deviation of the sample over the root of its size.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return MeanWithError(statistics.fmean(values), error, len(values))


def reaches(curve: Sequence[Mapping[str, float]], target: float, axis: str) -> float | None:
    """Where a loss curve first comes down to a target, by lines between the points.

    Args:
        curve: points with `loss` and the axis, in order.
        target: loss.
        axis: key of the points.

    Returns:
        The place, or None if it never does.
    """
    before: Mapping[str, float] | None = None
    for point in curve:
        if point["loss"] <= target:
            if before is None:
                return point[axis]
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


def tau(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Kendall's tau-b between two orders of the same things.

    Args:
        first: thing to number.
        second: the same things; others are left out.

    Returns:
        In [-1, 1]; nan for fewer than two.
    """
    both = [key for key in first if key in second]
    if len(both) < 2:
        return math.nan
    a, b = (torch.tensor([values[key] for key in both], dtype=torch.float64) for values in (first, second))
    return float(cast("torch.Tensor", kendall_rank_corrcoef(a, b)))


def stable_pairs(
    seeds: Mapping[str, Mapping[int, float]], held_out: int, apart: float = 2.0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs that differ on some seeds, and those of them that have the same order on another seed.

    Args:
        seeds: thing to seed to number.
        held_out: the other seed.
        apart: the least distance, in standard errors of the mean of paired differences.

    Returns:
        The pairs (lower, higher), and those of them that have the same order on the other seed.
    """
    pairs, stable = [], []
    for a, b in itertools.combinations(seeds, 2):
        shared = sorted((seeds[a].keys() & seeds[b].keys()) - {held_out})
        if len(shared) < 2 or not all(held_out in seeds[x] for x in (a, b)):
            continue
        gap = mean_with_error([seeds[a][s] - seeds[b][s] for s in shared])
        if abs(gap.mean) > apart * gap.error:
            low, high = (a, b) if gap.mean < 0 else (b, a)
            pairs.append((low, high))
            if seeds[low][held_out] < seeds[high][held_out]:
                stable.append((low, high))
    return pairs, stable


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The Pareto front: what nothing else beats in one number without being worse in the other.

    Args:
        points: thing to two numbers, the lower the better.

    Returns:
        Things, by the first number.
    """
    out, lowest = [], math.inf
    for name, (_, second) in sorted(points.items(), key=lambda item: item[1]):
        if second < lowest:
            out.append(name)
            lowest = second
    return out


def power_law(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Fit y = a x^b by least squares on logarithms.

    Args:
        points: (x, y), above zero.

    Returns:
        (a, b), or None with fewer than two different x.
    """
    if len({x for x, _ in points}) < 2:
        return None
    slope, intercept = statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return math.exp(intercept), slope
