"""The report of one measurement, exchanges between ranks, and the budget of measuring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass
class Report:
    """One measurement, by tag."""

    scalars: dict[str, float] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    """Pictures, `[height, width, 3]`, uint8."""
    texts: dict[str, str] = field(default_factory=dict)
    """Markdown."""
    arrays: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the pictures, for figures to be remade."""

    def save_arrays(self, folder: Path, name: str, step: int) -> Path | None:
        """Write the arrays, compressed.

        Args:
            folder: of the run's log; `diagnostics/` is made in it.
            name: of the probe.
            step: of the measurement.

        Returns:
            The file, or None if there are none.
        """
        if not self.arrays:
            return None
        path = folder / "diagnostics" / f"{name}-{step:07d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {
            k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in self.arrays.items()
        }
        np.savez_compressed(path, **cast("Any", plain))
        return path

    def under(self, prefix: str) -> Report:
        """The same report with other tags; the arrays keep their names within their file.

        Args:
            prefix: of every tag.

        Returns:
            A report.
        """
        named = Report(arrays=self.arrays)
        named.scalars = {f"{prefix}{tag}": x for tag, x in self.scalars.items()}
        named.images = {f"{prefix}{tag}": x for tag, x in self.images.items()}
        named.texts = {f"{prefix}{tag}": x for tag, x in self.texts.items()}
        return named

    def finite(self) -> dict[str, float]:
        """Scalars without those that could not be measured: they are absent, never zero.

        Returns:
            Tag to number.
        """
        return {k: v for k, v in self.scalars.items() if not math.isnan(v)}


class RankSum(Metric):
    """A vector summed over all ranks."""

    full_state_update = False
    total: Tensor

    def __init__(self, size: int, **kwargs: Any) -> None:
        """Start at zero.

        Args:
            size: length of the vector.
            **kwargs: of torchmetrics' Metric.
        """
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add this rank's vector."""
        self.total += values

    def compute(self) -> Tensor:
        """The sum.

        Returns:
            `[size]`.
        """
        return self.total


_checks: list[Callable[[], None]] = []


@contextmanager
def checked(check: Callable[[], None]) -> Iterator[None]:
    """Precede every exchange between ranks in the block by a check, which is itself an exchange and may raise.

    Args:
        check: called on every rank before each exchange.

    Yields:
        Nothing.
    """
    _checks.append(check)
    try:
        yield
    finally:
        _checks.remove(check)


def before_exchange() -> None:
    """Run the check of the enclosing block, if there is one. It is called before every exchange between ranks."""
    for check in _checks[-1:]:
        check()


def over_ranks(values: Tensor) -> Tensor:
    """Sum a vector over all ranks; the vector itself without a process group.

    Args:
        values: `[n]`, on a device that the process group can reach.

    Returns:
        `[n]`, float64, equal on every rank.
    """
    before_exchange()
    return summed(values)


def summed(values: Tensor) -> Tensor:
    """`over_ranks` without a check.

    Args:
        values: `[n]`.

    Returns:
        `[n]`, float64.
    """
    metric = RankSum(values.numel()).to(values.device)
    metric.update(values.double())
    return metric.compute().reshape(values.shape)  # torchmetrics makes a scalar of a single number


@dataclass
class OverheadBudget:
    """How often to measure: every so many steps, less often if measuring takes too large a share of training.

    After a measurement whose cost, averaged with those before, exceeds `limit` of the training time since the last
    one, the interval doubles.

    Args:
        every: steps between measurements.
        limit: largest share of training time.
    """

    every: int
    limit: float
    share: float = 0.0
    """Of all training time so far."""
    recent: float = math.nan
    """Running mean over measurements, at the present interval."""
    judged: float = math.nan
    """The same, at the interval before the last measurement."""
    spent: float = 0.0
    trained: float = 0.0
    _since: float = 0.0
    _count: int = 0

    def due(self, step: int) -> bool:
        """Whether a step, counted from 1, is measured.

        Returns:
            True every `every` steps.
        """
        return step % self.every == 0

    def add_training_time(self, seconds: float) -> None:
        """Add time spent on training."""
        self.trained += seconds
        self._since += seconds

    def add_measurement(self, seconds: float) -> None:
        """Add a measurement, and double the interval if it is too costly. The first one of a run does not count.

        Args:
            seconds: its duration, equal on every rank.
        """
        self.spent += seconds
        self.share = self.spent / max(self.trained, 1e-9)
        self._count += 1
        if self._count > 1:
            now = seconds / max(self._since, 1e-9)
            self.recent = now if math.isnan(self.recent) else 0.5 * self.recent + 0.5 * now
            self.judged = self.recent
            if self.recent > self.limit:
                self.every *= 2
                self.recent /= 2
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run continues.

        Returns:
            Plain numbers.
        """
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: from `state_dict`.
        """
        for key, value in state.items():
            setattr(self, key, value)
        self._count = 0
