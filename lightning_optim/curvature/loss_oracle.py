"""The loss of the coming step's batches, its gradient and its Gauss-Newton matrix, for rules that search."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.curvature.labels import LOSSES_WITH_LABELS, Labels
from lightning_optim.curvature.measurement import BatchMeasure, LossMeasurement, explain_checkpointing, gradients
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.hessian import GaussNewton, Method
from lightning_optim.diagnostics.undisturbed import frozen


class BatchLossOracle:
    """The loss of the coming step's batches, for rules that search.

    It implements `lightning_optim.core.step.line_search.LossOracle`: the mean over micro-batches and ranks, without
    dropout; no `.grad` is touched.

    Args:
        measurement: the model, the loss and how it is measured.
        batches: micro-batches.
    """

    def __init__(self, measurement: LossMeasurement, batches: Sequence[RecordedBatch]) -> None:
        self.measurement, self.batches = measurement, batches
        self._matrices: dict[int, tuple[GaussNewton, Labels]] = {}

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss at the present weights, and its gradients.

        Args:
            params: parameters of the optimizer.

        Returns:
            (loss, one tensor per parameter, float32 or wider).
        """
        self._matrices = {}  # their graphs hold other weights

        def measure(batch: RecordedBatch, i: int) -> tuple[list[Tensor], float]:
            scale = self.measurement.loss_scale()
            with frozen(self.measurement.model, twice=False):
                with Labels() as labels:
                    loss = self.measurement.loss(batch)
                values = gradients(loss * scale, params, ())
            return [loss.detach(), *(x / scale for x in values)], self.measurement.batch_weight(batch, labels)

        like = torch.zeros((), dtype=torch.float64, device=params[0].device)
        value, *means = self._mean(measure, [like, *params])
        return float(value), means

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """The Gauss-Newton matrix of the loss at the present weights times a vector.

        Args:
            params: parameters of the optimizer.
            v: one tensor per parameter.

        Returns:
            One tensor per parameter, float32 or wider.

        Raises:
            ValueError: a loss whose predictions the estimator cannot observe.
            RuntimeError: a kernel stands in the way; the message says what to change.
        """

        def measure(batch: RecordedBatch, i: int) -> tuple[list[Tensor], float]:
            def multiply(method: Method) -> tuple[list[Tensor], Labels]:
                matrix = self._matrices[i][0] if i in self._matrices else None
                if matrix is None or matrix.method != method:
                    self._matrices[i] = self._matrix(params, batch, v, method)
                matrix, labels = self._matrices[i]
                return matrix.product(v), labels

            with frozen(self.measurement.model):
                values, labels = self.measurement.second_order(multiply)
            if not labels.inputs:
                raise ValueError(
                    f"the loss calls none of torch's {LOSSES_WITH_LABELS}, so the Gauss-Newton matrix cannot be told "
                    "from the Hessian; use one of these (no fused loss kernel), or lbfgs, which needs the loss only"
                )
            return values, self.measurement.batch_weight(batch, labels)

        return self._mean(measure, params)

    def _matrix(
        self, params: Sequence[Tensor], batch: RecordedBatch, v: Sequence[Tensor], method: Method
    ) -> tuple[GaussNewton, Labels]:
        """The Gauss-Newton matrix of one micro-batch, and the labels of its loss."""
        labels = Labels()

        def predict() -> tuple[Tensor, list[Tensor]]:
            labels.clear()
            with labels:
                loss = self.measurement.loss(batch)
            labels.keep_used(loss)
            return loss, labels.inputs

        predict()  # tells which predictions are used; passes of a difference have no graph
        matrix = GaussNewton(predict, params, method)
        if method == "exact" and labels.inputs and self.measurement.must_check(labels, params):
            self.measurement.check(matrix.pushed(v), GaussNewton(predict, params, "difference").pushed(v))
            matrix = GaussNewton(predict, params)  # the difference has written to what the graph holds
        return matrix, labels

    def _mean(self, measure: BatchMeasure, like: Sequence[Tensor]) -> list[Tensor]:
        started = time.perf_counter()
        try:
            with explain_checkpointing():
                return self.measurement.mean(measure, like, self.batches)[0]
        finally:
            self.measurement.seconds += time.perf_counter() - started
