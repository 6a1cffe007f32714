"""Random runs of optimizers: what is drawn, how it is run, and what has to hold at every step of it.

A run is plain data (`Run`), so that it can be printed, repeated and sent to other processes.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.options import OPTIONS as OPTION_DEFAULTS
from lightning_optim.core.options import has_constraint
from lightning_optim.core.rule import REGISTRY, Rule
from lightning_optim.core.step import compiled
from lightning_optim.core.step.averaging_methods import averages_of
from tests.helpers.rules import NAMES, SEARCHING, refreshing, switches

SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (1,), (7,), (0,), (3, 0), (1, 6), (6, 1), (1, 1), (5, 3), (8, 8), (12, 5)),
    *((2, 150), (150, 2), (4, 3, 2), (1, 4, 3), (3, 4, 2, 2), (2, 3, 1, 2, 2)),
)
LAYOUTS = ("plain", "turned", "strided", "channels_last", "shared")
"""How parameters lie in memory: as a transposed matrix, every other row, channels last, or part of one buffer."""
PATTERNS: dict[str, float] = {"normal": 1.0, "tiny": 1e-20, "least": 1e-38, "denormal": 1e-42, "large": 1e12}
PATTERNS |= {"huge": 1e20, "greatest": 1e30, "zero": 0.0}
FORMS = ("dense", "rank one", "dead rows", "one element", "expanded", "missing")
OPTIONS: dict[str, Sequence[Any]] = {
    "lr_convention": ("adamw", "native"),
    "on_nonfinite": ("raise", "skip"),
    "param_rounding": ("nearest", "kahan", "stochastic"),
    "state_storage": ("bf16", "int8", "int8_grid", "fp8", "host"),
    "transposed": (True,),
    "constraint": ("hyperball",),
    "uw_floor": (0.3,),
    "uw_floor_by": ("row",),
    "radial_damping": (0.5,),
    "pin": (True,),
    "cautious_decay": (0.1, True),
    "cautious_when": ("after_pin",),
    "clip_norm": (0.5, 1e-3),
    "comm_dtype": ("bf16",),
    "weight_decay": (0.1,),
    "seed": (1,),
    "blocks": (1, (2, 1)),
}
EVENTS = ("save", "copy", "pickle", "freeze", "thaw", "still", "zeros", "add", "narrow", "scaler", "nan", "evaluate")
AVERAGING: dict[str, dict[str, Any]] = {
    "ema_nesterov": {"step_size": 0.5, "beta": 0.5, "start": 1, "stop": 4},
    "tail_ema": {"start": 1, "tau": 2.0},
    "muloco": {"every": 2},
}
"""Methods with settings under which they act within a few steps."""
LARGE: dict[bool, Sequence[tuple[int, ...]]] = {False: ((131, 127), (20000,), (3, 74, 76)), True: ((521, 509),)}
"""Shapes that are stepped by compiled graphs, for elementwise rules and for those that reduce."""
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Run:
    """A random run."""

    rule: str
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    dtype: str
    settings: tuple[tuple[str, Any], ...]
    gradients: tuple[tuple[tuple[str, str], ...], ...]
    """Of every step and parameter: size and form."""
    events: tuple[tuple[int, str], ...]
    """Before which step something happens."""
    averaging: str = ""
    backward: str = ""
    """How gradients come: assigned, by a `closure`, or stepped as they are computed (`fused`)."""
    seed: int = 0


@st.composite
def runs(draw: st.DrawFn, names: Sequence[str] = (*NAMES, *SEARCHING), *, steps: int = 5, sharded: bool = False) -> Run:
    """Draw a run.

    Args:
        draw: of Hypothesis.
        names: of the rules.
        steps: at most so many.
        sharded: of a model over several ranks, for which not every event, shape or layout makes sense.

    Returns:
        The run.
    """
    rule = draw(st.sampled_from(sorted(names)))
    least = 0 if REGISTRY[rule].vectors else 2
    most = 2 if REGISTRY[rule].needs_all_gradients else 5
    possible = [s for s in SHAPES if max(least, int(sharded)) <= len(s) <= most and (math.prod(s) or not sharded)]
    shapes = tuple(draw(st.lists(st.sampled_from(possible), min_size=1, max_size=4)))
    layouts = tuple("plain" if sharded else draw(st.sampled_from(LAYOUTS)) for _ in shapes)
    settings: dict[str, Any] = dict(draw(st.sampled_from(switches(rule))))
    for key in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True)):
        settings[key] = draw(st.sampled_from(OPTIONS[key]))
    if "state_storage" in settings:
        settings |= {"storage_min": 1, "storage_block": 16}
    count = draw(st.integers(2, steps))
    size = st.sampled_from(["normal", *PATTERNS])
    form = st.sampled_from(["dense", "dense", *(FORMS[:4] if sharded else FORMS)])
    one = st.tuples(size, form)
    gradients = tuple(tuple(draw(one) for _ in shapes) for _ in range(count))
    kinds: list[str] = list(EVENTS)
    if sharded:  # what a rule observes is shown by each rank, as far as it can see
        kinds = ["save"] if REGISTRY[rule].curvature_input else ["save", "still", "nan"]
    events = tuple(draw(st.lists(st.tuples(st.integers(1, count), st.sampled_from(kinds)), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES[:3] if sharded else DTYPES))
    averaging = draw(st.sampled_from(["", "", "", *AVERAGING]))
    backward = draw(st.sampled_from(["", "", *_backwards(rule)])) if not sharded else ""
    if backward == "fused":
        settings = {k: v for k, v in settings.items() if (k, v) != ("on_nonfinite", "skip")}
    given, number = tuple(settings.items()), draw(st.integers(0, 9))
    return Run(rule, shapes, layouts, dtype, given, gradients, events, averaging, backward, number)


def _backwards(name: str) -> list[str]:
    """Other ways in which a rule may get its gradients."""
    rule = REGISTRY[name]
    return [] if rule.curvature_input else ["closure"] if rule.preconditioners else ["closure", "fused"]


COMPILED = [n for n in NAMES if REGISTRY[n].reduces or REGISTRY[n].elementwise]


@st.composite
def compiled_runs(draw: st.DrawFn) -> Run:
    """Draw a run with `compile=True` and a tensor that a graph steps, every other one for ordinary steps to compare."""
    run = draw(runs(COMPILED, steps=3))
    rule, options = REGISTRY[run.rule], {**dict(run.settings), "compile": True}
    if rule.elementwise and rule.kernel is not Rule.kernel:
        options |= {"state_storage": "int8", "storage_min": 1, "storage_block": 16}
    shapes = (draw(st.sampled_from(LARGE[rule.reduces])), *run.shapes[:1])
    options = {k: v for k, v in options.items() if compiled.refusal(rule(), {**OPTION_DEFAULTS, k: v}) is None}
    dtype, layouts = "float64" if run.dtype == "float64" else "float32", (run.layouts[0], *run.layouts[:1])
    run = dataclasses.replace(run, shapes=shapes, layouts=layouts, dtype=dtype, settings=tuple(options.items()))
    if draw(st.booleans()):
        plain = tuple((("normal", "dense"),) * 2 for _ in run.gradients)
        return dataclasses.replace(run, gradients=plain, events=(), averaging="", backward="")
    return dataclasses.replace(run, gradients=tuple((one[0], one[-1]) for one in run.gradients))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "turned" and x.ndim >= 2:
        return x.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "strided" and x.ndim:
        return torch.stack([x, x], 1)[:, 0]
    if layout == "channels_last" and x.ndim == 4:
        return x.clone(memory_format=torch.channels_last)
    return x.clone()


def parameters(run: Run) -> list[Parameter]:
    """The parameters of a run; those with the layout `shared` are parts of one buffer."""
    draw = torch.Generator().manual_seed(run.seed)
    values = [torch.randn(s, generator=draw, dtype=torch.float64).to(getattr(torch, run.dtype)) for s in run.shapes]
    buffer, start = torch.empty(sum(map(Tensor.numel, values)), dtype=values[0].dtype), 0
    out = []
    for x, layout in zip(values, run.layouts, strict=True):
        if layout == "shared":
            part = buffer[start : start + x.numel()].view(x.shape).copy_(x)
            start += x.numel()
            out.append(Parameter(part))
        else:
            out.append(Parameter(laid_out(x, layout)))
    return out


def gradient(run: Run, p: Tensor, i: int, t: int) -> Tensor | None:
    """The gradient of the i-th parameter at step t, from 1."""
    size, form = run.gradients[t - 1][i % len(run.shapes)]
    draw = torch.Generator().manual_seed(1000 * run.seed + 100 * i + t)
    g = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    if form == "missing":
        return None
    if form == "rank one" and p.ndim >= 2:
        g = g[..., :1] * g[..., :1, :]
    elif form == "dead rows" and p.ndim:
        g[::2] = 0
    elif form == "one element":
        g.view(-1)[1:] = 0
    scale = PATTERNS[size]
    if p.dtype == torch.float16:  # between its smallest and its largest number
        scale = min(max(scale, 1e-7), 1e3) if scale else 0.0
    g = (g * scale).to(p.dtype)
    if form == "expanded":
        return g.flatten()[:1].expand(p.numel()).view(p.shape) if p.numel() else g
    return g


def make_optimizer(run: Run, ps: Sequence[Any]) -> RuleOptimizer:
    """The optimizer of a run; ValueError where its settings contradict each other."""
    return complete(run, RuleOptimizer([settings_of_group(run, ps)]))


def settings_of_group(run: Run, ps: Sequence[Any]) -> dict[str, Any]:
    """A group of a run."""
    return {"params": list(ps), "rule": run.rule, "lr": 1e-3, **refreshing(run.rule), **dict(run.settings)}


def complete(run: Run, optimizer: RuleOptimizer) -> RuleOptimizer:
    """Add what is around the steps of a run."""
    if run.averaging:
        optimizer.with_averaging(*averages_of({run.averaging: AVERAGING[run.averaging]}))
    if run.backward == "fused":
        optimizer.fuse_backward()
    return optimizer


def contents(optimizer: RuleOptimizer) -> list[Any]:
    """Copies of all weights, state and settings."""
    out: list[Any] = []
    for group in optimizer.param_groups:
        out.append({k: v for k, v in group.items() if k != "params"})
        for p in group["params"]:
            out.append(p.detach().clone())
            state = optimizer.state[p] if p in optimizer.state else {}
            if not state.get("step", 0):
                state = {}  # at its start values, or not allocated yet
            out += [(k, v.detach().clone()) for k, v in sorted(state.items()) if isinstance(v, Tensor)]
    return copy.deepcopy(out)


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Bitwise equality of two `contents`."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor):
            return x[0] == y[0] and equal(x[1], y[1])
        if isinstance(x, Tensor):
            return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(3.0), y.nan_to_num(3.0))
        return x == y

    return len(a) == len(b) and all(map(equal, a, b))


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclasses.dataclass
class Trial:
    """A run under way, with what continues it beside: loaded, copied or unpickled."""

    run: Run
    ps: list[Parameter]
    optimizer: RuleOptimizer
    counts: Counter[str]
    twins: list[RuleOptimizer] = dataclasses.field(default_factory=list)
    taken: dict[int, int] = dataclasses.field(default_factory=dict)
    """Steps that each parameter has taken."""
    is_spoiled: bool = False
    """A gradient that is not finite was used, as `on_nonfinite="off"` says."""

    def check(self, invariant: str, holds: bool, what: str = "") -> None:
        """Count an invariant that was looked at, and raise if it does not hold."""
        self.counts[invariant] += 1
        if not holds:
            raise Violation(f"{invariant}: {what}\n{self.run}")


def start(run: Run, counts: Counter[str]) -> Trial | None:
    """Begin a run; None where its settings are refused, which changes nothing."""
    ps = parameters(run)
    before = [p.detach().clone() for p in ps]
    try:
        optimizer = make_optimizer(run, ps)
    except ValueError as error:
        counts["refused at construction"] += 1
        if not str(error) or not all(torch.equal(p, x) for p, x in zip(ps, before, strict=True)):
            raise Violation(f"a refusal without a word, or with a trace: {error}\n{run}") from error
        return None
    return Trial(run, ps, optimizer, counts)


def all_params(optimizer: RuleOptimizer) -> list[Parameter]:
    """Of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def happen(trial: Trial, event: str) -> None:
    """Something between two steps."""
    optimizer, run = trial.optimizer, trial.run
    if event == "save":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        every = all_params(optimizer)
        copies = [
            Parameter(laid_out(p.detach(), x), p.requires_grad) for p, x in zip(every, layouts(trial), strict=True)
        ]
        groups, first = [], 0
        for group in optimizer.param_groups:
            part = copies[first : first + len(group["params"])]
            first += len(part)
            groups.append({"name": group["name"], **settings_of_group(run, part)})
        twin = complete(run, RuleOptimizer(groups))
        twin.load_state_dict(torch.load(file, weights_only=True))
        trial.twins.append(twin)
    elif event in ("copy", "pickle"):  # such copies take ordinary steps, which clip by the norm of all gradients
        if run.backward != "fused" or optimizer.param_groups[0]["clip_norm"] is None:
            trial.twins.append(copy.deepcopy(optimizer) if event == "copy" else pickle.loads(pickle.dumps(optimizer)))
    elif event in ("freeze", "thaw"):
        for one in (optimizer, *trial.twins):
            all_params(one)[0].requires_grad_(event == "thaw")
    elif event == "add":
        for one in (optimizer, *trial.twins):
            more = [Parameter(p.detach().clone()) for p in parameters(dataclasses.replace(run, seed=run.seed + 1))]
            one.add_param_group(settings_of_group(run, more))
    elif event == "evaluate":
        before = contents(optimizer)
        for one in (optimizer, *trial.twins):
            one.eval()
            one.train()
        trial.check("training weights return bit for bit", same(before, contents(optimizer)))
    elif event == "narrow" and run.dtype == "float32" and run.rule not in SEARCHING and not run.averaging:
        for one in (optimizer, *trial.twins):  # as Module.to
            for p in all_params(one):
                p.data = p.data.to(torch.bfloat16)


