"""One step of one stack, block or parameter: calling the rule, storing its state, writing the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core import chunks, layout, storage
from lightning_optim.core.chunks import Dims
from lightning_optim.core.rule import ADAMW_RMS, Rule, Slot
from lightning_optim.core.storage import COMPENSATION, Form, scale_key
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
    forms: Mapping[str, Form] = field(default_factory=dict)
    """How its slots rest."""

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


def forms_of(job: Job, w: Work) -> dict[str, Form]:
    """How everything a rule keeps for a parameter rests.

    Returns:
        Forms by slot.
    """
    shape, dtype, group, sums = w.param.shape, w.param.dtype, job.group, job.rule.reduces
    return {k: storage.form_of(s, shape, w.dims, dtype, group, sums=sums) for k, s in w.slots(job.rule).items()}


def first_index(rule: Rule, form: Form, w: Work) -> int:
    """Index, within a slot, of the first element that rests on this rank: blocks of scales begin at multiples."""
    cut = (rule.elementwise or rule.reduces) and form.slot.letters == "mn"
    return layout.start_of(w.param) if cut and form.quantised else 0


def takes_kernel(job: Job, w: Work) -> bool:
    """Whether a kernel of torch's does what the group asks for, if dtypes and strides agree."""
    wide = w.param.dtype == storage.work_dtype(w.param.dtype)
    return wide and factor_of(job, w) == 1.0 and not job.group["cautious_decay"]


class Elements:
    """The global index of every element of a block, for rounding that draws equal bits on every mesh."""

    def __init__(self, part: Tensor, param: Tensor | None = None):
        """Find where a part lies.

        Args:
            part: what blocks are cut from.
            param: whose local part it is shaped like; a whole tensor if not given.
        """
        self.first = (0 if part.is_contiguous() else None) if param is None else layout.first_element(param)
        self.tensors = [] if self.first is not None else [layout.element_index(part if param is None else param)]
        """The indices, as a tensor to be cut with the part, where it is not one contiguous run."""

    def __call__(self, block: Tensor, cut: slice, held: Sequence[Tensor]) -> Tensor:
        """The indices of a block.

        Args:
            block: gives the shape.
            cut: where it lies along the first dimension of the part, flat or not.
            held: the block of `tensors`.

        Returns:
            int32, shaped like the block.
        """
        if held:
            return held[0]
        start = (self.first or 0) + _offset(block, cut)
        return torch.arange(start, start + block.numel(), device=block.device).to(torch.int32).view(block.shape)


