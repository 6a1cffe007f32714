"""Power cooldown, roles with a cooldown of their own, momentum at both ends: alone, in Lightning, in Transformers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, PolynomialLR

import lightning_optim
from lightning_optim import RuleOptimizer, ScheduleConfig, ScheduleLR, build_optimizer
from lightning_optim.core.momentum_alias import momentum_of
from lightning_optim.optimizers import CLASSES
from tests.helpers.rules import give, make, others_slow, params

ROLES: Any = [("embedding", None, {"cooldown": 3, "min_lr_ratio": 0.1, "lr": 0.5})]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))


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
    actual = rates(optimizer, ScheduleLR(optimizer), 10)
    for t, lrs in enumerate(actual):
        common = 0.1 * power(t, 12, 8, 1.2)
        expected = {"muon/hidden": common, "adamw/vector": common, "adamw/head": common}
        expected["adamw/embedding"] = 0.5 * power(t, 12, 3, 1.2, 0.1)
        assert dict(zip(names, lrs, strict=True)) == pytest.approx(expected)


def test_shares_of_the_run() -> None:
    steps = ScheduleConfig("power", cooldown=400, horizon=1100, power=0.4)
    shares = ScheduleConfig("power", cooldown=400 / 1100, horizon=1.1, power=0.4)
    for t in (0, 10, 699, 700, 701, 999, 1100, 1200):
        assert steps.factor(t, lambda: 1000, {}) == pytest.approx(shares.factor(t, lambda: 1000, {}))


def test_power_one_is_the_linear_cooldown() -> None:
    """With a cooldown of all steps, also PolynomialLR of torch."""
    linear, line = ScheduleConfig("linear", warmup_steps=5), ScheduleConfig("power", warmup_steps=5)
    down = ScheduleConfig("power", cooldown=40, power=1.0)
    for t in range(101):
        assert linear.factor(t, lambda: 100, {}) == pytest.approx(line.factor(t, lambda: 100, {}))
        assert down.factor(t, lambda: 100, {}) == pytest.approx(min(1, (100 - t) / 40))
    net = model()
    optimizer = build_optimizer(net, "adamw", lr=0.1)
    theirs = rates(optimizer, PolynomialLR(optimizer, 20, power=1.3), 20)
    optimizer = build_optimizer(net, "adamw", lr=0.1, schedule={"schedule": "power", "power": 1.3})
    assert rates(optimizer, ScheduleLR(optimizer, total_steps=20), 20) == [pytest.approx(x) for x in theirs]


def test_momentum_rises_and_falls() -> None:
    settings = {"momentum_warmup_steps": 4, "momentum_cooldown_steps": 2, "horizon": 10, "schedule": "power"}
    optimizer = build_optimizer(model(), "muon", lr=0.1, schedule=settings)
    scheduler, actual = ScheduleLR(optimizer), []
    for _ in range(12):
        actual.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    rise = [0.85 + 0.1 * k / 4 for k in range(4)]
    assert actual == pytest.approx([*rise, 0.95, 0.95, 0.95, 0.95, 0.95, 0.9, 0.85, 0.85])
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    torch.save(scheduler.state_dict(), buffer := __import__("io").BytesIO())
    buffer.seek(0)
    again = ScheduleLR(build_optimizer(model(), "muon", lr=0.1, schedule=settings))
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


@pytest.mark.parametrize(("case", "record"), ERRORS, ids=str)
def test_what_a_schedule_cannot_be(case: dict[str, Any], record: str) -> None:
    with pytest.raises(ValueError, match=record):
        build_optimizer(model(), "adamw", lr=0.1, schedule=case)


def test_a_schedule_needs_a_curve_and_a_length() -> None:
    with pytest.raises(ValueError, match="give a curve"):
        ScheduleLR(build_optimizer(model(), "adamw", lr=0.1))
    optimizer = build_optimizer(model(), "adamw", lr=0.1, schedule={"schedule": "power"})
    with pytest.raises(ValueError, match="give total_steps"):
        ScheduleLR(optimizer)


# -- torch's schedules, which move the momentum too --------------------------------------------------------------------

CYCLES: dict[str, Callable[[Any], LRScheduler]] = {
    "one": lambda optimizer: OneCycleLR(optimizer, max_lr=0.01, total_steps=6),
    "cyclic": lambda optimizer: CyclicLR(optimizer, base_lr=0.001, max_lr=0.01, step_size_up=2),
}
WITHOUT_MOMENTUM = {"adafactor", "adafactor_hf", "adagrad", "adalomo", "galore_adafactor", "hessian_free", "lbfgs"}
WITHOUT_MOMENTUM |= {"lomo", "olbfgs", "racs", "signsgd", "sr1_cubic", "swan"}


def cycled(optimizer: Any, cycle: str, steps: int = 5, *, prepare: Callable[[int], None] | None = None) -> list[Any]:
    """Learning rate and momentum of every group before each step."""
    scheduler, out = CYCLES[cycle](optimizer), []
    for t in range(1, steps + 1):
        out.append([(g["lr"], momentum_of(g) if "rule" in g else g["betas"][0]) for g in optimizer.param_groups])
        if prepare is not None:
            prepare(t)
        optimizer.step()
        scheduler.step()
    return out


def of_torch(cycle: str) -> list[Any]:
    p = Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    return cycled(torch.optim.AdamW([p]), cycle)


@pytest.mark.parametrize(
    ("name", "cycle"), [*((name, "one") for name in CLASSES), *others_slow(list(CLASSES), "cyclic")]
)
def test_every_class_cycles_as_torchs_adamw_does(name: str, cycle: str) -> None:
    ps = params(name)
    optimizer = make(name, ps)
    if name in WITHOUT_MOMENTUM:
        with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
            CYCLES[cycle](optimizer)
        return
    assert cycled(optimizer, cycle, prepare=lambda t: give(ps, t)) == of_torch(cycle)
    assert all(p.isfinite().all() for p in ps.values())


def train(net: nn.Module) -> Callable[[int], None]:
    def prepare(t: int) -> None:
        net.zero_grad()
        net(torch.arange(6).roll(t)).square().mean().backward()

    return prepare


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {}),
        ("muon", {}),
        ("soap", {"rest": "sgd", "rest_settings": {"momentum": 0.5}}),
        ("racs", {}),  # the main rule has none
        ("muon", {"rest": "signsgd"}),
        ("flora", {"rank": 2, "overrides": [("bias", "adagrad", {})]}),
        ("cosmos", {"overrides": [("bias", "signum", {})]}),  # its `momentum` is a word
        ("muown", {}),  # has both: `betas` are those of a part of it
    ],
)
def test_the_momentum_of_every_group_cycles(name: str, settings: dict[str, Any], cycle: str) -> None:
    net = model()
    optimizer = build_optimizer(net, name, lr=0.1, **settings)
    has_none = [momentum_of(g) is None for g in optimizer.param_groups]
    keys = [set(g) for g in optimizer.param_groups]
    words = [g.get("momentum") for g in optimizer.param_groups if g["rule"] == "cosmos"]
    actual = cycled(optimizer, cycle, prepare=train(net))
    for t, [(lr, momentum)] in enumerate(of_torch(cycle)):
        assert actual[t] == [(lr, None if none else momentum) for none in has_none]
    scheduled = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
    assert [set(g) - scheduled for g in optimizer.param_groups] == keys  # no dead setting beside the rule's own
    assert [g.get("momentum") for g in optimizer.param_groups if g["rule"] == "cosmos"] == words


def test_a_cycle_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, RuleOptimizer, LRScheduler]:
        net = model()
        optimizer = build_optimizer(net, "muon", lr=0.1)
        return net, optimizer, CYCLES["one"](optimizer)

    def steps(net: nn.Module, optimizer: RuleOptimizer, scheduler: LRScheduler, which: range) -> None:
        for t in which:
            train(net)(t)
            optimizer.step()
            scheduler.step()

    whole = start()
    steps(*whole, range(3))
    torch.save([x.state_dict() for x in whole], saved := io.BytesIO())
    saved.seek(0)
    resumed = start()
    for x, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
        x.load_state_dict(state)
    copied = copy.deepcopy(whole)
    for run in (whole, resumed, copied):
        steps(*run, range(3, 5))
        assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), whole[0].parameters(), strict=True))
        assert run[1].state_dict()["param_groups"] == whole[1].state_dict()["param_groups"]
    assert "betas" not in dict(whole[1].param_groups[0]) and "momentum" not in dict(whole[1].param_groups[1])


def test_defaults_of_one_rule_are_not_anothers() -> None:
    a, b, c = (Parameter(torch.zeros(3, 3)) for _ in range(3))
    optimizer = lightning_optim.SOAP([a], betas=(0.8, 0.9))  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.add_param_group({"params": [b], "rule": "muon"})
    optimizer.add_param_group({"params": [c]})
    _, muon, soap = optimizer.param_groups
    assert (muon["momentum"], "betas" in muon) == (0.95, False)
    assert (soap["betas"], "momentum" in soap) == ((0.8, 0.9), False)
    muon = lightning_optim.Muon([a])  # pyright: ignore[reportAttributeAccessIssue]
    assert muon.defaults["momentum"] == 0.95 and "betas" not in muon.defaults
    muon.add_param_group({"params": [b], "rule": "adamw"})
    muon.add_param_group({"params": [c]})
    assert muon.param_groups[1]["betas"] == (0.9, 0.999) and "betas" in muon.defaults
    assert "betas" not in muon.param_groups[2] and muon.param_groups[2]["momentum"] == 0.95


def test_a_momentum_under_the_other_name_is_refused_in_a_new_group() -> None:
    p = Parameter(torch.zeros(3, 3))
    for rule, case, record in (
        ("adamw", {"momentum": 0.5}, "adamw has no setting 'momentum'; its momentum is the first of 'betas'"),
        ("muon", {"betas": (0.5, 0.9)}, "muon has no setting 'betas'; its momentum is 'momentum'"),
        ("racs", {"momentum": 0.5}, "racs has no setting 'momentum'; it has no momentum"),
    ):
        with pytest.raises(ValueError, match=record):
            RuleOptimizer([{"params": [p], "rule": rule, **case}])


def test_a_dead_momentum_of_an_old_checkpoint_is_left_out() -> None:
    p = Parameter(torch.zeros(3))
    optimizer = lightning_optim.AdamW([p])  # pyright: ignore[reportAttributeAccessIssue]
    state = optimizer.state_dict()
    state["param_groups"][0]["momentum"] = 0.5
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and "momentum" not in optimizer.param_groups[0]
