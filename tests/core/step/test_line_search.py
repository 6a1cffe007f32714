"""Rules that learn curvature from differences of gradients, and those that look for a step by the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import Trainer

import hf_integration
from lightning_optim import (
    LBFGS,
    MLBFGS,
    OLBFGS,
    EMANesterov,
    HessianFree,
    MuLoCo,
    RuleOptimizer,
    SR1Cubic,
    TailEMA,
    build_optimizer,
)
from lightning_optim.curvature import CurvatureEstimator
from lightning_optim.ops.krylov import conjugate_gradients
from lightning_optim.ops.secant import cubic_step, damped, dot, sr1, two_loop
from tests.curvature.test_estimator import Keep, Once, Small, batches
from tests.helpers import rules
from tests.helpers.pool import Pool
from tests.hf_integration import test_trainer as test_hf
from tests.test_lightning import Net, Rows, assert_same, of_precision, trainer, weights
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings


@pytest.fixture(autouse=True)
def nothing_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No losses made of gradients here."""
    monkeypatch.setattr(rules, "feeding", False)


PLAIN: dict[str, Any] = {
    "lr": 1.0,
    "beta": 0.0,
    "interval": 1,
    "momentum": 0.0,
    "bounds": None,
    "kl_clip": None,
}
"""L-BFGS."""


