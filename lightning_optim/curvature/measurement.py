"""Passes over the loss beside training: means over micro-batches and ranks, and the method of second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.curvature.labels import Labels
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.hessian import (
    TOLERANCE,
    Method,
    NoSecondDerivativeError,
    apart,
    differences_may_help,
)

NO_SECOND_DERIVATIVE = (
    "a kernel of the model has no second derivative, or a false one (its own attention, say): give the curvature "
    "estimator method='auto' or method='difference', or load the model with attn_implementation='sdpa' or 'eager'"
)

EstimatorMethod = Literal["auto"] | Method
BatchMeasure = Callable[[RecordedBatch, int], tuple[list[Tensor], float]]
"""Of a micro-batch and its index: tensors, and the weight of the micro-batch in their mean."""
T = TypeVar("T")


class LossMeasurement:
    """What every measurement of a loss shares: the model, the loss, the ranks and the method.

    Args:
        model: the module.
        loss: the mean training loss of a batch, without side effects.
        method: the method of second derivatives; see `CurvatureEstimator`.
        weight: weight of a batch in the mean over micro-batches and ranks; the number of its labels if None.
        loss_scale: the present factor of mixed precision; None without.
        group: process group of the ranks that train together; all processes if None.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        *,
        method: EstimatorMethod,
        weight: Callable[[Any], float] | None,
        loss_scale: Callable[[], float | None],
        group: Any,
    ) -> None:
        self.model, self.group = model, group
        self._loss = loss
        self.method: EstimatorMethod = method
        self._weight, self._loss_scale = weight, loss_scale
        self.seconds = 0.0
        """Time spent on measurements so far."""
        self._is_exact = False
        """True once second derivatives have been compared with differences of first ones."""
        self._uses_differences = method == "difference"

    def loss_scale(self) -> float:
        """The factor by which mixed precision scales the loss.

        Returns:
            The factor; 1 without.
        """
        return self._loss_scale() or 1.0

    def loss(self, batch: RecordedBatch) -> Tensor:
        """The loss of a batch, always the same for the same weights.

        Args:
            batch: the batch.

        Returns:
            A scalar.
        """
        return batch.evaluate(self._loss, self.model)

    def batch_weight(self, batch: RecordedBatch, labels: Labels) -> float:
        """The weight of a batch in the mean over micro-batches and ranks.

        Args:
            batch: the batch.
            labels: the labels that its loss was given.

        Returns:
            Its weight.
        """
        return float(labels.count or 1) if self._weight is None else self._weight(batch.inputs)

    def second_order(self, measure: Callable[[Method], T]) -> T:
        """Measure what needs second derivatives, by differences of gradients where a kernel has none.

        Args:
            measure: the measurement by a method.

        Returns:
            What it returns.

        Raises:
            RuntimeError: `method="exact"`, and a kernel has no second derivative.
        """
        if self._uses_differences:
            return measure("difference")
        try:
            return measure("exact")
        except Exception as error:
            if self.method == "exact" and isinstance(error, NoSecondDerivativeError):
                raise RuntimeError(NO_SECOND_DERIVATIVE) from error
            if self.method == "exact" or not differences_may_help(error):
                raise
            is_refused = isinstance(error, NoSecondDerivativeError)
            reason = "a kernel has none, or a false one" if is_refused else str(error)
        out = measure("difference")  # raises again what has another cause
        self._uses_differences = True
        warnings.warn(
            f"the curvature estimator takes differences of gradients in place of second derivatives: {reason}",
            stacklevel=6,
        )
        return out

    def must_check(self, labels: Labels, params: Sequence[Tensor]) -> bool:
        """Whether second derivatives are to be compared with differences, which tell little in low precision.

        Args:
            labels: the labels of a loss, which know of autocast.
            params: the parameters that are measured.

        Returns:
            True until the first comparison.
        """
        has_low_precision = labels.autocast or any(p.dtype.itemsize < 4 for p in params)
        return not self._is_exact and not has_low_precision

    def check(self, exact: Sequence[Tensor], difference: Sequence[Tensor]) -> None:
        """Compare second derivatives with differences, once: a kernel may silently leave its second derivative out.

        Args:
            exact: products by second derivatives.
            difference: the same products by differences of gradients.

        Raises:
            NoSecondDerivativeError: they differ.
        """
        if apart(exact, difference) > TOLERANCE:
            raise NoSecondDerivativeError
        self._is_exact = True

    def mean(
        self, measure: BatchMeasure, params: Sequence[Tensor], batches: Sequence[RecordedBatch]
    ) -> tuple[list[Tensor], float]:
        """The mean over micro-batches and ranks, weighted by what `measure` returns beside the tensors.

        Args:
            measure: measures one micro-batch.
            params: tensors whose shapes the measured tensors have.
            batches: micro-batches of this rank.

        Returns:
            (means, float32 or wider; total weight).
        """
        is_sharded = any(sharding.local(p) is not p for p in params)
        sums = [torch.zeros_like(sharding.local(p), dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        total = torch.zeros(1, dtype=torch.float64, device=sums[0].device)
        for i, batch in enumerate(batches):
            values, count = measure(batch, i)
            n = torch.full_like(total, count)
            if is_sharded:  # their gradients are means over ranks already
                collectives.sum_([n], self.group)
            for x, value in zip(sums, values, strict=True) if n else ():  # the mean over no label is not a number
                x.add_(value, alpha=float(n))
            total += n
        if not is_sharded:
            collectives.sum_([*sums, total], self.group)
        count = float(total)
        return [x / count for x in sums], count


def gradients(loss: Tensor, params: Sequence[Tensor], module_params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss on this rank, without touching `.grad`.

    Args:
        loss: the loss.
        params: the parameters to differentiate by.
        module_params: all parameters of the module; FSDP2 writes to their `.grad`, which is put back.

    Returns:
        One tensor per parameter; zeros where the loss does not depend on it.
    """
    if any(sharding.local(p) is not p for p in params):  # FSDP2 reduces in hooks of an ordinary backward pass
        previous = [(p, p.grad) for p in module_params]
        try:
            for p, _ in previous:
                p.grad = None
            loss.backward()
            out = [sharding.local_gradient(p) for p in params]
        finally:
            for p, g in previous:
                p.grad = g
        return [torch.zeros_like(sharding.local(p)) if g is None else g for p, g in zip(params, out, strict=True)]
    out = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, out, strict=True)]


@contextmanager
def explain_checkpointing() -> Iterator[None]:
    """Say what to do about reentrant activation checkpointing, under which nothing can be measured.

    Yields:
        Nothing.

    Raises:
        RuntimeError: the model uses reentrant activation checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "the curvature estimator cannot work with reentrant activation checkpointing; give checkpoint() "
            "use_reentrant=False (Transformers: gradient_checkpointing_kwargs={'use_reentrant': False})"
        ) from error
