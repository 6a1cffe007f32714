"""Random runs of every rule, with every option, and what holds of all of them."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.step import stacked
from tests.helpers.pool import Pool
from tests.helpers.random_ranks import WORLDS
from tests.helpers.random_ranks import check as check_ranks
from tests.helpers.random_runs import Run, carry_out, compiled_runs, runs
from tests.helpers.rules import NAMES, refreshing, without_draws

FUSING = [n for n in NAMES if (REGISTRY[n].elementwise or REGISTRY[n].reduces) and not REGISTRY[n].curvature_input]
"""Rules that can step shards within the backward pass."""
QUIET: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}
SEED = int(os.environ.get("PROPERTY_SEED", random.randrange(2**31)))
"""Of the runs behind the marker `slow`; printed with what they have counted."""


def report(capsys: pytest.CaptureFixture[str], counts: Counter[str]) -> None:
    """Print the seed, and how often each invariant was looked at."""
    with capsys.disabled():
        print(f"\nPROPERTY_SEED={SEED}", *(f"{n:8d} {what}" for what, n in counts.most_common()), sep="\n")


def carry_out_many(cases: st.SearchStrategy[Run], count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Carry out runs that are drawn from `SEED`, and print what was looked at."""
    counts: Counter[str] = Counter()

    @seed(SEED)
    @settings(max_examples=count, **QUIET)
    @given(cases)
    def check(run: Run) -> None:
        carry_out(run, counts)

    try:
        check()
    finally:
        report(capsys, counts)


@settings(max_examples=100, derandomize=True, **QUIET)
@given(runs())
def test_random_runs(run: Run) -> None:
    carry_out(run, Counter())


@pytest.mark.slow
def test_thousands_of_random_runs(capsys: pytest.CaptureFixture[str]) -> None:
    carry_out_many(runs(), int(os.environ.get("PROPERTY_RUNS", "5000")), capsys)


@pytest.mark.slow
def test_random_runs_of_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    carry_out_many(compiled_runs(), int(os.environ.get("PROPERTY_RUNS_OF_GRAPHS", "60")), capsys)


@st.composite
def on_ranks(draw: st.DrawFn) -> tuple[str, int, Run]:
    """A layout, a number of ranks, and a run, every other one with gradients by which ranks can be compared."""
    layout = draw(st.sampled_from(sorted(WORLDS)))
    world = draw(st.sampled_from(WORLDS[layout]))
    fusing = layout in ("fsdp2", "hsdp") and draw(st.sampled_from([False, False, True]))
    run = draw(runs(FUSING if fusing else NAMES, steps=4, sharded=True))
    if fusing:
        kept = {k: v for k, v in run.settings if k != "clip_norm" and (k, v) != ("on_nonfinite", "skip")}
        run = dataclasses.replace(run, backward="fused", settings=tuple(kept.items()), averaging="")
    if draw(st.booleans()):
        plain = tuple(tuple(("normal", "dense") for _ in step) for step in run.gradients)
        run = dataclasses.replace(run, gradients=plain)
    return layout, world, run


def carry_out_on_ranks(pool: Pool, case: tuple[str, int, Run], counts: Counter[str]) -> None:
    layout, world, run = case
    results = pool.run("tests.helpers.random_ranks:on_ranks", world, layout=layout, run=run)
    check_ranks(run, layout, results, counts)


@pytest.mark.dist
def test_random_runs_on_ranks(pool: Pool) -> None:
    @settings(max_examples=30, derandomize=True, **QUIET)
    @given(on_ranks())
    def check(case: tuple[str, int, Run]) -> None:
        carry_out_on_ranks(pool, case, Counter())

    check()


