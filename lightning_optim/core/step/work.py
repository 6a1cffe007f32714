"""One step of one stack, block or parameter: calling the rule, storing its state, writing the parameter."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.matrix_views import MatrixBlock, StackShape
from lightning_optim.core.parallel import sharding, stack_sharding
from lightning_optim.core.parallel.exchange import Team
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.rule import ADAMW_RMS, DirectionByRows, Rule, StateSpec
from lightning_optim.core.state import formats, quantized_view, stacking
from lightning_optim.core.state.formats import COMPENSATION, StateFormat, scale_key
from lightning_optim.core.step import compiled, constraints
from lightning_optim.core.step.constraints import Factors
from lightning_optim.ops.eigenbasis import overlap
from lightning_optim.ops.lapack import LinAlgError, failures
from lightning_optim.ops.noise import normal
from lightning_optim.ops.rounding import hash_key, indices, stochastic_round
from lightning_optim.ops.row_chunks import row_chunks, take_rows
from lightning_optim.refresh import parse


@dataclass
class Work:
    """One trainable parameter in one step."""

    param: Tensor
    name: str
    index: int
    parts: tuple[MatrixBlock, ...]
    state: dict[str, Tensor]
    transposed: bool = False
    team: Team | None = None
    """Ranks of which one works on its matrices, if they travel."""
    replicas: Replicas | None = None
    """Ranks with gradients of their own, for a rule that reduces what it needs of them."""
    t: int = 0
    scale: float = 1.0
    """The gradient is clipped by this factor."""
    piece: int = 0
    """Which part of the parameter this is the work of, where it has several and this is one's."""
    due: str = ""
    """Why the costly state is refreshed in this step, if it is."""
    cost: float = 0.0
    """Of a refresh."""
    rank: int = 0
    """Among the parameters whose refreshes are spread over the steps."""
    stale: float = math.nan
    """Measured in this step, if it was."""
    note: Callable[[Work, Refresh], None] | None = None
    """Is told about a refresh."""
    forms: Mapping[str, StateFormat] = field(default_factory=dict)
    """How its slots rest."""
    prepared: Tensor | None = None
    """What a joint rule has put in the gradient's place."""

    @property
    def dims(self) -> StackShape:
        """The parameter as a stack of matrices; its first part, where they are not all equal."""
        return self.parts[0].dims

    def pieces(self, rule: Rule) -> list[Work]:
        """The work of each part; this one, where all matrices are equal."""
        if len(self.parts) == 1:
            return [self]
        out = []
        for i, part in enumerate(self.parts):
            slots = rule.state_specs(*part.dims[1:])
            state = {k: self.state[_key(k, slot, i)] for k, slot in slots.items()}
            cost = refresh_cost(rule, (part,), vector=False)
            due = self.due if cost else ""
            out.append(replace(self, parts=(part,), state=state, piece=i, cost=cost, due=due))
        return out

    @property
    def has_gradient(self) -> bool:
        """Whether the parameter takes part in this step."""
        return self.param.grad is not None

    @property
    def records(self) -> list[Tensor]:
        """What the refresh policy keeps, `[matrices, numbers]`, of each part."""
        kept = [t for k, t in self.state.items() if k.partition(".")[0] == "refreshed"]
        return [sharding.local(t).flatten(0, -2) for t in kept]

    def slots(self, rule: Rule) -> dict[str, StateSpec]:
        """What the rule keeps for this parameter."""
        return slots_of(rule, self.parts, self.param.ndim)

    def gradient(self) -> Tensor:
        """The gradient on this rank, zeros where there is none; a clipped one is a copy."""
        g = self.unclipped()
        return g if self.scale == 1 else g * self.scale

    def unclipped(self) -> Tensor:
        """The gradient on this rank as it came."""
        g = sharding.local_gradient(self.param) if self.prepared is None else self.prepared
        return torch.zeros_like(sharding.local(self.param)) if g is None else g


class Job(NamedTuple):
    """One param group in one step."""

    rule: Rule
    group: dict[str, Any]
    works: list[Work]


