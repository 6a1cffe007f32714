"""One step of one stack, block or parameter: calling the rule, storing its state, writing the parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core import chunks, layout, storage
from lightning_optim.core.chunks import Dims
from lightning_optim.core.rule import ADAMW_RMS, Rule, Slot
from lightning_optim.ops.rounding import hash_key, stochastic_round


@dataclass
class Work:
    """One trainable parameter in one step."""

    param: Tensor
    name: str
    index: int
    dims: Dims
    state: dict[str, Tensor]
    transposed: bool = False
    t: int = 0

    @property
    def has_gradient(self) -> bool:
        """Whether the parameter takes part in this step."""
        return self.param.grad is not None

    def slots(self, rule: Rule) -> dict[str, Slot]:
        """What the rule keeps for this parameter."""
        return rule.declared(*self.dims[1:], vector=self.param.ndim < 2)

    def count(self) -> None:
        """Count one step, on the CPU: Lightning moves all loaded state to the device, where reading it would wait."""
        if self.state["step"].device.type != "cpu":
            self.state["step"] = self.state["step"].cpu()
        self.t = int(self.state["step"].add_(1).item())

    def gradient(self) -> Tensor:
        """The gradient on this rank, zeros where there is none."""
        g = layout.local_gradient(self.param)
        return torch.zeros_like(layout.local(self.param)) if g is None else g


class Job(NamedTuple):
    """One param group in one step."""

    rule: Rule
    group: dict[str, Any]
    works: list[Work]


def factor_of(job: Job, w: Work) -> float:
    """What the direction is multiplied by: a constant of the matrix's shape."""
    if job.group["lr_convention"] == "native":
        return 1.0
    rms = job.rule.rms(*w.dims[1:])
    return 1.0 if rms is None else ADAMW_RMS / rms


def needs_param(rule: Rule) -> bool:
    """Whether a stack of parameters is to be made for the rule, or for decay in the L2 form."""
    return rule.reads_param or (rule.decay == "coupled" and rule.weight_decay != 0)


def alike(w: Work) -> tuple[Any, ...]:
    """Works with equal keys may share a stack."""
    return w.dims, w.transposed, w.param.ndim, w.param.dtype, w.param.device, w.t


def update_elementwise(job: Job, w: Work) -> None:
    """Walk over one parameter in flat blocks."""
    rule, slots = job.rule, list(w.slots(job.rule))
    p, dtype = layout.local(w.param), storage.work_dtype(w.param.dtype)
    write = _Write(job, w)
    tensors = [p, w.gradient(), *(layout.local(w.state[k]) for k in slots), *write.index]
    for (pb, gb, *rest), cut in chunks.blocks(tensors):
        gb = gb.to(dtype)
        if rule.decay == "coupled" and rule.weight_decay:
            gb = gb.add(pb, alpha=rule.weight_decay)
        views: dict[str, Tensor] = dict(zip(slots, rest, strict=False))
        s = SimpleNamespace(**views)
        d = rule.update(gb, s, pb.to(dtype) if rule.reads_param else None, w.t)
        for key, value in storage.untangled(views, vars(s)).items():
            if value is not views[key]:
                views[key].copy_(value)
        if not rule.rests(w.t):
            write(pb, d, cut, rest[len(slots) :])


