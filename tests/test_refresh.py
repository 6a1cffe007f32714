"""Refresh policies: what they decide, that they rest with the state, and that they cost what they say."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import SOAP
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.param_groups import rule_of
from lightning_optim.core.step.records import Refresh
from lightning_optim.ops.eigenbasis import eigenbasis, off_diagonal, overlap, unaligned
from lightning_optim.ops.noise import normal
from lightning_optim.refresh import RECORD, Clock, View, parse, phases
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import assert_equal, give, gradient, make

ADAPTIVE = ["off_diagonal:0.1:5", "lazy:2:0.4:2", "any(staggered:5, off_diagonal:0.2)", "clamp(lazy:2, 3, 4)"]


def dates(
    policy: str,
    steps: int,
    *,
    costs: Sequence[float] = (1.0,),
    stale: float = 0.0,
    ageing: float = 0.0,
    shared: float = 0.0,
):
    """Steps at which each of several matrices is refreshed, the first step apart; all get stale alike."""
    chosen, records = parse(policy), [dict.fromkeys(RECORD, 0.0) | {"age": 1.0, "overlap": shared} for _ in costs]
    out: list[list[int]] = [[] for _ in costs]

    def measure(some: Sequence[View]) -> list[float]:
        return [stale + ageing * v.record["age"] for v in some]

    clock = Clock(now=iter(range(10**6)).__next__)
    for t in range(2, steps + 1):
        clock.tick()
        clock.rate = 1.0
        views = [
            View(t, c, lambda f, i=i: phases(tuple(costs), f)[i], r)
            for i, (c, r) in enumerate(zip(costs, records, strict=True))
        ]
        for i, reason in enumerate(chosen.decide(views, measure, clock)):
            records[i]["age"] = 1.0 if reason else records[i]["age"] + 1
            if reason:
                out[i].append(t)
    return out


def test_fixed_is_the_published_schedule() -> None:
    assert dates("fixed:10", 40) == [[11, 21, 31]]
    assert dates("fixed:10:10", 40) == [[10, 20, 30, 40]]


def test_staggered_spreads_the_cost_over_the_steps() -> None:
    costs = (8.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0, 8.0)
    actual = dates("staggered:4", 17, costs=costs)
    for days in actual:
        assert {b - a for a, b in zip(days, days[1:], strict=False)} == {4}
    paid = Counter({t: 0.0 for t in range(6, 10)})
    for cost, days in zip(costs, actual, strict=True):
        paid.update({t: cost for t in days if 6 <= t < 10})
    assert max(paid.values()) <= max(sum(costs) / 4, *costs)


@pytest.mark.parametrize(("count", "interval"), [(7, 3), (12, 4), (3, 10)])
def test_equal_matrices_are_staggered_as_evenly_as_can_be(count: int, interval: int) -> None:
    actual = dates(f"staggered:{interval}", 1 + 3 * interval, costs=(1.0,) * count)
    at = Counter(t for days in actual for t in days)
    assert max(at.values()) == -(-count // interval) and sum(at.values()) == 3 * count


def test_dense_warm_up_ends_in_the_staggered_schedule() -> None:
    (days,) = dates("warmup_dense:1:8:2", 50)
    assert days == [2, 4, 8, 9, 17, 25, 33, 41, 49]


def test_off_diagonal_refreshes_what_is_stale_and_looks_less_often_where_nothing_is() -> None:
    assert dates("off_diagonal:0.3:10", 60, stale=0.2) == [[]]
    (forced,) = dates("off_diagonal:0.3:10", 250, stale=0.2)
    assert forced == [101, 201]
    (often,) = dates("off_diagonal:0.3:10", 21, stale=0.5)
    assert {b - a for a, b in zip(often, often[1:], strict=False)} == {2}


def test_lazy_intervals_grow_where_little_changes_and_shrink_where_much_does() -> None:
    (calm,) = dates("lazy:10:0.4:2", 400, shared=0.9)
    (wild,) = dates("lazy:10:0.4:2", 400, shared=0.1)
    distances = [[b - a for a, b in zip(days, days[1:], strict=False)] for days in (calm, wild)]
    assert distances[0][0] == 10 and distances[0][-1] > 10 and sorted(distances[0]) == distances[0]
    assert max(distances[0]) <= 100
    assert distances[1][0] == 10 and distances[1][-1] == 1


def test_time_budget_spends_its_share() -> None:
    steps, share = 400, 0.25
    actual = dates(f"time_budget:{share}:10000", steps, costs=(1.0, 2.0, 1.0), ageing=0.01)
    spent = sum(c * len(days) for c, days in zip((1.0, 2.0, 1.0), actual, strict=True))
    assert share * steps - 6 <= spent <= share * steps + 1e-9
    assert all(actual)


def test_combinators() -> None:
    assert dates("any(fixed:4, fixed:6)", 14) == [[5, 7, 9, 13]]
    assert dates("all(fixed:4, fixed:6)", 30) == [[13, 25]]
    assert dates("clamp(fixed:2, 3, 9)", 14) == [[5, 9, 13]]
    assert dates("clamp(fixed:100, 3, 9)", 30) == [[10, 19, 28]]
    assert dates("until(4, fixed:1, fixed:5)", 12) == [[2, 3, 4, 6, 11]]
    assert parse("any(fixed:2, until(3, fixed:1, lazy:2))").reads
    assert not parse("any(fixed:2, staggered:3)").reads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stagered:10", "no policy 'stagered:10'; known: fixed"),
        ("fixed:0", "'0' in 'fixed:0' must be positive"),
        ("fixed:2.5", "is not an integer"),
        ("fixed:1:2:3", "at most interval:offset"),
        ("clamp(fixed:1, 9, 3)", "min_age must not exceed max_age, got 9 and 3"),
        ("any(fixed:1, off_diagonal:2.0)", "'off_diagonal:2.0': tolerance must lie in \\[0, 1\\], got 2"),
        ("time_budget:5", "share must lie in"),
        ("lazy:10:1.5", "threshold must lie in"),
        ("warmup_dense:10:1", "first must not exceed last, got 10 and 1"),
        ("any(" * 5000 + "fixed:1" + ", fixed:2)" * 5000, "nested more than 16 deep"),
        ("clamp(fixed:2)", "clamp\\(a, min, max\\)"),
    ],
)
def test_a_wrong_policy_is_told_at_construction(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([Parameter(torch.ones(3, 3))], refresh=text)


STALE = {
    "soap": {"betas": (0.5, 0.5)},
    "eigen_adam": {"betas": (0.5, 0.5, 0.5)},
    "alice": {"betas": (0.5, 0.5, 0.5), "rank": 3, "leading": 2},
    "alice0": {"rank": 3, "leading": 2},
    "cosmos": {"betas": (0.5, 0.5), "rank": 2},
    "shampoo": {"betas": (0.5, 0.5), "max_dim": 4},
    "shampoo eigenvalue": {"betas": (0.5, 0.5), "preconditioner": "eigenvalue"},
    "galore": {"rank": 2},
}
"""Settings under which a rule forgets within a few steps."""


def watched(name: str, ps: Any, policy: str) -> tuple[RuleOptimizer, list[Refresh]]:
    """An optimizer of a rule with a policy, and what it tells."""
    optimizer, events = make(name.partition(" ")[0], ps, refresh=policy, **STALE[name]), list[Refresh]()
    optimizer.on_refresh = events.append
    return optimizer, events


@pytest.mark.parametrize("name", STALE)
def test_a_gradient_that_turns_makes_every_rule_refresh_and_a_steady_one_does_not(name: str) -> None:
    gradients = [Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    p = Parameter(torch.zeros(6, 9))
    optimizer, events = watched(name, [p], "off_diagonal:0.3:1")
    for t in range(1, 15):
        p.grad = gradients[t > 6].detach().clone()
        optimizer.step()
    assert [(e.t, e.reason) for e in events if e.t <= 6] == [(1, "first")]
    later = [e for e in events if e.t > 6]
    assert later and all(e.reason == "stale" and 0.3 < e.staleness <= 1 for e in later)
    assert later[-1].t < 12, "it still refreshes where nothing changes any more"


@pytest.mark.parametrize("name", ["alice", "alice0", "cosmos"])
def test_staleness_of_a_followed_subspace_is_that_of_the_dense_matrix(name: str) -> None:
    """[U, rest]^T A [U, rest] off the diagonal, in the leading columns; A is what the next refresh would follow."""
    p = Parameter(torch.zeros(7, 7, dtype=torch.float64))
    optimizer, _ = watched(name, [p], "fixed:3")
    for t in range(1, 6):
        p.grad = gradient(p, "p", t)
        optimizer.step()
    g, state = gradient(p, "p", 6), optimizer.state[p]
    u, beta = state["basis"], optimizer.param_groups[0]["betas"][-1]
    tracked = u @ state["factor"] @ u.T if beta else torch.zeros(7, 7)
    a = beta * tracked + (1 - beta) * (g.T @ g if name == "cosmos" else g @ g.T)
    whole = torch.cat([u, torch.linalg.qr(u, mode="complete").Q[:, u.shape[1] :]], 1)
    b = (whole.T @ a @ whole)[:, :2]  # rank of cosmos, leading columns of alice
    expected = ((b.square().sum() - b.diagonal().square().sum()) / b.square().sum()).sqrt()
    slots = SimpleNamespace(**{k: v[None] for k, v in state.items() if v.ndim == 2})
    (actual,) = rule_of(optimizer.param_groups[0]).staleness(g[None], slots, 6)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("psgd_kron", {}, "psgd_kron: a fit is one step along a noisy gradient"),
        ("flora", {}, "flora: its projection is drawn at random"),
        ("apollo", {}, "apollo: its projection is drawn at random"),
        ("shampoo", {"exponent": 0.3}, "exponent = 1 / integer only"),
    ],
)
@pytest.mark.parametrize("policy", ["off_diagonal:0.3", "lazy:10", "any(staggered:5, lazy:5)", "time_budget:0.1"])
def test_what_cannot_go_stale_refuses_policies_that_look(
    name: str, settings: dict[str, Any], message: str, policy: str
) -> None:
    p = Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match=f"{message}.*so refresh=.* cannot decide; take fixed or staggered"):
        make(name, [p], refresh=policy, **settings)
    make(name, [p], refresh="staggered:5", **settings)
    make(name, [p], refresh="warmup_dense:1:5", **settings)


def test_regular_looks_see_every_column_in_time() -> None:
    """A matrix that is off the diagonal in one pair of columns only, looked at every second step."""
    n, basis = 100, torch.eye(100)[None]
    seen = set()
    for j in range(32, n - 1):
        x = torch.eye(n)[None].clone()
        x[0, j, j + 1] = x[0, j + 1, j] = 0.5
        looks = [t for t in range(0, 80, 2) if off_diagonal(x, basis, t) > 0]
        assert looks, j
        seen.update(looks)
    assert len(seen) == 40


def test_unaligned_share_of_a_whole_basis_is_the_off_diagonal_one() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 20, 20, generator=random, dtype=torch.float64) for _ in range(2))
    x, q = a @ a.mT, torch.linalg.qr(b).Q
    torch.testing.assert_close(unaligned(x @ q, q), off_diagonal(x, q, top=20))
    exact = eigenbasis(x)[..., :5]
    assert unaligned(x @ exact, exact).max() < 1e-7
    assert not unaligned(torch.zeros(1, 4, 2), torch.eye(4)[None, :, :2]).any()


@pytest.mark.parametrize("policy", [*ADAPTIVE, "staggered:3", "warmup_dense:1:4:2"])
@pytest.mark.parametrize("name", ["soap", "alice", "cosmos", "shampoo"])
def test_resume_is_bitwise_with_refreshes_after_it(name: str, policy: str) -> None:
    def start() -> tuple[dict[str, Parameter], RuleOptimizer, list[Refresh]]:
        random, sizes = torch.Generator().manual_seed(0), {"a": (6, 9), "b": (9, 9), "c": (4, 6)}
        ps = {k: Parameter(torch.randn(s, generator=random)) for k, s in sizes.items()}
        return ps, *watched(name, ps, policy)

    whole, straight, _ = start()
    for t in range(1, 25):
        give(whole, t)
        straight.step()
    ps, first, _ = start()
    for t in range(1, 13):
        give(ps, t)
        first.step()
    again, second, events = start()
    for key in again:
        again[key].data.copy_(ps[key])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for t in range(13, 25):
        give(again, t)
        second.step()
    assert_equal(whole, again)
    assert events, "no refresh in the resumed part"


def test_events_tell_what_happened() -> None:
    ps = {"a": Parameter(torch.randn(6, 9)), "vector": Parameter(torch.randn(5))}
    optimizer, events = SOAP(ps.items(), refresh="fixed:4"), []
    optimizer.on_refresh = events.append
    for t in range(1, 10):
        give(ps, t)
        optimizer.step()
    assert [(e.name, e.t, e.reason, e.age) for e in events] == [
        ("soap: a", 1, "first", 0),
        ("soap: a", 5, "interval", 4),
        ("soap: a", 9, "interval", 4),
    ]
    assert all(e.seconds > 0 for e in events)
    assert events[1].overlap <= 1 and events[0].overlap != events[0].overlap
    assert optimizer.state[ps["a"]]["refreshed"][0, 0] == 1
    assert "refreshed" not in optimizer.state[ps["vector"]]


def test_policy_changes_live() -> None:
    p = Parameter(torch.randn(6, 9))
    optimizer, events = SOAP([p], refresh="fixed:100"), []
    optimizer.on_refresh = events.append
    for t in range(1, 9):
        if t == 5:
            optimizer.param_groups[0]["refresh"] = "off_diagonal:0.01:5"
        p.grad = gradient(p, "p", t)
        optimizer.step()
    assert {e.reason for e in events if e.t > 1} == {"stale"}
    assert all(e.t >= 5 and 0.01 < e.staleness <= 1 for e in events if e.t > 1)


def test_observing_refreshes_changes_nothing() -> None:
    out = []
    for watched in (False, True):
        p = Parameter(torch.ones(6, 9))
        optimizer = SOAP([p], refresh="fixed:2")
        optimizer.on_refresh = (lambda e: None) if watched else None
        for t in range(1, 8):
            p.grad = gradient(p, "p", t)
            optimizer.step()
        out.append(p)
    assert torch.equal(*out)


def test_off_diagonal_share_is_exact_with_all_columns_and_close_with_some() -> None:
    made = torch.Generator().manual_seed(0)
    n = 192
    a = torch.randn(n, n, generator=made, dtype=torch.float64)
    x = (a @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** -1.0) @ a.T)[None]
    wiggle = torch.randn(n, n, generator=made, dtype=torch.float64)
    q = torch.linalg.qr(eigenbasis(x)[0] + 0.01 * wiggle).Q[None]
    b = q.mT @ x @ q
    exact = ((b - torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))).norm() / b.norm()).item()
    assert off_diagonal(x, q, top=n).item() == pytest.approx(exact, rel=1e-10)
    assert off_diagonal(x, eigenbasis(x), top=n).item() < 1e-6
    sampled = [off_diagonal(x, q, t).item() for t in range(5)]
    assert max(abs(s - exact) for s in sampled) < 0.05 * exact


def test_overlap_is_one_for_itself_and_zero_by_chance() -> None:
    made = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 200, 200, generator=made)).Q
    assert overlap(q[0], -q[0]).item() == pytest.approx(1, abs=1e-5)
    assert overlap(q[0, :, :20], q[0, :, :20].flip(-1)).item() == pytest.approx(1, abs=1e-5)
    thin = torch.stack([overlap(q[i, :, :20], q[i + 1, :, :20]) for i in range(39)])
    assert thin.mean().abs() < 4 * thin.std() / 39**0.5
    square = torch.stack([overlap(q[i], q[i + 1]) for i in range(39)])
    assert square.mean().abs() < 4 * square.std() / 39**0.5


def test_noise_is_normal_and_depends_on_the_key_only() -> None:
    x = normal((400, 500), key=7)
    assert torch.equal(x, normal((400, 500), key=7))
    assert torch.equal(x[0], normal((500,), key=7))
    assert abs(x.mean()) < 4 / 200_000**0.5 and abs(x.std() - 1) < 4 / 400_000**0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / 200_000) ** 0.5
    other = normal((400, 500), key=8)
    assert abs((x * other).mean()) < 4 / 200_000**0.5
    assert x.isfinite().all() and x.abs().max() < 7


# -- several ranks ----------------------------------------------------------------------------------------------------

UNTIMED = [
    *ADAPTIVE,
    *("fixed:3", "staggered:3", "warmup_dense:1:4:2", "off_diagonal:0.3:2", "lazy:3"),
    *("all(fixed:2, off_diagonal:0.3)", "until(6, lazy:2, off_diagonal:0.3:2)"),
]
TIMED = ["time_budget:0.2", "time_budget:0.2:4", "clamp(time_budget:0.2, 2, 6)", "any(time_budget:0.1, lazy:5)"]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", pytest.param("shared", marks=pytest.mark.slow), "fsdp2"])
def test_ranks_decide_alike(pool: Pool, layout: str) -> None:
    """Replicas refresh the same matrices in the same steps, whatever their clocks say; else only the owner does."""
    expected = jobs.decided(0, 1, "ddp", UNTIMED, 12)
    first, second = pool.run("tests.helpers.jobs:decided", 2, layout=layout, policies=[*UNTIMED, *TIMED], steps=12)
    for policy in (*UNTIMED, *TIMED):
        (mine, a), (theirs, b) = first[policy], second[policy]
        assert all(torch.equal(a[k], b[k]) for k in a), f"{policy}: the replicas have different weights"
        if layout == "ddp":
            assert mine == theirs, policy
            actual = mine
        else:
            owned = [{name for name, *_ in events} for events in (mine, theirs)]
            assert all(owned) and not owned[0] & owned[1], policy
            actual = mine + theirs
        if policy in UNTIMED and not parse(policy).compares:  # the overlap of a first basis hangs on the last bit
            assert sorted(actual) == sorted(expected[policy][0]), policy
        days = [t for _, t, reason in actual if t > 1]
        matrices = len({name for name, *_ in actual})
        assert matrices == 6 and 0 < len(days) < 11 * matrices, f"{policy} does not decide"
        if policy in TIMED:
            assert "budget" in {reason for *_, reason in actual}, policy


@pytest.mark.dist
def test_a_time_budget_needs_to_know_the_replicas(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="set optimizer.process_group to the group of the replicas"):
        pool.run("tests.helpers.jobs:decided", 2, layout="ddp", policies=TIMED[:1], steps=2, told=False)
