"""The loss that is measured and the loss that is trained: in the first step they are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives
from lightning_optim.core.step.line_search import LossOracle
from lightning_optim.curvature.labels import Labels
from lightning_optim.curvature.measurement import LossMeasurement
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.undisturbed import undisturbed


class LossComparison:
    """Compares, over the micro-batches and ranks of one step, what is measured with what the trainer reports.

    The loss is measured as it is trained, dropout included, from the same random numbers, before the trainer computes
    it: its buffers and counters have the values that the trainer finds.

    Args:
        measurement: the loss that is measured, and how.
    """

    def __init__(self, measurement: LossMeasurement) -> None:
        self.measurement = measurement
        self._dtypes = {p.dtype for p in measurement.model.parameters() if p.is_floating_point()}
        self.clear()

    def clear(self) -> None:
        """Forget the batches of a step that is not taken."""
        self._measured: list[float] = []
        self._reported: list[float] = []
        self._weights: list[float] = []

    def measure(self, batch: RecordedBatch) -> None:
        """Measure the loss of a batch that is about to be trained on.

        Args:
            batch: the batch.
        """
        with undisturbed(self.measurement.model), Labels() as labels:
            self._measured.append(float(self.measurement.loss(batch).detach()))
            self._weights.append(self.measurement.batch_weight(batch, labels))
        self._reported.append(math.nan)
        self._dtypes |= labels.dtypes

    def report(self, losses: Sequence[float]) -> None:
        """Note what the trainer reports of the batch that was measured last.

        Args:
            losses: one for every backward pass of the batch so far. The measured loss may be one of them or their sum;
                the nearest is taken.
        """
        self._reported[-1] = min((*losses, sum(losses)), key=lambda x: abs(x - self._measured[-1]))

    def compare(self) -> None:
        """Compare what is known.

        Raises:
            ValueError: the losses differ.
        """
        pairs = list(zip(self._weights, self._measured, self._reported, strict=True))
        sums = [sum(w for w, _, _ in pairs), sum(w * x for w, x, _ in pairs), sum(w * x for w, _, x in pairs)]
        total = torch.tensor(sums, dtype=torch.float64, device=next(self.measurement.model.parameters()).device)
        collectives.sum_([total], self.measurement.group)
        self.clear()
        weight, measured, trained = total.tolist()
        if weight:
            validate_losses(measured / weight, trained / weight, self._dtypes)


def validate_losses(measured: float, trained: float, dtypes: set[torch.dtype]) -> None:
    """Check that the loss that is measured is the one that is trained.

    Args:
        measured: the estimator's loss.
        trained: the trainer's loss of the same batches; not a number if it is not known.
        dtypes: the dtypes of the weights and of the computation; the narrowest sets the tolerance.

    Raises:
        ValueError: they differ.
    """
    tolerance = max([torch.finfo(dtype).eps for dtype in dtypes], default=1e-7) ** 0.5
    is_close = math.isclose(measured, trained, rel_tol=tolerance, abs_tol=tolerance * 1e-3)
    if not is_close and not math.isnan(measured) and not math.isnan(trained):
        raise ValueError(
            f"the loss that is measured is not the loss that is trained: in the first step it is {measured:.6g}, and "
            f"the trainer's is {trained:.6g}; nothing was updated. Leave CurvatureCallback(loss=...) out, or give it "
            "the trainer's own. If none is given, the loss of a batch is another one when it is computed again: "
            "something changes it beside weights, buffers, counters and the random numbers of torch, NumPy and Python. "
            "Use a rule that does not search then"
        )


@torch.no_grad()
def validate_search(oracle: LossOracle, params: Sequence[Tensor]) -> bool:
    """Check that a loss changes along its own gradient, which that of a policy gradient on policy does not.

    Args:
        oracle: gives the loss.
        params: parameters of rules that search; they are restored.

    Returns:
        False if the gradient is zero, so that nothing can be told yet.

    Raises:
        ValueError: the gradient is not zero, and the loss is the same at other weights.
    """
    eps = max(torch.finfo(p.dtype).eps for p in params)
    value, gradient = oracle.gradient(params)
    slope = sum(float(g.double().square().sum()) for g in gradient)
    weight = sum(float(p.double().square().sum()) for p in params)
    if not 0 < slope < math.inf:
        return False
    rate = (eps * weight / slope) ** 0.5
    before = [p.clone() for p in params]
    try:
        for p, g in zip(params, gradient, strict=True):
            p.sub_(g.to(p.dtype), alpha=rate)
        change = oracle.gradient(params)[0] - value
    finally:
        for p, x in zip(params, before, strict=True):
            p.copy_(x)
    if rate * slope > 10 * eps * abs(value) and abs(change) < 1e-3 * rate * slope:
        raise ValueError(
            f"a search needs a loss that changes with the weights, and this one is {value:.6g} at all of them, though "
            "its gradient is not zero, as that of a policy gradient on policy is; nothing was updated. Use a rule that "
            "follows gradients, such as muon or soap, or train on each batch more than once (TRL: num_iterations=2)"
        )
    return True