def update_stack(
    job: Job,
    chunk: Sequence[Work],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: layout.StackLayout | None = None,
    sink: Callable[[Work, Tensor], None] | None = None,
) -> None:
    """Call a rule on one stack, store the state it leaves and hand out the directions.

    Args:
        job: rule and settings.
        chunk: works that are alike.
        params: of the works, local or whole.
        gradients: likewise.
        frame: how a reducing rule's stacks are cut.
        sink: takes each direction, shaped like its gradient; applied if not given.
    """
    rule, first = job.rule, chunk[0]
    b, m, n = first.dims if frame is None else frame.local_dims
    dtype = storage.work_dtype(first.param.dtype)
    slots = first.slots(rule)
    turn = first.transposed
    entries = {k: [layout.local(w.state[k]) for w in chunk] for k in slots}
    for k, slot in slots.items():
        if slot.letters == "mn":
            entries[k] = [chunks.turned(t, turn) for t in entries[k]]
    before = {k: storage.read(entries[k], (b, *slot.shape(m, n))) for k, slot in slots.items()}
    g, p = chunks.stack([chunks.turned(t, turn) for t in gradients], (b, m, n), dtype), None
    if needs_param(rule):
        p = chunks.stack([chunks.turned(t, turn) for t in params], (b, m, n), dtype)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
    wrap, unwrap = (frame.wrap, frame.unwrap) if frame else (_as_is, _as_is)
    seen = {k: wrap(before[k], slot.letters) for k, slot in slots.items()}
    s = SimpleNamespace(**seen, vector=first.param.ndim < 2 or job.group.get("role") == "vector")
    d = rule.update(wrap(g), s, wrap(p) if rule.reads_param and p is not None else None, first.t)
    left = {k: unwrap(getattr(s, k), slot.letters) for k, slot in slots.items()}
    for k, value in storage.untangled(before, left).items():
        storage.write(entries[k], value)
    if rule.rests(first.t):
        return
    for w, piece, like in zip(chunk, unwrap(d).split(b), gradients, strict=True):
        piece = chunks.turned(piece.reshape(chunks.turned(like, turn).shape), turn)
        sink(w, piece) if sink else apply(job, w, piece)


def _as_is(t: Tensor, letters: str = "mn") -> Tensor:
    del letters
    return t


def apply(job: Job, w: Work, d: Tensor) -> None:
    """Take the step of one parameter, given its direction on this rank."""
    write, p = _Write(job, w), layout.local(w.param)
    if p.dtype == d.dtype:
        write(p, d)
    else:
        for (pb, db, *index), cut in chunks.blocks([p, d, *write.index]):
            write(pb, db, cut, index)


class _Write:
    """p <- p - lr wd p - lr factor d, with the rounding of narrow weights: the only place that writes a parameter."""

    def __init__(self, job: Job, w: Work):
        rule = job.rule
        self.step = rule.lr * factor_of(job, w)
        self.keep = 1 - rule.lr * rule.weight_decay
        self.decay = rule.decay
        self.cautious = job.group["cautious_decay"] and self.keep != 1
        self.dtype = storage.work_dtype(w.param.dtype)
        self.stochastic = w.param.dtype == torch.bfloat16 and job.group["param_rounding"] == "stochastic"
        self.key = hash_key(job.group["seed"], w.t, w.index) if self.stochastic else 0
        self.first = layout.first_element(w.param) if self.stochastic else None
        self.index = [layout.element_index(w.param)] if self.stochastic and self.first is None else []
        """The element indices, as a tensor, where the local part is not one contiguous run."""

    def __call__(self, p: Tensor, d: Tensor, cut: slice | None = None, index: Sequence[Tensor] = ()) -> None:
        """Write one block.

        Args:
            p: a view of the parameter.
            d: its direction.
            cut: where the block lies along the first dimension of the local part, flat or not.
            index: the block of `self.index`, if any.
        """
        x = p.to(self.dtype)  # p itself, or a copy
        if self.decay == "before" and self.keep != 1:
            x.mul_(self._mask(x, d) if self.cautious else self.keep)
        keep = self._mask(x, d) if self.decay == "after" and self.cautious else self.keep
        x.add_(d, alpha=-self.step)
        if self.decay == "after" and self.keep != 1:
            x.mul_(keep)
        if x is p:
            return
        if self.stochastic and cut is not None:
            x = stochastic_round(x, index[0] if index else self._run(p, cut), self.key)
        p.copy_(x)

    def _mask(self, x: Tensor, d: Tensor) -> Tensor:
        return torch.where(x * d >= 0, self.keep, 1.0).to(x.dtype)

    def _run(self, p: Tensor, cut: slice) -> Tensor:
        start = (self.first or 0) + cut.start * (p.numel() // max(1, cut.stop - cut.start))
        return torch.arange(start, start + p.numel(), device=p.device).to(torch.int32).view(p.shape)
