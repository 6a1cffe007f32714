"""Gradient noise scale: the batch size at which noise and gradient are equally large (McCandlish et al. 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def estimate(mean_square: Tensor, square_of_mean: Tensor, small: float, big: float) -> tuple[Tensor, Tensor]:
    """Unbiased |G|^2 and tr Sigma from gradients of equal micro-batches and their mean.

    |G|^2 = (B Gb - b S) / (B - b);  tr Sigma = (S - Gb) / (1/b - 1/B)

    Args:
        mean_square: S, the mean of |g_i|^2 over the micro-batches, `[...]`.
        square_of_mean: Gb, |mean g_i|^2, `[...]`.
        small: b, the size of a micro-batch.
        big: B, the size of the whole batch, larger than b.

    Returns:
        (|G|^2, which may be negative, and the trace of the covariance of one example's gradient).

    Raises:
        ValueError: a single micro-batch, which tells nothing of noise.
    """
    if not big > small > 0:
        raise ValueError(f"needs at least two micro-batches: the batch has {big}, a micro-batch {small}")
    square = (big * square_of_mean - small * mean_square) / (big - small)
    return square, (mean_square - square_of_mean) / (1 / small - 1 / big)


class NoiseScale:
    """Averages of numerator and denominator over steps, divided at the end; ratios of steps must not be averaged.

    Args:
        beta: of the exponential averages, which are corrected for their start.
        size: number of separate scales (roles).
    """

    def __init__(self, beta: float = 0.99, size: int = 1) -> None:
        self.beta, self.weight = beta, 0.0
        self.square = torch.zeros(size, dtype=torch.float64)
        self.trace = torch.zeros(size, dtype=torch.float64)

    def update(self, square: Tensor, trace: Tensor) -> None:
        """Add the estimates of one step; a negative |G|^2 belongs to the average.

        Args:
            square: |G|^2, `[size]`.
            trace: tr Sigma, `[size]`.
        """
        self.weight = self.beta * self.weight + 1 - self.beta
        self.square = self.square.lerp(square.double().cpu(), 1 - self.beta)
        self.trace = self.trace.lerp(trace.double().cpu(), 1 - self.beta)

    def scale(self) -> Tensor:
        """The noise scale tr Sigma / |G|^2.

        Returns:
            `[size]`, in the unit of the batch sizes; NaN where the average of |G|^2 is not positive.
        """
        return torch.where(self.square > 0, self.trace / self.square, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """What continues the averages.

        Returns:
            Plain values.
        """
        return {"weight": self.weight, "square": self.square.tolist(), "trace": self.trace.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue saved averages.

        Args:
            state: from `state_dict`.
        """
        self.weight = state["weight"]
        self.square = torch.tensor(state["square"], dtype=torch.float64)
        self.trace = torch.tensor(state["trace"], dtype=torch.float64)


class MicroBatches(Metric):
    """Sums over micro-batches and data-parallel ranks of one step.

    `update` takes what one micro-batch adds to the gradient, so that K times it is that micro-batch's own gradient
    however the loss was divided.
    """

    full_state_update = False
    squares: Tensor
    sums: Tensor
    calls: Tensor
    examples: Tensor
    ranks: Tensor

    def __init__(self, params: int, **kwargs: Any) -> None:
        """Make empty sums.

        Args:
            params: number of parameters.
            **kwargs: of torchmetrics' Metric.
        """
        super().__init__(**kwargs)
        self.add_state("squares", torch.zeros(params, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(params, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("calls", torch.zeros(params, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("examples", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("ranks", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, squares: Tensor, sums: Tensor, calls: Tensor, examples: Tensor) -> None:
        """Add this rank's micro-batches.

        Args:
            squares: |increment|^2, summed over the micro-batches, per parameter.
            sums: the sum of all elements of the increments, per parameter.
            calls: how many increments came, per parameter.
            examples: sequences and tokens.
        """
        self.squares += squares
        self.sums += sums
        self.calls += calls
        self.examples += examples
        self.ranks += 1

    def compute(self) -> dict[str, Tensor]:
        """Sums over ranks.

        Returns:
            `mean_square` (S per parameter), `sums` (of the mean gradient, before clipping), `count` of micro-batches
            on all ranks, and `examples`.
        """
        ranks, steps = self.ranks.squeeze(), self.calls.max()
        count = steps * ranks
        # K increments make the rank's gradient, the mean over ranks the whole one
        return {
            "mean_square": self.squares * steps.square() / count,
            "sums": self.sums / ranks,
            "count": count,
            "examples": self.examples,
        }
