"""Power cooldown, roles with a cooldown of their own, momentum at both ends: alone, in Lightning's and in HF's door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from lightning_optim import Curve, Schedule, build_optimizer

ROLES: Any = [("embedding", None, {"cooldown": 3, "min_lr_ratio": 0.1, "lr": 0.5})]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))


def rates(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    out = []
    for _ in range(steps):
        out.append([float(g["lr"]) for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return out


def power(t: int, end: float, length: float, p: float, floor: float = 0.0) -> float:
    return floor + (1 - floor) * min(1.0, (end - t) / length) ** p


def test_power_cooldown_is_its_formula_in_every_role() -> None:
    curve = {"schedule": "power", "horizon": 12, "cooldown": 8, "power": 1.2}
    optimizer = build_optimizer(model(), "muon", lr=0.1, schedule=curve, overrides=ROLES)
    names = [g["name"] for g in optimizer.param_groups]
    found = rates(optimizer, Schedule(optimizer), 10)
    for t, lrs in enumerate(found):
        expected = {"muon/hidden": 0.1 * power(t, 12, 8, 1.2), "adamw/vector": 0.1 * power(t, 12, 8, 1.2)}
        expected["adamw/embedding"] = 0.5 * power(t, 12, 3, 1.2, 0.1)
        assert dict(zip(names, lrs, strict=True)) == pytest.approx(expected)


def test_shares_of_the_run() -> None:
    steps = Curve("power", cooldown=400, horizon=1100, power=0.4)
    shares = Curve("power", cooldown=400 / 1100, horizon=1.1, power=0.4)
    for t in (0, 10, 699, 700, 701, 999, 1100, 1200):
        assert steps.factor(t, lambda: 1000, {}) == pytest.approx(shares.factor(t, lambda: 1000, {}))


def test_power_one_is_the_linear_cooldown() -> None:
    """With a cooldown of all steps, also PolynomialLR of torch."""
    linear, line = Curve("linear", warmup_steps=5), Curve("power", warmup_steps=5)
    down = Curve("power", cooldown=40, power=1.0)
    for t in range(101):
        assert linear.factor(t, lambda: 100, {}) == pytest.approx(line.factor(t, lambda: 100, {}))
        assert down.factor(t, lambda: 100, {}) == pytest.approx(min(1, (100 - t) / 40))
    net = model()
    optimizer = build_optimizer(net, "adamw", lr=0.1)
    theirs = rates(optimizer, PolynomialLR(optimizer, 20, power=1.3), 20)
    optimizer = build_optimizer(net, "adamw", lr=0.1, schedule={"schedule": "power", "power": 1.3})
    assert rates(optimizer, Schedule(optimizer, total_steps=20), 20) == [pytest.approx(x) for x in theirs]


def test_momentum_rises_and_falls() -> None:
    settings = {"momentum_warmup_steps": 4, "momentum_cooldown_steps": 2, "horizon": 10, "schedule": "power"}
    optimizer = build_optimizer(model(), "muon", lr=0.1, schedule=settings)
    scheduler, found = Schedule(optimizer), []
    for _ in range(12):
        found.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    rise = [0.85 + 0.1 * k / 4 for k in range(4)]
    assert found == pytest.approx([*rise, 0.95, 0.95, 0.95, 0.95, 0.95, 0.9, 0.85, 0.85])
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    torch.save(scheduler.state_dict(), buffer := __import__("io").BytesIO())
    buffer.seek(0)
    again = Schedule(build_optimizer(model(), "muon", lr=0.1, schedule=settings))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.last_epoch == 12


def test_adam_without_bias_correction_is_a_setting_of_a_role() -> None:
    rest = {"correct_bias": False, "betas": (0.8, 0.99), "eps": 1e-10}
    overrides: Any = [("bias", None, {"betas": (0.8, 0.997)})]
    optimizer = build_optimizer(model(), "muon", lr=0.1, rest_settings=rest, overrides=overrides)
    bias = next(g for g in optimizer.param_groups if g["role"] == "vector")
    assert bias["betas"] == (0.8, 0.997) and not bias["correct_bias"] and bias["rule"] == "adamw"


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "powr"}, "unknown schedule 'powr'; did you mean 'power'"),
    ({"cooldown": 5}, "cooldown, horizon and power are for schedule='power'"),
    ({"schedule": "power", "cooldown": 2386.0}, "cooldown is a share as a float"),
    ({"schedule": "power", "powr": 2.0}, "a schedule has no setting 'powr'; did you mean 'power'"),
    ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
]


@pytest.mark.parametrize(("given", "said"), ERRORS, ids=str)
def test_what_a_schedule_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_optimizer(model(), "adamw", lr=0.1, schedule=given)


def test_a_schedule_needs_a_curve_and_a_length() -> None:
    with pytest.raises(ValueError, match="give a curve"):
        Schedule(build_optimizer(model(), "adamw", lr=0.1))
    optimizer = build_optimizer(model(), "adamw", lr=0.1, schedule={"schedule": "power"})
    with pytest.raises(ValueError, match="give total_steps"):
        Schedule(optimizer)
