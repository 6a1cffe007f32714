"""Averaging methods as pure functions on one parameter: their formulas, their times, and their names."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import EMANesterov, MuLoCo, RuleOptimizer, TailEMA
from lightning_optim.core.step.averaging_methods import averages_of
from tests.helpers.rules import gradient


def test_tail_ema_starts_at_the_weights_and_evaluates_a_mix() -> None:
    method, x = TailEMA(start=3, tau=4.0, weight=0.25), torch.full((5,), 8.0)
    state = {"tail": method.init("tail", torch.zeros(5))}
    assert [method.is_active(t, None) for t in range(5)] == [False, False, False, True, True]
    method.after_step(x, state, 3, 0)
    assert torch.equal(state["tail"], x)
    method.after_step(x + 4, state, 4, 1)
    assert state["tail"].eq(9).all() and x.eq(8).all()
    assert method.eval_weights(x, state).eq(8.25).all()
    narrow = method.init("tail", x.bfloat16())
    assert narrow.dtype == torch.float32
    assert method.eval_weights(x.bfloat16(), {"tail": narrow}).dtype == torch.bfloat16


def test_muloco_takes_an_outer_step_every_few_steps() -> None:
    method, x = MuLoCo(every=2, lr=0.5, momentum=0.5), torch.full((3,), 10.0)
    state = {key: method.init(key, x) for key in method.keys}
    assert state["outer_momentum"].eq(0).all() and state["outer_anchor"] is not x
    x -= 4
    method.after_step(x, state, 0, 0)
    assert x.eq(6).all() and state["outer_anchor"].eq(10).all()
    x -= 4
    method.after_step(x, state, 1, 0)  # D = 8, u = 4, W = 10 - 2 - 4
    assert state["outer_momentum"].eq(4).all() and x.eq(4).all() and state["outer_anchor"].eq(4).all()


def test_muloco_without_momentum_at_lr_one_is_the_optimizer() -> None:
    params = [Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2)]
    optimizers = [RuleOptimizer([{"params": [p], "rule": "lion", "lr": 0.25}]) for p in params]
    optimizers[1].with_averaging(MuLoCo(every=2, lr=1.0, momentum=0.0))
    for t in range(1, 5):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = gradient(p, "p", t)
            optimizer.step()
    torch.testing.assert_close(*params)
    assert torch.equal(optimizers[1].state[params[1]]["outer_anchor"], params[1])


def test_ema_nesterov_follows_the_motion_and_looks_ahead_for_part_of_the_run() -> None:
    method, x = EMANesterov(step_size=0.5, beta=0.75, start=2, stop=0.5), torch.zeros(3)
    state = {key: method.init(key, x) for key in method.keys}
    for _ in range(2):
        x += 4
        method.after_step(x, state, 0, 0)
    assert state["lookahead"].eq(1.75).all() and torch.equal(state["anchor"], x)  # 1, then 0.75 + 0.25 * 4
    assert [method.ahead(t, 8, 0.5) for t in range(6)] == [0, 0, 0.25, 0.25, 0, 0]
    assert method.ahead(5, None, 1.0) == 0.5  # as long as the run's length is unknown, it does not stop
    late = EMANesterov(start=0.5)
    assert late.ahead(100, None, 1.0) == 0 and late.ahead(4, 8, 1.0) == 0.3


def test_settings_are_checked_by_name() -> None:
    assert averages_of({"tail_ema": {"start": 0.9}, "muloco": {}}) == [TailEMA(start=0.9), MuLoCo()]
    with pytest.raises(ValueError, match="averaging: unknown name 'tail_emma'.*tail_ema"):
        averages_of({"tail_emma": {}})
    with pytest.raises(ValueError, match="muloco has no setting 'evry'.*every"):
        averages_of({"muloco": {"evry": 3}})
    with pytest.raises(ValueError, match="tail_ema: tau"):
        averages_of({"tail_ema": {"tau": -1.0}})
