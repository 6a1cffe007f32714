"""The loss that is measured is compared with the loss that the trainer reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim.curvature.comparison import LossComparison, validate_losses, validate_search
from lightning_optim.curvature.loss_oracle import BatchLossOracle
from lightning_optim.curvature.measurement import LossMeasurement
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.undisturbed import RandomState


def test_losses_are_compared_in_the_precision_of_the_narrowest_dtype() -> None:
    narrow, wide = {torch.float32, torch.bfloat16}, {torch.float32}
    validate_losses(2.0, 2.0 * (1 + 1e-4), wide)
    validate_losses(2.0, 2.05, narrow)
    for measured, trained, dtypes in ((2.0, 2.05, wide), (2.0, 2.5, narrow), (0.0, 1e-3, wide)):
        with pytest.raises(ValueError, match=f"is not the loss that is trained: .*{measured:.6g}.*{trained:.6g}"):
            validate_losses(measured, trained, dtypes)
    validate_losses(math.nan, 2.0, wide)  # nothing can be told; the step is refused for what is not finite
    validate_losses(2.0, math.nan, wide)


class Noisy(nn.Module):
    """A loss with dropout and noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 2), nn.Dropout(0.5)

    def loss(self, x: Tensor) -> Tensor:
        return (self.dropout(self.layer(x)) + torch.randn(len(x), 2)).square().mean()


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_loss_is_measured_with_the_random_numbers_and_the_dropout_of_training(factor: float) -> None:
    torch.manual_seed(0)
    model = Noisy()
    settings: Any = dict(method="auto", weight=len, loss_scale=lambda: None, group=None)
    comparison = LossComparison(LossMeasurement(model, lambda x: factor * model.loss(x), **settings))
    for rows in (5, 2):
        batch = torch.randn(rows, 3)
        comparison.measure(RecordedBatch(batch, RandomState(model)))
        comparison.report([float(model.loss(batch).detach())])
    if factor == 1:
        comparison.compare()
        comparison.compare()  # there is nothing more to compare
    else:
        with pytest.raises(ValueError, match="is not the loss that is trained"):
            comparison.compare()


def test_of_several_backward_passes_one_or_their_sum_is_compared() -> None:
    model = nn.Linear(2, 1)
    settings: Any = dict(method="auto", weight=lambda batch: 1.0, loss_scale=lambda: None, group=None)
    comparison = LossComparison(LossMeasurement(model, lambda x: F.mse_loss(x, torch.zeros(1)), **settings))
    for losses in ([4.0], [7.0, 4.0], [1.0, 3.0]):
        comparison.measure(RecordedBatch(torch.full((1,), 2.0), RandomState(model)))
        comparison.report(losses)
        comparison.compare()
    comparison.measure(RecordedBatch(torch.full((1,), 2.0), RandomState(model)))
    comparison.report([1.0, 2.0])
    with pytest.raises(ValueError, match="it is 4, and the trainer's is 3"):
        comparison.compare()


def oracle(model: nn.Module, loss: Any) -> BatchLossOracle:
    settings: dict[str, Any] = dict(method="auto", weight=lambda batch: 1.0, loss_scale=lambda: None, group=None)
    return BatchLossOracle(LossMeasurement(model, loss, **settings), [RecordedBatch(None, RandomState(model))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_is_refused_where_the_loss_is_the_same_at_all_weights(dtype: torch.dtype) -> None:
    """As that of a policy gradient on policy; only its gradient tells weights apart."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).to(dtype)
    params, x, reward = list(model.parameters()), torch.randn(8, 6, dtype=dtype), torch.randn(8)
    before = [p.detach().clone() for p in params]

    def policy(_: Any, *, on_policy: bool) -> Tensor:
        chosen = model(x).float().log_softmax(1)[:, 0]
        return -(reward * (chosen - (chosen.detach() if on_policy else 0)).exp()).mean()

    with pytest.raises(ValueError, match=r"changes with the weights, and this one is .* such as muon .*num_iterations"):
        validate_search(oracle(model, lambda _: policy(_, on_policy=True)), params)
    assert validate_search(oracle(model, lambda _: policy(_, on_policy=False)), params)
    assert not validate_search(oracle(model, lambda _: 0 * policy(_, on_policy=True)), params)  # nothing can be told
    assert validate_search(oracle(model, lambda _: 1e6 + policy(_, on_policy=False).mul(1e-3)), params)  # too small
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
