"""Passes beside training leave it as it was: one test over everything that they could change."""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_optim.diagnostics.undisturbed import FEW, RandomState, frozen, measuring, undisturbed


class Busy(nn.Module):
    """Writes to everything that a module or a trainer may keep account in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.queue, self.replaced = nn.Buffer(torch.zeros(FEW + 1)), nn.Buffer(torch.zeros(2))
        self.mean, self.curve = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.accuracy = torchmetrics.MetricCollection([MulticlassAccuracy(3)])
        self.calls, self.ratio, self.label, self.optional = 0, 1.0, "a", None
        self.lines: list[Any] = []
        self.nested: dict[str, Any] = {"sums": {"loss": torch.zeros(1)}, "recent": deque([1, 2], maxlen=2), "seen": {1}}
        self.owner: Any = SimpleNamespace(metrics=defaultdict(list), step=0, total=torch.zeros(3))
        self.owner.head = nn.BatchNorm1d(3)

    def loss(self, x: Tensor) -> Tensor:
        y = x.argmax(1) % 3
        z = self.dropout(self.norm(self.layer(x + torch.randn_like(x) + random.random() + np.random.rand())))
        loss = F.cross_entropy(z, y) + 0 * self.queue.sum()
        self.mean(loss.detach())
        self.curve(loss.detach())
        self.accuracy(z.detach(), y)
        self.queue += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        self.ratio *= 0.5
        self.label, self.optional, self.late = self.label + "b", 3, 4
        self.lines.append(float(loss.detach()))
        self.nested["sums"]["loss"] += loss.detach()
        self.nested["recent"].append(3)
        self.nested["seen"].add(2)
        self.owner.metrics["loss"].append(1.0)
        self.owner.step += 1
        self.owner.total += 1
        self.owner.head(z.detach())
        return loss


def state_of(module: Any) -> dict[str, Any]:
    """Everything that a module and its owner keep, by value."""
    modules = [*module.modules(), module.owner.head]
    kept = {f"{i}.{k}": v for i, m in enumerate(modules) for k, v in vars(m).items() if k not in ("_modules", "owner")}
    owner = {k: v for k, v in vars(module.owner).items() if k != "head"}
    return copy.deepcopy({k: v for k, v in kept.items() if not callable(v)} | owner)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple | deque):
        assert len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y, where)
    elif not callable(a) and type(a).__eq__ is not object.__eq__:
        assert a == b, where


@pytest.mark.parametrize("trained", [False, True])
def test_training_is_left_as_it_was(trained: bool) -> None:
    torch.manual_seed(0)
    model = Busy()
    model.norm.eval()
    model.layer.bias.requires_grad_(False)
    x = torch.randn(5, 4)
    if trained:
        model.loss(x).backward()
    state, grad, identities = state_of(model), model.layer.weight.grad, {k: id(b) for k, b in model.named_buffers()}
    numbers = RandomState(model)
    expected = [torch.rand(1), random.random(), np.random.rand()]
    numbers.restore()
    with undisturbed(model, model.owner):
        assert measuring() and torch.is_grad_enabled() and model.layer.weight.grad is None
        for _ in range(2):
            model.loss(x).backward()
        model.train().requires_grad_(True)
        changed = state_of(model)
        with pytest.raises(AssertionError):
            assert_equal(state, changed)
    assert not measuring()
    assert_equal(state, state_of(model))
    assert model.layer.weight.grad is grad and not model.layer.bias.requires_grad and not model.norm.training
    assert {k: id(b) for k, b in model.named_buffers()} == identities
    assert [torch.rand(1), random.random(), np.random.rand()] == expected


def test_an_exception_puts_everything_back_as_well() -> None:
    model = Busy()
    state = state_of(model)
    with pytest.raises(ZeroDivisionError), frozen(model), undisturbed(model, model.owner):
        model.loss(torch.randn(5, 4))
        raise ZeroDivisionError
    assert_equal(state, state_of(model))
    assert model.training and not measuring()


def test_metrics_of_inference_mode_and_large_lists_are_left_alone() -> None:
    model: Any = nn.Module()
    model.metric = torchmetrics.MeanMetric()
    with torch.inference_mode():
        model.metric.update(torch.ones(3))
    model.predictions = [torch.zeros(FEW + 1)]
    model.many = list(range(3 * FEW))
    with undisturbed(model):
        model.predictions.append(torch.ones(1))
        model.many.append(0)
        model.metric.reset()
        model.metric.update(torch.zeros(2))
    assert len(model.predictions) == 1 and len(model.many) == 3 * FEW and float(model.metric.compute()) == 1.0
