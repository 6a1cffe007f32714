"""Steps by compiled graphs: the numbers of eager ones, one graph whatever the step, the learning rate and the size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.nn import Parameter

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.core.rule import REGISTRY, Rule, lookup
from lightning_optim.core.step import compiled
from tests.helpers.pool import Pool

SHAPES = [(512, 520), (700, 530), (260, 5000), (7, 9), (40,)]
"""Two sizes, rows longer than what Inductor sums up in one go, and two that are stepped without a graph."""
BRANCHING = ("mlbfgs",)
"""Their updates ask for the number of the step."""
COMPILING = sorted(
    name
    for name, r in REGISTRY.items()
    if (r.elementwise or r.reduces) and r.kernel is Rule.kernel and name not in BRANCHING
)
ELEMENTWISE = [name for name in COMPILING if REGISTRY[name].elementwise and REGISTRY[name].state]
QUICK = ("lion", "lamb", "adafactor")
names = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in [*COMPILING, "rmsprop"]]


def made(name: str, *, shapes: list[tuple[int, ...]] = SHAPES, **settings: Any) -> RuleOptimizer:
    """An optimizer of parameters of several shapes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in shapes if lookup(name).vectors or len(s) > 1]
    ps = [Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = RuleOptimizer([{"params": ps, "rule": name, "weight_decay": 0.1, **settings}])
    optimizer.has_curvature = True  # by nobody: a curvature of zero
    return optimizer


def run(optimizer: RuleOptimizer, steps: range) -> list[Tensor]:
    """Steps under a schedule, given by their numbers."""
    group = optimizer.param_groups[0]
    apart = lookup(group["rule"]).decay in ("before", "after")  # else the decay is a constant of the graph
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        group |= {"lr": 1e-2 / (1 + t), "weight_decay": 0.1 / (1 + t % 2 * apart)}
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in group["params"]]


@pytest.mark.parametrize("name", names)
def test_one_graph_and_the_numbers_of_eager_steps(name: str) -> None:
    compiled._graph.cache_clear()
    counters.clear()
    optimizer, eager = made(name, compile=True), made(name)
    start = [p.detach().clone() for p in eager.param_groups[0]["params"]]
    actual, expected = run(optimizer, range(6)), run(eager, range(6))
    assert counters["aot_autograd"]["total"] == 1
    for a, b, p in zip(actual, expected, start, strict=True):
        # measured: 0 to 4e-7 of the way, and 2e-4 where the sign of nearly nothing turns (lion, one of 271,000)
        assert (a - b).norm() <= 1e-3 * (b - p).norm()


@pytest.mark.parametrize("name", [pytest.param("racs"), *(n for n in names if n.values != ("racs",))])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-30])
def test_gradients_that_are_zero_or_tiny_are_finite(name: str, scale: float) -> None:
    optimizer = made(name, shapes=[(512, 520)], compile=True, lr_convention="adamw")
    eager = made(name, shapes=[(512, 520)], lr_convention="adamw")
    for t, factor in enumerate((scale, 1.0, scale, scale)):
        moved = []
        for o in (optimizer, eager):
            (p,) = o.param_groups[0]["params"]
            before = p.detach().clone()
            p.grad = factor * torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            o.step()
            assert p.isfinite().all()
            assert all(value.isfinite().all() for value in o.state[p].values())
            moved.append((p.detach() - before).norm().item())
        assert moved[0] == pytest.approx(moved[1], rel=1e-2), t


CODED = [("adamw", "int8"), *((n, "int8") for n in ELEMENTWISE), ("adamw", "int8_grid"), ("adamw", "fp8")]
KERNELS = [("amsgrad", "int8"), ("rmsprop", "int8"), ("adagrad", "int8")]
"""Rules that a kernel of torch's steps where their state rests as values."""


@pytest.mark.parametrize(
    ("name", "storage"), [pytest.param(*x, marks=() if x == CODED[0] else pytest.mark.slow) for x in CODED + KERNELS]
)
def test_state_that_rests_as_codes(name: str, storage: str) -> None:
    shapes: list[tuple[int, ...]] = [(512, 520), (301, 150), (7, 9)]  # whole blocks in two pieces, and 94 elements over
    compiled._graph.cache_clear()
    counters.clear()
    optimizer, eager = (made(name, shapes=shapes, state_storage=storage, compile=on) for on in (True, False))
    start = [p.detach().clone() for p in eager.param_groups[0]["params"]]
    actual, expected = run(optimizer, range(4)), run(eager, range(4))
    assert counters["aot_autograd"]["total"] == 1
    for a, b, p in zip(actual, expected, start, strict=True):
        # measured: 0 to 1e-4 of the way, where a quotient in the middle of two values takes the other's code
        assert (a - b).norm() <= 1e-3 * (b - p).norm()
    for a, b in zip(*(list(o.param_groups[0]["params"]) for o in (optimizer, eager)), strict=True):
        for key, codes in optimizer.state[a].items():
            assert key == "step" or codes.is_floating_point() or (codes != eager.state[b][key]).float().mean() <= 1e-3


