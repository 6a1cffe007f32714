"""Weight averaging around the steps of any rule: look-ahead, averages for evaluation, an outer optimizer.

    optimizer.with_averaging(EMANesterov(0.3), TailEMA(start=2400))
    optimizer.eval()     # averaged weights, to validate and to save
    optimizer.train()    # training weights, bitwise as before

The state is in `state[p]`, the counters are in the groups, so checkpoints hold both, whether the model currently has
training or averaged weights. The integrations with Lightning and Transformers make the two calls.
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
    """The part of an optimizer that averaging uses."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the run, if known."""
        ...


class _ParamState(NamedTuple):
    """A parameter with the state of its averaging methods."""

    param: Tensor
    x: Tensor
    """This rank's shard of the parameter."""
    averages: dict[str, Tensor]
    """This rank's shards of the methods' state tensors."""
    state: dict[str, Tensor]
    role: str


class Averages:
    """The averaging methods of an optimizer; made by `RuleOptimizer.with_averaging`.

    Args:
        optimizer: the optimizer to wrap.
        members: averaging methods, each at most once.

    Raises:
        ValueError: two methods that exclude each other, or weights of too low precision.
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
        """Check a group and add the counters to it.

        Args:
            group: a param group of the optimizer, or one to be added.

        Raises:
            ValueError: its weights have too low precision, or its rule does not allow other changes of the weights.
        """
        weight_changing = [m.name for m in self.members if not m.takes_low_precision]
        if weight_changing and lookup(group["rule"]).tracks_weights:
            raise ValueError(
                f"group {group['name']!r}: {group['rule']} keeps in its state where its own steps have led, but "
                f"{', '.join(weight_changing)} changes the weights; give it tail_ema only, or use another rule"
            )
        for i, p in enumerate(group["params"]):
            label, p = p if isinstance(p, tuple) else (f"parameter {i} of group {group['name']!r}", p)
            for m in self.members:
                if not m.takes_low_precision and p.dtype != compute_dtype_of(p.dtype):
                    raise ValueError(
                        f"{label}: {m.name} moves weights by less than {p.dtype} can hold; keep them in float32 "
                        "(precision bf16-mixed, --bf16)"
                    )
        for key, value in COUNTERS.items():
            group.setdefault(key, value)

    @property
    def needs_total(self) -> bool:
        """Whether a setting is a fraction of the run."""
        return any(isinstance(getattr(m, key, None), float) for m in self.members for key in ("start", "stop"))

    def check_total(self, optimizer: AveragedOptimizer) -> None:
        """Check, before anything is written, that the length of the run is known where a setting is a fraction of it.

        Args:
            optimizer: the wrapped optimizer.

        Raises:
            RuntimeError: the length is not known.
        """
        if self.needs_total and optimizer.total_steps is None:
            raise RuntimeError(
                "averaging: start or stop is a fraction of the run, whose length is unknown: set "
                "optimizer.total_steps, give ScheduleLR total_steps, or add the callback AveragedWeights() (Lightning) "
                "or KeepSchedule() (Transformers) to the trainer"
            )

    def check_loaded(self, groups: Sequence[Mapping[str, Any]], states: Iterable[Mapping[str, Any]]) -> None:
        """Check that a checkpoint has the training weights.

        Args:
            groups: param groups of the checkpoint.
            states: states of its parameters.

        Raises:
            ValueError: it was made after `eval()`, and has the averaged weights only.
        """
        eval_groups = [g for g in groups if not g.get("train_mode", True)]
        with_averages = [s for s in states if any(key in s for key in self.keys) and float(s.get("step", 1)) > 0]
        if any(g["average_count"] or g["average_shift"] for g in eval_groups) and not all(
            TRAINED in s for s in with_averages
        ):
            raise ValueError(
                "the checkpoint was made after optimizer.eval(), by torch.distributed.checkpoint, say, which leaves "
                "out the training weights; call optimizer.train() before such a checkpoint is made"
            )

    @property
    def keys(self) -> list[str]:
        """Keys of the state tensors of all methods."""
        return [key for m in self.members for key in m.keys]

    def allocate(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Allocate the missing state tensors of a parameter.

        Args:
            p: the parameter, before a step.
            state: its state, extended in place.
        """
        for m in self.members:
            for key in m.keys:
                if key not in state:
                    state[key] = sharding.placed_like(m.init(key, sharding.local(p).detach()), p)

    def _each(self, optimizer: AveragedOptimizer) -> Iterator[_ParamState]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p] if p in optimizer.state else {}
                if all(key in state for key in self.keys):
                    averages = {key: sharding.local(state[key]) for key in self.keys}
                    yield _ParamState(p, sharding.local(p).detach(), averages, state, group.get("role", ""))

    def _undo_look_ahead(self, s: _ParamState) -> None:
        """Restore a parameter that was frozen while extrapolated; later calls do nothing."""
        if self.ahead:
            s.x.copy_(torch.where(s.averages["lookahead"] != 0, s.averages["anchor"], s.x))
            s.averages["lookahead"].zero_()

    def _set_counters(self, optimizer: AveragedOptimizer, **counters: Any) -> None:
        for group in optimizer.param_groups:
            group.update(counters)

    def _shift(self, optimizer: AveragedOptimizer, factor: float) -> None:
        """Set the weights to the anchor plus `factor` times the look-ahead."""
        if factor != optimizer.param_groups[0]["average_shift"]:
            for s in self._each(optimizer):
                if not s.param.requires_grad:
                    self._undo_look_ahead(s)
                    continue
                s.x.copy_(s.averages["anchor"])
                if factor:
                    s.x.add_(s.averages["lookahead"], alpha=factor)
            self._set_counters(optimizer, average_shift=factor)

    def _next_shift(self, optimizer: AveragedOptimizer) -> float:
        """Factor of the look-ahead for the next gradient."""
        group = optimizer.param_groups[0]
        initial_lr = float(group.get("initial_lr", self.lr))
        ratio = float(group["lr"]) / initial_lr if initial_lr else 1.0
        return self.ahead.ahead(group["average_step"], optimizer.total_steps, ratio) if self.ahead else 0.0

    def begin(self, optimizer: AveragedOptimizer, *, closure: bool) -> None:
        """Prepare a step, before its closure computes the gradients.

        Args:
            optimizer: the wrapped optimizer.
            closure: whether the step has a closure.

        Raises:
            RuntimeError: the model has the averaged weights.
        """
        if not optimizer.param_groups[0]["train_mode"]:
            raise RuntimeError("after optimizer.eval() call optimizer.train() before the gradients of a step are taken")
        if closure:
            self.look_ahead(optimizer)

    def look_ahead(self, optimizer: AveragedOptimizer) -> None:
        """Extrapolate the weights for the next gradient, where not all gradients are computed in a closure.

        Args:
            optimizer: the wrapped optimizer.
        """
        self._shift(optimizer, self._next_shift(optimizer))

    def end(self, optimizer: AveragedOptimizer, *, taken: bool, closure: bool) -> None:
        """Apply the methods after a step.

        Args:
            optimizer: the wrapped optimizer.
            taken: False for a step that was skipped, or ended in an error.
            closure: whether the step had a closure. Without one, the weights are extrapolated for the next gradients.
        """
        if taken:
            t, count = (optimizer.param_groups[0][key] for key in ("average_step", "average_count"))
            active = [m for m in self.members if m.is_active(t, optimizer.total_steps)]
            for s in self._each(optimizer):
                if not s.param.requires_grad:
                    self._undo_look_ahead(s)
                    continue
                for m in active:
                    m.after_step(s.x, s.averages, t, count)
            count += any(isinstance(m, TailEMA) for m in active)
            self._set_counters(optimizer, average_step=t + 1, average_count=count, average_shift=0.0)
        if closure or taken:
            self._shift(optimizer, 0.0 if closure else self._next_shift(optimizer))

    def eval(self, optimizer: AveragedOptimizer) -> None:
        """Replace the training weights by the averaged weights.

        Args:
            optimizer: the wrapped optimizer.
        """
        group = optimizer.param_groups[0]
        if not group["train_mode"]:
            return
        tail = [m for m in self.members if isinstance(m, TailEMA) and group["average_count"]]
        if tail or group["average_shift"]:
            for s in self._each(optimizer):
                if is_frozen := not s.param.requires_grad:
                    self._undo_look_ahead(s)
                s.state[TRAINED] = sharding.placed_like(s.x.clone(), s.param)
                weights = s.averages["anchor"] if self.ahead and not is_frozen else s.x
                for m in tail if s.role != "embedding" and not is_frozen else ():
                    weights = m.eval_weights(weights, s.averages)
                s.x.copy_(weights)
        self._set_counters(optimizer, train_mode=False)

    def train(self, optimizer: AveragedOptimizer) -> None:
        """Restore the training weights.

        Args:
            optimizer: the wrapped optimizer.
        """
        if not optimizer.param_groups[0]["train_mode"]:
            for s in self._each(optimizer):
                if TRAINED in s.state:
                    s.x.copy_(sharding.local(s.state.pop(TRAINED)))
            self._set_counters(optimizer, train_mode=True)

    def replaced(self, optimizer: AveragedOptimizer) -> None:
        """Treat the current weights as the averaged ones, since weights from elsewhere were loaded into the model.

        Args:
            optimizer: the wrapped optimizer.
        """
        for state in optimizer.state.values():
            state.pop(TRAINED, None)
        self._set_counters(optimizer, train_mode=False, average_shift=0.0)