def pairs(h: int, n: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A gradient and pairs of a quadratic: (g, steps, changes)."""
    made = torch.Generator().manual_seed(0)
    g, *s = torch.randn(h + 1, 1, 1, n, generator=made, dtype=torch.float64)
    curvature = torch.linspace(0.5, 5, n, dtype=torch.float64)
    return g.to(dtype), [x.to(dtype) for x in s], [(curvature * x).to(dtype) for x in s]


def test_two_loop_maps_the_newest_change_to_its_step() -> None:
    _, steps, changes = pairs(4, 50, torch.float64)
    torch.testing.assert_close(two_loop(changes[-1], steps, changes), steps[-1], rtol=1e-12, atol=1e-12)


def test_two_loop_in_float32() -> None:
    exact = two_loop(*pairs(10, 1000, torch.float64))
    error = (two_loop(*pairs(10, 1000, torch.float32)).double() - exact).norm() / exact.norm()
    assert error < 1e-6


def test_damping_keeps_curvature_within_bounds() -> None:
    made = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 3, 4, generator=made, dtype=torch.float64)
    asked = torch.tensor([-3.0, 0.005, 0.5, 1.4, 40.0], dtype=torch.float64).view(5, 1, 1)
    actual = [dot(steps, damped(steps, asked * steps, (0.01, 1.5), most)) / dot(steps, steps) for most in (1.0, 0.99)]
    torch.testing.assert_close(actual[0].flatten().tolist(), [0.01, 0.01, 0.5, 1.4, 1.5], rtol=1e-12, atol=1e-12)
    mu = 0.99 * 0.005 + 0.01  # (1 - 0.01) / (1 - 0.005) = 0.99497 is above the largest tau
    assert actual[1].flatten()[1].item() == pytest.approx(mu, rel=1e-12)


def test_the_mean_scale_is_over_pairs_that_count() -> None:
    g, steps, changes = pairs(3, 50, torch.float64)
    ratios = [dot(s, y) / dot(y, y) for s, y in zip(steps, changes, strict=True)]
    none = [torch.zeros_like(g)]
    for pad in ([], none, [*none, *none]):
        content = [*pad, *steps], [*pad, *changes]
        basis = torch.linalg.qr(torch.stack([x.flatten() for x in (*steps, *changes)], 1))[0]
        across = (g.flatten() - basis @ (basis.mT @ g.flatten())).view_as(g)
        for scale, factor in (("newest", ratios[-1]), ("mean", sum(ratios) / 3)):
            actual = two_loop(across, *content, scale=scale)  # pyright: ignore[reportArgumentType]
            torch.testing.assert_close(actual, factor * across, rtol=1e-9, atol=1e-9)


def wolfe(value: Callable[[Tensor], Tensor], start: Tensor, d: Tensor) -> Tensor:
    """A point start - a d that fulfils the weak Wolfe conditions (1e-4, 0.9), by bisection from a = 1."""

    def along(a: float) -> tuple[float, float]:
        x = (start - a * d).requires_grad_()
        y = value(x)
        (g,) = torch.autograd.grad(y, x)
        return y.item(), -(g * d).sum().item()

    low, high, a = 0.0, float("inf"), 1.0
    f0, slope0 = along(0.0)
    for _ in range(60):
        f, slope = along(a)
        if f > f0 + 1e-4 * a * slope0:
            high = a
        elif slope < 0.9 * slope0:
            low = a
        else:
            break
        a = (low + high) / 2 if high < float("inf") else 2 * a
    return start - a * d


def iterations(value: Callable[[Tensor], Tensor], start: Tensor, search: Callable[..., Tensor], goal: float) -> int:
    """Steps of the rule, each of the length a search finds, until the gradient is small."""
    p = Parameter(start.clone())
    optimizer = MLBFGS([p], **PLAIN)
    for t in range(200):
        (g,) = torch.autograd.grad(value(p), p)
        if g.norm() <= goal:
            return t
        p.grad = g
        before = p.detach().clone()
        optimizer.step()
        with torch.no_grad():
            d = before - p
        actual = search(value, before, d)
        with torch.no_grad():
            p.copy_(actual)
    raise AssertionError(f"no gradient of {goal} in 200 steps")


def test_solves_a_quadratic_in_its_dimension_with_exact_line_search() -> None:
    """There L-BFGS is the method of conjugate gradients (Nocedal & Wright 2006, section 7.2)."""
    scale = torch.linspace(1, 100, 10, dtype=torch.float64)
    start = torch.ones(10, dtype=torch.float64)

    def exact(value: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> Tensor:
        return x - (d * scale * x).sum() / (d * scale * d).sum() * d

    assert iterations(lambda x: 0.5 * (scale * x * x).sum(), start, exact, 1e-8) <= 11


def test_solves_rosenbrock_in_the_iterations_of_the_literature() -> None:
    """From (-1.2, 1) to a gradient of 1e-5: 34 iterations of BFGS (Nocedal & Wright 2006, section 6.1)."""

    def value(x: Tensor) -> Tensor:
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    actual = {goal: iterations(value, start, wolfe, goal) for goal in (1e-5, 1e-8)}
    assert actual[1e-5] <= 40, actual
    assert actual[1e-8] <= actual[1e-5] + 3, actual


def test_zero_steps_make_no_pairs() -> None:
    p = Parameter(torch.ones(3, 4))
    optimizer = MLBFGS([p], **{**PLAIN, "lr": 0.0})
    for _ in range(3):
        p.grad = torch.randn(3, 4)
        optimizer.step()
    assert not any(x.any() for key, x in optimizer.state[p].items() if key.startswith(("step_", "change_")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history": 0}, "history and interval must be >= 1"),
        ({"beta": 1.0}, "beta and damping must lie in"),
        ({"bounds": (1.5, 2.0)}, "bounds must be .low, high."),
        ({"kl_clip": 0.0}, "kl_clip must be positive"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(torch.nn.Linear(2, 2), "mlbfgs", lr=1.0, **settings)


# -- rules that search ------------------------------------------------------------------------------------------------

SEARCHING: dict[str, dict[str, Any]] = {
    "lbfgs": {"max_iter": 3, "history_size": 4, "line_search_fn": "strong_wolfe"},
    "hessian_free": {"cg_iter": 4},
    "olbfgs": {"history": 3},
    "sr1_cubic": {"history": 3},
}
each = pytest.mark.parametrize("name", SEARCHING)


SINGLE: dict[str, Any] = {
    "max_iter": 1,
    "max_eval": 20,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
    "line_search_fn": "strong_wolfe",
}
"""One iteration of L-BFGS per step."""


def rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def closure_of(p: Tensor, value: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        p.grad = None
        loss = value(p)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_torch_s_own_on_all_parameters_together(search: Any) -> None:
    """Several groups are one vector, checkpoints hold all there is, and weight decay is a part of the loss."""
    settings: dict[str, Any] = {"lr": 0.5, "max_iter": 4, "history_size": 3, "line_search_fn": search}
    theirs, ours, batch, decay = Small(), Small(), batches()[0], 0.01
    reference = torch.optim.LBFGS(theirs.parameters(), **settings)
    optimizer = build_optimizer(ours, "lbfgs", weight_decay=decay, **settings)
    assert len(optimizer.param_groups) > 1

    def penalised() -> Tensor:
        reference.zero_grad()
        penalty = sum((p.square().sum() for p in theirs.parameters() if p.ndim > 1), torch.zeros(()))
        loss = theirs.loss(batch) + 0.5 * decay * penalty
        loss.backward()
        return loss

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ours.loss(batch)
        loss.backward()
        return loss

    for t in range(5):
        reference.step(penalised)
        value = ours.loss(batch).item()
        assert optimizer.step(closure).item() == value
        for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=key)
        if t == 2:
            saved = optimizer.state_dict()
            optimizer = build_optimizer(ours, "lbfgs", lr=1.0, history_size=3)
            optimizer.load_state_dict(saved)


def test_lbfgs_solves_rosenbrock_in_the_iterations_of_the_literature() -> None:
    """From (-1.2, 1): about 35 iterations, 45 evaluations (Nocedal & Wright 2006, section 6.1)."""
    p = Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer, calls = LBFGS([p], history_size=5, **SINGLE), 0

    def value(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rosenbrock(x)

    closure, t = closure_of(p, value), 0
    while t < 60:
        t += 1
        optimizer.step(closure)
        if torch.autograd.grad(rosenbrock(p), p)[0].norm() <= 1e-8:
            break
    assert (p - 1).norm() < 1e-8
    assert t <= 40, t
    assert calls <= 60 + t, calls  # one per step is of the point the last step has ended at


def test_lbfgs_solves_a_quadratic_in_about_its_dimension() -> None:
    scale = torch.linspace(1, 100, 10, dtype=torch.float64)
    p = Parameter(torch.ones(10, dtype=torch.float64))
    optimizer = LBFGS([p], **SINGLE)
    t = 0
    while t < 40:
        t += 1
        optimizer.step(closure_of(p, lambda x: 0.5 * (scale * x * x).sum()))
        if p.norm() < 1e-8:
            break
    assert t <= 30, t  # 11 with an exact line search


def test_olbfgs_takes_two_gradients_of_a_batch_and_solves_a_quadratic() -> None:
    """Without a line search: as many steps as L-BFGS with one, 32 there; Rosenbrock's valley takes it 89."""
    scale, calls = torch.linspace(1, 100, 10, dtype=torch.float64), 0

    def quadratic(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * (scale * x * x).sum()

    for value, start, most in ((quadratic, torch.ones(10), 40), (rosenbrock, torch.tensor([-1.2, 1.0]), 100)):
        p, t = Parameter(start.double()), 0
        optimizer = OLBFGS([p], lr=1.0, damping=0.0)
        while t < 200 and torch.autograd.grad(value(p), p)[0].norm() > 1e-8:
            optimizer.step(closure_of(p, value))
            t += 1
        assert t <= most, t
        if value is quadratic:
            assert calls == 3 * t + 1  # with the test's own
            steps = [optimizer.state[p][f"step_{i}"] for i in range(10)]
            for i, s in enumerate(steps):
                torch.testing.assert_close(optimizer.state[p][f"change_{i}"], scale * s, rtol=1e-6, atol=1e-12)


def test_olbfgs_writes_out_its_second_step() -> None:
    """H of one pair: V^T c V + s s^T / (s^T y), V = I - y s^T / (s^T y), c = s^T y / y^T y."""
    p = Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    scale, lr, damping = torch.tensor([3.0, 1.0, 7.0], dtype=torch.float64), 0.5, 0.01
    optimizer = OLBFGS([p], lr=lr, damping=damping)
    x = p.detach().clone()
    g = scale * x
    s = -lr * g / g.abs().sum()
    y = scale * s + damping * s
    optimizer.step(closure_of(p, lambda x: 0.5 * (scale * x * x).sum()))
    torch.testing.assert_close(p.detach(), x + s, rtol=1e-12, atol=1e-12)
    v = torch.eye(3, dtype=torch.float64) - torch.outer(y, s) / (s @ y)
    inverse = v.mT @ v * (s @ y) / (y @ y) + torch.outer(s, s) / (s @ y)
    optimizer.step(closure_of(p, lambda x: 0.5 * (scale * x * x).sum()))
    torch.testing.assert_close(p.detach(), x + s - lr * inverse @ (scale * (x + s)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sr1_matrix_maps_steps_to_changes(dtype: torch.dtype) -> None:
    """Of a quadratic all, not the last only; across them it is the newest pair's <y, y> / <s, y>."""
    made = torch.Generator().manual_seed(0)
    steps = torch.randn(6, 1000, generator=made, dtype=torch.float64)
    changes = torch.linspace(-0.5, 5, 1000, dtype=torch.float64) * steps
    zero = torch.zeros(2, 1000, dtype=torch.float64)
    u, e, c = sr1(*(list(torch.cat([zero, x]).to(dtype)) for x in (steps, changes)))
    u = u.double()
    assert u.shape == (1000, 6) and e.dtype == torch.float64
    assert c == pytest.approx(float(changes[-1].dot(changes[-1]) / steps[-1].dot(changes[-1])), rel=1e-6)
    actual = (steps @ u) * (e - c) @ u.mT + c * steps
    limit = 5e-6 if dtype == torch.float32 else 1e-13  # measured: 2e-7 and 3e-15
    assert ((actual - changes).norm(dim=1) <= limit * changes.norm(dim=1)).all()
    torch.testing.assert_close(u.mT @ u, torch.eye(6).double(), rtol=0, atol=10 * torch.finfo(dtype).eps)
    assert sr1(list(zero), list(zero))[0].shape == (1000, 0)


@pytest.mark.parametrize(
    ("e", "g", "mu", "z"),
    [(2.0, 3.0, 1e-12, -1.5), (0.0, 1.0, 1.0, -1.0), (-1.0, 0.01, 1.0, -1.0099019514), (5.0, 0.0, 1.0, 0.0)],
)
def test_the_cubic_step_of_one_direction(e: float, g: float, mu: float, z: float) -> None:
    """The zeros of g + e z + mu |z| z, also where the curvature is negative and the slope small."""
    made = (torch.tensor([g], dtype=torch.float64), torch.ones(1, 1).double(), torch.tensor([e], dtype=torch.float64))
    step, product, least = cubic_step(*made, 1.0, mu=mu, reach=10.0)
    assert step.item() == pytest.approx(z, rel=1e-9)
    assert product.item() == pytest.approx(e * z, rel=1e-9)
    assert least == pytest.approx(g * z + 0.5 * e * z**2 + mu / 3 * abs(z) ** 3, rel=1e-9)
    short = cubic_step(*made, 1.0, mu=mu, reach=0.3)[0].abs().item()
    assert 0.1 < short <= 0.3 if g else short == 0


def test_a_cubic_step_has_the_least_value_of_its_model() -> None:
    made = torch.Generator().manual_seed(0)
    g = torch.randn(9, generator=made, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(9, 4, generator=made, dtype=torch.float64))[0]
    e, c, mu = torch.tensor([-3.0, -0.1, 0.5, 20.0], dtype=torch.float64), 2.0, 0.7

    def model(s: Tensor) -> Tensor:  # rows
        z, beside = s @ u, s - s @ u @ u.mT
        quadratic = (z.square() * e).sum(-1) + c * beside.square().sum(-1)
        return s @ g + 0.5 * quadratic + mu / 3 * (z.abs().pow(3).sum(-1) + beside.norm(dim=-1) ** 3)

    step, product, least = cubic_step(g, u, e, c, mu=mu, reach=100.0)
    assert model(step[None]).item() == pytest.approx(least, rel=1e-12)
    torch.testing.assert_close(product, u @ (e * (u.mT @ step)) + c * (step - u @ (u.mT @ step)))
    for size in (1e-3, 0.1, 1.0, 10.0):
        others = step + size * torch.randn(500, 9, generator=made, dtype=torch.float64)
        assert (model(others) > least).all()


def chained(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def naive_sr1_cubic(value: Callable[[Tensor], Tensor], x: Tensor, steps: int, history: int) -> list[Tensor]:
    """The rule with dense matrices, written from its docstring: where it is after every step."""
    pairs: list[tuple[Tensor, Tensor]] = []
    reach, out, identity = 1.0, [], torch.eye(len(x), dtype=x.dtype)

    def at(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        f = value(x)
        return f.item(), torch.autograd.grad(f, x)[0]

    f, g = at(x)
    for _ in range(steps):
        positive = [float(y @ y / (s @ y)) for s, y in pairs if s @ y > 0]
        c = positive[-1] if positive else 1.0
        b = c * identity
        for s, y in pairs:
            a = y - b @ s
            if abs(a @ s) > 1.5e-8 * a.norm() * s.norm():
                b = b + torch.outer(a, a) / (a @ s)
        extra, vectors = torch.linalg.eigh(b - c * identity)
        along = [(float(e) + c, v) for e, v in zip(extra, vectors.mT, strict=True) if abs(e) > 1e-9 * extra.abs().max()]
        rest = g - sum(((v @ g) * v for _, v in along), torch.zeros_like(g))
        if rest.norm() > 1e-9 * g.norm():
            along.append((c, rest / rest.norm()))
        mu, sizes, s = 0.5, [], torch.full_like(x, float("inf"))
        while s.norm() > reach:
            mu *= 2
            sizes = [np.roots([mu, e, -abs(float(v @ g))]).max() for e, v in along]
            s = sum((-torch.sign(v @ g) * z * v for z, (_, v) in zip(sizes, along, strict=True)), torch.zeros_like(x))
        least = float(g @ s + 0.5 * s @ b @ s) + mu / 3 * sum(z**3 for z in sizes)
        after, h = at(x + s)
        if abs(s @ (h - g - b @ s)) > 1e-8 * s.norm() * (h - g - b @ s).norm():
            pairs = [*pairs, (s, h - g)][-history:]
        rho = (after - f) / least
        reach = max(reach, 2 * float(s.norm())) if rho > 0.75 else reach if rho >= 0.1 else 0.5 * float(s.norm())
        if rho >= 0.1:
            x, f, g = x + s, after, h
        out.append(x)
    return out


def test_sr1_cubic_goes_the_way_of_dense_matrices() -> None:
    start = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
    p = Parameter(start.clone())
    optimizer = SR1Cubic([p], history=4)
    way = naive_sr1_cubic(chained, start, 12, 4)
    assert sum(bool(torch.equal(a, b)) for a, b in zip(way, way[1:], strict=False)) >= 2  # steps that are not taken
    for x in way:
        optimizer.step(closure_of(p, chained))
        torch.testing.assert_close(p.detach(), x, rtol=1e-7, atol=1e-8)


def test_sr1_cubic_takes_as_many_steps_as_sr1_in_a_trust_region() -> None:
    """49 to 58 for Rosenbrock's function with the algorithm 6.2 of Nocedal & Wright 2006 and radii from 0.1 to 10."""
    scale = torch.linspace(1, 100, 10, dtype=torch.float64)

    def quadratic(x: Tensor) -> Tensor:
        return 0.5 * (scale * x * x).sum()

    for value, start, most in ((quadratic, torch.ones(10), 16), (rosenbrock, torch.tensor([-1.2, 1.0]), 65)):
        p, t = Parameter(start.double()), 0
        optimizer = SR1Cubic([p])
        while t < 100 and torch.autograd.grad(value(p), p)[0].norm() > 1e-8:
            optimizer.step(closure_of(p, value))
            t += 1
        assert t <= most, t  # 14 and 57


def test_sr1_cubic_leaves_a_saddle() -> None:
    p = Parameter(torch.tensor([1e-9, 0.5], dtype=torch.float64))
    optimizer = SR1Cubic([p])
    for _ in range(15):
        optimizer.step(closure_of(p, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2))
    torch.testing.assert_close(p.detach().abs(), torch.tensor([1.0, 0.0]).double(), rtol=1e-6, atol=1e-6)


def least_squares() -> tuple[nn.Linear, Callable[[Any], Tensor], Any, Tensor]:
    """A linear model, its loss, a batch and the best [weight, bias]."""
    made = torch.Generator().manual_seed(0)
    model = nn.Linear(7, 3, dtype=torch.float64)
    x = torch.randn(40, 7, generator=made, dtype=torch.float64)
    y = torch.randn(40, 3, generator=made, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, x.new_ones(40, 1)], 1), y).solution.mT
    return model, lambda batch: F.mse_loss(model(batch[0]), batch[1]), (x, y), best


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_hessian_free_solves_linear_least_squares_in_one_step(method: Any) -> None:
    model, loss, batch, best = least_squares()
    optimizer = build_optimizer(model, "hessian_free", lr=1.0, damping=0.0, tolerance=0.0)
    estimator = CurvatureEstimator(model, optimizer, loss, method=method)
    estimator.record_batch(batch)
    loss(batch).backward()
    estimator.estimate()
    optimizer.step()
    actual = torch.cat([model.weight, model.bias[:, None]], 1)
    torch.testing.assert_close(actual, best, rtol=1e-10, atol=1e-10)
    assert estimator.seconds > 0


def test_conjugate_gradients_take_as_many_iterations_as_there_are_eigenvalues() -> None:
    made = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(20, 20, generator=made, dtype=torch.float64))[0]
    b = torch.randn(20, generator=made, dtype=torch.float64)
    for values in (torch.linspace(1, 100, 20).double(), torch.tensor([1.0, 7.0, 50.0]).double().repeat(7)[:20]):
        a, calls = q @ torch.diag(values) @ q.mT, 0

        def product(v: Tensor, a: Tensor = a) -> Tensor:
            nonlocal calls
            calls += 1
            return a @ v

        for start in (torch.zeros_like(b), torch.ones_like(b)):
            calls = 0
            actual = conjugate_gradients(product, b, start, iterations=len(values.unique()), tolerance=0.0)
            assert calls == len(values.unique()) + bool(start.any())
            x, value = actual[-1]
            assert (a @ x - b).norm() <= 1e-9 * b.norm()
            assert value == pytest.approx(float(0.5 * x @ a @ x - b @ x), rel=1e-9)
            assert [v for _, v in actual] == sorted((v for _, v in actual), reverse=True)
    zero = conjugate_gradients(product, torch.zeros_like(b), torch.zeros_like(b), iterations=5, tolerance=0.0)
    assert len(zero) == 1 and not zero[0][0].any()


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_products_are_those_of_the_gauss_newton_matrix(method: Any) -> None:
    """J^T L J written out, over micro-batches of different sizes, with weight decay and a frozen parameter."""
    model = Small(dropout=0.5).train()
    model.embedding.weight.requires_grad_(False)
    some = [batches()[0], batches(1, 2)[0]]
    whole = torch.cat(some)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    made = torch.Generator().manual_seed(0)
    v = {k: torch.randn(p.shape, generator=made, dtype=torch.float64) for k, p in params.items()}

    def logits(values: dict[str, Tensor]) -> Tensor:
        out: Any = torch.func.functional_call(model.eval(), values, (whole[:, :-1],))
        return out.flatten(0, 1)

    start = {k: p.detach() for k, p in params.items()}
    probability = logits(start).softmax(-1)
    columns: Any = [torch.autograd.functional.jacobian(lambda p, k=k: logits({**start, k: p}), start[k]) for k in start]
    jacobians = [j.flatten(2) for j in columns]
    jv = sum((j @ x.flatten() for j, x in zip(jacobians, v.values(), strict=True)), torch.zeros(()))
    turned = (probability * jv - probability * (probability * jv).sum(-1, keepdim=True)) / len(jv)
    expected = [torch.einsum("bc,bcp->p", turned, j).view(p.shape) for j, p in zip(jacobians, v.values(), strict=True)]
    model.train()
    optimizer = build_optimizer(model, "hessian_free", lr=1.0)
    estimator = CurvatureEstimator(model, optimizer, model.loss, method=method)
    for batch in some:
        estimator.record_batch(batch)
    estimator.estimate()
    assert optimizer.loss_oracle is not None
    actual = optimizer.loss_oracle.product(list(params.values()), list(v.values()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 if method == "exact" else 1e-7)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, start[k]) for k, p in params.items())


def test_damping_follows_the_ratio() -> None:
    """Down where the model is right, up where the loss is curved otherwise."""
    model, loss, batch, _ = least_squares()
    for wrong, expected in ((False, 2 / 3), (True, 1.5)):
        optimizer = build_optimizer(model, "hessian_free", lr=1.0, damping=1e-3)
        estimator = CurvatureEstimator(model, optimizer, loss)
        estimator.record_batch(batch)
        loss(batch).backward()
        estimator.estimate()
        look: Any = optimizer.loss_oracle
        if wrong:
            product = look.product
            look.product = lambda params, v, product=product: [x / 10 for x in product(params, v)]
        before = loss(batch).item()
        optimizer.step()
        assert loss(batch).item() < before
        state = optimizer.state[model.weight]
        assert state["damping"].item() == pytest.approx(1e-3 * expected)
        optimizer.zero_grad()
        torch.manual_seed(1)
        model.reset_parameters()


def fed(name: str, some: list[list[Tensor]], **settings: Any) -> dict[str, Tensor]:
    """Weights after a step on each list of micro-batches."""
    model = Small(dropout=0.3).train()
    optimizer = build_optimizer(model, name, lr=1.0, **SEARCHING[name])
    estimator = CurvatureEstimator(model, optimizer, model.loss, **settings)
    for group in some:
        for batch in group:
            estimator.record_batch(batch)
            (model.loss(batch) * len(batch) / sum(map(len, group))).backward()
        grads = {p: p.grad for p in model.parameters()}
        copies = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        numbers = torch.get_rng_state()
        estimator.estimate()
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, copies[p]) for p, g in grads.items() if g is not None)
        assert torch.equal(numbers, torch.get_rng_state()) and all(m.training for m in model.modules())
        assert optimizer.loss_oracle is None
        optimizer.zero_grad()
    return weights(model)