def test_codes_of_a_clipped_gradient_with_gaps() -> None:
    """The copy that is clipped has none; what is over the last whole block is stepped from the gradient as it came."""
    gradient, ends = torch.randn(512, 1041, generator=torch.Generator().manual_seed(1))[:, :521], []
    for on in (True, False):
        optimizer = made("adamw", shapes=[(512, 521)], state_storage="int8", clip_norm=1.0, compile=on)
        (p,) = optimizer.param_groups[0]["params"]
        start, p.grad = p.detach().clone(), gradient
        optimizer.step()
        ends.append(p.detach() - start)
    assert (ends[0] - ends[1]).norm() <= 1e-3 * ends[1].norm()


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_whose_part_begins_within_a_block(pool: Pool) -> None:
    actual = pool.run("tests.helpers.jobs:begun_within_a_block", 2)
    assert actual[1][0] % 256
    assert all(far <= 1e-3 for _, far in actual)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam_mini", "racs"])
def test_matrices_of_a_stack_are_stepped_alone(name: str) -> None:
    shapes = [(3, 400, 300), (2, 500, 600)]
    compiled._graph.cache_clear()
    counters.clear()
    actual, expected = (run(made(name, shapes=shapes, compile=graphs), range(4)) for graphs in (True, False))
    assert counters["aot_autograd"]["total"] == 1
    torch.testing.assert_close(actual, expected)


def test_resuming_is_bitwise_and_a_checkpoint_does_not_say_how_to_step() -> None:
    shapes, settings = [(512, 520)], {"transposed": True, "compile": True}
    compiled._graph.cache_clear()
    counters.clear()
    through = made("lamb", shapes=shapes, **settings)
    expected, resumed = run(through, range(4)), made("lamb", shapes=shapes, **settings)
    half = made("lamb", shapes=shapes, **settings)
    begun = run(half, range(2))
    saved = copy.deepcopy(half.state_dict())
    saved["param_groups"][0]["compile"] = False
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(begun[0])
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["compile"]
    assert torch.equal(run(resumed, range(2, 4))[0], expected[0])
    assert counters["aot_autograd"]["total"] == 1
    plain = run(made("lamb", shapes=shapes, transposed=True), range(4))
    torch.testing.assert_close(expected, plain)


def test_small_and_narrow_parameters_and_fused_kernels_need_no_graph() -> None:
    compiled._graph.cache_clear()
    small, narrow = Parameter(torch.randn(8, 8)), Parameter(torch.randn(512, 520, dtype=torch.bfloat16))
    for rule, p in (("lion", small), ("lamb", narrow), ("adamw", Parameter(torch.randn(512, 520)))):
        optimizer = RuleOptimizer([{"params": [p], "rule": rule, "compile": True}])
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert compiled._graph.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("settings", "record"),
    [
        ({"rule": "muon"}, "muon works on whole matrices"),
        ({"rule": "lion", "state_storage": "bf16"}, "state_storage='fp32'"),
        ({"rule": "lamb", "state_storage": "int8"}, "state_storage='fp32'"),
        ({"rule": "lion", "cautious_decay": 0.1}, "cautious_decay"),
        ({"rule": "lion", "momentum_kernel": ((0.9, 0.5), (0.99, 0.5))}, "momentum_kernel=None"),
    ],
)
def test_what_has_no_graph_is_refused_with_a_remedy(settings: dict[str, Any], record: str) -> None:
    with pytest.raises(ValueError, match=record):
        RuleOptimizer([{"params": [Parameter(torch.randn(8, 8))], "compile": True, **settings}])


def test_a_missing_compiler_is_found_before_training() -> None:
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(ValueError, match=r"lion cannot be compiled here: .*install g\+\+"):
        made("lion", compile=True, betas=(0.8, 0.98))  # of no other test


@pytest.mark.parametrize(
    ("name", "settings"),
    [("sgd", {"momentum": 0.9, "dampening": 0.1, "state_storage": "int8"}), *((name, {}) for name in BRANCHING)],
)
def test_an_update_that_branches_on_the_step_is_named(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name} branches on the step number or a rate"):
        made(name, shapes=[(512, 520)], compile=True, **settings)


def test_a_setting_that_changes_all_the_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 0)
    monkeypatch.setattr(compiled, "_graph_counts", type(compiled._graph_counts)())
    with pytest.raises(ValueError, match="other than lr and weight_decay keeps changing"):
        made("lion", compile=True, betas=(0.7, 0.98))


def test_the_door_asks_for_it_where_it_can_be() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
    optimizer = build_optimizer(model, "racs", lr=1e-3, compile=True)
    assert all(group["compile"] for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="leave compile out"):
        build_optimizer(model, "muon", lr=1e-3, compile=True)
