"""A rule that computes one step for all parameters: what it is given, and what becomes of its direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.rule import REGISTRY, GlobalStepRule, Objective, zeros


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry, restored afterwards."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


SEEN: list[dict[str, Any]] = []


def declare(*, product: bool = False) -> None:
    """Register a rule that notes what it is given, and steps along the gradient."""

    @dataclass(frozen=True)
    class Noting(GlobalStepRule):
        lr: float = 1.0
        weight_decay: float = 0.0

        name: ClassVar[str] = "noting"
        source: ClassVar[str] = "none"
        state: ClassVar[Any] = {"past": zeros("mn"), "count": zeros("12")}

        def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:
            value, gradient = at.at(at.x - 1)
            SEEN.append({"x": at.x.clone(), "value": at.value, "gradient": at.gradient.clone()})
            SEEN[-1] |= {"moved": (value, gradient), "shapes": (tuple(s.past.shape), tuple(s.count.shape))}
            if product:
                at.product(at.x)
            return at.gradient

    assert REGISTRY["noting"] is Noting and Noting.curvature_input == "loss" and Noting.needs_all_gradients


def weights() -> list[Parameter]:
    made = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=made, dtype=torch.float64)) for shape in ((3, 2), (4,))]


def closure(ps: list[Parameter]) -> Any:
    """The loss 3/2 |x|^2, and its gradients."""

    def loss() -> float:
        for p in ps:
            p.grad = 3 * p.detach()
        return sum(float(1.5 * p.detach().square().sum()) for p in ps)

    return loss


def test_all_parameters_are_one_vector_with_their_decay() -> None:
    declare()
    SEEN.clear()
    ps = weights()
    x = torch.cat([p.detach().flatten() for p in ps])
    optimizer = RuleOptimizer(ps, {"rule": "noting", "lr": 0.5, "weight_decay": 0.25})
    optimizer.step(closure(ps))
    (seen,) = SEEN
    assert torch.equal(seen["x"], x) and seen["shapes"] == ((10,), (2,))
    torch.testing.assert_close(seen["gradient"], 3.25 * x, rtol=1e-12, atol=0)
    assert seen["value"] == pytest.approx(3.25 / 2 * float(x @ x), rel=1e-12)
    value, gradient = seen["moved"]
    torch.testing.assert_close(gradient, 3.25 * (x - 1), rtol=1e-12, atol=1e-12)
    assert value == pytest.approx(3.25 / 2 * float((x - 1) @ (x - 1)), rel=1e-12)
    stepped = torch.cat([p.detach().flatten() for p in ps])
    torch.testing.assert_close(stepped, x - 0.5 * 3.25 * x, rtol=1e-12, atol=1e-12)


def test_no_direction_is_asked_for_while_the_learning_rate_is_zero() -> None:
    declare()
    SEEN.clear()
    ps = weights()
    before = [p.detach().clone() for p in ps]
    RuleOptimizer(ps, {"rule": "noting", "lr": 0.0}).step(closure(ps))
    assert not SEEN and all(torch.equal(p, x) for p, x in zip(ps, before, strict=True))


def test_a_closure_gives_no_products_and_nothing_is_written() -> None:
    declare(product=True)
    ps = weights()
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError, match="noting"):
        RuleOptimizer(ps, {"rule": "noting"}).step(closure(ps))
    assert all(torch.equal(p, x) for p, x in zip(ps, before, strict=True))


def test_the_base_is_no_rule_and_has_no_direction() -> None:
    assert GlobalStepRule not in REGISTRY.values()
    with pytest.raises(NotImplementedError):
        GlobalStepRule().direction(SimpleNamespace(), SimpleNamespace())  # pyright: ignore[reportArgumentType]
    g = torch.ones(1, 2, 3)
    assert GlobalStepRule().update(g, SimpleNamespace(), None, 1) is g, "the step is `direction`, not `update`"