def _offset(block: Tensor, cut: slice) -> int:
    return cut.start * (block.numel() // max(1, cut.stop - cut.start))


class _Kept:
    """One slot of one parameter, of which a rule sees values that are not what rests."""

    def __init__(self, job: Job, w: Work, key: str):
        self.form, self.part = w.forms[key], layout.local(w.state[key])
        self.scale = layout.local(w.state[scale_key(key)]) if self.form.quantised else None
        cut = job.rule.elementwise or job.rule.reduces
        self.param = w.param if cut and self.form.slot.letters == "mn" else None
        self.start = first_index(job.rule, self.form, w)
        if self.scale is not None and self.scale.numel() != storage.blocks_here(self.form, self.part, self.start):
            raise RuntimeError(f"{w.name}: storage_block was changed while there is {key!r}; set it as it was")
        self.key = hash_key(job.group["seed"], w.t, w.index, 1 + list(w.forms).index(key))
        self.device = layout.local(w.param).device

    def open(self, part: Tensor, at: int = 0) -> Tensor:
        """The values of a block that begins at an element."""
        scale = storage.scales_at(self.form, self.scale, self.start, at, part.numel())
        return storage.widen(self.form, part, scale, self.start + at, self.device)

    def close(self, part: Tensor, value: Tensor, index: Callable[[], Tensor], at: int = 0) -> None:
        """Store the values of a block that begins at an element."""
        scale = storage.scales_at(self.form, self.scale, self.start, at, part.numel())
        storage.narrow(self.form, part, scale, self.start + at, value, index, self.key)

    def close_all(self, value: Tensor) -> None:
        """Store all values, block by block if they are rounded at random."""
        if self.form.kind != "bf16":
            self.close(self.part, value, _no_index)
            return
        where = Elements(self.part, self.param)
        for (part, wide, *held), cut in chunks.blocks([self.part, value, *where.tensors]):
            self.close(part, wide, lambda part=part, cut=cut, held=held: where(part, cut, held))


def _no_index() -> Tensor:
    raise AssertionError("only rounding to bfloat16 asks for indices")


def update_elementwise(job: Job, w: Work) -> None:
    """Walk over one parameter in flat blocks."""
    rule, p = job.rule, layout.local(w.param)
    dtype, write = storage.work_dtype(p.dtype), _Write(job, w)
    kept = {k: _Kept(job, w, k) for k, form in w.forms.items() if not form.direct(p.device)}
    rounded = write.stochastic or any(x.form.kind == "bf16" for x in kept.values())
    fused = bool(kept) and takes_kernel(job, w)
    where = Elements(p, w.param) if rounded else None
    tensors = [p, w.gradient(), *(layout.local(w.state[k]) for k in w.forms), *write.carried]
    tensors += where.tensors if where else []
    grid = next((x for x in kept.values() if x.form.quantised), None)
    align, start = (grid.form.block, grid.start) if grid else (1, 0)
    for (pb, gb, *rest), cut in chunks.blocks(tensors, align, start):
        resting, rest = dict(zip(w.forms, rest, strict=False)), rest[len(w.forms) :]
        carried, held = rest[: len(write.carried)], rest[len(write.carried) :]
        at = _offset(pb, cut)
        views = {k: kept[k].open(x, at) if k in kept else x for k, x in resting.items()}
        index = _no_index if where is None else lambda pb=pb, cut=cut, held=held: where(pb, cut, held)
        if not (fused and _kernel(rule, pb, gb, views, w.t)):
            gb = gb.to(dtype)
            if rule.decay == "coupled" and rule.weight_decay:
                gb = gb.add(pb, alpha=rule.weight_decay)
            s = SimpleNamespace(**views)
            d = rule.update(gb, s, pb.to(dtype) if rule.reads_param else None, w.t)
            for key, value in storage.untangled(views, vars(s)).items():
                if value is not views[key]:
                    views[key].copy_(value)
            if not rule.rests(w.t):
                write(pb, d, index, *carried)
        for key, x in kept.items():
            x.close(resting[key], views[key], index, at)


def _kernel(rule: Rule, p: Tensor, g: Tensor, s: Mapping[str, Tensor], t: int) -> bool:
    """Try a kernel of the rule's on one block."""
    return chunks.agree([p, g, *s.values()]) and rule.kernel([p], [g], {k: [x] for k, x in s.items()}, t) is not None


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
    kept = {k: [_Kept(job, w, k) for w in chunk] for k, f in first.forms.items() if not f.direct(params[0].device)}
    opened = {k: [x.open(x.part) for x in some] for k, some in kept.items()}
    entries = {k: opened[k] if k in opened else [layout.local(w.state[k]) for w in chunk] for k in slots}
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
    s = SimpleNamespace(**seen)
    d = rule.update(wrap(g), s, wrap(p) if rule.reads_param and p is not None else None, first.t)
    left = {k: unwrap(getattr(s, k), slot.letters) for k, slot in slots.items()}
    for k, value in storage.untangled(before, left).items():
        storage.write(entries[k], value)
    for k, some in kept.items():
        for x, value in zip(some, opened[k], strict=True):
            x.close_all(value)
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
        return
    where = Elements(p, w.param) if write.stochastic else None
    for (pb, db, *rest), cut in chunks.blocks([p, d, *write.carried, *(where.tensors if where else [])]):
        carried, held = rest[: len(write.carried)], rest[len(write.carried) :]
        index = _no_index if where is None else lambda pb=pb, cut=cut, held=held: where(pb, cut, held)
        write(pb, db, index, *carried)


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
        kept = storage.compensated(w.param.dtype, job.group)
        self.carried = [layout.local(w.state[COMPENSATION])] if kept else []
        """What rounding left of the weights."""

    def __call__(
        self, p: Tensor, d: Tensor, index: Callable[[], Tensor] | None = None, carried: Tensor | None = None
    ) -> None:
        """Write one block.

        Args:
            p: a view of the parameter.
            d: its direction.
            index: gives the global indices of its elements, where the weights are rounded at random.
            carried: the block of `self.carried`, if any.
        """
        x = p.to(self.dtype)  # p itself, or a copy
        if carried is not None:
            x.add_(carried)
        if self.decay == "before" and self.keep != 1:
            x.mul_(self._mask(x, d) if self.cautious else self.keep)
        keep = self._mask(x, d) if self.decay == "after" and self.cautious else self.keep
        x.add_(d, alpha=-self.step)
        if self.decay == "after" and self.keep != 1:
            x.mul_(keep)
        if x is p:
            return
        if self.stochastic and index is not None:
            p.copy_(stochastic_round(x, index(), self.key))
        else:
            p.copy_(x)
        if carried is not None:
            carried.copy_(x.sub_(p))

    def _mask(self, x: Tensor, d: Tensor) -> Tensor:
        return torch.where(x * d >= 0, self.keep, 1.0).to(x.dtype)
