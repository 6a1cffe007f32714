"""Rules that need curvature say when, take it into their state, and do not step without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.curvature_input import measured, pending, require_curvature
from tests.helpers import rules


@pytest.fixture(autouse=True)
def unfed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curvature but what a test gives."""
    monkeypatch.setattr(rules, "feeding", False)


def sophia(p: Parameter, **settings: object) -> RuleOptimizer:
    return RuleOptimizer([{"params": [p], "rule": "sophia_h", "refresh": "fixed:3", **settings}])


def estimate(x: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(value=x, count=1)


def test_curvature_is_due_by_the_step_of_the_policy() -> None:
    p, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = sophia(p)
    optimizer.add_param_group({"params": [other], "rule": "lion"})
    optimizer.has_curvature = True
    due = []
    for _ in range(7):
        p.grad = torch.ones(4)
        wanted = pending(optimizer.group_steps())
        assert all(x is p for x in wanted.get("hutchinson", [])) and set(wanted) <= {"hutchinson"}
        due.append(len(wanted))
        optimizer.step()
    assert due == [1, 0, 0, 1, 0, 0, 1]
    p.requires_grad_(False)
    p.grad = None
    assert pending(optimizer.group_steps()) == {}


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_an_estimate_enters_the_state_and_moves_nothing(storage: str) -> None:
    p = Parameter(torch.ones(64))
    optimizer = sophia(p, state_storage=storage, storage_min=1)
    metrics = optimizer.update_curvature({p: estimate(torch.full((64,), 2.0))})
    state = optimizer.state[p]
    assert p.eq(1).all() and state["step"] == 0 and metrics == {"win_rate": 1.0}
    if storage == "fp32":
        torch.testing.assert_close(state["hessian"], torch.full((64,), 0.02))
    else:
        assert state["hessian"].dtype == torch.uint8
        torch.testing.assert_close(state["hessian_scale"], torch.tensor([0.02]))
    p.grad = torch.full((64,), float("inf"))
    kept = {key: t.clone() for key, t in state.items()}
    assert optimizer.update_curvature({p: estimate(torch.ones(64))}) == {}
    assert all(torch.equal(kept[key], t) for key, t in state.items())


def test_metrics_are_means_over_the_elements_of_all_parameters() -> None:
    small, large = Parameter(torch.ones(10)), Parameter(torch.ones(30))
    optimizer = RuleOptimizer([{"params": [small, large], "rule": "sophia_h", "eps": 0.0}])
    metrics = optimizer.update_curvature({small: estimate(torch.ones(10)), large: estimate(-torch.ones(30))})
    assert metrics == {"win_rate": 10 / 40}  # where h is not positive, no momentum is below it


def test_an_estimate_for_a_rule_that_uses_none_is_refused() -> None:
    p, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = sophia(p)
    optimizer.add_param_group({"params": [other], "rule": "lion", "name": "rest"})
    (group,) = measured(optimizer.group_steps(), {p: estimate(torch.ones(4))})
    assert [s.plan.param is p for s in group.params] == [True]
    with pytest.raises(ValueError, match="rest: parameter 0: lion uses no curvature estimate"):
        optimizer.update_curvature({p: estimate(torch.ones(4)), other: estimate(torch.ones(4))})
    assert not optimizer.state


def test_no_step_without_an_estimator() -> None:
    p = Parameter(torch.ones(4))
    optimizer = sophia(p, name="hidden")
    require_curvature(optimizer.group_steps(), False, has_oracle=False)  # no gradient, no need
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"group 'hidden': sophia_h needs more than gradients.*nothing was updated"):
        optimizer.step()
    assert p.eq(1).all() and not optimizer.state
    searching = RuleOptimizer([{"params": [p], "rule": "lbfgs"}])
    with pytest.raises(RuntimeError, match=r"call estimate\(\) of the curvature estimator before step"):
        require_curvature(searching.group_steps(), True, has_oracle=False)
    require_curvature(searching.group_steps(), False, has_oracle=True)
