"""Refresh policies: what they decide, that they rest with the state, and that they cost what they say."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import SOAP
from lightning_optim.core.work import Refresh
from lightning_optim.ops.eigenbasis import eigenbasis, off_diagonal, overlap
from lightning_optim.ops.noise import normal
from lightning_optim.refresh import RECORD, Clock, View, parse, phases
from tests.rules import assert_equal, give, gradient

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
    made, records = parse(policy), [dict.fromkeys(RECORD, 0.0) | {"age": 1.0, "overlap": shared} for _ in costs]
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
        for i, reason in enumerate(made.decide(views, measure, clock)):
            records[i]["age"] = 1.0 if reason else records[i]["age"] + 1
            if reason:
                out[i].append(t)
    return out


def test_fixed_is_the_published_schedule() -> None:
    assert dates("fixed:10", 40) == [[11, 21, 31]]
    assert dates("fixed:10:10", 40) == [[10, 20, 30, 40]]


def test_staggered_spreads_the_cost_over_the_steps() -> None:
    costs = (8.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0, 8.0)
    found = dates("staggered:4", 17, costs=costs)
    for days in found:
        assert {b - a for a, b in zip(days, days[1:], strict=False)} == {4}
    paid = Counter({t: 0.0 for t in range(6, 10)})
    for cost, days in zip(costs, found, strict=True):
        paid.update({t: cost for t in days if 6 <= t < 10})
    assert max(paid.values()) <= max(sum(costs) / 4, *costs)


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
    found = dates(f"time_budget:{share}:10000", steps, costs=(1.0, 2.0, 1.0), ageing=0.01)
    spent = sum(c * len(days) for c, days in zip((1.0, 2.0, 1.0), found, strict=True))
    assert share * steps - 6 <= spent <= share * steps + 1e-9
    assert all(found)


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
        ("clamp(fixed:2)", "clamp\\(a, min, max\\)"),
    ],
)
def test_a_wrong_policy_is_told_at_construction(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([Parameter(torch.ones(3, 3))], refresh=text)


@pytest.mark.parametrize("policy", [*ADAPTIVE, "staggered:3", "warmup_dense:1:4:2"])
def test_resume_is_bitwise_with_refreshes_after_it(policy: str) -> None:
    def start() -> tuple[dict[str, Parameter], SOAP, list[Refresh]]:
        made = torch.Generator().manual_seed(0)
        ps = {k: Parameter(torch.randn(s, generator=made)) for k, s in {"a": (6, 9), "b": (9, 9), "c": (4, 6)}.items()}
        optimizer, events = SOAP(ps.items(), refresh=policy), []
        optimizer.on_refresh = events.append
        return ps, optimizer, events

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