class Refresh(NamedTuple):
    """One refresh of the costly state of one parameter."""

    name: str
    t: int
    reason: str
    age: int
    """Steps since the refresh before."""
    seconds: float
    """Its share of the time its stack took."""
    staleness: float
    """Just before, if the policy measured it; else NaN."""
    overlap: float
    """With the state before, 1 for none of a change, 0 for chance; NaN for the first."""


def count(works: Sequence[Work]) -> None:
    """Count one step, on the CPU: Lightning moves all loaded state to the device, where reading it would wait."""
    for w in works:
        if not w.state["step"].is_cpu:
            w.state["step"] = w.state["step"].cpu()
    if steps := [w.state["step"] for w in works]:
        one = torch.ones((), device="cpu")
        cast("Any", torch)._foreach_add_(steps, one, alpha=1.0)  # a number is four times slower
        for w, t in zip(works, steps, strict=True):
            w.t = int(t.item())


def slots_of(rule: Rule, parts: Sequence[MatrixBlock], ndim: int) -> dict[str, StateSpec]:
    """What a rule keeps for a parameter.

    An `m x n` slot has the parameter's shape. Of others, each part but the first has its own: `factor_left.1`.

    Returns:
        Slots by their key in the parameter's state.
    """
    out: dict[str, StateSpec] = {}
    for i, part in enumerate(parts):
        for key, slot in rule.state_specs(*part.dims[1:], vector=ndim < 2).items():
            out[_key(key, slot, i)] = slot if len(parts) == 1 else replace(slot, dims=part.dims)
    return out


def _key(key: str, slot: StateSpec, i: int) -> str:
    return key if i == 0 or slot.letters == "mn" else f"{key}.{i}"


def refresh_cost(rule: Rule, parts: Sequence[MatrixBlock], *, vector: bool) -> float:
    """Work of one refresh of all matrices of a parameter."""
    return sum(b * rule.refresh_cost(m, n, vector=vector) for b, m, n in (part.dims for part in parts))


def work_of(parts: Sequence[MatrixBlock]) -> float:
    """Work of one step of a whole-matrix rule, by which matrices are spread over ranks.

    Returns:
        Multiplications of a product of each matrix with a square one of its shorter side.
    """
    return sum(float(b * m * n * min(m, n)) for b, m, n in (part.dims for part in parts))


def factor_of(job: Job, dims: StackShape) -> float:
    """What the direction is multiplied by: a constant of the matrix's shape."""
    if job.group["lr_convention"] == "native":
        return 1.0
    rms = job.rule.rms(*dims[1:])
    return 1.0 if rms is None else ADAMW_RMS / rms


def needs_param(rule: Rule) -> bool:
    """Whether a stack of parameters is to be made for the rule, or for decay in the L2 form."""
    return rule.reads_param or (rule.decay == "coupled" and rule.weight_decay != 0)


def stack_key(w: Work) -> tuple[Any, ...]:
    """Works with equal keys may share a stack."""
    return w.parts, w.transposed, w.param.ndim, w.param.dtype, w.param.device, w.t, bool(w.due)


def portions(works: Sequence[Work], max_temp_bytes: int) -> Iterator[Sequence[Work]]:
    """Runs of works whose clipped gradients, which are copies, take no more than some memory together."""
    start = size = 0
    for i, w in enumerate(works):
        size += 0 if w.scale == 1 else w.param.numel() * w.param.element_size()
        if size > max_temp_bytes and i > start:
            yield works[start:i]
            start, size = i, w.param.numel() * w.param.element_size()
    yield works[start:]


def state_beside(w: Work) -> list[int]:
    """Elements of the state of one parameter that is not shaped like it: square factors and bases, statistics."""
    return [math.prod(form.shape) for form in w.forms.values() if form.slot.letters != "mn"]


def check_scales(rule: Rule, w: Work, key: str) -> None:
    """Check that codes and scales of a quantised slot belong together.

    Raises:
        RuntimeError: the group's `storage_block` was changed.
    """
    codes, scale = sharding.local(w.state[key]), w.state.get(scale_key(key))
    count = quantized_view.blocks_here(w.forms[key], codes, first_index(rule, w.forms[key], w))
    if scale is not None and sharding.local(scale).numel() != count:
        raise RuntimeError(f"{w.name}: storage_block was changed while there is {key!r}; set it as it was")


