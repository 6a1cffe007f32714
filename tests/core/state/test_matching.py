"""Checkpoints whose parameters are others, or in another order or group."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import RuleOptimizer


class Net(nn.Module):
    """Two matrices of one shape, a vector and a head."""

    def __init__(self, *trained: str):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith(trained))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(self.a(x).tanh()))


def step(net: nn.Module, optimizer: RuleOptimizer, times: int = 1) -> None:
    for i in range(times):
        net.zero_grad()
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))).square().sum().backward()
        optimizer.step()


def by_name(optimizer: RuleOptimizer) -> dict[str, Any]:
    return {
        name: optimizer.state.get(p)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def made(net: nn.Module, *groups: tuple[str, list[str]]) -> RuleOptimizer:
    named = dict(net.named_parameters())
    return RuleOptimizer([
        {"rule": rule, "lr": 0.1, "params": [(n, named[n]) for n in names]} for rule, names in groups
    ])


def test_the_state_of_one_layer_never_becomes_another_s(caplog: pytest.LogCaptureFixture):
    net = Net("a", "norm")
    saved = made(net, ("muon", ["a.weight"]), ("adamw", ["norm.weight"]))
    step(net, saved)
    other = made(Net("b", "norm"), ("muon", ["b.weight"]), ("adamw", ["norm.weight"]))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(saved.state_dict())
    assert not by_name(other)["b.weight"]
    assert torch.equal(by_name(other)["norm.weight"]["exp_avg"], by_name(saved)["norm.weight"]["exp_avg"])
    assert "state of 1 of 2 parameters is continued" in caplog.text
    assert "not in the checkpoint, from scratch: b.weight; in the checkpoint only: a.weight" in caplog.text


def test_other_groups_and_another_order_continue_by_name(caplog: pytest.LogCaptureFixture):
    net = Net("a", "b", "norm")
    saved = made(net, ("muon", ["a.weight", "b.weight"]), ("adamw", ["norm.weight", "norm.bias"]))
    step(net, saved, 3)
    there, twin = saved.state_dict(), copy.deepcopy(net)
    other = made(twin, ("adamw", ["norm.bias"]), ("adamw", ["norm.weight"]), ("muon", ["b.weight", "a.weight"]))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(there)
    assert "4 of 4 parameters is continued; groups differ" in caplog.text
    step(net, saved, 2)
    step(twin, other, 2)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_another_rule_updates_starts_from_scratch(caplog: pytest.LogCaptureFixture):
    net = Net("a", "b")
    saved = made(net, ("muon", ["a.weight", "b.weight"]))
    step(net, saved)
    other = made(Net("a", "b"), ("muon", ["a.weight"]), ("adamw", ["b.weight"]))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(saved.state_dict())
    assert by_name(other)["a.weight"] and not by_name(other)["b.weight"]
    assert "of another rule there, from scratch: b.weight" in caplog.text


def test_names_within_a_larger_module_are_the_same(caplog: pytest.LogCaptureFixture):
    net = Net("a", "b")
    saved = made(net, ("muon", ["a.weight", "b.weight"]))
    step(net, saved)
    outer = nn.ModuleDict({"net": Net("a", "b")})
    other = made(outer, ("muon", ["net.a.weight", "net.b.weight"]))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(saved.state_dict())
    assert all(by_name(other).values()) and not caplog.records


def test_another_model_s_checkpoint_is_refused_and_nothing_changes():
    net = Net("a")
    saved = made(net, ("muon", ["a.weight"]))
    step(net, saved)
    twin = Net("b")
    other = made(twin, ("muon", ["b.weight"]))
    step(twin, other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="no parameter of the checkpoint.*has a.weight.*here are b.weight"):
        other.load_state_dict(saved.state_dict())
    after = other.state_dict()
    assert torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