@each
def test_micro_batches_and_a_loss_scale_change_nothing(name: str) -> None:
    some = batches(3, rows=6)
    whole = fed(name, [[x] for x in some])
    parts = fed(name, [[x[:4], x[4:]] for x in some], loss_scale=lambda: 64.0)
    start = weights(Small())
    for key, p in whole.items():
        assert (parts[key] - p).norm() <= 1e-8 * (p - start[key]).norm(), key
        assert not torch.equal(p, start[key])


@each
def test_steps_lower_the_loss_of_their_batch(name: str) -> None:
    model, batch = Small(), batches(1, 8)[0]
    lr = 0.2 if name == "olbfgs" else 1.0  # it does not look whether its step does
    optimizer = build_optimizer(model, name, lr=lr, **SEARCHING[name])
    estimator, losses = CurvatureEstimator(model, optimizer, model.loss), []
    for _ in range(6):
        estimator.record_batch(batch)
        loss = model.loss(batch)
        losses.append(loss.item())
        loss.backward()
        estimator.estimate()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0], losses


class Counting(L.Callback):
    """How often the trainer's closure is run."""

    def __init__(self) -> None:
        self.backward = 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.backward += 1


@each
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_lightning_accumulates_scales_and_calls_its_closure_once(tmp_path: Path, name: str, precision: str) -> None:
    counting, settings = Counting(), {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_steps": 3}
    net = Net(name, lr=1.0, **SEARCHING[name])
    start = weights(net)
    trainer(tmp_path, callbacks=[counting], **of_precision(precision), **settings).fit(net, Rows(8))
    assert counting.backward == 6
    assert all(not torch.equal(start[key], p) for key, p in weights(net).items())


@each
def test_lightning_installs_the_feed_and_resumes_bitwise(tmp_path: Path, name: str) -> None:
    whole = Net(name, lr=1.0, **SEARCHING[name])
    trainer(tmp_path, max_steps=6, callbacks=[Keep(tmp_path / "a.ckpt")]).fit(whole, Rows(6))
    resumed = Net(name, lr=1.0, **SEARCHING[name])
    trainer(tmp_path, max_steps=6).fit(resumed, Rows(6), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert_same(weights(whole), weights(resumed))


@each
def test_transformers_attach_installs_the_feed_and_resumes_bitwise(tmp_path: Path, name: str) -> None:
    def make() -> tuple[nn.Module, Trainer]:
        model = test_hf.llama()
        args = test_hf.arguments(
            tmp_path, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2
        )
        run = Trainer(model, args, train_dataset=test_hf.Tokens())
        return model, hf_integration.attach(run, name, lr=1.0, **SEARCHING[name])

    whole, run = make()
    start = test_hf.weights(whole)
    run.train()
    resumed, run = make()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    test_hf.assert_same(test_hf.weights(whole), test_hf.weights(resumed))
    assert all(not torch.equal(start[key], p) for key, p in test_hf.weights(whole).items())


def searched(name: str, steps: int, member: Any = None) -> tuple[nn.Module, RuleOptimizer, Callable[[], None]]:
    """A linear model after steps with an estimator, its optimizer, and what takes one more."""
    torch.manual_seed(0)
    model, loss, batch, _ = least_squares()
    optimizer = build_optimizer(model, name, lr=0.5, **SEARCHING[name])
    optimizer = optimizer if member is None else optimizer.with_averaging(member)
    estimator = CurvatureEstimator(model, optimizer, loss)

    def step() -> None:
        optimizer.zero_grad()
        estimator.record_batch(batch)
        loss(batch).backward()
        estimator.estimate()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


@pytest.mark.parametrize("name", [name for name in SEARCHING if name != "lbfgs"])
@pytest.mark.parametrize("member", [EMANesterov(0.3, 0.9, start=1), MuLoCo(every=2)], ids=["ahead", "outer"])
def test_a_search_starts_where_the_weights_are_put(name: str, member: Any) -> None:
    """Wrapping is as moving the weights by hand between the steps of the bare rule."""
    wrapped, optimizer, _ = searched(name, 5, member)
    optimizer.eval()
    bare, _, step = searched(name, 0)
    ways: list[Any] = [(p.data, p.data.clone(), torch.zeros_like(p)) for p in bare.parameters()]
    for t in range(5):
        if isinstance(member, EMANesterov) and t >= 1:
            for p, _, b in ways:
                p.add_(0.3 * b)
        step()
        for p, before, b in ways:
            if isinstance(member, EMANesterov):
                b.copy_(0.9 * b + 0.1 * (p - before))
                before.copy_(p)
            elif t % 2:
                b.mul_(0.5).add_(0.7 * (before - p))
                p.copy_(before - 0.5 * b - 0.7 * (before - p))
                before.copy_(p)
    alone = weights(searched(name, 5)[0])
    for key, p in weights(wrapped).items():
        torch.testing.assert_close(p, weights(bare)[key], rtol=1e-9, atol=1e-10)
        assert (p - alone[key]).norm() > 1e-3


@each
def test_an_average_leaves_a_search_as_it_is(name: str) -> None:
    wrapped, optimizer, _ = searched(name, 4, TailEMA(start=1, tau=2.0))
    bare = [weights(searched(name, t)[0]) for t in (2, 3, 4)]
    assert_same(weights(wrapped), bare[-1])
    optimizer.eval()
    for key, p in weights(wrapped).items():
        mean = bare[0][key].lerp(bare[1][key], 0.5).lerp(bare[2][key], 0.5)
        torch.testing.assert_close(p, 0.4 * bare[2][key] + 0.6 * mean)


@pytest.mark.parametrize("member", [EMANesterov(), MuLoCo()], ids=["ahead", "outer"])
def test_lbfgs_whose_pairs_go_from_step_to_step_is_not_moved(member: Any) -> None:
    with pytest.raises(ValueError, match="lbfgs keeps .* give it tail_ema only"):
        LBFGS([Parameter(torch.ones(2))]).with_averaging(member)


# -- what stands in the way -------------------------------------------------------------------------------------------


def backward(model: Small) -> None:
    model.loss(batches()[0]).backward()


def test_without_a_loss_the_error_says_what_to_add() -> None:
    model = Small()
    optimizer = build_optimizer(model, "lbfgs", lr=1.0)
    backward(model)
    before = weights(model)
    with pytest.raises(
        RuntimeError, match=r"loss of the batch at other weights, but no curvature estimator.*or step\(closure\)"
    ):
        optimizer.step()
    with pytest.raises(ValueError, match="the closure of this step returns none; nothing was updated"):
        optimizer.step(lambda: backward(model))
    CurvatureEstimator(model, optimizer, model.loss)
    with pytest.raises(RuntimeError, match=r"call estimate\(\) of the curvature estimator before step\(\)"):
        optimizer.step()
    assert_same(before, weights(model))
    assert all(int(s["step"]) == 0 for s in optimizer.state.values())
    free = build_optimizer(model, "hessian_free", lr=1.0)
    with pytest.raises(RuntimeError, match="which a closure cannot give.*CurvatureEstimator"):
        free.step(lambda: (backward(model), 1.0)[1])
    assert_same(before, weights(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 1.0}, "clip_norm has no gradient to clip"),
        ({"constraint": "hyperball"}, "constraint.* are not for it"),
        ({"cautious_decay": 0.1}, "constraint.* are not for it"),
        ({"fused_backward": True}, "fused_backward is not for lbfgs"),
        ({"history_size": 0}, "max_iter and history_size must be >= 1"),
        ({"line_search_fn": "armijo"}, "line_search_fn: unknown value 'armijo'"),
    ],
)
def test_what_lbfgs_cannot_do_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(Small(), "lbfgs", lr=1.0, **settings)


