"""What is done to all weights around the steps of any rule: look-ahead, averages to evaluate with, an outer optimizer.

    optimizer.wrap(EMANesterov(0.3), TailEMA(start=2400))
    optimizer.eval()     # weights to validate and to save
    optimizer.train()    # weights to train, bit for bit as they were

The state is in `state[p]`, the counters are in the groups: checkpoints hold both, whichever weights the model's hold.
Lightning's and Transformers' doors make the two calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lightning_optim.core import layout
from lightning_optim.core.rule import check_value, lookup, nearest
from lightning_optim.core.storage import work_dtype

if TYPE_CHECKING:
    from lightning_optim.core.executor import Executor

TRAINED = "train_weight"
"""The state entry that holds the weights to train while the parameter has those to evaluate."""
COUNTERS: dict[str, Any] = {"train_mode": True, "average_step": 0, "average_shift": 0.0, "average_count": 0}
"""Of every group of a wrapped optimizer."""


@dataclass(frozen=True)
class Average:
    """Base of what an optimizer can be wrapped in."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    """Keys in `state[p]`, shaped like the parameter."""
    narrow: ClassVar[bool] = False
    """Whether bfloat16 and float16 weights are enough for it."""

    def __post_init__(self) -> None:
        """Check the settings."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            check_value(f"{self.name}: {f.name}", getattr(self, f.name), hints[f.name])

    def first(self, key: str, x: Tensor) -> Tensor:
        """The start value of a slot.

        Args:
            key: of the slot.
            x: this rank's part of a parameter.

        Returns:
            A tensor of its own.
        """
        del key
        return x.to(work_dtype(x.dtype), copy=True)

    def moved(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:
        """Take notice of a step, or change what it has made of a parameter.

        Args:
            x: this rank's part of the parameter, after the step.
            s: its slots, on this rank.
            t: steps before this one.
            count: of them in which `counts` was true.
        """

    def counts(self, t: int, total: int | None) -> bool:
        """Whether it is at work in a step.

        Args:
            t: steps before this one.
            total: steps of the run, if known.

        Returns:
            True if so.
        """
        return True

    def shown(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """What to evaluate in the place of weights.

        Args:
            x: weights that no look-ahead has shifted.
            s: slots on this rank.

        Returns:
            The weights themselves, or others.
        """
        return x


@dataclass(frozen=True)
class EMANesterov(Average):
    """EMA-Nesterov: every gradient is taken ahead, where the weights have been going of late.

    B <- beta B + (1 - beta) (W - W_before), after every step; the next gradient is that at W + step_size (lr / lr_0) B,
    where the step is taken, too

    lr is that of group 0, lr_0 its first. Only in steps from `start` on and before `stop` (from 0; a float is a share
    of the run, `optimizer.total_steps`). `step(closure)` looks ahead for the closure only; after a step without one the
    weights are ahead until `eval()`. State: two tensors as large as the weights, which must be float32.

    Source: arXiv:2605.25395; modded-nanogpt, track 3, pull requests 308, 309, 321: 0.3 on SOAP-Muon, 0.6 on Muon.
    """

    step_size: float = 0.3
    beta: float = 0.99
    start: int | float = 300
    stop: int | float | None = None

    name: ClassVar = "ema_nesterov"
    slots: ClassVar = ("lookahead", "anchor")

    def first(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "lookahead" else x.clone()

    def moved(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        s["lookahead"].lerp_(x - s["anchor"], 1 - self.beta)
        s["anchor"].copy_(x)

    def ahead(self, t: int, total: int | None, ratio: float) -> float:
        """How many B the gradient of a step is taken ahead.

        Args:
            t: steps before it.
            total: steps of the run, if known.
            ratio: lr / lr_0.

        Returns:
            The factor of B; 0 where it rests.
        """
        stop = resolved(self.stop, total)
        begun = (start := resolved(self.start, total)) is not None and t >= start
        return self.step_size * ratio if begun and (stop is None or t < stop) else 0.0


@dataclass(frozen=True)
class TailEMA(Average):
    """Tail EMA: towards the end of a run average the weights, and evaluate between them and their average.

    E <- E + (W - E) / tau, from step `start` on, where E is W; evaluate (1 - weight) W + weight E

    `start` as a float is a share of the run, `optimizer.total_steps`, which then must be set. The weights of embeddings
    are left as they are. State: one tensor as large as the weights, one more while evaluating.

    Source: modded-nanogpt, track 3, pull requests 325 and 328.
    """

    start: int | float = 0
    tau: float = 150.0
    weight: float = 0.6

    name: ClassVar = "tail_ema"
    slots: ClassVar = ("tail",)
    narrow: ClassVar = True

    def counts(self, t: int, total: int | None) -> bool:  # noqa: D102
        start = resolved(self.start, total)
        return start is not None and t >= start

    def moved(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        wide = x.to(s["tail"].dtype)
        if count == 0:
            s["tail"].copy_(wide)
        s["tail"].lerp_(wide, 1 / max(1.0, self.tau))

    def shown(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return x.to(s["tail"].dtype).lerp(s["tail"], self.weight).to(x.dtype)


@dataclass(frozen=True)
class MuLoCo(Average):
    """MuLoCo with one worker: every so many steps an outer Nesterov step over the way they have gone.

    D = S - W;  u <- momentum u + lr D;  W <- S - momentum u - lr D;  S <- W        every `every` steps

    With lr 1 and momentum 0 that is the inner optimizer. State: two tensors as large as the weights, which must be
    float32.

    Source: Therien et al. 2025, arXiv:2505.23725; constants as in modded-nanogpt, track 3, pull request 277.
    """

    every: int = 30
    lr: float = 0.7
    momentum: float = 0.5

    name: ClassVar = "muloco"
    slots: ClassVar = ("outer_momentum", "outer_anchor")

    def first(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "outer_momentum" else x.clone()

    def moved(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        if (t + 1) % max(1, self.every) == 0:
            way = s["outer_anchor"] - x
            s["outer_momentum"].mul_(self.momentum).add_(way, alpha=self.lr)
            x.copy_(s["outer_anchor"]).add_(s["outer_momentum"], alpha=-self.momentum).add_(way, alpha=-self.lr)
            s["outer_anchor"].copy_(x)


AVERAGES: dict[str, type[Average]] = {cls.name: cls for cls in (EMANesterov, TailEMA, MuLoCo)}
"""By the names under which `build_optimizer(..., wrap={"tail_ema": {"start": 0.9}})` takes them."""


def averages_of(given: Mapping[str, Mapping[str, Any]]) -> list[Average]:
    """Make averages of plain settings.

    Args:
        given: settings by the names of `AVERAGES`.

    Returns:
        The averages.

    Raises:
        ValueError: an unknown name or setting.
    """
    out = []
    for name, settings in given.items():
        if name not in AVERAGES:
            raise ValueError(f"wrap: unknown name {name!r}; {nearest(name, list(AVERAGES))}")
        known = [f.name for f in fields(AVERAGES[name])]
        for key in settings:
            if key not in known:
                raise ValueError(f"{name} has no setting {key!r}; {nearest(key, known)}")
        out.append(AVERAGES[name](**settings))
    return out


def resolved(at: float | None, total: int | None) -> float | None:
    """A step, given as such or as a share of the run.

    Returns:
        The step; None where there is none, or it is not known.
    """
    if at is None or isinstance(at, int):
        return at
    return None if total is None else at * total


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
    """What an optimizer is wrapped in; made by `Executor.wrap`.

    Args:
        optimizer: whose steps these are.
        members: what to do; each once.

    Raises:
        ValueError: two that do not go together, or weights that are too narrow.
    """

    def __init__(self, optimizer: Executor, members: tuple[Average, ...]) -> None:
        names = [m.name for m in members]
        if len(set(names)) < len(names) or {EMANesterov.name, MuLoCo.name} <= set(names):
            raise ValueError(f"wrap: {', '.join(names)} do not go together; each once, and ema_nesterov or muloco")
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
        if moving and lookup(group["rule"]).keeps_weights:
            raise ValueError(
                f"group {group['name']!r}: {group['rule']} keeps in its state where its own steps have led, and "
                f"{', '.join(moving)} puts the weights elsewhere; wrap it in tail_ema only, or take another rule"
            )
        for i, p in enumerate(group["params"]):
            label, p = p if isinstance(p, tuple) else (f"parameter {i} of group {group['name']!r}", p)
            for m in self.members:
                if not m.narrow and p.dtype != work_dtype(p.dtype):
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

    def check_total(self, optimizer: Executor) -> None:
        """Check, before anything is written, that shares of the run can be told.

        Args:
            optimizer: whose step it is.

        Raises:
            RuntimeError: its length is not known.
        """
        if self.needs_total and optimizer.total_steps is None:
            raise RuntimeError(
                "wrap: start or stop is a share of the run, whose length is not known: set optimizer.total_steps, give "
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

    def materialise(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Make the state of a parameter that has none.

        Args:
            p: the parameter, before a step.
            state: of it.
        """
        for m in self.members:
            for key in m.slots:
                if key not in state:
                    state[key] = layout.wrapped_like(m.first(key, layout.local(p).detach()), p)

    def _each(self, optimizer: Executor) -> Iterator[_Place]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p] if p in optimizer.state else {}
                if all(key in state for key in self.keys):
                    slots = {key: layout.local(state[key]) for key in self.keys}
                    yield _Place(p, layout.local(p).detach(), slots, state, group.get("role", ""))

    def _rest(self, at: _Place) -> None:
        """Put a parameter that was frozen ahead back, once."""
        if self.ahead:
            at.x.copy_(torch.where(at.slots["lookahead"] != 0, at.slots["anchor"], at.x))
            at.slots["lookahead"].zero_()

    def _note(self, optimizer: Executor, **counters: Any) -> None:
        for group in optimizer.param_groups:
            group.update(counters)

    def _shift(self, optimizer: Executor, by: float) -> None:
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

    def _wanted(self, optimizer: Executor) -> float:
        """How far ahead the next gradient is to be taken."""
        group = optimizer.param_groups[0]
        first = float(group.get("initial_lr", self.lr))
        ratio = float(group["lr"]) / first if first else 1.0
        return self.ahead.ahead(group["average_step"], optimizer.total_steps, ratio) if self.ahead else 0.0

    def begin(self, optimizer: Executor, *, closure: bool) -> None:
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

    def look_ahead(self, optimizer: Executor) -> None:
        """Put the weights where the next gradient is to be taken; for gradients that a closure takes only in part.

        Args:
            optimizer: whose weights they are.
        """
        self._shift(optimizer, self._wanted(optimizer))

    def end(self, optimizer: Executor, *, taken: bool, closure: bool) -> None:
        """After a step.

        Args:
            optimizer: whose step it was.
            taken: False for one that was left out, or ended in an error.
            closure: whether there was one; without, the weights go ahead for the gradients to come.
        """
        if taken:
            t, count = (optimizer.param_groups[0][key] for key in ("average_step", "average_count"))
            busy = [m for m in self.members if m.counts(t, optimizer.total_steps)]
            for at in self._each(optimizer):
                if not at.param.requires_grad:
                    self._rest(at)
                    continue
                for m in busy:
                    m.moved(at.x, at.slots, t, count)
            counted = count + any(isinstance(m, TailEMA) for m in busy)
            self._note(optimizer, average_step=t + 1, average_count=counted, average_shift=0.0)
        if closure or taken:
            self._shift(optimizer, 0.0 if closure else self._wanted(optimizer))

    def eval(self, optimizer: Executor) -> None:
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
                at.state[TRAINED] = layout.wrapped_like(at.x.clone(), at.param)
                shown = at.slots["anchor"] if self.ahead and not frozen else at.x
                for m in tail if at.role != "embedding" and not frozen else ():
                    shown = m.shown(shown, at.slots)
                at.x.copy_(shown)
        self._note(optimizer, train_mode=False)

    def train(self, optimizer: Executor) -> None:
        """Put the weights to train back.

        Args:
            optimizer: whose weights they are.
        """
        if not optimizer.param_groups[0]["train_mode"]:
            for at in self._each(optimizer):
                if TRAINED in at.state:
                    at.x.copy_(layout.local(at.state.pop(TRAINED)))
            self._note(optimizer, train_mode=True)

    def replaced(self, optimizer: Executor) -> None:
        """Take the weights for those to evaluate as they are, since others than the run's were loaded.

        Args:
            optimizer: whose weights they are.
        """
        for slots in optimizer.state.values():
            slots.pop(TRAINED, None)
        self._note(optimizer, train_mode=False, average_shift=0.0)
