"""Rules that learn curvature from differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import MLBFGS, build_optimizer
from lightning_optim.ops.secant import damped, dot, two_loop

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
    found = [dot(steps, damped(steps, asked * steps, (0.01, 1.5), most)) / dot(steps, steps) for most in (1.0, 0.99)]
    torch.testing.assert_close(found[0].flatten().tolist(), [0.01, 0.01, 0.5, 1.4, 1.5], rtol=1e-12, atol=1e-12)
    mu = 0.99 * 0.005 + 0.01  # (1 - 0.01) / (1 - 0.005) = 0.99497 is above the largest tau
    assert found[1].flatten()[1].item() == pytest.approx(mu, rel=1e-12)


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
        found = search(value, before, d)
        with torch.no_grad():
            p.copy_(found)
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
    found = {goal: iterations(value, start, wolfe, goal) for goal in (1e-5, 1e-8)}
    assert found[1e-5] <= 40, found
    assert found[1e-8] <= found[1e-5] + 3, found


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


def test_lbfgs_is_torch_s_own() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'lbfgs'; .*torch\.optim\.LBFGS.*mlbfgs"):
        build_optimizer(torch.nn.Linear(2, 2), "lbfgs", lr=1.0)