def test_narrow_weights_and_different_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden.weight.*keep weights in float32"):
        build_optimizer(Small(dtype=torch.bfloat16), "lbfgs", lr=1.0)
    with pytest.raises(ValueError, match="cg_iter must be >= 1"):
        HessianFree([Parameter(torch.ones(2))], cg_iter=0)
    wrong: list[dict[str, Any]] = [{"history": 0}, {"mu": 0.0}, {"reach": 0.0}]
    for settings in wrong:
        with pytest.raises(ValueError, match="history, mu and reach must be positive"):
            SR1Cubic([Parameter(torch.ones(2))], **settings)
    with pytest.raises(ValueError, match="eta must be .low, high."):
        SR1Cubic([Parameter(torch.ones(2))], eta=(0.75, 0.1))
    model = Small()
    optimizer = build_optimizer(model, "lbfgs", lr=1.0, overrides=[("head*", None, {"lr_factor": 0.5})])
    backward(model)
    with pytest.raises(ValueError, match="may differ in weight_decay only"):
        optimizer.step(lambda: (backward(model), 1.0)[1])


def test_a_search_that_finds_no_finite_step_changes_nothing() -> None:
    p = Parameter(torch.ones(3))
    optimizer = LBFGS([p], lr=1e30, max_iter=3)
    with pytest.raises(FloatingPointError, match="no finite step"):
        optimizer.step(closure_of(p, lambda x: (x**4).sum()))
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state[p]["d"].any()


