"""Models of many families train under rules for whole matrices, and the plan's bytes are the state's."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_optim import build_optimizer, plan
from tests.helpers import tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("optim", ["muon", "soap", "adam_mini"])
@pytest.mark.parametrize("name", tiny_models.names())
def test_tiny_models_train(name: str, optim: str) -> None:
    model = tiny_models.tiny(name)
    predicted = plan(model, optim).state_bytes
    optimizer = build_optimizer(model, optim, lr=3e-3)
    losses: list[float] = []
    for _ in range(5):
        loss = tiny_models.loss_of(model)
        loss.backward()
        losses.append(loss.item())
        for p in model.parameters():
            if p.grad is None:  # a pooler that no output reads
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(math.isfinite, losses)) and min(losses[1:]) < losses[0], losses
    assert predicted == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
