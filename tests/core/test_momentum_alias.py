"""The momentum of a group is read and written by either name, and stored by its own alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from lightning_optim import AdamW, RuleOptimizer
from lightning_optim.core.momentum_alias import momentum_field, momentum_names, momentum_of, publish_momentum
from lightning_optim.core.rule import REGISTRY


def group(name: str, **settings: Any) -> dict[str, Any]:
    """The group of a rule."""
    return made(name, **settings).param_groups[0]


def made(*names: str, **settings: Any) -> RuleOptimizer:
    """An optimizer with a matrix for every rule."""
    return RuleOptimizer([{"params": [Parameter(torch.ones(4, 4))], "rule": name, **settings} for name in names])


def test_betas_of_a_group_with_momentum() -> None:
    muon = group("muon", momentum=0.9)
    assert muon["betas"] == (0.9,) and "betas" not in muon
    muon["betas"] = (0.75, 0.99)
    assert muon["momentum"] == 0.75 and "betas" not in muon and dict(muon).get("betas") is None
    muon["momentum"] = 0.5
    assert muon["betas"] == (0.5,)


def test_momentum_of_a_group_with_betas() -> None:
    adamw, flora = group("adamw", betas=(0.9, 0.95)), group("flora", beta1=0.8)
    adamw["momentum"] = 0.75
    assert adamw["betas"] == (0.75, 0.95) and adamw["momentum"] == 0.75 and "momentum" not in adamw
    flora["betas"] = (0.6, 0.1)
    assert flora["beta1"] == flora["momentum"] == 0.6 and flora["betas"] == (0.6,)


def test_rules_without_momentum_read_as_zero_and_ignore_writes() -> None:
    signsgd = group("signsgd")
    before = dict(signsgd)
    signsgd["momentum"] = 0.9
    signsgd["betas"] = (0.9, 0.9)
    assert dict(signsgd) == before and signsgd["momentum"] == 0.0 and signsgd["betas"] == (0.0,)
    assert momentum_field(REGISTRY["signsgd"]) is None and momentum_of(signsgd) is None
    with pytest.raises(KeyError, match="momentun"):
        signsgd["momentun"]


def test_one_name_for_all_groups() -> None:
    assert momentum_names(made("muon", "sgd", momentum=0.9).param_groups) == "momentum"
    assert momentum_names(made("muon", "adamw").param_groups) == "betas"
    assert momentum_names(made("signsgd").param_groups) is None
    defaults: dict[str, Any] = {"rule": "muon"}
    publish_momentum(defaults, made("muon", "adamw").param_groups)
    assert defaults["momentum"] == 0.95 and defaults["betas"] == (0.95,)


def test_a_schedule_of_torch_moves_the_momentum_of_every_group() -> None:
    optimizer = made("muon", "adamw", "signsgd")
    optimizer.param_groups[1]["betas"] = (0.5, 0.875)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    assert [momentum_of(g) for g in optimizer.param_groups] == [0.9, 0.9, None]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.875)
    for saved, rule in zip(optimizer.state_dict()["param_groups"], ("muon", "adamw", "signsgd"), strict=True):
        assert [k for k in ("momentum", "betas") if k in saved] == [k for k in [momentum_field(REGISTRY[rule])] if k]


def test_the_only_group_has_no_name_of_its_own():
    p, q = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    optimizer = AdamW([p])
    group = optimizer.param_groups[0]
    assert group["name"] == "adamw" and "name" not in group and group.get("name") is None
    other = AdamW([q])
    other.load_state_dict(optimizer.state_dict())
    assert "name" not in other.param_groups[0] and other.param_groups[0]["name"] == "adamw"
    optimizer.add_param_group({"params": [q]})
    assert [g.get("name") for g in optimizer.param_groups] == ["adamw", "adamw_1"]
    assert AdamW([{"params": [p], "name": "mine"}]).param_groups[0].get("name") == "mine"
