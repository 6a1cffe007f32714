"""Hyperball, update floor, radial brake, pin and cautious decay: a naive reference, and every path of the step."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import AdamW, Muon, RuleOptimizer
from lightning_optim.core.rule import REGISTRY
from tests.contract.references import constraint as naive
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import NAMES, gradient, make, params, reference, run, settings_of, strict, tensors

CONVERGED: dict[str, Any] = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12}
SETTINGS: list[dict[str, Any]] = [
    {"constraint": "hyperball"},
    {"constraint": "hyperball", "weight_decay": 0.3, "radial_damping": 0.2},
    {"constraint": "hyperball", "uw_floor": 0.9, "uw_floor_by": "row"},
    {"constraint": "hyperball", "cautious_decay": 0.4, "radial_damping": 0.3},
    {"uw_floor": 0.7},
    {"uw_floor": 0.7, "uw_floor_by": "row", "weight_decay": 0.2},
    {"radial_damping": 0.0},
    {"pin": True},
    {"pin": True, "cautious_decay": 0.5, "weight_decay": 0.1, "radial_damping": 0.5},
    {"uw_floor": 0.3825, "radial_damping": 0.5, "pin": True},
    {
        "uw_floor": 0.3825,
        "uw_floor_by": "row",
        "radial_damping": 0.5,
        "pin": True,
        "cautious_decay": 0.5,
        "cautious_when": "after_pin",
    },
    {"cautious_decay": 0.5},
    {"cautious_decay": 0.5, "cautious_when": "after_pin", "weight_decay": 0.3},
]
RECORD: dict[str, Any] = {"lr": 0.1, **SETTINGS[10]}
BALL: dict[str, Any] = {"lr": 0.1, "constraint": "hyperball"}
each = pytest.mark.parametrize("case", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
RULES = ["adamw", "lion", "sgd", "adafactor", "muon", "soap"]
"""Kernels, flat blocks, decay in the gradient, sums, whole matrices, decay after the step."""


def hand(t: int) -> Tensor:
    """Gradient H of the specification's hand-checked numbers."""
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    return (torch.sin(1 + 3 * rows + 5 * columns + 7 * t) + 0.5 * torch.cos((rows + 1) * (columns + 2) * t)).double()


def hand_start() -> Parameter:
    rows, columns = torch.meshgrid(torch.arange(2.0).double(), torch.arange(3.0).double(), indexing="ij")
    return Parameter(torch.cos(rows + 2 * columns))


