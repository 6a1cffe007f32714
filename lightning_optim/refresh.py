"""When preconditioners are recomputed: eigenbases, inverse roots, projections.

A policy is spelled in one string, the setting `refresh` of every rule with such state: a name and numbers,
`"staggered:10"`, or a combinator, `"any(staggered:50, off_diagonal:0.3)"`. It decides from the step, a phase and a
short record per matrix that rests with the state, so that a resumed run, and every rank, decides alike. The first
step of a parameter always computes its state.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from lightning_optim.settings import split_at_commas

RECORD = ("age", "overlap", "every", "count", "mean")
"""What rests per matrix: steps since the refresh, its overlap with the state before, and a policy's own numbers."""

Measure = Callable[[Sequence["View"]], Sequence[float]]


@dataclass
class View:
    """What a policy may ask about one parameter.

    Args:
        t: number of this step for the parameter, from 1.
        cost: of a refresh, in any unit common to all parameters.
        phase: of the parameter among all, for an interval.
        record: numbers by the names of `RECORD`; a policy may write `every`, `count` and `mean`.
    """

    t: int
    cost: float
    phase: Callable[[int], int]
    record: dict[str, float]


@dataclass
class Clock:
    """Seconds between steps and of refreshes, for policies that budget time.

    Args:
        now: gives seconds.
    """

    now: Callable[[], float] = time.perf_counter
    elapsed: float = 0.0
    ticks: int = 0
    rate: float = 0.0
    """Seconds per unit of cost, as known when the step started: ranks have agreed on it for the whole step."""
    credits: dict[Policy, tuple[int, float]] = field(default_factory=dict)
    _last: float | None = None
    _mean: float = 0.0

    def tick(self) -> None:
        """Note the start of a step."""
        now = self.now()
        self.elapsed = 0.0 if self._last is None else now - self._last
        self.rate = self._mean
        self._last = now
        self.ticks += 1

    def spent(self, cost: float, seconds: float) -> None:
        """Note a refresh."""
        if cost > 0:
            self._mean = seconds / cost if self._mean == 0 else 0.8 * self._mean + 0.2 * seconds / cost


