"""Averaging around the steps of any rule: look-ahead, averages to evaluate with, an outer optimizer.

    optimizer.with_averaging(EMANesterov(0.3), TailEMA(start=2400))
    optimizer.eval()     # averaged weights, to validate and to save
    optimizer.train()    # training weights, bit for bit as they were

The state is in `state[p]`, the counters are in the groups: checkpoints hold both, whichever weights the model's hold.
The integrations with Lightning and Transformers make the two calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.rule import lookup
from lightning_optim.core.state.formats import TRAINED, compute_dtype_of
from lightning_optim.core.step.averaging_methods import COUNTERS, AveragingMethod, EMANesterov, MuLoCo, TailEMA


class AveragedOptimizer(Protocol):
    """What averaging needs of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def total_steps(self) -> int | None:
        """The length of the run, if known."""
        ...


class _Place(NamedTuple):
    """One trained parameter, and what is kept for it."""

    param: Tensor
    x: Tensor
    """This rank's part."""
    slots: dict[str, Tensor]
    """This rank's parts."""
    state: dict[str, Tensor]
    role: str


class Averages:
    """What an optimizer is wrapped in; made by `RuleOptimizer.with_averaging`.

    Args:
        optimizer: whose steps these are.
        members: what to do; each once.

    Raises:
        ValueError: two that do not go together, or weights that are too narrow.
    """

    def __init__(self, optimizer: AveragedOptimizer, members: tuple[AveragingMethod, ...]) -> None:
        names = [m.name for m in members]
        if len(set(names)) < len(names) or {EMANesterov.name, MuLoCo.name} <= set(names):
            raise ValueError(f"averaging: {', '.join(names)} do not go together; each once, and ema_nesterov or muloco")
        self.members = sorted(members, key=lambda m: m.name == TailEMA.name)
        self.ahead = next((m for m in members if isinstance(m, EMANesterov)), None)
        self.lr = optimizer.param_groups[0]["lr"] if optimizer.param_groups else 0.0
        for group in optimizer.param_groups:
            self.join(group)

    def join(self, group: dict[str, Any]) -> None:
        """Take a group in.

        Args:
            group: of the optimizer, or to be.

        Raises:
            ValueError: its weights are too narrow, or its rule does not let others move them.
        """
        moving = [m.name for m in self.members if not m.narrow]
        if moving and lookup(group["rule"]).tracks_weights:
            raise ValueError(
                f"group {group['name']!r}: {group['rule']} keeps in its state where its own steps have led, and "
                f"{', '.join(moving)} puts the weights elsewhere; give it tail_ema only, or take another rule"
            )
        for i, p in enumerate(group["params"]):
            label, p = p if isinstance(p, tuple) else (f"parameter {i} of group {group['name']!r}", p)
            for m in self.members:
                if not m.narrow and p.dtype != compute_dtype_of(p.dtype):
                    raise ValueError(
                        f"{label}: {m.name} moves weights by less than {p.dtype} can hold; keep them in float32 "
                        "(precision bf16-mixed, --bf16)"
                    )
        for key, value in COUNTERS.items():
            group.setdefault(key, value)

    @property
    def needs_total(self) -> bool:
        """Whether a setting is a share of the run."""
        return any(isinstance(getattr(m, key, None), float) for m in self.members for key in ("start", "stop"))

    def check_total(self, optimizer: AveragedOptimizer) -> None:
        """Check, before anything is written, that shares of the run can be told.

        Args:
            optimizer: whose step it is.

        Raises:
            RuntimeError: its length is not known.
        """
        if self.needs_total and optimizer.total_steps is None:
            raise RuntimeError(
                "averaging: start or stop is a share of the run, whose length is not known: set optimizer.total_steps, give "
                "Schedule total_steps, or the trainer the callback AveragedWeights() (Lightning) or KeepSchedule() "
                "(Transformers)"
            )

    def check_loaded(self, groups: Sequence[Mapping[str, Any]], states: Iterable[Mapping[str, Any]]) -> None:
        """Check that a checkpoint has the weights to train.

        Args:
            groups: of the checkpoint.
            states: of its parameters.

        Raises:
            ValueError: it was made after `eval()`, and only the weights to evaluate are in it.
        """
        shown = [g for g in groups if not g.get("train_mode", True)]
        averaged = [s for s in states if any(key in s for key in self.keys) and float(s.get("step", 1)) > 0]
        if any(g["average_count"] or g["average_shift"] for g in shown) and not all(TRAINED in s for s in averaged):
            raise ValueError(
                "the checkpoint was made after optimizer.eval(), by torch.distributed.checkpoint, say, which leaves "
                "out weights to train; call optimizer.train() before such a checkpoint is made"
            )

    @property
    def keys(self) -> list[str]:
        """Of their state."""
        return [key for m in self.members for key in m.slots]

    def allocate(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Make the state of a parameter that has none.

        Args:
            p: the parameter, before a step.
            state: of it.
        """
        for m in self.members:
            for key in m.slots:
                if key not in state:
                    state[key] = sharding.wrapped_like(m.init(key, sharding.local(p).detach()), p)

    def _each(self, optimizer: AveragedOptimizer) -> Iterator[_Place]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p] if p in optimizer.state else {}
                if all(key in state for key in self.keys):
                    slots = {key: sharding.local(state[key]) for key in self.keys}
                    yield _Place(p, sharding.local(p).detach(), slots, state, group.get("role", ""))

    def _rest(self, at: _Place) -> None:
        """Put a parameter that was frozen ahead back, once."""
        if self.ahead:
            at.x.copy_(torch.where(at.slots["lookahead"] != 0, at.slots["anchor"], at.x))
            at.slots["lookahead"].zero_()

    def _note(self, optimizer: AveragedOptimizer, **counters: Any) -> None:
        for group in optimizer.param_groups:
            group.update(counters)

    def _shift(self, optimizer: AveragedOptimizer, by: float) -> None:
        """Put the weights ahead of the anchor, or back on it."""
        if by != optimizer.param_groups[0]["average_shift"]:
            for at in self._each(optimizer):
                if not at.param.requires_grad:
                    self._rest(at)
                    continue
                at.x.copy_(at.slots["anchor"])
                if by:
                    at.x.add_(at.slots["lookahead"], alpha=by)
            self._note(optimizer, average_shift=by)

    def _wanted(self, optimizer: AveragedOptimizer) -> float:
        """How far ahead the next gradient is to be taken."""
        group = optimizer.param_groups[0]
        first = float(group.get("initial_lr", self.lr))
        ratio = float(group["lr"]) / first if first else 1.0
        return self.ahead.ahead(group["average_step"], optimizer.total_steps, ratio) if self.ahead else 0.0

    def begin(self, optimizer: AveragedOptimizer, *, closure: bool) -> None:
        """Before a step, and before its closure computes the gradients.

        Args:
            optimizer: whose step it is.
            closure: whether there is one.

        Raises:
            RuntimeError: the weights are those to evaluate.
        """
        if not optimizer.param_groups[0]["train_mode"]:
            raise RuntimeError("after optimizer.eval() call optimizer.train() before the gradients of a step are taken")
        if closure:
            self.look_ahead(optimizer)

    def look_ahead(self, optimizer: AveragedOptimizer) -> None:
        """Put the weights where the next gradient is to be taken; for gradients that a closure takes only in part.

        Args:
            optimizer: whose weights they are.
        """
        self._shift(optimizer, self._wanted(optimizer))

    def end(self, optimizer: AveragedOptimizer, *, taken: bool, closure: bool) -> None:
        """After a step.

        Args:
            optimizer: whose step it was.
            taken: False for one that was left out, or ended in an error.
            closure: whether there was one; without, the weights go ahead for the gradients to come.
        """
        if taken:
            t, count = (optimizer.param_groups[0][key] for key in ("average_step", "average_count"))
            busy = [m for m in self.members if m.is_active(t, optimizer.total_steps)]
            for at in self._each(optimizer):
                if not at.param.requires_grad:
                    self._rest(at)
                    continue
                for m in busy:
                    m.after_step(at.x, at.slots, t, count)
            counted = count + any(isinstance(m, TailEMA) for m in busy)
            self._note(optimizer, average_step=t + 1, average_count=counted, average_shift=0.0)
        if closure or taken:
            self._shift(optimizer, 0.0 if closure else self._wanted(optimizer))

    def eval(self, optimizer: AveragedOptimizer) -> None:
        """Put the weights to evaluate in the place of those to train.

        Args:
            optimizer: whose weights they are.
        """
        group = optimizer.param_groups[0]
        if not group["train_mode"]:
            return
        tail = [m for m in self.members if isinstance(m, TailEMA) and group["average_count"]]
        if tail or group["average_shift"]:
            for at in self._each(optimizer):
                if frozen := not at.param.requires_grad:
                    self._rest(at)
                at.state[TRAINED] = sharding.wrapped_like(at.x.clone(), at.param)
                shown = at.slots["anchor"] if self.ahead and not frozen else at.x
                for m in tail if at.role != "embedding" and not frozen else ():
                    shown = m.eval_weights(shown, at.slots)
                at.x.copy_(shown)
        self._note(optimizer, train_mode=False)

    def train(self, optimizer: AveragedOptimizer) -> None:
        """Put the weights to train back.

        Args:
            optimizer: whose weights they are.
        """
        if not optimizer.param_groups[0]["train_mode"]:
            for at in self._each(optimizer):
                if TRAINED in at.state:
                    at.x.copy_(sharding.local(at.state.pop(TRAINED)))
            self._note(optimizer, train_mode=True)

    def replaced(self, optimizer: AveragedOptimizer) -> None:
        """Take the weights for those to evaluate as they are, since others than the run's were loaded.

        Args:
            optimizer: whose weights they are.
        """
        for slots in optimizer.state.values():
            slots.pop(TRAINED, None)
        self._note(optimizer, train_mode=False, average_shift=0.0)
