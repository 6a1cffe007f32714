"""Random runs of every rule, with every option, and what holds of all of them."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.helpers.pool import Pool
from tests.helpers.random_ranks import WORLDS
from tests.helpers.random_ranks import check as check_ranks
from tests.helpers.random_runs import Run, carry_out, runs
from tests.helpers.rules import NAMES

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


@settings(max_examples=100, derandomize=True, **QUIET)
@given(runs())
def test_random_runs(run: Run) -> None:
    carry_out(run, Counter())


@pytest.mark.slow
def test_thousands_of_random_runs(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()

    @seed(SEED)
    @settings(max_examples=int(os.environ.get("PROPERTY_RUNS", "5000")), **QUIET)
    @given(runs())
    def check(run: Run) -> None:
        carry_out(run, counts)

    try:
        check()
    finally:
        report(capsys, counts)


@st.composite
def on_ranks(draw: st.DrawFn) -> tuple[str, int, Run]:
    """A layout, a number of ranks, and a run, every other one with gradients by which ranks can be compared."""
    layout = draw(st.sampled_from(sorted(WORLDS)))
    world = draw(st.sampled_from(WORLDS[layout]))
    run = draw(runs(NAMES, steps=4, sharded=True))
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