HAND = {
    "MuonH": (
        lambda p: Muon([p], **BALL, **CONVERGED, ns_dtype="float64"),
        {
            1: [0.99036, -0.419982, -0.528348, 0.65491, -1.00395, 0.282367],
            3: [0.889269, -0.577448, -0.541159, 0.807711, -0.919837, 0.193157],
        },
    ),
    "AdamH": (
        lambda p: AdamW([p], **BALL, betas=(0.9, 0.95), weight_decay=0.0),
        {
            1: [0.943684, -0.351142, -0.592174, 0.61954, -1.075923, 0.216686],
            3: [0.79839, -0.52679, -0.541261, 0.825749, -1.018046, 0.163485],
        },
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_hand_checked_numbers(name: str) -> None:
    build, expected = HAND[name]
    p = hand_start()
    optimizer = build(p)
    for t in range(1, 4):
        p.grad = hand(t)
        optimizer.step()
        if t in expected:
            torch.testing.assert_close(p.flatten(), torch.tensor(expected[t]).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SETTINGS[:11:2], ids=str)
def test_one_matrix_is_the_reference(case: dict[str, Any]) -> None:
    """The direction is the gradient: nothing but the shaped step is compared."""
    p = Parameter(torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    expected = p.detach().clone()
    optimizer = make("sgd", [p], lr=0.1, momentum=0.0, **{**case, "weight_decay": 0.0})
    for t in range(1, 5):
        p.grad = gradient(p, "one", t)
        expected = naive.step(expected, p.grad.clone(), {**case, "lr": 0.1, "weight_decay": 0.0})
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("name", RULES)
def test_equals_naive_reference_in_float64(name: str, case: dict[str, Any]) -> None:
    rule, module = REGISTRY[name], reference(name)
    case = {"lr": 0.05, "weight_decay": 0.0, **strict(name), **case}
    if name == "adafactor":
        case["weight_decay"] = 0.0  # its own
    ps = params(name, torch.float64)
    ps.pop("scalar", None)
    run(name, ps, range(1, 5), **case)
    h = settings_of(name, {k: v for k, v in case.items() if k not in naive.OFF})
    coupled = case["weight_decay"] if rule.decay == "coupled" else 0.0
    for key in ps:
        p, state = params(name, torch.float64)[key].detach(), {}
        for t in range(1, 5):
            g = gradient(p, key, t) + coupled * p
            d = (p - module.step(p, g, state, t, {**h, "weight_decay": 0.0})) / h["lr"]
            ours = {**case, "decay": rule.decay, **({"weight_decay": 0.0} if coupled else {})}
            p = p if rule(**h).skips_update(t) else naive.step(p, d, ours)
        torch.testing.assert_close(ps[key].detach(), p, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def matrix(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def steps(ps: list[Parameter], optimizer: RuleOptimizer, some: range, key: str = "x") -> None:
    for t in some:
        for i, p in enumerate(ps):
            p.grad = gradient(p, f"{key}{i}", t)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("case", [BALL, RECORD], ids=["ball", "record"])
def test_fused_layers_experts_and_transposed_matrices_are_each_for_themselves(name: str, case: dict[str, Any]) -> None:
    """One parameter of several matrices moves as these matrices would as parameters."""
    case = case | narrow_dtype(name)
    forms: list[tuple[dict[str, Any], Any, Any]] = [
        ({"blocks": 3}, lambda ms: torch.cat(ms), lambda p: p.split(6)),
        ({"blocks": (6, 6)}, lambda ms: torch.cat(ms[:2]), lambda p: p.split(6)),
        (
            {"blocks": (2, 2)},
            lambda ms: torch.stack([m.view(3, 2, 10) for m in ms[:2]], 1).flatten(0, 2),
            in_turns,
        ),
        ({"transposed": True}, lambda ms: ms[0].mT.contiguous(), lambda p: [p.mT]),
        ({}, lambda ms: torch.stack(ms), lambda p: p.unbind()),
        ({"transposed": True}, lambda ms: torch.stack(ms).mT.contiguous(), lambda p: p.mT.unbind()),
    ]
    for settings, fuse, split in forms:
        apart = [matrix(6, 10, seed=i) for i in range(3)]
        fused = Parameter(fuse([p.detach() for p in apart]))
        one, many = make(name, [fused], **case, **settings), make(name, apart, **case)
        for t in range(1, 4):
            for i, p in enumerate(apart):
                p.grad = gradient(p, str(i), t)
            fused.grad = fuse([p.grad for p in apart])
            one.step()
            many.step()
        for actual, p in zip(split(fused), apart, strict=False):
            torch.testing.assert_close(actual, p, rtol=2e-5, atol=2e-6, msg=lambda m, s=settings: f"{s}: {m}")


def in_turns(p: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1) for x in p.view(3, 2, 2, 10).unbind(1)]


def narrow_dtype(name: str) -> dict[str, Any]:
    return {"ns_dtype": "float32"} if name == "muon" else {}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_large_convolution_and_strange_strides(name: str) -> None:
    """Beyond one block of the cache, in four dimensions, and in another memory order."""
    case = {**RECORD, "cautious_decay": 0.0}  # the sign of a tiny product is rounding's
    for p in (matrix(500, 300), matrix(24, 5, 3, 3), Parameter(matrix(40, 30).detach().t())):
        start = p.detach().double().clone()
        optimizer = make(name, [p], **{"weight_decay": 0.0, **case, **narrow_dtype(name)})
        p.grad = gradient(p, "one", 1)
        plain = Parameter(p.detach().clone())
        plain.grad = p.grad.clone()
        make(name, [plain], lr=0.1, weight_decay=0.0, **narrow_dtype(name)).step()
        d = (start - plain.detach().double()) / 0.1
        optimizer.step()
        expected = naive.step(start.flatten(1), d.flatten(1), case).view(p.shape)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
def test_the_norm_of_bfloat16_weights_does_not_drift(rounding: str) -> None:
    p = matrix(64, 48, dtype=torch.bfloat16)
    start = p.detach().float().norm()
    optimizer = make("muon", [p], lr=2e-3, constraint="hyperball", param_rounding=rounding)
    steps([p], optimizer, range(1, 301))
    assert abs(p.detach().float().norm() / start - 1) < 2e-3
    assert ("radius" in optimizer.state[p]) == (rounding != "kahan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("case", [BALL, RECORD], ids=["ball", "record"])
def test_save_load_continue_is_bitwise(name: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    ps = [matrix(6, 9, dtype=dtype), matrix(3, 4, 5, dtype=dtype)]
    optimizer = make(name, ps, **case)
    steps(ps, optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = [Parameter(p.detach().clone()) for p in ps]
    resumed = make(name, other, **case)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(ps, optimizer, range(4, 7))
    steps(other, resumed, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(ps, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(resumed), strict=True))


def test_nothing_of_it_runs_when_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW is torch's fused kernel and nothing else; no rule asks for sums."""
    from lightning_optim.core.step import apply, constraints, elementwise

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("off")

    monkeypatch.setattr(constraints, "factors", never)
    monkeypatch.setattr(apply.ParamWriter, "_cautious_factor", never)
    for name in RULES:
        run(name, params(name), range(1, 3))
    monkeypatch.setattr(elementwise, "step_param", never)
    run("adamw", params("adamw"), range(1, 3))


def test_with_everything_at_its_neutral_value_it_is_the_plain_step() -> None:
    neutral = {"uw_floor": 0.0, "uw_floor_by": "row", "radial_damping": 1.0, "cautious_when": "after_pin"}
    for name in RULES:
        plain, shaped = params(name), params(name)
        run(name, plain, range(1, 4))
        run(name, shaped, range(1, 4), **neutral)
        assert all(torch.equal(plain[k], shaped[k]) for k in plain)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_hyperball_keeps_the_norm_and_makes_lr_an_angle(name: str) -> None:
    small, large = matrix(12, 20), Parameter(matrix(12, 20).detach() * 64)
    start = small.detach().norm().item()
    a, b = (make(name, [p], lr=0.02, constraint="hyperball", weight_decay=0.0) for p in (small, large))
    for t in range(1, 1001):
        before = small.detach().clone()
        for p, optimizer in ((small, a), (large, b)):
            p.grad = gradient(p, "x", t)
            optimizer.step()
        if t % 100 == 1:
            assert (small - before).norm() <= 2 * 0.02 * before.norm()
    assert abs(small.detach().norm().item() / start - 1) < 1e-6
    torch.testing.assert_close(small * 64, large, rtol=1e-4, atol=1e-3)


def test_hyperball_in_adamws_convention_steps_as_far_as_adamw() -> None:
    p = matrix(12, 20)
    start = p.detach().clone()
    optimizer = make("muon", [p], lr=1e-3, lr_convention="adamw", constraint="hyperball")
    steps([p], optimizer, range(1, 2))
    moved = (p - start).norm().item()
    assert 0.9 * 0.2e-3 * 240**0.5 < moved <= 0.2e-3 * 240**0.5 * (1 + 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_takes_them(name: str) -> None:
    """Hyperball keeps the norms, the record's settings keep everything finite and away from the plain step."""
    case: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0}
    ball, record, plain = params(name), params(name), params(name)
    run(name, ball, range(1, 5), **case, constraint="hyperball")
    run(name, record, range(1, 5), **{**RECORD, **case, "uw_floor": 2.0})
    run(name, plain, range(1, 5), **case)
    for key, p in params(name).items():
        torch.testing.assert_close(ball[key].norm(), p.norm(), rtol=2e-6, atol=1e-7)
        assert record[key].isfinite().all() and not torch.equal(ball[key], p) or p.ndim == 0, key
    assert not torch.equal(record["wide"], plain["wide"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_pin_moves_the_norm_by_the_radial_part_of_the_step(name: str) -> None:
    """|W_t| - |W_{t-1}| = - lr <O, W> / |W|."""
    p = matrix(8, 6, dtype=torch.float64)
    pinned = make(name, [p], lr=0.03, pin=True, weight_decay=0.2, **strict(name))
    for t in range(1, 5):
        free = Parameter(p.detach().clone())
        before = free.detach().clone()
        other = make(name, [free], lr=0.03, weight_decay=0.0, **strict(name))
        if t > 1:
            other.load_state_dict({
                "state": pinned.state_dict()["state"],
                "param_groups": other.state_dict()["param_groups"],
            })
        p.grad = free.grad = gradient(p, "x", t)
        other.step()
        o = (before - free.detach()) / 0.03
        pinned.step()
        expected = -0.03 * (o * before).sum() / before.norm()
        assert abs((p.detach().norm() - before.norm() - expected).item()) < 1e-12


def test_a_zero_matrix_starts_under_floor_brake_and_pin() -> None:
    p = Parameter(torch.zeros(6, 4))
    optimizer = make("muon", [p], **RECORD)
    steps([p], optimizer, range(1, 4))
    assert p.isfinite().all() and p.norm() > 0.05


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_fused_backward_is_the_same_bit_for_bit(name: str) -> None:
    results = []
    for fused in (True, False):
        p = matrix(6, 9)
        optimizer = make(name, [p], **RECORD)
        if fused:
            optimizer.fuse_backward()
        for t in range(1, 4):
            (p * gradient(p, "x", t)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(p.detach().clone())
    assert torch.equal(*results)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"constraint": "ball"}, "unknown value 'ball'"),
    ({"constraint": "hyperball", "pin": True}, "leave out pin and uw_floor"),
    ({"constraint": "hyperball", "uw_floor": 0.3}, "uw_floor_by='row'"),
    ({"uw_floor": -1.0}, "uw_floor must be"),
    ({"uw_floor_by": "column"}, "unknown value 'column'"),
    ({"cautious_when": "later"}, "unknown value 'later'"),
]


@pytest.mark.parametrize(("case", "warned_record"), ERRORS, ids=str)
def test_settings_that_cannot_be(case: dict[str, Any], warned_record: str) -> None:
    with pytest.raises(ValueError, match=warned_record):
        make("muon", [matrix(4, 3)], **case)


def test_what_a_constraint_cannot_take_is_named() -> None:
    with pytest.raises(ValueError, match="parameter 1 of group 'muon': a matrix of zeros"):
        make("muon", [matrix(4, 3), Parameter(torch.zeros(4, 3))], constraint="hyperball")
    first, some = matrix(4, 3), Parameter(torch.stack([matrix(4, 3).detach(), torch.zeros(4, 3)]))
    before, optimizer = first.detach().clone(), make("muon", [first, some], constraint="hyperball")
    with pytest.raises(ValueError, match="parameter 1: a matrix of zeros"):
        steps([first, some], optimizer, range(1, 2))
    assert torch.equal(first, before) and not any(int(s["step"]) for s in optimizer.state.values())
    with pytest.raises(ValueError, match="adam applies weight_decay itself"):
        make("adam", [matrix(4, 3)], weight_decay=0.1, cautious_decay=True)


def test_cautious_decay_of_the_weight_decay_is_a_rate_of_its_own() -> None:
    a, b = matrix(6, 5), matrix(6, 5)
    one = make("lion", [a], lr=0.1, weight_decay=0.3, cautious_decay=True)
    other = make("lion", [b], lr=0.1, weight_decay=0.0, cautious_decay=0.3)
    steps([a], one, range(1, 4))
    steps([b], other, range(1, 4))
    assert torch.equal(a, b)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("case", [BALL, RECORD], ids=["ball", "record"])
def test_two_ranks_equal_one_process(pool: Pool, name: str, case: dict[str, Any]) -> None:
    for dtype, turned in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        settings = {**case, "weight_decay": 0.0, "transposed": turned, **narrow_dtype(name)}
        torch.set_num_threads(1)
        model = jobs.Model(name, dtype)
        start = {k: p.detach().float().clone() for k, p in model.named_parameters()}
        jobs.take_steps(model, make(name, model.parameters(), **settings), range(1, 5))
        torch.set_num_threads(2)
        for actual, _ in pool.run("tests.helpers.jobs:train", 2, name=name, steps=4, dtype=dtype, settings=settings):
            for key, p in model.named_parameters():
                moved = (p.detach().float() - start[key]).norm()
                rounded = 1e-2 if dtype == torch.bfloat16 else 1e-5
                assert (actual[key].float() - p.detach().float()).norm() <= rounded * moved + 1e-6, (key, dtype, turned)


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout", ["tp", "fsdp2+tp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("hsdp", "mixed", "shared"))]
)
def test_every_layout_equals_one_process(pool: Pool, layout: str) -> None:
    """Norms of matrices that are cut by columns, both ways, or not at all, and of rows that are cut."""
    for names, case in itertools.product([["adamw", "adafactor"], ["muon"]], [BALL, RECORD]):
        settings = {**case, "weight_decay": 0.0, **narrow_dtype(names[0])}
        job = {"layout": layout, "names": names, "steps": 4, "settings": settings}
        for actual in pool.run("tests.helpers.jobs:laid_out", jobs.LAYOUTS[layout], **job):
            for name in names:
                torch.set_num_threads(1)
                model, start = jobs.Model(name), dict(jobs.Model(name).named_parameters())
                jobs.take_steps(model, make(name, model.parameters(), **settings), range(1, 5))
                torch.set_num_threads(2)
                for key, p in model.named_parameters():
                    assert (actual[name][key] - p).norm() <= 1e-5 * (p - start[key]).norm() + 1e-6, (name, key)
