"""State is allocated whole before the first step, keeps what is there, and is converted to another format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.state.allocate import allocate_state, assign_owners


def allocated(optimizer: RuleOptimizer) -> dict[str, Tensor]:
    """The state of the first parameter after allocation."""
    p = optimizer.param_groups[0]["params"][0]
    allocate_state(optimizer.group_steps(), Owners(), lambda p: optimizer.state.setdefault(p, {}))
    return optimizer.state[p]


def lion(p: Parameter, **settings: Any) -> RuleOptimizer:
    return RuleOptimizer([{"params": [p], "rule": "lion", "storage_min": 1, **settings}])


def test_all_state_at_its_start_values() -> None:
    p = Parameter(torch.ones(6, 4))
    optimizer = RuleOptimizer([{"params": [p], "rule": "soap"}])
    assert not optimizer.group_steps()[0].is_complete
    state = allocated(optimizer)
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        "step": (),
        "exp_avg": (6, 4),
        "exp_avg_sq": (6, 4),
        "factor_left": (6, 6),
        "basis_left": (6, 6),
        "factor_right": (4, 4),
        "basis_right": (4, 4),
        "refreshed": (1, 5),
    }
    assert torch.equal(state["basis_left"], torch.eye(6)) and state["factor_left"].eq(0).all()
    assert state["step"] == 0 and state["step"].is_cpu and p.eq(1).all()
    assert optimizer.group_steps()[0].is_complete


def test_what_is_there_is_kept_and_what_is_missing_is_added() -> None:
    p, q = Parameter(torch.ones(6, 4)), Parameter(torch.ones(3))
    optimizer = RuleOptimizer([{"params": [p, q], "rule": "adamw"}])
    momentum = torch.full((6, 4), 3.0)
    optimizer.state[p] = {"exp_avg": momentum, "step": torch.tensor(7.0)}
    also: list[tuple[Tensor, list[str]]] = []
    groups = optimizer.group_steps()
    allocate_state(
        groups, Owners(), lambda p: optimizer.state.setdefault(p, {}), lambda p, s: also.append((p, list(s)))
    )
    state = optimizer.state[p]
    assert state["exp_avg"] is momentum and momentum.eq(3).all() and state["step"] == 7
    assert state["exp_avg_sq"].eq(0).all() and optimizer.state[q]["step"] == 0
    assert [x is y for (x, _), y in zip(also, (p, q), strict=True)] == [True, True]
    assert set(also[1][1]) == {"step", "exp_avg", "exp_avg_sq"}
    allocate_state(groups, Owners(), lambda p: {}, lambda p, s: also.append((p, [])))
    assert len(also) == 2  # complete state is not looked at again


@pytest.mark.parametrize("storage", ["int8", "fp8", "bf16"])
def test_stored_values_are_converted_to_another_format_and_back(storage: str) -> None:
    p = Parameter(torch.ones(8, 8))
    optimizer = lion(p)
    values = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    allocated(optimizer)["exp_avg"].copy_(values)
    optimizer.param_groups[0]["state_storage"] = storage
    state = allocated(optimizer)
    narrow = {"int8": torch.uint8, "fp8": torch.int8, "bf16": torch.bfloat16}
    assert state["exp_avg"].dtype == narrow[storage] and ("exp_avg_scale" in state) == (storage != "bf16")
    optimizer.param_groups[0]["state_storage"] = "fp32"
    state = allocated(optimizer)
    assert state["exp_avg"].dtype == torch.float32 and set(state) == {"step", "exp_avg"}
    assert (state["exp_avg"] - values).abs().max() < 0.07 * values.abs().max() and state[
        "exp_avg"
    ].unique().numel() > 20


def test_what_narrow_weights_keep_beside() -> None:
    p = Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    kept = allocated(lion(p, param_rounding="kahan"))["compensation"]
    assert kept.dtype == torch.bfloat16 and kept.shape == p.shape and kept.eq(0).all()
    radius = allocated(lion(p, constraint="hyperball", blocks=3))["radius"]
    assert radius.shape == (3,) and radius.dtype == torch.float32
    assert set(allocated(lion(Parameter(torch.ones(6, 4)), param_rounding="kahan"))) == {"step", "exp_avg"}


def test_parameters_of_one_process_have_no_owner() -> None:
    p = Parameter(torch.ones(6, 4))
    optimizer, owners = RuleOptimizer([{"params": [p], "rule": "muon"}]), Owners()
    assign_owners(optimizer.group_steps(), owners, [p])
    with pytest.raises(KeyError):
        owners[p]