def layouts(trial: Trial) -> Iterable[str]:
    """Of all parameters."""
    return [trial.run.layouts[i % len(trial.run.layouts)] for i in range(len(all_params(trial.optimizer)))]


def take_step(trial: Trial, t: int, events: Sequence[str]) -> bool:
    """One step of a run and of what continues it, and everything that has to hold of it; whether it can go on."""
    run, optimizer = trial.run, trial.optimizer
    before = contents(optimizer)
    outcomes = [_step(trial, one, t, events) for one in (optimizer, *trial.twins)]
    (outcome, grads), ps = outcomes[0], all_params(optimizer)
    trial.check("the copy raises what the original raises", len({x for x, _ in outcomes}) == 1, str(outcomes))
    if run.backward == "fused":
        if outcome == "refused":  # in the middle of the pass
            return False
    else:
        for p, g in zip(ps, grads, strict=True):
            trial.check(
                "gradients are left as they are",
                g is None or (p.grad is not None and bool((p.grad == g).all()) or bool(g.isnan().any())),
            )
    if outcome == "refused":
        trial.check("a refused step changes nothing", same(before, contents(optimizer)))
        return True
    if any(g is not None and p.requires_grad and bool(g.isnan().any()) for p, g in zip(ps, grads, strict=True)):
        is_kept = _weights_same(before, contents(optimizer))
        trial.is_spoiled = trial.is_spoiled or optimizer.param_groups[0]["on_nonfinite"] == "off" and not is_kept
        trial.check("a gradient that is not finite is not used", is_kept or trial.is_spoiled)
    sane = all(p.isfinite().all() for p in ps)
    trial.check("weights are finite", sane or trial.is_spoiled, f"step {t}")
    if (
        "still" in events
        and run.rule not in SEARCHING
        and not has_constraint(optimizer.param_groups[0])
        and not run.averaging
    ):
        if not any(p.dtype == torch.bfloat16 for p in ps) or dict(run.settings).get("param_rounding") != "kahan":
            trial.check("no learning rate, no move", _weights_same(before, contents(optimizer)), f"step {t}")
    _check_counts(trial, before, grads)
    return True