def forms_for(rule: Rule, group: Mapping[str, Any], p: Tensor, parts: Sequence[MatrixBlock]) -> dict[str, StateFormat]:
    """How everything a rule keeps for a parameter rests.

    Args:
        rule: of the group.
        group: of the parameter.
        p: the parameter.
        parts: of the parameter.

    Returns:
        Forms by their key in the parameter's state.
    """
    slots, dims = slots_of(rule, parts, p.ndim), parts[0].dims
    return {k: formats.format_of(s, p.shape, dims, p.dtype, group, sums=rule.reduces) for k, s in slots.items()}


def forms_of(job: Job, w: Work) -> dict[str, StateFormat]:
    """How everything a rule keeps for a parameter rests.

    Returns:
        Forms by their key in the parameter's state.
    """
    return forms_for(job.rule, job.group, w.param, w.parts)


def first_index(rule: Rule, form: StateFormat, w: Work) -> int:
    """Index, within a slot, of the first element that rests on this rank: blocks of scales begin at multiples."""
    cut = (rule.elementwise or rule.reduces) and w.team is None and form.slot.letters == "mn"
    return sharding.start_of(w.param, w.name) if cut and form.is_quantized else 0


def takes_kernels(group: Mapping[str, Any]) -> bool:
    """Whether kernels of torch's do what a group asks for."""
    return not group["cautious_decay"] and not constraints.shapes_step(group)


def takes_kernel(job: Job, w: Work) -> bool:
    """Whether a kernel of torch's does what a group that takes any asks for, if dtypes and strides agree."""
    return w.param.dtype == formats.compute_dtype_of(w.param.dtype) and factor_of(job, w.dims) == 1.0


class Elements:
    """The global index of every element of a block, for rounding that draws equal bits on every mesh."""

    def __init__(self, part: Tensor, param: Tensor | None = None):
        """Find where a part lies.

        Args:
            part: what blocks are cut from.
            param: whose local part it is shaped like; a whole tensor if not given.
        """
        self.first = (0 if part.is_contiguous() else None) if param is None else sharding.first_element(param)
        self.tensors = [] if self.first is not None else [sharding.element_index(part if param is None else param)]
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
        return indices(start, block.numel(), block.device).view(block.shape)


