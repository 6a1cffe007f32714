"""Random runs on several ranks: every layout, and what has to hold of all ranks together."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim import RuleOptimizer
from lightning_optim.core.parallel.sharding import local
from lightning_optim.core.rule import REGISTRY, Rule
from tests.helpers import jobs
from tests.helpers.random_runs import Run, Violation, gradient, make_optimizer

WORLDS = {
    "ddp": (2, 3),
    "shared": (2, 4),
    "fsdp2": (2, 3, 4),
    "hsdp": (4,),
    "tp": (2, 3),
    "fsdp2+tp": (4,),
    "mixed": (3,),
}
"""Layouts with the numbers of ranks that are tried."""


@dataclasses.dataclass
class Result:
    """What one rank has seen of a run."""

    refusal: str = ""
    """Why it was refused at construction, or its layout at the first step."""
    outcomes: list[str] = dataclasses.field(default_factory=list)
    """Of every step: taken, or why not."""
    faults: list[str] = dataclasses.field(default_factory=list)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def model_of(run: Run, layout: str, world: int) -> jobs.Model:
    """A model with the parameters of a run, laid out over the ranks."""
    shapes = {f"p{i}": shape for i, shape in enumerate(run.shapes)}
    return jobs.lay_out(jobs.Model(run.rule, getattr(torch, run.dtype), shapes), layout, world)


def optimizer_of(run: Run, model: nn.Module, layout: str) -> RuleOptimizer:
    """Its optimizer."""
    optimizer = make_optimizer(run, list(model.parameters()))
    if layout == "shared":
        optimizer.shard_work()
    return optimizer


def content(optimizer: RuleOptimizer) -> list[Tensor]:
    """Copies of this rank's weights and state, but for what other ranks own."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in every for _, t in sorted(optimizer.state[p].items())] if optimizer.state else []
    return [local(t).detach().clone() for t in (*every, *tensors) if local(t).numel()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise equality; NaN equals NaN."""
    pairs = [(x.nan_to_num(3.0), y.nan_to_num(3.0)) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


def take_step(run: Run, model: nn.Module, optimizer: RuleOptimizer, t: int, events: list[str]) -> str:
    """One step with gradients that are the same, as whole tensors, on every rank."""
    ps, grads = list(model.parameters()), list[Tensor | None]()
    for i, p in enumerate(ps):
        g = gradient(run, torch.empty(p.shape, dtype=p.dtype), i, t)
        if g is not None and "nan" in events and i == 0:
            g.view(-1)[-1] = float("nan")
        grads.append(None if g is None else jobs.placed(g.contiguous(), p))
    rates = [group["lr"] for group in optimizer.param_groups]
    if "still" in events:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if run.backward == "fused":
                _backward(ps, grads)
            else:
                for p, g in zip(ps, grads, strict=True):
                    p.grad = g
            optimizer.step()
        return "taken"
    except FloatingPointError:
        return "refused"
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _backward(ps: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """A backward pass with these gradients, which needs no communication."""
    for p in ps:
        p.grad = None
    torch.autograd.backward([(part(p) * local(g)).sum() for p, g in zip(ps, grads, strict=True) if g is not None])


def part(p: Tensor) -> Tensor:
    """This rank's part of a parameter, through which gradients flow."""
    return p.to_local() if isinstance(p, DTensor) else p


def train(run: Run, layout: str, world: int) -> Result:
    """A run on this rank; in one process, too."""
    out = Result()
    model = model_of(run, layout, world)
    try:
        optimizer = optimizer_of(run, model, layout)
    except ValueError as error:
        out.refusal = str(error)
        return out
    twin: tuple[jobs.Model, RuleOptimizer] | None = None
    for t in range(1, len(run.gradients) + 1):
        events = [event for at, event in run.events if at == t]
        if "save" in events and twin is None:
            saved = optimizer.state_dict()
            other = model_of(run, layout, world)
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                local(p.detach()).copy_(local(q.detach()))
            twin = other, optimizer_of(run, other, layout)
            twin[1].load_state_dict(saved)
        before = content(optimizer)
        try:
            outcome = take_step(run, model, optimizer, t, events)
        except ValueError as error:
            out.refusal = str(error)
            if not same(before, content(optimizer)):
                out.faults.append(f"a layout was refused in the middle of step {t}")
            return out
        out.outcomes.append(outcome)
        if outcome == "refused" and run.backward == "fused":
            return out  # in the middle of the pass
        if outcome == "refused" and not same(before, content(optimizer)):
            out.faults.append(f"a refused step changed something: {t}")
        if twin is not None and take_step(run, *twin, t, events) != outcome:
            out.faults.append(f"what was loaded refuses another step: {t}")
        values = [local(p) for p in model.parameters()]
        if not all(bool(x.isfinite().all()) for x in values) and not _may_be_nan(run, optimizer):
            out.faults.append(f"weights are not finite: {t}")
    if twin is not None and not same(content(optimizer), content(twin[1])):
        out.faults.append("what was loaded does not continue bit for bit")
    out.weights = jobs.weights(model) if dist.is_initialized() else {k: p.detach() for k, p in model.named_parameters()}
    return out


def _may_be_nan(run: Run, optimizer: RuleOptimizer) -> bool:
    return any(event == "nan" for _, event in run.events) and optimizer.param_groups[0]["on_nonfinite"] == "off"


def on_ranks(rank: int, world: int, layout: str, run: Run) -> Result:
    """What the processes of the pool do."""
    return train(run, layout, world)


def check(run: Run, layout: str, results: list[Result], counts: Counter[str]) -> None:
    """Everything that has to hold of the ranks together.

    Raises:
        Violation: something does not.
    """

    def hold(invariant: str, holds: bool, what: Any = "") -> None:
        counts[invariant] += 1
        if not holds:
            raise Violation(f"{invariant}: {what}\n{layout} {len(results)} {run}")

    first = results[0]
    hold("ranks refuse together", len({bool(r.refusal) for r in results}) == 1, [r.refusal for r in results])
    hold("no fault on a rank", not any(r.faults for r in results), [r.faults for r in results])
    if first.refusal:
        counts["refused"] += 1
        return
    counts["runs"] += 1
    hold("ranks step together", len({tuple(r.outcomes) for r in results}) == 1, [r.outcomes for r in results])
    for r in results[1:]:
        hold(
            "ranks have the same weights",
            all(torch.equal(r.weights[k].nan_to_num(), x.nan_to_num()) for k, x in first.weights.items()),
        )
    if run.backward == "fused" and "refused" in first.outcomes:
        counts["ended by a gradient that is not finite, in a fused backward pass"] += 1
        return
    alone = train(dataclasses.replace(run, backward=""), "ddp", 1)
    if alone.refusal:
        raise Violation(f"refused by one process only: {alone.refusal}\n{layout} {run}")
    hold("steps are those of one process", alone.outcomes == first.outcomes, (alone.outcomes, first.outcomes))
    is_spoiled = any(bool(p.isnan().any()) for p in alone.weights.values())  # as on_nonfinite="off" says
    if is_spoiled or any(one != ("normal", "dense") for step in run.gradients for one in step):
        return
    rule = REGISTRY[run.rule]
    options = dict(run.settings)
    sums = rule.reduces or rule.kernel is not Rule.kernel or options.get("clip_norm") or options.get("comm_dtype")
    sums = (
        sums
        or any(options.get(k) for k in ("uw_floor", "pin", "constraint"))
        or options.get("radial_damping", 1.0) != 1.0
    )
    for key, p in alone.weights.items():
        actual = first.weights[key]
        if sums or layout in ("tp", "fsdp2+tp"):
            start = model_of(run, "ddp", 1).get_parameter(key).detach()
            coarse = (
                1e-2 if options.get("comm_dtype") or run.dtype == "bfloat16" or "state_storage" in options else 1e-4
            )
            bound = coarse * (p - start).double().norm() + torch.finfo(p.dtype).eps * 4 * p.double().norm()
            hold(
                "weights are those of one process, to rounding",
                bool((actual - p).double().norm() <= bound),
                (key, float((actual - p).double().norm()), float(bound)),
            )
        else:
            hold(
                "weights are those of one process, bit for bit",
                torch.equal(actual.nan_to_num(), p.nan_to_num()),
                (key, float((actual - p).abs().max())),
            )