def _weights_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    kept = [[x for x in some if isinstance(x, Tensor)] for some in (a, b)]
    return same(*kept)


def _check_counts(trial: Trial, before: Sequence[Any], grads: Sequence[Tensor | None]) -> None:
    """A step counts for all parameters that have a gradient, or for none, and moves no other."""
    optimizer, run = trial.optimizer, trial.run
    weights, counted = [x for x in before if isinstance(x, Tensor)], set[int]()
    for p, g, old in zip(all_params(optimizer), grads, weights, strict=True):
        is_used = g is not None and p.requires_grad and p.numel() > 0
        steps = int(optimizer.state[p]["step"]) if p in optimizer.state and "step" in optimizer.state[p] else 0
        last, trial.taken[id(p)] = trial.taken.get(id(p), 0), steps
        if is_used:
            counted.add(steps - last)
        elif run.rule not in SEARCHING:
            trial.check("a step counts for parameters with a gradient", steps == last)
        if not is_used and not run.averaging:
            trial.check("without a gradient, or frozen, nothing moves", same([p.detach()], [old]))
    trial.check("a step is taken, or it is not", counted in (set(), {0}, {1}), str(counted))
    if counted == {0}:
        trial.check("what is not counted moves nothing", _weights_same(before, contents(optimizer)))


