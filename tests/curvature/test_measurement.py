"""Means over micro-batches, gradients beside training, and the method that second derivatives take."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_optim.curvature import Labels, first_rows
from lightning_optim.curvature.measurement import LossMeasurement, explain_checkpointing, gradients
from lightning_optim.diagnostics.batches import RecordedBatch
from lightning_optim.diagnostics.hessian import NoSecondDerivativeError
from lightning_optim.diagnostics.undisturbed import RandomState


def measurement(method: Any = "auto", weight: Any = None) -> LossMeasurement:
    return LossMeasurement(
        nn.Linear(2, 2), lambda batch: batch, method=method, weight=weight, loss_scale=lambda: None, group=None
    )


def test_a_mean_is_weighted_and_batches_without_labels_do_not_count() -> None:
    params = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)]
    given: Any = [(1.0, 3.0), (float("nan"), 0.0), (5.0, 1.0)]

    def measure(batch: Any, i: int) -> tuple[list[Tensor], float]:
        assert batch is given[i]
        return [torch.full_like(p, batch[0]) for p in params], batch[1]

    (a, b), total = measurement().mean(measure, params, given)
    assert a.tolist() == [2.0, 2.0] and b.tolist() == [2.0] and total == 4.0
    assert (a.dtype, b.dtype) == (torch.float32, torch.float64)


def test_weights_of_batches_and_the_scale_of_the_loss() -> None:
    labels, batch = Labels(), RecordedBatch("abc", RandomState(nn.Linear(1, 1)))
    assert measurement().batch_weight(batch, labels) == 1.0 and measurement().loss_scale() == 1.0
    labels._counts = [3, 4]
    assert measurement().batch_weight(batch, labels) == 7.0
    assert measurement(weight=len).batch_weight(batch, labels) == 3


def test_a_kernel_without_second_derivative_is_measured_by_differences_from_then_on() -> None:
    seen: list[str] = []

    def measure(method: str) -> str:
        seen.append(method)
        if method == "exact":
            raise NoSecondDerivativeError
        return method

    auto = measurement()
    with pytest.warns(UserWarning, match="takes differences of gradients in place of second derivatives: a kernel"):
        assert auto.second_order(measure) == "difference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert auto.second_order(measure) == "difference" and measurement("difference").second_order(measure)
    assert seen == ["exact", "difference", "difference", "difference"]
    with pytest.raises(RuntimeError, match="give the curvature estimator method='auto' or method='difference'"):
        measurement("exact").second_order(measure)


def test_errors_with_another_cause_are_raised_and_nothing_is_decided() -> None:
    def measure(method: str) -> str:
        raise RuntimeError(f"out of luck with {method}")

    auto = measurement()
    with pytest.raises(RuntimeError, match="out of luck with difference"):
        auto.second_order(measure)
    assert auto.second_order(str) == "exact", "both methods failed, so the kernels are not to blame"
    p = torch.zeros(2)
    assert auto.must_check(Labels(), [p]) and not auto.must_check(Labels(), [p, p.bfloat16()])
    with pytest.raises(NoSecondDerivativeError):
        auto.check([torch.ones(2)], [2 * torch.ones(2)])
    assert auto.must_check(Labels(), [p])
    auto.check([torch.ones(2)], [1.001 * torch.ones(2)])
    assert not auto.must_check(Labels(), [p])


def test_gradients_and_rows_leave_what_they_are_given_as_it_is() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    a.grad = kept = torch.full((2,), 7.0)
    found = gradients((3 * a).sum(), [a, b], [a, b])
    assert [x.tolist() for x in found] == [[3.0, 3.0], [0.0, 0.0]] and a.grad is kept and b.grad is None
    batch = (torch.arange(5), {"x": torch.arange(10).view(5, 2), "scale": torch.tensor(2.0), "other": torch.arange(4)})
    rows, nested = first_rows(batch, 0.3)
    assert rows.tolist() == [0, 1] and nested["x"].tolist() == [[0, 1], [2, 3]]
    assert nested["scale"] is batch[1]["scale"] and nested["other"] is batch[1]["other"]  # pyright: ignore
    assert rows.data_ptr() == batch[0].data_ptr(), "a view"  # pyright: ignore
    assert first_rows("text", 0.5) == "text"


def test_reentrant_checkpointing_is_explained_and_other_errors_are_not() -> None:
    x = torch.ones(2, requires_grad=True)
    y: Any = checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="give checkpoint\\(\\) use_reentrant=False"), explain_checkpointing():
        torch.autograd.grad(y.sum(), x)
    with pytest.raises(RuntimeError, match="^another$"), explain_checkpointing():
        raise RuntimeError("another")
