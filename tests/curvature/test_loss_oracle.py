"""The loss, its gradient and its Gauss-Newton matrix over micro-batches, without a trace in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim.curvature import BatchLossOracle
from lightning_optim.curvature.measurement import LossMeasurement
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.undisturbed import RandomState


class Net(nn.Module):
    """A small network with dropout and a loss of labels that may not count."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 4, generator=made, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(4, 3, generator=made, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x @ self.first), 0.5, self.training) @ self.second

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def batch() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    y = torch.randint(3, (6,), generator=made)
    y[5] = -100
    return torch.randn(6, 3, generator=made, dtype=torch.float64), y


def oracle(model: nn.Module, loss: Any, batches: Any, scale: float | None = None) -> BatchLossOracle:
    measurement = LossMeasurement(model, loss, method="exact", weight=None, loss_scale=lambda: scale, group=None)
    return BatchLossOracle(measurement, [RecordedBatch(batch, RandomState(model)) for batch in batches])


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_micro_batches_have_the_loss_and_gradient_of_one_batch(scale: float | None) -> None:
    """Micro-batches weigh as many labels as count in them; a loss scale of mixed precision cancels."""
    model, (x, y) = Net().train(), batch()
    params = list(model.parameters())
    model.first.grad = kept = torch.ones_like(model.first)
    found, gradients = oracle(model, model.loss, [(x[:2], y[:2]), (x[2:], y[2:])], scale).gradient(params)
    assert model.training and model.first.grad is kept and model.second.grad is None
    loss = model.eval().loss((x, y))
    assert found == pytest.approx(loss.item(), rel=1e-14)
    for a, b in zip(gradients, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_products_are_those_of_the_gauss_newton_matrix() -> None:
    model, (x, y) = Net().eval(), batch()
    params = list(model.parameters())
    made = torch.Generator().manual_seed(2)
    v = [torch.randn(p.shape, generator=made, dtype=p.dtype) for p in params]
    before = [p.detach().clone() for p in params]
    found = oracle(model, model.loss, [(x[:4], y[:4]), (x[4:], y[4:])]).product(params, v)

    def logits(first: Tensor, second: Tensor) -> Tensor:
        return torch.tanh(x[:5] @ first) @ second

    moved: Any = torch.autograd.functional.jvp(logits, tuple(params), tuple(v))
    z, dz = moved
    p = z.softmax(-1)
    du = (p * dz - p * (p * dz).sum(-1, keepdim=True)) / 5
    expected: Any = torch.autograd.functional.vjp(logits, tuple(params), du)[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(params, before, strict=True))


def test_products_follow_the_weights_once_the_gradient_was_asked_for() -> None:
    """Their graph is kept for all products at one place."""
    model, v = Net().eval(), [torch.ones(3, 4, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)]
    params = list(model.parameters())
    source = oracle(model, model.loss, [batch()])
    first = source.product(params, v)
    assert all(torch.equal(a, b) for a, b in zip(first, source.product(params, v), strict=True))
    with torch.no_grad():
        model.second.mul_(2)
    source.gradient(params)
    fresh = oracle(model, model.loss, [batch()]).product(params, v)
    for a, b, old in zip(source.product(params, v), fresh, first, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, old)


def test_losses_without_predictions_have_no_products() -> None:
    model = Net()
    params = list(model.parameters())
    source = oracle(model, lambda b: model(b[0]).square().mean(), [batch()])
    with pytest.raises(ValueError, match="so the Gauss-Newton matrix cannot be told from the Hessian; use one of"):
        source.product(params, [torch.ones_like(p) for p in params])
    assert source.gradient(params)[0] > 0 and source.measurement.seconds > 0
