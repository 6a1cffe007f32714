"""What the contract tests share: every rule of the registry, its reference, parameters it takes, gradients."""

from __future__ import annotations

import importlib
import typing
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lightning_optim.optimizers as optimizers
from lightning_optim import RuleOptimizer
from lightning_optim.core.parallel import sharding
from lightning_optim.core.rule import REGISTRY, Rule, hyperparameters

NAMES = [name for name in sorted(REGISTRY) if REGISTRY[name].curvature_input != "loss"]
SEARCHING = [name for name in sorted(REGISTRY) if REGISTRY[name].curvature_input == "loss"]
"""Rules whose parameters are one vector: none is as if it were alone."""
KINDS = ["lion", "adafactor", "racs", "muon", "soap", "galore", "psgd_kron", "sophia_g"]
"""Elementwise and reducing rules, rules for whole matrices with and without preconditioners, low-rank ones."""
SHAPES = {"wide": (5, 12), "tall": (12, 5), "square": (8, 8), "again": (5, 12), "vector": (7,), "scalar": ()}


def others_slow(names: list[str], *settings: Any) -> list[Any]:
    """Cases of a test that takes a rule's name, and maybe more: those of one rule of each kind are not slow."""
    return [pytest.param(name, *settings, marks=() if name in KINDS else pytest.mark.slow) for name in names]


def reference(name: str) -> ModuleType:
    """The rule's module in tests/contract/references; a missing one is a failure that says so."""
    try:
        return importlib.import_module(f"tests.contract.references.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"tests.contract.references.{name}":
            raise
        pytest.fail(f"rule {name!r} has no reference: write tests/contract/references/{name}.py", pytrace=False)


def narrow(name: str) -> dict[str, Any]:
    """The same settings for float32 parameters."""
    module = reference(name)
    return getattr(module, "NARROW", getattr(module, "STRICT", {}))


def without_draws(name: str) -> dict[str, Any]:
    """Settings under which a rule draws no random numbers, which depend on how matrices are spread over parameters."""
    return getattr(reference(name), "WITHOUT_DRAWS", {})


def strict(name: str) -> dict[str, Any]:
    """Settings under which a rule computes in its parameters' precision."""
    return getattr(reference(name), "STRICT", {})


def cases() -> list[Any]:
    """Every rule with each of its reference's settings, defaults included."""
    out = []
    for name in NAMES:
        try:
            module = importlib.import_module(f"tests.contract.references.{name}")
            settings = [{}, *module.SETTINGS]
        except ModuleNotFoundError:
            settings = [{}]
        out += [pytest.param(name, s, id=f"{name}-{i}") for i, s in enumerate(settings)]
    return out


def switches(name: str) -> list[dict[str, Any]]:
    """The settings of a rule's reference, and every other value of each switch, if the rule allows it alone."""
    rule, out = REGISTRY[name], [{}, *([] if name in SEARCHING else reference(name).SETTINGS)]
    hints, defaults = typing.get_type_hints(rule), hyperparameters(rule)
    for key, default in defaults.items():
        values = (True, False) if hints[key] is bool else typing.get_args(hints[key])
        if hints[key] is not bool and typing.get_origin(hints[key]) is not typing.Literal:
            continue
        for value in values:
            with suppress(ValueError):
                if value != default:
                    rule(**{**defaults, key: value}).validate()
                    out.append({key: value})
    return out


def shapes(rule: type[Rule]) -> dict[str, tuple[int, ...]]:
    """Shapes a rule takes."""
    return {k: s for k, s in SHAPES.items() if rule.vectors or len(s) >= 2}


def drawing(seed: int) -> torch.Generator:
    """Random numbers for the device where tensors are made; a pretend one draws on the CPU."""
    device = torch.get_default_device()
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def params(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Parameter]:
    """Random parameters of every shape a rule takes."""
    made = drawing(seed)
    draw = {k: torch.randn(s, generator=made, dtype=torch.float64) for k, s in shapes(REGISTRY[name]).items()}
    return {k: Parameter(x.to(dtype)) for k, x in draw.items()}


def gradient(p: Tensor, key: str, t: int) -> Tensor:
    """The gradient of a parameter at step t: the same whatever the weights, the run or the rank."""
    made = drawing(sum(map(ord, key)) * 1000 + t)
    return torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.dtype)


def give(ps: dict[str, Parameter], t: int, *, without: str = "", only: str = "") -> None:
    """Set every gradient of step t, except one parameter's, or one parameter's alone."""
    for key, p in ps.items():
        p.grad = None if key == without or (only and key != only) else gradient(p, key, t)


def make(name: str, ps: Any, **settings: Any) -> RuleOptimizer:
    """A rule's own optimizer class."""
    settings = refreshing(name) | settings
    return optimizers.CLASSES[name](ps.values() if isinstance(ps, dict) else ps, **settings)  # pyright: ignore