def test_a_kernel_without_a_second_derivative() -> None:
    def run(**settings: Any) -> RuleOptimizer:
        model = Small()
        model.head.register_forward_pre_hook(lambda m, x: (Once.apply(x[0]),))
        optimizer = build_optimizer(model, "hessian_free", lr=1.0, cg_iter=2)
        estimator = CurvatureEstimator(model, optimizer, model.loss, **settings)
        estimator.record_batch(batches()[0])
        model.loss(batches()[0]).backward()
        estimator.estimate()
        optimizer.step()
        return optimizer

    with pytest.raises(RuntimeError, match="method='difference'"):
        run(method="exact")
    assert run(method="difference").state
    with pytest.warns(UserWarning, match="differences of gradients in place of second derivatives"):
        assert run().state


def test_zero_is_refused_by_name() -> None:
    model = Small()
    model.hidden.weight.ds_id = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match="hidden.weight: lbfgs cannot be measured in the flat parameters of FSDP1 and ZeRO"
    ):
        build_optimizer(model, "lbfgs", lr=1.0)


# -- several processes ------------------------------------------------------------------------------------------------


def train(rank: int, world: int, name: str, kind: str) -> dict[str, Tensor]:
    """Two steps on the rank's rows; the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Small()
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    outer: Any = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    rules.feeding = False
    try:
        optimizer = build_optimizer(model, name, lr=1.0, **SEARCHING[name])
        estimator = CurvatureEstimator(model, optimizer, model.loss, rank=rank) if kind != "closure" else None
        for batch in batches(2):
            mine = batch.chunk(world)[rank]
            F.cross_entropy(outer(mine[:, :-1]).transpose(1, 2), mine[:, 1:]).backward()
            if estimator is None:
                optimizer.step(lambda: torch.zeros(()))
            else:
                estimator.record_batch(mine)
                estimator.estimate()
                optimizer.step()
            optimizer.zero_grad()
    except (RuntimeError, ValueError) as error:
        return {"error": torch.tensor(list(str(error).encode()))}
    finally:
        rules.feeding = True
    return weights(model)


@pytest.mark.dist
@each
def test_two_processes_equal_one(pool: Pool, name: str) -> None:
    alone, start = train(0, 1, name, ""), weights(Small())
    for one in pool.run("tests.core.step.test_line_search:train", 2, name=name, kind="ddp"):
        for key, p in alone.items():
            assert (one[key] - p).norm() <= 1e-8 * (p - start[key]).norm(), key
    refused = {"fsdp2": "FSDP2 does not support; use DDP", "closure": "each process's closure"}
    for kind, record in refused.items():
        error = pool.run("tests.core.step.test_line_search:train", 2, name=name, kind=kind)[0]["error"]
        assert record in bytes(error.tolist()).decode()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["lbfgs", "olbfgs"])
def test_other_rules_beside_a_search_use_the_gradients_of_the_closure_s_last_call(name: str, set_to_none: bool) -> None:
    def run(*, set_to_none: bool) -> list[Tensor]:
        torch.manual_seed(0)
        w, b, x = nn.Parameter(torch.randn(4, 4) / 4), nn.Parameter(torch.randn(4) / 4), torch.randn(8, 4)
        groups = [{"params": [w], "rule": name, "lr": 0.5}, {"params": [b], "rule": "sgd", "lr": 1e-3}]
        optimizer, moves = RuleOptimizer(groups), []

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = ((x @ w.T + b).sin() ** 2).sum()
            loss.backward()
            return loss

        for _ in range(2):
            before = b.detach().clone()
            optimizer.step(closure)
            moves.append((b.detach() - before) / -1e-3)
            torch.testing.assert_close(moves[-1], b.grad, rtol=1e-4, atol=1e-4)
        return [w.detach(), b.detach()]

    for x, y in zip(run(set_to_none=set_to_none), run(set_to_none=not set_to_none), strict=True):
        assert torch.equal(x, y)