class Policy:
    """Base of every policy; `decide` is asked once per step for all parameters of a group that are worked on alike."""

    reads: ClassVar[bool] = False
    """Whether it looks at records or staleness; the others need the step and the phase only."""
    measures: ClassVar[bool] = False
    """Whether it asks for the staleness, which not every rule defines."""
    compares: ClassVar[bool] = False
    """Whether it looks at what a refresh changed, which not every rule's state tells."""
    timed: ClassVar[bool] = False
    """Whether it looks at the clock."""
    needs_all: ClassVar[bool] = True
    """Whether it decides about all parameters together: it spreads their refreshes, or shares a budget among them."""
    is_periodic: ClassVar[bool] = False
    """Whether `next_step` tells the next refresh, so that nothing has to be decided before it."""
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    """Bounds of fields, included; every field is positive."""

    def contradiction(self) -> str:
        """What of the numbers cannot be meant.

        Returns:
            The end of an error message; empty where all is well.
        """
        for key, (low, high) in self.ranges.items():
            if not low <= getattr(self, key) <= high:
                return f"{key} must lie in [{low:g}, {high:g}], got {getattr(self, key):g}"
        return ""

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:
        """Decide for each view; never called at t = 1.

        Args:
            views: of the parameters.
            measure: gives the staleness of views, in [0, 1], with one synchronization.
            clock: for time budgets.

        Returns:
            The reason of a refresh, or an empty string.
        """
        return ["interval" if self.next_step(v.t, v.phase) == v.t else "" for v in views]

    def next_step(self, t: int, phase: Callable[[int], int]) -> int:
        """The next refresh of a parameter, for policies that depend on the step and the phase alone (`is_periodic`).

        Args:
            t: number of a step, from 2.
            phase: gives the phase of the parameter for an interval.

        Returns:
            The first step from `t` on in which a refresh is due.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(Policy):
    """Every `interval` steps, all at once: the published schedule of SOAP and GaLore, at steps 1, 11, 21.

    With `offset` equal to the interval at multiples of it, as Alice, Eigen-Adam, Shampoo and PSGD: 10, 20, 30.
    """

    interval: int = 10
    offset: int = 1
    needs_all: ClassVar = False
    is_periodic: ClassVar = True

    def next_step(self, t: int, phase: Callable[[int], int]) -> int:  # noqa: D102
        return t + (self.offset - t) % self.interval


@dataclass(frozen=True)
class Staggered(Policy):
    """Every `interval` steps, each matrix at its own phase; phases balance the cost, so no step pays for all."""

    interval: int = 10
    is_periodic: ClassVar = True

    def next_step(self, t: int, phase: Callable[[int], int]) -> int:  # noqa: D102
        return t + (phase(self.interval) + 1 - t) % self.interval


@dataclass(frozen=True)
class WarmupDense(Policy):
    """The j-th refresh follows after min(`last`, `first` * `growth`^j) steps; `staggered` from the longest on."""

    first: int = 1
    last: int = 10
    growth: float = 1.5
    ranges: ClassVar = {"growth": (1.0, math.inf)}

    def contradiction(self) -> str:  # noqa: D102
        is_shrinking = self.first > self.last
        return (
            f"first must not exceed last, got {self.first} and {self.last}" if is_shrinking else super().contradiction()
        )

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        times, end = _dense(self.first, self.last, self.growth)
        later = Staggered(self.last).decide(views, measure, clock)
        return [("warm-up" if v.t in times else "") if v.t <= end else x for v, x in zip(views, later, strict=True)]


@functools.lru_cache
def _dense(first: int, last: int, growth: float) -> tuple[frozenset[int], int]:
    times, t, interval = [1], 1, float(first)
    while interval < last:
        t += max(1, round(interval))
        times.append(t)
        interval *= max(growth, 1.01)
    return frozenset(times), t


@dataclass(frozen=True)
class OffDiagonal(Policy):
    """When the staleness exceeds `tolerance`; looked at every `interval` / 5 steps, forced after 10 intervals.

    Three looks without need double the distance between looks, up to the interval; a refresh resets it.
    """

    tolerance: float = 0.3
    interval: int = 10
    reads: ClassVar = True
    measures: ClassVar = True
    ranges: ClassVar = {"tolerance": (0.0, 1.0)}

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        base = max(1, self.interval // 5)
        looked = []
        for v in views:
            v.record["every"] = v.record["every"] or base
            every = int(v.record["every"])
            if v.record["age"] >= base and (v.t + v.phase(every)) % every == 0:
                looked.append(v)
        stale = {id(v): x for v, x in zip(looked, measure(looked), strict=True)}
        out = []
        for v in views:
            reason = "stale" if stale.get(id(v), 0.0) > self.tolerance else ""
            if v.record["age"] >= 10 * self.interval:
                reason = "age"
            if reason:
                v.record |= {"every": base, "count": 0}
            elif id(v) in stale:
                v.record["count"] += 1
                if v.record["count"] >= 3:
                    v.record |= {"every": min(2 * v.record["every"], self.interval), "count": 0}
            out.append(reason)
        return out


@dataclass(frozen=True)
class Lazy(Policy):
    """Q-GaLore's: the interval grows where `looks` refreshes in a row changed little.

    If the mean overlap of the last `looks` refreshes with the state before is at least `threshold`, the interval is
    multiplied by `growth`, at most to 10 times the first; below half the threshold it is divided.

    Differs: chance-adjusted overlap of all columns, shrinking, a bound, and the measurements start again after a change
    (Zhang et al. 2024, arXiv:2407.08296, Sec. 3.2: cosine of the first vector, growth only, unbounded).
    """

    interval: int = 10
    threshold: float = 0.4
    looks: int = 5
    growth: float = 2.0
    reads: ClassVar = True
    compares: ClassVar = True
    ranges: ClassVar = {"threshold": (0.0, 1.0), "growth": (1.0, math.inf)}

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        out = []
        for v in views:
            r = v.record
            r["every"] = r["every"] or self.interval
            first = r["age"] == v.t - 1  # only initialized so far
            if r["age"] == 1 and not first:
                self._learn(r)
            due = r["age"] >= (self.interval + v.phase(self.interval) if first else r["every"])
            out.append("interval" if due else "")
        return out

    def _learn(self, r: dict[str, float]) -> None:
        r["count"] += 1
        r["mean"] += (r["overlap"] - r["mean"]) / r["count"]
        if r["count"] < self.looks:
            return
        if r["mean"] >= self.threshold:
            r["every"] = min(round(r["every"] * self.growth), 10 * self.interval)
        elif r["mean"] < self.threshold / 2:
            r["every"] = max(1, round(r["every"] / self.growth))
        r |= {"count": 0, "mean": 0}


@dataclass(frozen=True)
class TimeBudget(Policy):
    """At most `share` of the time between steps goes into refreshes, where staleness per cost is largest.

    Unspent time is kept up to three times the largest cost; no state grows older than `max_age` steps. Ranks that
    do the same work must agree on the seconds, so a replicated model needs `RuleOptimizer.process_group`. The times
    start again when a run is resumed, and differ from run to run: the only policy under which two runs, or a run and
    its resumption, are not bitwise equal.
    """

    share: float = 0.05
    max_age: int = 1000
    reads: ClassVar = True
    measures: ClassVar = True
    timed: ClassVar = True
    ranges: ClassVar = {"share": (0.0, 1.0)}

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        seconds = [v.cost * clock.rate for v in views]
        ticks, credit = clock.credits.get(self, (0, 0.0))
        if ticks != clock.ticks:
            credit += self.share * clock.elapsed
        bound = 3 * max(seconds, default=0.0)
        credit = min(credit, bound) if bound else credit
        out = ["age" if v.record["age"] >= self.max_age else "" for v in views]
        credit -= sum(s for s, reason in zip(seconds, out, strict=True) if reason)
        able = [i for i, v in enumerate(views) if not out[i] and v.record["age"] > 1]
        if able and min(seconds[i] for i in able) <= credit:
            stale = dict(zip(able, measure([views[i] for i in able]), strict=True))
            for i in sorted(able, key=lambda i: (-stale[i] / max(seconds[i], 1e-12), i)):
                if stale[i] <= 0 or seconds[i] > credit:
                    break  # a large one at the head of the queue waits; else it would never be its turn
                out[i] = "budget"
                credit -= seconds[i]
        clock.credits[self] = clock.ticks, credit
        return out


class _Combined(Policy):
    """Needs what one of its parts needs."""

    needs_all: ClassVar = False

    def __post_init__(self) -> None:
        for need in ("reads", "measures", "compares", "timed", "needs_all"):
            is_needed = any(getattr(p, need) for p in self.inner()) or getattr(type(self), need)
            object.__setattr__(self, need, is_needed)

    def inner(self) -> Sequence[Policy]:
        """The policies it is made of."""
        raise NotImplementedError


@dataclass(frozen=True)
class AnyOf(_Combined):
    """When one of several policies says so."""

    parts: tuple[Policy, ...]

    def inner(self) -> Sequence[Policy]:  # noqa: D102
        return self.parts

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        votes = [p.decide(views, measure, clock) for p in self.parts]
        return [next((x for x in row if x), "") for row in zip(*votes, strict=True)]


@dataclass(frozen=True)
class AllOf(AnyOf):
    """When all of several policies say so."""

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        votes = [p.decide(views, measure, clock) for p in self.parts]
        return ["+".join(row) if all(row) else "" for row in zip(*votes, strict=True)]


@dataclass(frozen=True)
class Clamp(_Combined):
    """Another policy, but never before `min_age` steps and always after `max_age`."""

    part: Policy
    min_age: int
    max_age: int
    reads: ClassVar = True

    def contradiction(self) -> str:  # noqa: D102
        ages = self.min_age, self.max_age
        return "min_age must not exceed max_age, got {} and {}".format(*ages) if ages[0] > ages[1] else ""

    def inner(self) -> Sequence[Policy]:  # noqa: D102
        return [self.part]

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        out = self.part.decide(views, measure, clock)
        ages = [v.record["age"] for v in views]
        reasons = [x if age >= self.min_age else "" for x, age in zip(out, ages, strict=True)]
        return ["age" if age >= self.max_age else x for x, age in zip(reasons, ages, strict=True)]


@dataclass(frozen=True)
class Until(_Combined):
    """One policy up to a step, another from there on."""

    step: int
    first: Policy
    then: Policy

    def inner(self) -> Sequence[Policy]:  # noqa: D102
        return [self.first, self.then]

    def decide(self, views: Sequence[View], measure: Measure, clock: Clock) -> list[str]:  # noqa: D102
        early, late = [v for v in views if v.t <= self.step], [v for v in views if v.t > self.step]
        answers = [
            *zip(early, self.first.decide(early, measure, clock) if early else [], strict=True),
            *zip(late, self.then.decide(late, measure, clock) if late else [], strict=True),
        ]
        answer_of = {id(v): x for v, x in answers}
        return [answer_of[id(v)] for v in views]


POLICIES: dict[str, type[Policy]] = {
    "fixed": Fixed,
    "staggered": Staggered,
    "warmup_dense": WarmupDense,
    "off_diagonal": OffDiagonal,
    "lazy": Lazy,
    "time_budget": TimeBudget,
}
COMBINATORS: dict[str, type[Policy]] = {"any": AnyOf, "all": AllOf, "clamp": Clamp, "until": Until}
MAX_DEPTH = 16
"""Of combinators within combinators."""


@functools.lru_cache
def parse(text: str) -> Policy:
    """Read a policy.

    Args:
        text: `name:number:number`, numbers in the order of the policy's fields and optional; or `any(a, b)`,
            `all(a, b)`, `clamp(a, min_age, max_age)`, `until(step, a, b)`.

    Returns:
        The policy.

    Raises:
        ValueError: text that is none, numbers out of range or that contradict each other.
    """
    text = text.strip()
    if max(itertools.accumulate((c == "(") - (c == ")") for c in text), default=0) > MAX_DEPTH:
        raise ValueError(f"refresh: policies are nested more than {MAX_DEPTH} deep")
    policy = _parse(text)
    if reason := policy.contradiction():
        raise ValueError(f"refresh: {text!r}: {reason}")
    return policy


def _parse(text: str) -> Policy:
    call = re.fullmatch(r"(\w+)\((.*)\)", text)
    if call and call[1] in COMBINATORS:
        return _combined(call[1], split_at_commas(call[2], "refresh"), text)
    name, *numbers = text.split(":")
    if name not in POLICIES:
        names = ", ".join([*POLICIES, *(f"{c}(...)" for c in COMBINATORS)])
        raise ValueError(f"refresh: no policy {text!r}; known: {names}")
    cls = POLICIES[name]
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    if len(numbers) > len(names):
        raise ValueError(f"refresh: {name} takes at most {':'.join(names)}, got {text!r}")
    return cls(**{key: _number(x, hints[key], text) for key, x in zip(names, numbers, strict=False)})


def _combined(name: str, parts: list[str], text: str) -> Policy:
    if name in ("any", "all") and len(parts) > 1:
        return (AnyOf if name == "any" else AllOf)(tuple(parse(p) for p in parts))
    if name == "clamp" and len(parts) == 3:
        return Clamp(parse(parts[0]), int(_number(parts[1], int, text)), int(_number(parts[2], int, text)))
    if name == "until" and len(parts) == 3:
        return Until(int(_number(parts[0], int, text)), parse(parts[1]), parse(parts[2]))
    raise ValueError(f"refresh: {text!r}: any(a, b, ...), all(a, b, ...), clamp(a, min, max) or until(step, a, b)")


def _number(text: str, kind: type, whole: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(
            f"refresh: {text!r} in {whole!r} is not {'an integer' if kind is int else 'a number'}"
        ) from None
    if not 0 < value < float("inf"):
        raise ValueError(f"refresh: {text!r} in {whole!r} must be positive")
    return value


@functools.lru_cache
def phases(costs: tuple[float, ...], interval: int) -> tuple[int, ...]:
    """Spread refreshes over an interval: the most expensive first, each to the phase with the least cost so far.

    Args:
        costs: of every parameter that shares the policy.
        interval: number of phases.

    Returns:
        The phase of each, in [0, interval).
    """
    loads = [0.0] * min(interval, len(costs))  # no more phases are needed than there are parameters
    out = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        out[i] = loads.index(min(loads))
        loads[out[i]] += costs[i]
    return tuple(out)
