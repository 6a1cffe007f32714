"""Rules that look for their step by the loss at other weights: all their parameters are one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives
from lightning_optim.core.rule import GlobalStepRule, Rule
from lightning_optim.core.state import formats, stacking
from lightning_optim.core.step import constraints
from lightning_optim.core.step.work import Job, Work, kept_slots, with_values


class LossOracle(Protocol):
    """Where the loss comes from."""

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss at the present values of parameters, and its gradients.

        Args:
            params: of the optimizer.

        Returns:
            (loss, one tensor per parameter), the same on every rank.
        """
        ...

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """The Gauss-Newton matrix at their present values times a vector.

        Args:
            params: of the optimizer.
            v: one tensor per parameter.

        Returns:
            Likewise.
        """
        ...


class ClosureOracle:
    """The loss by the closure of a loop of one's own, which sets the gradients.

    Args:
        closure: of `step`, called once.
        value: what it returned.
        name: of the rule, for messages.
    """

    def __init__(self, closure: Callable[[], Any], value: Any, name: str) -> None:
        if value is None:
            raise ValueError(f"{name}: the closure must return the loss")
        if collectives.world_size() > 1:
            raise RuntimeError(
                f"{name}: the closure of each process knows the loss of its own batch only; nothing was updated. Add a "
                "curvature feed, which averages it"
            )
        self.closure, self.name, self.first = closure, name, _number(value)
        self.fresh = True

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """See `LossOracle`."""
        if self.fresh:
            value, self.fresh = self.first, False
        else:
            with torch.enable_grad():
                value = _number(self.closure())
        return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """See `LossOracle`.

        Raises:
            RuntimeError: a closure gives no such products.
        """
        raise RuntimeError(
            f"{self.name} needs products with the Gauss-Newton matrix, which a closure cannot give; nothing was "
            "updated. Add a curvature feed: in your own loop, lightning_optim.curvature.Feed"
        )


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


