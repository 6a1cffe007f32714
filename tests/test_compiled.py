"""Steps by compiled graphs: the numbers of eager ones, one graph whatever the step, the learning rate and the size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import Parameter

from lightning_optim import Executor
from lightning_optim.core import compiled
from lightning_optim.core.rule import REGISTRY, Rule


def compiles(rule: type[Rule]) -> bool:
    """Whether large parameters of a rule are stepped by graphs."""
    kernel = rule.kernel is not Rule.kernel  # torch's, which is not compiled
    return rule.compiles and (rule.elementwise or rule.reduces) and not kernel and rule.observes is None


COMPILING = sorted(name for name, rule in REGISTRY.items() if compiles(rule))
QUICK = ("lion", "lamb")
names = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in COMPILING]


def stepped(name: str, *, graphs: bool) -> list[Tensor]:
    """Ten steps of parameters of several shapes under a schedule."""
    made = torch.Generator().manual_seed(0)
    vectors = [(40,)] if REGISTRY[name].vectors else []
    ps = [Parameter(torch.randn(s, generator=made)) for s in [(160, 200), (300, 130), (7, 9), *vectors]]
    optimizer = Executor([{"params": ps, "rule": name, "lr": 1e-2, "weight_decay": 0.1, "compile": graphs}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for _ in range(10):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=made)
        optimizer.step()
        schedule.step()
    return [p.detach() for p in ps]


@pytest.mark.parametrize("name", names)
def test_one_graph_and_the_numbers_of_eager_steps(name: str) -> None:
    compiled._graph.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    found, expected = stepped(name, graphs=True), stepped(name, graphs=False)
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(found, expected, strict=True):
        # the same operations, some of them fused into one rounding, ten times
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_small_parameters_and_rules_that_compare_are_stepped_as_ever() -> None:
    p = Parameter(torch.randn(8, 8))
    for rule in ("lion", "adafactor"):
        counters.clear()
        optimizer = Executor([{"params": [p], "rule": rule, "compile": True}])
        p.grad = torch.randn(8, 8)
        optimizer.step()
        assert not counters["stats"]["unique_graphs"]