def run(
    name: str,
    ps: dict[str, Parameter],
    steps: range,
    optimizer: RuleOptimizer | None = None,
    *,
    only: str = "",
    **settings: Any,
):
    """Take steps, with a gradient of one parameter only if so asked; returns the optimizer."""
    optimizer = optimizer or make(name, ps, **settings)
    for t in steps:
        give(ps, t, only=only)
        optimizer.step()
    return optimizer


def settings_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters, defaults included."""
    return {**hyperparameters(REGISTRY[name]), **refreshing(name), **given}


def refreshing(name: str) -> dict[str, Any]:
    """Settings under which parameters do not ask for each other, and costly state is due in any run of three steps."""
    if name in SEARCHING:
        return {}
    alone = getattr(reference(name), "ALONE", {}) if REGISTRY[name].needs_all_gradients else {}
    due = {"refresh": "fixed:2"} if REGISTRY[name].preconditioners else getattr(reference(name), "DUE", {})
    return due | alone


def tensors(optimizer: RuleOptimizer) -> list[Tensor]:
    """Every state tensor, in the order of parameters and slots."""
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    return [t for p in owned if p in optimizer.state for _, t in sorted(optimizer.state[p].items())]


def assert_equal(a: dict[str, Parameter], b: dict[str, Parameter]) -> None:
    """Bitwise equality of two sets of parameters."""
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs by {(a[key] - b[key]).abs().max()}"


_shown_here: WeakSet[RuleOptimizer] = WeakSet()
feeding = True
"""Whether optimizers that nobody else feeds are shown numbers made of their gradients."""


class Bowl:
    """A loss with given gradients at the present weights, for rules that search: <g, x - x0> + |x - x0|^2."""

    def __init__(self, optimizer: RuleOptimizer) -> None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        self.start = {p: (p.detach().clone(), p.grad.clone()) for p in every if p.grad is not None}

    def gradient(self, params: Any) -> tuple[float, list[Tensor]]:
        moved = [(p.detach() - self.start[p][0], self.start[p][1]) for p in params]
        return sum(float((g * x + x * x).sum()) for x, g in moved), [g + 2 * x for x, g in moved]

    def product(self, params: Any, v: Any) -> list[Tensor]:
        return [2 * x for x in v]


def show(optimizer: RuleOptimizer) -> None:
    """Show a rule what it observes, before a step."""
    _feed(optimizer, (optimizer,), {})


def _feed(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Show rules that observe something what `shown` makes of a gradient, at every odd step of a parameter.

    A step that is refused, and DCP's dummy step, see nothing: in training these are no steps of a trainer. Rules that
    search get a `Bowl`, unless they have a closure.
    """
    if isinstance(optimizer, RuleOptimizer) and {g["rule"] for g in optimizer.param_groups} & {*SEARCHING}:
        if feeding and not optimizer.has_curvature and not args[1:] and not kwargs:
            optimizer.loss_oracle = Bowl(optimizer)
        return
    if not isinstance(optimizer, RuleOptimizer) or not any(
        REGISTRY[g["rule"]].curvature_input for g in optimizer.param_groups
    ):
        return
    if not feeding or (optimizer.has_curvature and optimizer not in _shown_here):
        return
    _shown_here.add(optimizer)
    optimizer.has_curvature = True
    asked = [g for g in optimizer.param_groups if REGISTRY[g["rule"]].curvature_input]
    groups = [(g, [p for p in g["params"] if p.grad is not None and p.numel()]) for g in asked]
    given = [(p, sharding.local(p.grad)) for _, ps in groups for p in ps]
    still = all(float(g["lr"]) == 0 for g, _ in groups) and not any(g.any() for _, g in given)
    if (still and not optimizer.state) or not all(g.isfinite().all() for _, g in given):
        return
    needs_all_gradients = any(REGISTRY[group["rule"]].needs_all_gradients for group in asked)
    turned = {p for g in asked for p in g["params"] if needs_all_gradients and g["transposed"]}
    t = {p: 1 + int(optimizer.state[p].get("step", 0) if p in optimizer.state else 0) for p, _ in given}
    optimizer.update_curvature({
        p: seen(g.mT if p in turned else g, t[p])
        for p, g in given
        if t[p] % 2 and (g.ndim > 1 or not needs_all_gradients)
    })


def seen(g: Tensor, t: int) -> SimpleNamespace:
    """All that rules observe."""
    x = shown(g, t)
    if g.ndim < 2:
        return SimpleNamespace(value=x, count=16.0)
    m, n = g.shape[-2:]
    return SimpleNamespace(value=x, count=16.0, inputs=x.mT @ x / m, outputs=x @ x.mT / n)


def shown(g: Tensor, t: int) -> Tensor:
    """What is measured at step t of a parameter with this gradient: nothing that clipping would change."""
    return g.to(torch.promote_types(g.dtype, torch.float32)).sign() * (t % 4 + 1) / 4


register_optimizer_step_pre_hook(_feed)