class FlatObjective:
    """What a rule sees of the loss (`core.rule.Objective`); it moves the weights, and puts them back bitwise."""

    def __init__(self, works: Sequence[Work], decays: Sequence[float], look: LossOracle) -> None:
        self.params, self.loss_oracle = [w.param for w in works], look
        self.dtype = formats.compute_dtype_of(self.params[0].dtype)
        self.saved = [p.detach().clone() for p in self.params]
        self.x = self.vector(self.saved)
        sizes = torch.tensor([p.numel() for p in self.params], device=self.x.device)
        self.decay = torch.tensor(decays, dtype=self.dtype, device=self.x.device).repeat_interleave(sizes)
        self.moved = False
        self.value, self.gradient = self._measured(self.x)

    @torch.no_grad()
    def at(self, x: Tensor) -> tuple[float, Tensor]:
        """See `Objective`."""
        if torch.equal(x, self.x):
            return self.value, self.gradient.clone()
        self.moved = True
        for p, part in zip(self.params, self.parts(x), strict=True):
            p.copy_(part)
        return self._measured(x)

    def product(self, v: Tensor) -> Tensor:
        """See `Objective`."""
        self.back()
        return self.vector(self.loss_oracle.product(self.params, self.parts(v))) + self.decay * v

    def back(self) -> None:
        """To the present weights, if that is not where they are: graphs mind being written to."""
        for p, start in zip(self.params, self.saved, strict=True) if self.moved else ():
            p.copy_(start)
        self.moved = False

    def vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector of tensors like the parameters."""
        return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])

    def parts(self, x: Tensor) -> list[Tensor]:
        """Tensors like the parameters of a vector."""
        pieces = x.split([p.numel() for p in self.params])
        return [part.view(p.shape) for p, part in zip(self.params, pieces, strict=True)]

    def _measured(self, x: Tensor) -> tuple[float, Tensor]:
        value, found = self.loss_oracle.gradient(self.params)
        penalty = 0.5 * float((self.decay * x).dot(x))
        return value + penalty, self.vector(found).addcmul_(self.decay, x)


def search(jobs: Sequence[Job], look: LossOracle) -> None:
    """Let every rule that searches replace the gradients of its parameters by the direction it finds.

    State is stored when all of them have found one.

    A closure leaves the gradients of its last call, as with torch.optim.LBFGS; a curvature feed touches none.

    Args:
        jobs: of this step.
        look: the loss.

    Raises:
        ValueError: groups of one such rule whose settings differ.
        FloatingPointError: the direction is not finite; weights and state are as before.
    """
    found: list[Callable[[], None]] = []
    for kind in dict.fromkeys(type(job.rule) for job in jobs if isinstance(job.rule, GlobalStepRule)):
        mine = [(job, w) for job in jobs if type(job.rule) is kind for w in job.works if w.has_gradient]
        if mine:
            found.append(_search([job for job, _ in mine], [w for _, w in mine], look))
    for store in found:
        store()


def _search(jobs: Sequence[Job], works: Sequence[Work], look: LossOracle) -> Callable[[], None]:
    """Find a direction; what stores it, and the state that goes with it."""
    rules = [cast("GlobalStepRule", job.rule) for job in jobs]
    for job in jobs:
        if replace(cast("Any", job.rule), weight_decay=0.0) != replace(cast("Any", rules[0]), weight_decay=0.0):
            raise ValueError(
                f"group {job.group['name']!r}: {job.rule.name} takes one step of all its parameters, so its groups may "
                "differ in weight_decay only; leave out lr_factor and the like, or give parameters to another rule"
            )
    if len({w.param.device for w in works}) > 1:
        raise ValueError(f"{rules[0].name}: all parameters must be on one device, as they are one vector")
    kept = [kept_slots(job, w) for job, w in zip(jobs, works, strict=True)]
    full = [with_values(w, slots) for w, slots in zip(works, kept, strict=True)]
    steps = [int(w.state["step"]) for w in works]
    oldest = steps.index(max(steps))  # a parameter that joined late knows less
    at: FlatObjective | None = None
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    try:
        if rules[0].lr:
            at = FlatObjective(works, [r.weight_decay for r in rules], look)
            for key, slot in works[0].slots(rules[0]).items():
                held = [w.state[key] for w in full]
                row = held[oldest].reshape(-1)[: slot.shape(1, 1)[1]].clone()
                before[key] = at.vector(held) if slot.letters == "mn" else row
            s = SimpleNamespace(**before)
            d = rules[0].direction(at, s)
            if not bool(d.isfinite().all()):
                raise FloatingPointError(
                    f"{rules[0].name}: no finite step was found; nothing was updated. A lower lr may help"
                )
            directions = at.parts(d)
            after = stacking.copy_aliased(before, {k: getattr(s, k) for k in before})
        else:
            directions = [torch.zeros_like(w.param) for w in works]
    finally:
        if at is not None:
            at.back()

    def store() -> None:
        if at is not None:
            _store(full, at, works[0].slots(rules[0]), after)
        for w, d, slots in zip(works, directions, kept, strict=True):
            w.prepared, w.scale = d, 1.0
            for key, x in slots.items():
                x.close_all(w.state[key])

    return store


def _store(works: Sequence[Work], at: FlatObjective, slots: Any, after: dict[str, Tensor]) -> None:
    for key, value in after.items():
        parts = at.parts(value) if slots[key].letters == "mn" else [value] * len(works)
        for w, part in zip(works, parts, strict=True):
            held = w.state[key]
            held.copy_(part if part.shape == held.shape else part.expand(held.shape))


def validate_line_search(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check that a group leaves the step of a rule that searches as it is found.

    Args:
        rule: of the group.
        group: its settings.

    Raises:
        ValueError: an option that would change it.
    """
    if not isinstance(rule, GlobalStepRule):
        return
    said = f"group {group['name']!r}: {rule.name} takes the step for which it measured the loss, so"
    if group["clip_norm"] is not None:
        raise ValueError(f"{said} clip_norm has no gradient to clip; leave it out")
    if group["cautious_decay"] or constraints.shapes_step(group):
        raise ValueError(f"{said} constraint, uw_floor, radial_damping, pin and cautious_decay are not for it")


def validate_dtype(rule: Rule, name: str, p: Tensor) -> None:
    """Check that a parameter can be moved along a search.

    Args:
        rule: that is to own it.
        name: of the parameter.
        p: the parameter.

    Raises:
        ValueError: its dtype is too narrow for small steps.
    """
    if isinstance(rule, GlobalStepRule) and p.dtype.itemsize < 4:
        raise ValueError(
            f"{name}: {rule.name} compares the loss at weights that are close together, which {p.dtype} cannot tell "
            "apart; keep weights in float32 (bf16-mixed, torch_dtype=torch.float32)"
        )