def _step(trial: Trial, optimizer: RuleOptimizer, t: int, events: Sequence[str]) -> tuple[str, list[Tensor | None]]:
    ps, backward = all_params(optimizer), trial.run.backward
    grads: list[Tensor | None] = []
    for i, p in enumerate(ps):
        g = gradient(trial.run, p.detach(), i, t)
        if g is not None and "nan" in events and i == 0 and g.numel():
            g = g.clone()
            g.view(-1)[0] = math.nan
        g = torch.zeros_like(p) if g is None and "zeros" in events else g  # set_to_none=False
        grads.append(g if p.requires_grad else p.grad)
    kept = [None if g is None else g.clone() for g in grads]

    def assign() -> float:
        for p, g in zip(ps, grads, strict=True):
            p.grad = g
        return 0.0

    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups if "still" in events else ():
        group["lr"] = 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if backward == "closure":
                optimizer.step(assign)
            elif backward == "fused":
                _backward(ps, grads)
                optimizer.step()
            else:
                assign()
                if "scaler" in events and all(p.dtype == torch.float32 for p in ps):
                    _scaled_step(optimizer, ps, kept)
                else:
                    optimizer.step()
        outcome = "taken"
    except FloatingPointError:
        outcome = "refused"
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return outcome, kept


def _backward(ps: Sequence[Parameter], grads: Sequence[Tensor | None]) -> None:
    """A backward pass with these gradients."""
    for p in ps:
        p.grad = None if p.requires_grad else p.grad
    terms = [(p * g).sum() for p, g in zip(ps, grads, strict=True) if g is not None and p.requires_grad]
    if terms:
        torch.autograd.backward(terms)


