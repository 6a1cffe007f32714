"""What a failure in the middle of a step leaves: whole parameters, or an error that says which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.apply import surely
from lightning_optim.core.step.recovery import PartlyWritten, restoring


class Full(TorchDispatchMode):
    """Memory that is full, for tensors of at least so many elements, in some of the operations that make one."""

    def __init__(self, elements: int, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.elements, self.fails, self.count = elements, fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, returned = func(*args, **(kwargs or {})), func._schema.returns
        if returned and str(returned[0].type) == "Tensor" and returned[0].alias_info is None:
            if out.numel() >= self.elements:
                self.count += 1
                if self.fails(self.count):
                    raise torch.OutOfMemoryError("full")
        return out


def prepared(rule: str, shape: tuple[int, ...], **settings: Any) -> tuple[Parameter, RuleOptimizer]:
    draw = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(shape, generator=draw))
    optimizer = RuleOptimizer([{"params": [p], "rule": rule, "lr": 0.1, **settings}])
    for _ in range(2):
        p.grad = torch.randn(shape, generator=draw)
        optimizer.step()
    p.grad = torch.randn(shape, generator=draw)
    return p, optimizer


def contents(p: Parameter, optimizer: RuleOptimizer) -> list[Tensor]:
    return [p.detach().clone(), *(t.clone() for _, t in sorted(optimizer.state[p].items()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("lion", (400_000,), {}),
    ("adamw", (400_000,), {"cautious_decay": 0.1}),
    ("lion", (400_000,), {"state_storage": "int8"}),
    ("rmsprop", (700, 600), {"constraint": "hyperball"}),
    ("adafactor", (700, 600), {}),
]


@pytest.mark.parametrize(("rule", "shape", "settings"), CASES)
def test_a_failure_after_the_first_block_is_made_up_for(
    rule: str, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    p, optimizer = prepared(rule, shape, **settings)
    with Full(20_000, lambda count: False) as memory:
        optimizer.step()
    complete, outcomes = contents(p, optimizer), set[bool]()
    for failing in range(1, memory.count + 1, 1 + memory.count // 12):
        p, optimizer = prepared(rule, shape, **settings)
        before = contents(p, optimizer)
        with Full(20_000, failing.__eq__):
            try:
                optimizer.step()
                outcomes.add(same(complete, contents(p, optimizer)))
            except RuntimeError as error:
                assert "not updated (OutOfMemoryError" in str(error)
                assert same(before, contents(p, optimizer))
    assert outcomes == {True}


def test_a_parameter_that_stays_in_between_is_named() -> None:
    _, optimizer = prepared("lion", (400_000,))
    with (
        Full(20_000, lambda count: count > 1),
        pytest.raises(RuntimeError, match=r"but for parts of lion: parameter 0"),
    ):
        optimizer.step()


def test_work_is_done_again_once() -> None:
    outcomes = [ValueError("first"), 3]

    def work() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert surely(work) == 3
    outcomes[:] = [ValueError("first"), ValueError("second")]
    with pytest.raises(PartlyWritten, match="ValueError: first"):
        surely(work)


@pytest.mark.parametrize("copies", [False, True])
def test_tensors_that_were_written_are_restored_or_named(copies: bool) -> None:
    x = torch.ones(3)

    def fail(*, late: bool) -> None:
        if late:
            x.add_(1)
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        restoring([x], lambda: fail(late=False), copies=copies)
    with pytest.raises(ValueError if copies else PartlyWritten, match="no memory"):
        restoring([x], lambda: fail(late=True), copies=copies)
    assert bool((x == 1).all()) == copies