@pytest.mark.slow
@pytest.mark.dist
def test_hundreds_of_random_runs_on_ranks(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()

    @seed(SEED)
    @settings(max_examples=int(os.environ.get("PROPERTY_RUNS_ON_RANKS", "500")), **QUIET)
    @given(on_ranks())
    def check(case: tuple[str, int, Run]) -> None:
        carry_out_on_ranks(pool, case, counts)

    try:
        check()
    finally:
        report(capsys, counts)


# -- symmetries -------------------------------------------------------------------------------------------------------

ALONE = [n for n in NAMES if not REGISTRY[n].needs_all_gradients and REGISTRY[n].curvature_input is None]
PLAIN = st.lists(st.sampled_from([(5, 3), (8, 8), (12, 5), (1, 6), (4, 3, 2)]), min_size=2, max_size=4)


def trained(name: str, groups: list[list[int]], shapes: list[tuple[int, ...]], number: int) -> list[torch.Tensor]:
    """Weights after four steps, with the parameters in this order and these groups."""
    ps = [Parameter(numbers(shape, number, i, 0)) for i, shape in enumerate(shapes)]
    settings = {"rule": name, "lr": 1e-2, **refreshing(name), **without_draws(name)}
    optimizer = RuleOptimizer([{"params": [ps[i] for i in some], **settings} for some in groups])
    for t in range(1, 5):
        for i, p in enumerate(ps):
            p.grad = numbers(p.shape, number, i, t)
        optimizer.step()
    return [p.detach() for p in ps]


@functools.cache
def draws(name: str) -> bool:
    """Whether a rule draws random numbers, which depend on the place of a parameter."""
    calls: list[Any] = []

    def drawn(*args: Any) -> torch.Tensor:
        calls.append(args)
        return noise(*args)

    noise = stacked._noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked, "_noise", drawn)
        trained(name, [[0]], [(8, 8)], 0)
    return bool(calls)


def numbers(shape: Sequence[int], number: int, i: int, t: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + 10 * i + t))


@settings(max_examples=30, derandomize=True, **QUIET)
@given(st.sampled_from(ALONE), PLAIN, st.permutations(range(4)), st.integers(0, 9))
def test_the_order_of_parameters_and_the_split_of_groups_change_nothing(
    name: str, shapes: list[tuple[int, ...]], order: list[int], number: int
) -> None:
    assume(not draws(name))
    order = [i for i in order if i < len(shapes)]
    together = trained(name, [[*range(len(shapes))]], shapes, number)
    apart = trained(name, [order[:1], order[1:]], shapes, number)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=10, derandomize=True, **QUIET)
@given(st.sampled_from(["muon", "lion", "signsgd", "signum", "swan"]), st.integers(-40, 40), st.integers(0, 9))
def test_the_scale_of_gradients_does_not_matter(name: str, exponent: int, number: int) -> None:
    """By powers of two, which change no digit; the eps of normalizations do not, either."""
    starts = [numbers((5, 3), number, 0, 0), numbers((8, 8), number, 1, 0)]
    moved = []
    for scale in (1.0, 2.0**exponent):
        ps = [Parameter(x.clone()) for x in starts]
        optimizer = RuleOptimizer([{"params": ps, "rule": name, "lr": 1e-2}])
        for t in range(1, 4):
            for i, p in enumerate(ps):
                p.grad = numbers(p.shape, number, i, t) * scale
            optimizer.step()
        moved.append([p.detach() - x for p, x in zip(ps, starts, strict=True)])
    for a, b in zip(*moved, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm(), (name, exponent)


@settings(max_examples=10, derandomize=True, **QUIET)
@given(st.sampled_from(["muon", "soap", "adamw", "lion", "shampoo"]), st.integers(0, 9))
def test_a_transposed_matrix_takes_the_transposed_step(name: str, number: int) -> None:
    starts = [numbers((5, 3), number, 0, 0), numbers((8, 8), number, 1, 0)]
    moved = []
    for is_turned in (False, True):
        ps = [Parameter(x.mT.contiguous() if is_turned else x.clone()) for x in starts]
        optimizer = RuleOptimizer([{"params": ps, "rule": name, "lr": 1e-2, "lr_convention": "adamw"}])
        for t in range(1, 4):
            for i, (p, x) in enumerate(zip(ps, starts, strict=True)):
                g = numbers(x.shape, number, i, t)
                p.grad = g.mT.contiguous() if is_turned else g
            optimizer.step()
        moved.append([(p.detach().mT if is_turned else p.detach()) - x for p, x in zip(ps, starts, strict=True)])
    for a, b in zip(*moved, strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm(), name