def _scaled_step(optimizer: RuleOptimizer, ps: Sequence[Parameter], kept: list[Tensor | None]) -> None:
    """A step by a GradScaler, which leaves out one whose gradients are not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for p in ps:
        if p.grad is not None:
            p.grad = p.grad * 4.0
    if any(p.grad is not None for p in ps):
        scaler.step(optimizer)
        scaler.update()
    for i, p in enumerate(ps):
        kept[i] = None if p.grad is None else p.grad.clone()


def carry_out(run: Run, counts: Counter[str]) -> None:
    """Run, and check everything that has to hold.

    Raises:
        Violation: something does not.
    """
    trial = start(run, counts)
    if trial is None:
        return
    counts["runs"] += 1
    for t in range(1, len(run.gradients) + 1):
        events = [event for at, event in run.events if at == t]
        for event in events:
            happen(trial, event)
        if not take_step(trial, t, events):
            counts["ended by a gradient that is not finite, in a fused backward pass"] += 1
            return
    if dict(run.settings).get("compile"):
        _compare_with_ordinary_steps(trial)
    for twin in trial.twins:
        pairs = zip(all_params(trial.optimizer), all_params(twin), strict=True)
        if any(p.stride() != q.stride() for p, q in pairs):
            counts["a copy with other strides, where kernels round differently"] += 1
            continue
        trial.check(
            "a copy, or a checkpoint, continues bit for bit", same(contents(trial.optimizer)[1:], contents(twin)[1:])
        )


def _compare_with_ordinary_steps(trial: Trial) -> None:
    """Graphs do what ordinary steps do, to rounding, where that is not amplified."""
    run = trial.run
    if run.events or any(one != ("normal", "dense") for step in run.gradients for one in step):
        return
    ordinary = tuple((k, v) for k, v in run.settings if k != "compile")
    other = start(dataclasses.replace(run, settings=ordinary), Counter())
    assert other is not None
    for t in range(1, len(run.gradients) + 1):
        _step(other, other.optimizer, t, ())
    coarse = 2e-2 if "state_storage" in dict(run.settings) else 1e-4
    for p, q, x in zip(trial.ps, other.ps, parameters(run), strict=True):
        bound = coarse * (q - x).norm() + 4 * torch.finfo(p.dtype).eps * q.norm()
        trial.check("graphs step as ordinary steps do, to rounding", bool((p - q).norm() <= bound), str(p.shape))
