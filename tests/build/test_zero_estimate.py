"""What `plan` says of a rank under DeepSpeed ZeRO is what is there."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from torch import nn

from lightning_optim import build_optimizer
from lightning_optim.build.plan import plan
from lightning_optim.build.zero_estimate import estimate_zero
from tests.helpers.pool import opened
from tests.helpers.zero_jobs import net

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@needs_deepspeed
@pytest.mark.slow  # the numbers by hand, below, are part of CI
@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_holds_the_bytes_that_were_estimated(world: int) -> None:
    cases: list[dict[str, Any]] = [
        {"name": name, "stage": stage, **more}
        for name, more in (("adamw", {}), ("muon", {}), ("soap", {}), ("muon", {"bf16": {"enabled": True}}))
        for stage in (1, 2, 3)
    ]
    with opened() as pool:
        ranks = pool.run("tests.helpers.zero_jobs:measure", world, cases=cases)
    for i, case in enumerate(cases):
        model = net().bfloat16() if "bf16" in case else net()
        strategy: Any = f"zero{case['stage']}"
        said = estimate_zero(build_optimizer(model, case["name"], lr=0.01), model, strategy, world)
        expected = [dict(zip(said.held, held, strict=True)) for held in zip(*said.held.values(), strict=True)]
        assert [rank[i] for rank in ranks] == [
            {"state": state, **held} for state, held in zip(said.state, expected, strict=True)
        ], case


def test_numbers_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))  # 48 + 8 + 40 + 5 weights
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, "adamw", lr=0.01)
    for group, size in zip(optimizer.param_groups, (13, 40), strict=True):
        assert sum(p.numel() for p in group["params"] if p.requires_grad) == size
    said = estimate_zero(optimizer, model, "zero1", 2)
    assert said.held == {"weights": [404, 404], "gradients": [212, 212], "masters": [4 * (20 + 8)] * 2}
    assert said.state == [2 * 4 * (20 + 8) + 2 * 8] * 2 and not any(said.sent) and not said.work
    said = estimate_zero(optimizer, model, "zero3", 3)
    assert said.held["weights"] == [4 * (16 + 3 + 14 + 2)] * 3
    assert said.held["masters"] == said.held["gradients"] == [4 * (3 + 14 + 2)] * 3


def test_owners_send_what_others_hold() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(model, "muon", lr=0.01, last_layer="rule")
    said = estimate_zero(optimizer, model, "zero2", 2)
    assert sorted(said.state) == [8, 8 + 4 * 16] and said.sent == [4 * 8, 4 * 8]


def test_a_plan_says_it_and_what_cannot_run_is_refused() -> None:
    text = str(plan(net().to("meta"), "muon", world_size=4, strategy="zero2"))
    assert "zero2 on 4 ranks: at most" in text and "weights 692 B, gradients" in text
    with pytest.raises(ValueError, match="sophia_h cannot be measured in the flat parameters of FSDP1 and ZeRO"):
        plan(net(), "sophia_h", world_size=2, strategy="zero1")
    with pytest.raises(ValueError, match="on_nonfinite='skip' does not work under DeepSpeed ZeRO"):
        plan(net(), "muon", world_size=2, strategy="zero3", on_nonfinite="skip")
