"""A group clips itself by its own norm, on any mesh, and leaves the gradients it was given alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import AdamW, Muon, RuleOptimizer, build_optimizer
from lightning_optim.core.parallel.collectives import total_norms
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import NAMES, assert_equal, give, gradient, make, params


def scaled_by_hand(ps: dict[str, Parameter], limit: float) -> float:
    """Clip as torch's `clip_grad_norm_` does, but into the gradients; returns the norm."""
    norm = total_norms([[(p, p.grad) for p in ps.values()]])[0]  # to the last bit
    for p in ps.values():
        if p.grad is not None:
            p.grad *= min(1.0, limit / (norm + 1e-6))
    return norm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_equals_smaller_gradients(name: str, limit: float) -> None:
    """Bitwise, through kernels, blocks and stacks; a norm below the limit changes nothing."""
    a, b = params(name), params(name)
    clipped, plain = make(name, a, lr=0.01, clip_norm=limit), make(name, b, lr=0.01)
    clipped.max_temp_bytes = 300  # several portions
    for t in range(1, 5):
        give(a, t, without="tall" if t == 3 else "")
        give(b, t, without="tall" if t == 3 else "")
        snapshot = {k: p.grad.clone() for k, p in a.items() if p.grad is not None}
        assert scaled_by_hand(b, limit) > 0.5
        clipped.step()
        plain.step()
        assert all(torch.equal(snapshot[k], p.grad) for k, p in a.items() if p.grad is not None)
    assert_equal(a, b)


def test_each_group_clips_by_its_own_norm() -> None:
    large, small = Parameter(torch.zeros(4, 3)), Parameter(torch.zeros(5))
    groups = [
        {"params": [large], "rule": "sgd", "lr": 1.0, "clip_norm": 1.0},
        {"params": [small], "rule": "sgd", "lr": 1.0, "clip_norm": 1.0, "name": "small"},
    ]
    optimizer = RuleOptimizer(groups)
    large.grad, small.grad = torch.full((4, 3), 100.0), torch.full((5,), 0.01)
    optimizer.step()
    torch.testing.assert_close(large.norm(), torch.tensor(1.0), rtol=1e-6, atol=0)
    assert torch.equal(small, -small.grad)


def test_clipping_is_a_setting_of_every_door() -> None:
    layers = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 7)
    model = torch.nn.Sequential(*layers)
    optimizer = build_optimizer(model, "muon", lr=1e-3, clip_norm=1.0, overrides=[("vector", None, {"clip_norm": 0.1})])
    expected = {"hidden": 1, "head": 1, "embedding": 1, "vector": 0.1}
    assert {g["role"]: g["clip_norm"] for g in optimizer.param_groups} == expected
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["clip_norm"]  # of an older version
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        AdamW(model.parameters(), clip_norm=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_does_not_hide_bad_gradients(bad: float) -> None:
    p = Parameter(torch.randn(4, 3))
    p.grad = torch.full((4, 3), bad)
    for optimizer in (Muon([p], clip_norm=1.0), AdamW([p], clip_norm=1.0, on_nonfinite="raise")):
        with pytest.raises(FloatingPointError, match="gradient not finite"):
            optimizer.step()


LIMIT = 3.0


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "world", "replicas"), [("lion", 2, 1), ("adafactor", 4, 2), ("sgd", 3, 1), ("soap", 2, 1)]
)
def test_the_norm_is_the_whole_meshs(pool: Pool, name: str, world: int, replicas: int) -> None:
    settings: dict[str, Any] = {"clip_norm": LIMIT}
    model = jobs.Model(name)
    start = jobs.weights(model)
    optimizer = make(name, model.parameters(), **settings)
    for t in range(1, 5):
        grads: dict[str, Tensor] = {}
        for key, p in model.named_parameters():
            p.grad = grads[key] = gradient(p, key, t)
        assert torch.nn.utils.get_total_norm(list(grads.values())) > 2 * LIMIT
        optimizer.step()
    args = {"name": name, "steps": 4, "dtype": torch.float32, "replicas": replicas, "settings": settings}
    for actual, _ in pool.run("tests.helpers.jobs:train", world, **args):
        for key, p in model.named_parameters():
            assert (actual[key] - p).norm() <= 1e-4 * (p - start[key]).norm() + 1e-6, key