def _offset(block: Tensor, cut: slice) -> int:
    return cut.start * (block.numel() // max(1, cut.stop - cut.start))


class _Kept:
    """One slot of one parameter, of which a rule sees values that are not what rests."""

    def __init__(self, job: Job, w: Work, key: str):
        self.form, self.part = w.forms[key], sharding.local(w.state[key])
        self.scale = sharding.local(w.state[scale_key(key)]) if self.form.is_quantized else None
        cut = (job.rule.elementwise or job.rule.reduces) and w.team is None
        self.param = w.param if cut and self.form.slot.letters == "mn" else None
        self.start = first_index(job.rule, self.form, w)
        self.key = hash_key(job.group["seed"], w.t, w.index, 1 + list(w.forms).index(key))
        self.device = sharding.local(w.param).device

    def open(self, part: Tensor, at: int = 0) -> Tensor:
        """The values of a block that begins at an element."""
        scale = quantized_view.scales_at(self.form, self.scale, self.start, at, part.numel())
        return quantized_view.dequantize(self.form, part, scale, self.start + at, self.device)

    def close(self, part: Tensor, value: Tensor, index: Callable[[], Tensor], at: int = 0) -> None:
        """Store the values of a block that begins at an element."""
        scale = quantized_view.scales_at(self.form, self.scale, self.start, at, part.numel())
        quantized_view.quantize(self.form, part, scale, self.start + at, value, index, self.key)

    def close_all(self, value: Tensor) -> None:
        """Store all values, block by block if they are rounded at random."""
        if self.form.kind != "bf16":
            self.close(self.part, value, _no_index)
            return
        where = Elements(self.part, self.param)
        for (part, wide, *held), cut in matrix_views.cache_blocks([self.part, value, *where.tensors]):
            self.close(part, wide, functools.partial(where, part, cut, held))


def kept_slots(job: Job, w: Work) -> dict[str, _Kept]:
    """The slots of a parameter of which a rule sees other values than rest."""
    device = sharding.local(w.param).device
    return {key: _Kept(job, w, key) for key, form in w.forms.items() if not form.direct(device)}


def with_values(w: Work, kept: Mapping[str, _Kept]) -> Work:
    """The work with the values of its slots in the place of what rests."""
    return replace(w, state={**w.state, **{k: x.open(x.part) for k, x in kept.items()}}) if kept else w


def _no_index() -> Tensor:
    raise AssertionError("only rounding to bfloat16 asks for indices")


def _by_graph(job: Job, w: Work) -> slice | None:
    """Step one parameter by a compiled graph, if its group asks for that and it can be.

    Returns:
        The elements that were stepped, in memory order: all, or those in whole blocks of scales; None for none.
    """
    rule, group, p = job.rule, job.group, sharding.local(w.param)
    if (
        not group["compile"]
        or w.replicas is not None
        or rule.skips_update(w.t)
        or compiled.refusal(rule, group) is not None
    ):
        return None
    kind = compiled.kind_of(rule, group, p, w.dims, list(w.forms.values()))
    rests = all([form.is_quantized or form.direct(p.device) for form in w.forms.values()])
    if kind is None or not rests or len(w.parts) > 1 or any(part.rows is not None for part in w.parts):
        return None
    g, state = w.gradient(), [sharding.local(w.state[key]) for key in w.forms]
    plain = [x for x, form in zip(state, w.forms.values(), strict=True) if not form.is_quantized and x.shape == p.shape]
    if not matrix_views.same_strides([p, g, *plain]) or ((rule.reduces or kind.rest) and not p.is_contiguous()):
        return None
    size = rule.lr * factor_of(job, w.dims)
    if kind.rest:
        return _by_blocks(job, w, kind, [p, g, *state], size)

    def seen(x: Tensor) -> Tensor:
        if rule.elementwise:
            return (x if p.is_contiguous() else x.permute(matrix_views.dense_order(p))).view(-1)
        return (
            matrix_views.transpose_if(x, kind.turned).view(w.dims)
            if x.shape == p.shape
            else x.view(w.dims[0], *x.shape[-2:])
        )

    compiled.step(rule, kind, [seen(x) for x in (p, g, *state)], w.t, size)
    return slice(0, p.numel())


def _by_blocks(job: Job, w: Work, kind: compiled.Kind, tensors: Sequence[Tensor], size: float) -> slice | None:
    """Step whole blocks of scales of one parameter by a graph; see `_by_graph`."""
    forms = {key: form for key, form in w.forms.items() if form.is_quantized}
    scales = [sharding.local(w.state[scale_key(key)]) for key in forms]
    form, count = next(iter(forms.values())), tensors[0].numel()
    start = first_index(job.rule, form, w)
    first = -start % kind.block
    blocks = (count - first) // kind.block
    if blocks < 2 or any(x.numel() != quantized_view.blocks_here(form, tensors[0], start) for x in scales):
        return None  # of other blocks: the walk says so
    done = slice(first, first + blocks * kind.block)
    if done != slice(0, count):
        tensors = [x.view(-1)[done] for x in tensors]
        at = (start + first) // kind.block - start // kind.block
        scales = [x[at : at + blocks] for x in scales]
    rows = [x.view(-1, kind.block) for x in tensors] + [x.view(-1, 1) for x in scales]
    compiled.step(job.rule, kind, rows, w.t, size)
    return done


def update_elementwise(job: Job, w: Work) -> None:
    """Step one parameter: by a graph, and by a walk in flat blocks over what that leaves."""
    done, count = _by_graph(job, w), sharding.local(w.param).numel()
    for part in (None,) if done is None else (slice(0, done.start), slice(done.stop, count)):
        if part is None or part.stop > part.start:
            _walk(job, w, part)


def _walk(job: Job, w: Work, part: slice | None) -> None:
    """Walk over one parameter, or some elements of a contiguous one without rounding at random, in flat blocks."""
    rule, p = job.rule, sharding.local(w.param)
    dtype, write = formats.compute_dtype_of(p.dtype), _Write(job, w)
    kept = kept_slots(job, w)
    rounded = write.stochastic or any(x.form.kind == "bf16" for x in kept.values())
    fused = bool(kept) and takes_kernels(job.group) and takes_kernel(job, w)
    where = Elements(p, w.param) if rounded else None
    shaped = [torch.empty_like(p, dtype=dtype)] if constraints.shapes_step(job.group) else []  # needs all of d
    tensors = [p, w.unclipped(), *(sharding.local(w.state[k]) for k in w.forms), *(shaped or write.carried)]
    aside = len(shaped or write.carried)
    tensors += where.tensors if where else []
    grid = next((x for x in kept.values() if x.form.is_quantized), None)
    first = 0
    if part is not None:
        first, tensors = part.start, [t.reshape(-1)[part] for t in tensors]
    align, start = (grid.form.block, grid.start + first) if grid else (1, 0)
    for (pb, gb, *rest), cut in matrix_views.cache_blocks(tensors, align, start):
        resting, rest = dict(zip(w.forms, rest, strict=False)), rest[len(w.forms) :]
        carried, held = rest[:aside], rest[aside:]
        at = first + _offset(pb, cut)
        views = {k: kept[k].open(x, at) if k in kept else x for k, x in resting.items()}
        index = _no_index if where is None else functools.cache(functools.partial(where, pb, cut, held))
        gb = gb.to(dtype) if w.scale == 1 else gb.to(dtype) * w.scale
        if not (fused and _kernel(rule, pb, gb, views, w.t)):
            if rule.decay == "coupled" and rule.weight_decay:
                gb = gb.add(pb, alpha=rule.weight_decay)
            s = SimpleNamespace(**views)
            s.vote = torch.sign if w.replicas is None else w.replicas.vote
            d = cast("Tensor", rule.update(gb, s, pb.to(dtype) if rule.reads_param else None, w.t))
            for key, value in stacking.copy_aliased(views, {k: getattr(s, k) for k in views}).items():
                if value is not views[key]:
                    views[key].copy_(value)
            if shaped:
                carried[0].copy_(d)
            elif not rule.skips_update(w.t):
                write(pb, d, index, *carried)
        for key, x in kept.items():
            x.close(resting[key], views[key], index, at)
    if shaped and not rule.skips_update(w.t):
        apply(job, w, shaped[0])


def _kernel(rule: Rule, p: Tensor, g: Tensor, s: Mapping[str, Tensor], t: int) -> bool:
    """Try a kernel of the rule's on one block."""
    return (
        matrix_views.same_strides([p, g, *s.values()])
        and rule.kernel([p], [g], {k: [x] for k, x in s.items()}, t) is not None
    )


def update_stack(
    job: Job,
    chunk: Sequence[Work],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: stack_sharding.StackSharding | None = None,
    sink: Callable[[Work, Tensor], None] | None = None,
) -> None:
    """Call a rule on the matrices of parameters, store the state it leaves and hand out the directions.

    Args:
        job: rule and settings.
        chunk: works that are alike.
        params: of the works, local or whole.
        gradients: likewise.
        frame: how a reducing rule's stacks are cut.
        sink: takes each direction, shaped like its gradient; applied if not given.
    """
    kept = [kept_slots(job, w) for w in chunk]
    opened = [with_values(w, slots) for w, slots in zip(chunk, kept, strict=True)]
    versions = [{k: stacking.version(w.state[k]) for k in slots} for w, slots in zip(opened, kept, strict=True)]
    pieces = zip(*(w.pieces(job.rule) for w in opened), strict=True)
    plain = sink is None and (frame is None or frame.cut is None) and not constraints.shapes_step(job.group)
    by_rows = plain and _goes_by_rows(chunk)
    if by_rows and job.rule.reduces and _by_graph(job, chunk[0]) is not None:
        return
    found = [_directions(job, piece, params, gradients, frame, by_rows) for piece in pieces]
    wrapped = frame is not None and frame.cut is not None  # what a DTensor writes to its local part is not counted
    for w, slots, old in zip(opened, kept, versions, strict=True):
        for key, x in slots.items():
            if wrapped or old[key] is None or stacking.version(w.state[key]) != old[key]:
                x.close_all(w.state[key])
    if job.rule.skips_update(chunk[0].t):
        return
    for w, like, *ds in zip(chunk, gradients, *found, strict=True):
        if isinstance(ds[0], Tensor):
            d = _joined(job, w, cast("list[Tensor]", ds), like)
            sink(w, d) if sink else apply(job, w, d)
        else:
            _apply_rows(job, w, ds[0])


def _goes_by_rows(chunk: Sequence[Work]) -> bool:
    """Whether a stack is one parameter whose memory is that of its matrices."""
    w, p = chunk[0], sharding.local(chunk[0].param)
    plain = len(chunk) == len(w.parts) == 1 and w.parts[0].rows is None and p.dtype == formats.compute_dtype_of(p.dtype)
    return plain and (p.ndim < 3 or (p.is_contiguous() and not w.transposed))


def _apply_rows(job: Job, w: Work, rows: DirectionByRows) -> None:
    """Take the step of one parameter in runs of rows."""
    write = _Write(job, w)
    p = matrix_views.transpose_if(sharding.local(w.param), w.transposed)
    p = p.view(w.dims)
    for run in row_chunks(p):
        write(take_rows(p, run), rows(run))


def _joined(job: Job, w: Work, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """The direction of one parameter, shaped like its gradient, out of those of its parts."""
    if len(pieces) == 1 and w.parts[0].rows is None:
        return matrix_views.transpose_if(
            pieces[0].reshape(matrix_views.transpose_if(like, w.transposed).shape), w.transposed
        )
    out = torch.empty_like(like, dtype=pieces[0].dtype)
    for part, piece in zip(w.parts, pieces, strict=True):
        where = part.of(out, w.transposed)
        ratio = factor_of(job, part.dims) / factor_of(job, w.dims)  # `apply` knows the first one's factor
        where.copy_((piece if ratio == 1 else piece * ratio).reshape(where.shape))
    return out


def _directions(
    job: Job,
    chunk: Sequence[Work],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: stack_sharding.StackSharding | None,
    by_rows: bool,
) -> Sequence[Tensor | DirectionByRows]:
    """Call a rule on one stack and store the state it leaves; directions by rows are the caller's wish."""
    rule, first = job.rule, chunk[0]
    dims = b, m, n = first.dims if frame is None or frame.cut is None else frame.local_dims
    dtype = formats.compute_dtype_of(first.param.dtype)
    slots = first.slots(rule)
    part, turn = first.parts[0], first.transposed
    entries, before = stacked_state(chunk, slots, dims)
    versions = {k: stacking.version(x) for k, x in before.items()}
    g, p = stacked_gradient(chunk, gradients, dims), None
    if needs_param(rule):
        p = matrix_views.stack([part.of(t, turn) for t in params], (b, m, n), dtype)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
    wrap, unwrap = (frame.wrap, frame.unwrap) if frame else (_as_is, _as_is)
    s = SimpleNamespace(**{k: wrap(before[k], slot.letters) for k, slot in slots.items()})
    s.vector = first.param.ndim < 2 or job.group.get("role") == "vector"
    s.noise = lambda letters, stream=0: wrap(_noise(job, chunk, frame, letters, stream), letters)
    s.mean = _as_is if first.replicas is None else first.replicas.mean
    s.refresh = functools.partial(_refresh, job, chunk, s)
    whole = wrap(g)
    try:
        d = rule.update(whole, s, wrap(p) if rule.reads_param and p is not None else None, first.t)
    except LinAlgError as error:  # others have moved: the step has to end
        failures.add(f"{rule.name} could not be computed and does not move ({error})")
        d = torch.zeros_like(whole)
    failures.name(lambda: [w.name for w in chunk])
    if "refreshed" in slots:
        age = s.refreshed[..., 0]
        age.copy_(torch.ones_like(age) if first.due else age + 1)
    left = {k: unwrap(getattr(s, k), slot.letters) for k, slot in slots.items()}
    wrapped = frame is not None and frame.cut is not None  # what a DTensor writes to its local part is not counted
    for k, value in stacking.copy_aliased(before, left).items():
        if wrapped or value is not before[k] or versions[k] is None or stacking.version(value) != versions[k]:
            stacking.store_stack(entries[k], value)
    if isinstance(d, Tensor):
        return unwrap(d).split(b)
    return [d] if by_rows else unwrap(d(slice(0, whole.shape[-2]))).split(b)


def stacked_state(
    chunk: Sequence[Work], slots: Mapping[str, StateSpec], dims: StackShape
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """State of works that are alike.

    Args:
        chunk: the works.
        slots: of each.
        dims: of each on this rank.

    Returns:
        (resting tensors by slot, one per work; stacks by slot).
    """
    entries = {k: [sharding.local(w.state[k]) for w in chunk] for k in slots}
    for k, slot in slots.items():
        if slot.letters == "mn":
            entries[k] = [chunk[0].parts[0].of(t, chunk[0].transposed) for t in entries[k]]
    b, m, n = dims
    return entries, {k: stacking.stack_state(entries[k], (b, *slot.shape(m, n))) for k, slot in slots.items()}


def stacked_gradient(chunk: Sequence[Work], gradients: Sequence[Tensor], dims: StackShape) -> Tensor:
    """Gradients of works that are alike, as one stack in the dtype of the arithmetic.

    Returns:
        `[len(chunk) * b, m, n]`.
    """
    part, dtype = chunk[0].parts[0], formats.compute_dtype_of(chunk[0].param.dtype)
    return matrix_views.stack([part.of(t, chunk[0].transposed) for t in gradients], dims, dtype)


def staleness(job: Job, w: Work, gradient: Tensor) -> Tensor:
    """The largest staleness among the matrices of one parameter that is whole here.

    Returns:
        A 0-d tensor.
    """
    found = []
    for piece in with_values(w, kept_slots(job, w)).pieces(job.rule):
        if piece.cost:
            _, state = stacked_state([piece], piece.slots(job.rule), piece.dims)
            g = stacked_gradient([piece], [gradient], piece.dims)
            found.append(job.rule.staleness(g, SimpleNamespace(**state), w.t).amax())
    return torch.stack(found).amax()


def _refresh(job: Job, chunk: Sequence[Work], s: SimpleNamespace, g: Tensor) -> None:
    """Rebuild the costly state of a stack if it is due, and tell about it."""
    first = chunk[0]
    if not first.due:
        return
    names = [k for k in job.rule.preconditioners if hasattr(s, k)]
    slots = first.slots(job.rule)
    looked = first.t > 1 and (first.note is not None or parse(job.group["refresh"]).reads)
    old = {k: getattr(s, k).clone() for k in names if looked}
    started = time.perf_counter()
    job.rule.refresh_preconditioner(g, s, first.t)
    failures.name(lambda: [w.name for w in chunk])
    seconds = (time.perf_counter() - started) / len(chunk)
    if old:
        shared = [overlap(*(_squares(x, slots[k]) for x in (old[k], getattr(s, k)))) for k in names]
        s.refreshed[..., 0, 1] = torch.stack(shared).amin(0)
    if first.note is not None:
        records = s.refreshed[:, 0].unflatten(0, (len(chunk), -1)).amin(1).tolist()
        for w, (age, shared, *_) in zip(chunk, records, strict=True):
            shared = shared if old else math.nan
            first.note(w, Refresh(w.name, w.t, w.due, int(age), seconds, w.stale, shared))


def _squares(x: Tensor, slot: StateSpec) -> Tensor:
    """The matrices that rest one below the other in a slot."""
    return x.unflatten(-2, (-1, x.shape[-1])) if slot.letters == "kk" else x


def _noise(
    job: Job, chunk: Sequence[Work], frame: stack_sharding.StackSharding | None, letters: str, stream: int
) -> Tensor:
    """This rank's part of the normal numbers for a stack."""
    device, dtype = sharding.local(chunk[0].param).device, formats.compute_dtype_of(chunk[0].param.dtype)
    whole = StateSpec(letters, rank=min(getattr(job.rule, "rank", 1), *chunk[0].dims[1:])).shape(*chunk[0].dims[1:])
    keys = [hash_key(job.group["seed"], w.t, w.index, stream, *[w.piece] * (w.piece > 0)) for w in chunk]
    drawn = [normal((w.dims[0], *whole), key, device=device) for w, key in zip(chunk, keys, strict=True)]
    stack = torch.cat(drawn).to(dtype)
    return stack if frame is None else frame.part(stack, letters)


def _as_is(t: Tensor, letters: str = "mn") -> Tensor:
    del letters
    return t


def apply(job: Job, w: Work, d: Tensor) -> None:
    """Take the step of one parameter, given its direction on this rank."""
    write, p = _Write(job, w), sharding.local(w.param)
    rows = write.factors(w, d) if constraints.shapes_step(job.group) else None
    if p.dtype == d.dtype:
        write(p, d, rows=rows)
        return
    where = Elements(p, w.param) if write.stochastic else None
    spread = [t.expand(p.shape) for t in rows or ()]
    for (pb, db, *rest), cut in matrix_views.cache_blocks([
        p,
        d,
        *spread,
        *write.carried,
        *(where.tensors if where else []),
    ]):
        at, rest = rest[: len(spread)], rest[len(spread) :]
        carried, held = rest[: len(write.carried)], rest[len(write.carried) :]
        index = _no_index if where is None else functools.partial(where, pb, cut, held)
        write(pb, db, index, *carried, rows=Factors(*at) if at else None)


class _Write:
    """p <- p - lr wd p - lr factor d, with the rounding of narrow weights: the only place that writes a parameter."""

    def __init__(self, job: Job, w: Work):
        rule, group = job.rule, job.group
        masked = group["cautious_decay"]
        self.lr, self.factor = rule.lr, factor_of(job, w.dims)
        self.step = self.lr * self.factor
        self.keep = 1.0 if masked is True else 1 - rule.lr * rule.weight_decay
        self.decay = rule.decay
        self.held = 1 - rule.lr * (rule.weight_decay if masked is True else masked)
        self.pinned = group["cautious_when"] == "after_pin"
        self.late = self.pinned or (masked is True and rule.decay == "after")
        self.group = group
        self.dtype = formats.compute_dtype_of(w.param.dtype)
        self.stochastic = w.param.dtype == torch.bfloat16 and group["param_rounding"] == "stochastic"
        self.key = hash_key(group["seed"], w.t, w.index) if self.stochastic else 0
        kept = formats.compensated(w.param.dtype, group)
        self.carried = [sharding.local(w.state[COMPENSATION])] if kept else []
        """What rounding left of the weights."""

    def factors(self, w: Work, d: Tensor) -> Factors:
        """What a constraint makes of the step, for every row.

        Args:
            w: the parameter.
            d: its direction.

        Returns:
            The factors.
        """
        owned = self.decay in ("before", "after")
        keep, held = self.keep if owned else 1.0, 1.0 if self.late else self.held
        step = constraints.Step(self.lr, self.factor, keep, held, self.decay == "after")
        return constraints.factors(self.group, w, d, step, self.carried[0] if self.carried else None)

    def __call__(
        self,
        p: Tensor,
        d: Tensor,
        index: Callable[[], Tensor] | None = None,
        carried: Tensor | None = None,
        *,
        rows: Factors | None = None,
    ) -> None:
        """Write one block.

        Args:
            p: a view of the parameter.
            d: its direction.
            index: gives the global indices of its elements, where the weights are rounded at random.
            carried: the block of `self.carried`, if any.
            rows: the block of the factors of a constraint, if any.
        """
        x = p.to(self.dtype)  # p itself, or a copy
        if carried is not None:
            x.add_(carried)
        held = self._held(x, d, rows) if self.held != 1 else None
        if rows is not None:
            x.mul_(rows.keep + rows.lift if held is None or self.late else rows.keep * held + rows.lift)
            x.addcmul_(d, rows.step, value=-1)
        else:
            if self.decay == "before" and self.keep != 1:
                x.mul_(self.keep)
            if held is not None and not self.late:
                x.mul_(held)
            x.add_(d, alpha=-self.step)
            if self.decay == "after" and self.keep != 1:
                x.mul_(self.keep)
        if held is not None and self.late:
            x.mul_(held)
        if x is p:
            return
        if self.stochastic and index is not None:
            p.copy_(stochastic_round(x, index(), self.key))
        else:
            p.copy_(x)
        if carried is not None:
            carried.copy_(x.sub_(p))

    def _held(self, x: Tensor, d: Tensor, rows: Factors | None) -> Tensor:
        """What cautious decay leaves of every weight: less of those that the step moves towards zero."""
        toward = x * d if rows is None else x * (d - rows.brake * x)
        taken = (toward > 0 if self.pinned else toward >= 0).to(x.dtype)
        return taken.mul_(self.held - 1).add_(1)
