"""Steps of rules that need whole matrices or sums over them: parameters of equal shape are one stack `[b, m, n]`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import SMALL, STACK_LIMIT, StackShape, transpose_if
from lightning_optim.core.parallel.stack_sharding import StackSharding
from lightning_optim.core.rule import DirectionByRows, Rule, StateSpec
from lightning_optim.core.state.formats import QUANTIZED_DTYPES
from lightning_optim.core.state.quantized_view import QuantizedView
from lightning_optim.core.step import compiled
from lightning_optim.core.step.apply import Transaction, apply_by_rows, apply_directions, is_written_at_once, surely
from lightning_optim.core.step.records import GroupStep, ParamStep, state_of
from lightning_optim.core.step.recovery import restoring
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler, refresh_if_due
from lightning_optim.core.step.stacks import (
    copy_aliased,
    quantized_views,
    share_scales,
    stack,
    stacked_gradient,
    stacked_state,
    stacks,
    store_stack,
    version,
    views_of,
    with_values,
)
from lightning_optim.ops.lapack import LinAlgError, failures
from lightning_optim.ops.noise import normal
from lightning_optim.ops.rounding import hash_key

Directions = Sequence[Tensor | DirectionByRows]
"""One direction per parameter, or one for a single parameter that is stepped by rows."""
Sink = Callable[[ParamStep, Tensor], None]
"""Takes the direction of one parameter."""


def chunks(steps: Sequence[ParamStep], max_temp_bytes: int) -> Iterator[Sequence[ParamStep]]:
    """Batch parameters that can share a stack.

    Args:
        steps: parameters of one group, whole on this rank.
        max_temp_bytes: bound for a stack and the temporaries of its update.

    Yields:
        Parameters of one stack.
    """
    batches: dict[tuple[int, int, bool], list[ParamStep]] = {}
    for s in steps:
        batches.setdefault((s.plan.stack_id, s.t, s.due != ""), []).append(s)
    for batch in batches.values():
        plan = batch[0].plan
        if len(batch) == 1:
            yield batch
        else:
            yield from stacks(batch, plan.param.numel(), max_temp_bytes, plan.elements_beside)


def step_whole(
    group: GroupStep,
    steps: Sequence[ParamStep],
    refreshes: RefreshScheduler,
    max_temp_bytes: int,
    transaction: Transaction,
) -> None:
    """Step parameters of a rule for whole matrices.

    Args:
        group: of the parameters.
        steps: parameters with a gradient that are whole on this rank.
        refreshes: decides which preconditioners are due.
        max_temp_bytes: bound for a stack and the temporaries of its update.
        transaction: keeps a stack whose update fails as it was.
    """
    if group.rule.preconditioners and not group.rule.needs_all_gradients:
        transaction.run(functools.partial(refreshes.decide, group, steps), steps)
    steps = transaction.taken(steps)
    for chunk in chunks(steps, max_temp_bytes):
        transaction.run(
            functools.partial(_update_whole, group, chunk),
            chunk,
            functools.partial(written_early, group, chunk),
            collective=chunk[0].plan.replicas is not None,
        )


def _update_whole(group: GroupStep, chunk: Sequence[ParamStep]) -> None:
    update_stack(group, chunk, [s.plan.param for s in chunk], [s.gradient() for s in chunk])


def written_early(group: GroupStep, chunk: Sequence[ParamStep]) -> list[Tensor]:
    """What the update of a stack writes before everything that can fail has been done.

    Args:
        group: of the parameters.
        chunk: parameters with one `stack_id`.

    Returns:
        State and weights on this rank; none where the rule works on a copy, which is stored and applied in place.
    """
    plain, plan = is_written_at_once(group, chunk[0]), chunk[0].plan
    if plain and len(chunk) > 1 and plan.is_compute_format and not plan.block_plans and plan.blocks[0].rows is None:
        return []
    return [t for s in chunk for t in (*state_of(s), *([] if plain else [s.local()]))]


def step_reducing(group: GroupStep, steps: Sequence[ParamStep], max_temp_bytes: int, transaction: Transaction) -> None:
    """Step parameters of a rule that only needs sums over rows, columns or matrices.

    Args:
        group: of the parameters.
        steps: parameters with a gradient.
        max_temp_bytes: bound for a stack and the temporaries of its update.
        transaction: keeps a stack whose update fails as it was.
    """
    batches: dict[Any, list[ParamStep]] = {}
    is_quantized = group.group["state_storage"] in QUANTIZED_DTYPES
    divided = [s for s in steps if s.plan.divided and s.plan.team is None] if is_quantized else []
    transaction.keep(divided)
    frames = {id(s): StackSharding(s.plan.param, s.plan.dims, s.plan.name, s.plan.transposed) for s in steps}
    for s in steps:
        batches.setdefault((s.plan.stack_id, s.t, frames[id(s)].cut), []).append(s)
    for batch in batches.values():
        frame = frames[id(batch[0])]
        elements = batch[0].local().numel() if frame.stackable else STACK_LIMIT + 1
        for chunk in stacks(batch, elements, max_temp_bytes):
            work, is_sharded = functools.partial(_update_reducing, group, chunk, frame), frame.cut is not None
            early = functools.partial(written_early, group, chunk) if is_sharded else tuple
            transaction.run(work, chunk, early, collective=is_sharded)
    if divided:
        transaction.run(functools.partial(share_scales, divided), divided, collective=True)


def _update_reducing(group: GroupStep, chunk: Sequence[ParamStep], frame: StackSharding) -> None:
    work = group, chunk, [s.local() for s in chunk], [s.gradient() for s in chunk], frame
    if frame.cut is not None:
        update_stack(*work)
        return
    state = [t for s in chunk for t in state_of(s)]
    limit = max(SMALL, chunk[0].local().numel() // 8) if len(chunk) == 1 else 0
    is_small = sum(t.numel() for t in state) <= limit
    restoring(state, update_stack, *work, copies=is_small)


def update_stack(
    group: GroupStep,
    chunk: Sequence[ParamStep],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: StackSharding | None = None,
    sink: Sink | None = None,
) -> None:
    """Call a rule on the matrices of parameters, store the state it leaves and apply the directions.

    Args:
        group: of the parameters.
        chunk: parameters with one `stack_id`.
        params: their local parts, or whole parameters.
        gradients: likewise.
        frame: how a reducing rule's stacks are sharded.
        sink: takes each direction, shaped like its gradient; they are applied if not given.
    """
    sharded = frame is not None and frame.cut is not None
    by_rows = sink is None and not sharded and _is_stepped_by_rows(group, chunk)
    if by_rows and group.rule.reduces and compiled.step_param(group, chunk[0]) is not None:
        return
    plan, rule = chunk[0].plan, group.rule
    if plan.is_compute_format and not plan.block_plans:
        directions = [_directions(group, chunk, params, gradients, frame, by_rows)]
    else:
        directions = _directions_of_values(group, chunk, params, gradients, frame, by_rows)
    if group.plan.may_skip and rule.skips_update(chunk[0].t):
        return
    if not isinstance(directions[0][0], Tensor):
        apply_by_rows(group, chunk[0], directions[0][0])
        return
    joined = surely(_join, group, chunk, cast("Sequence[Sequence[Tensor]]", directions), gradients)
    if sink is None:
        apply_directions(group, chunk, joined)
    else:
        for s, d in zip(chunk, joined, strict=True):
            sink(s, d)


def _directions_of_values(
    group: GroupStep,
    chunk: Sequence[ParamStep],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: StackSharding | None,
    by_rows: bool,
) -> list[Directions]:
    """Call a rule on dequantized state, once per size of matrix; store what it leaves."""
    views = [quantized_views(group, s) for s in chunk]
    loaded = [with_values(s, of) for s, of in zip(chunk, views, strict=True)]
    versions = [{k: version(s.state[k]) for k in of} for s, of in zip(loaded, views, strict=True)]
    by_block = zip(*(s.split(group.rule) for s in loaded), strict=True)
    out = [_directions(group, piece, params, gradients, frame, by_rows) for piece in by_block]
    sharded = frame is not None and frame.cut is not None  # torch does not count what a DTensor writes to its part
    for s, of, old in zip(loaded, views, versions, strict=True):
        _store_values(s, of, old, always=sharded)
    return out


def _store_values(
    step: ParamStep, views: Mapping[str, QuantizedView], versions: Mapping[str, int | None], *, always: bool
) -> None:
    """Quantize the state that a rule has written."""
    for key, view in views.items():
        if always or versions[key] is None or version(step.state[key]) != versions[key]:
            surely(view.store_all, step.state[key])


def _is_stepped_by_rows(group: GroupStep, chunk: Sequence[ParamStep]) -> bool:
    """Whether a stack is one parameter whose memory is that of its matrices, and no option needs a whole direction."""
    plan = chunk[0].plan
    if len(chunk) > 1 or plan.block_plans or plan.blocks[0].rows is not None or plan.dtype != plan.compute_dtype:
        return False
    p = chunk[0].local()
    return (p.ndim < 3 or (p.is_contiguous() and not plan.transposed)) and not group.plan.has_constraint


def _directions(
    group: GroupStep,
    chunk: Sequence[ParamStep],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    frame: StackSharding | None,
    by_rows: bool,
) -> Directions:
    """Call a rule on one stack and store the state it leaves; the caller may ask for a direction by rows."""
    rule, first, plan = group.rule, chunk[0], chunk[0].plan
    dims = plan.blocks[0].dims if frame is None or frame.cut is None else frame.local_dims
    specs = plan.specs
    entries, before = stacked_state(chunk, specs, dims)
    versions = {k: version(x) for k, x in before.items()}
    g, p = stacked_gradient(chunk, gradients, dims), None
    if needs_param(rule):
        p = stack(views_of(plan, params), dims, plan.compute_dtype)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        p = p if rule.reads_param else None
    s = SimpleNamespace(**before)
    if frame is not None:
        s = SimpleNamespace(**{k: frame.to_dtensor(x, specs[k].letters) for k, x in before.items()})
        g, p = frame.to_dtensor(g), None if p is None else frame.to_dtensor(p)
    s.vector = plan.is_vector or group.group.get("role") == "vector"
    s.noise = functools.partial(_noise, group, chunk, frame)
    s.mean = _identity if plan.replicas is None else plan.replicas.mean
    s.refresh = functools.partial(refresh_if_due, group, chunk, s)
    try:
        d = rule.update(g, s, p, first.t)
    except LinAlgError as error:  # other parameters have moved: the step has to end
        failures.add(f"{rule.name} could not be computed and does not move ({error})")
        d = torch.zeros_like(g)
    if failures.unnamed:
        failures.name([x.plan.name for x in chunk])
    if not (by_rows or isinstance(d, Tensor)):
        d = d(slice(0, g.shape[-2]))
    if "refreshed" in specs:
        age = s.refreshed[..., 0]
        age.copy_(torch.ones_like(age) if first.due else age + 1)
    _store_stacks(s, specs, entries, before, versions, frame)
    if not isinstance(d, Tensor):
        return [d]
    return (d if frame is None else frame.to_local(d)).split(dims[0])


def _store_stacks(
    s: SimpleNamespace,
    specs: Mapping[str, StateSpec],
    entries: Mapping[str, Sequence[Tensor]],
    before: Mapping[str, Tensor],
    versions: Mapping[str, int | None],
    frame: StackSharding | None,
) -> None:
    """Store the state that a rule left."""
    after = {k: getattr(s, k) for k in specs}
    if frame is not None:
        after = {k: frame.to_local(x, specs[k].letters) for k, x in after.items()}
    sharded = frame is not None and frame.cut is not None  # torch does not count what a DTensor writes to its part
    for k, x in copy_aliased(before, after).items():
        if sharded or x is not before[k] or versions[k] is None or x._version != versions[k]:
            store_stack(entries[k], x)


def _join(
    group: GroupStep,
    chunk: Sequence[ParamStep],
    directions: Sequence[Sequence[Tensor]],
    gradients: Sequence[Tensor],
) -> Sequence[Tensor]:
    """The directions of parameters, shaped like their gradients, out of those of their blocks."""
    plan = chunk[0].plan
    if len(directions) == 1 and plan.blocks[0].rows is None:
        if not plan.transposed:
            return [d.reshape(like.shape) for d, like in zip(directions[0], gradients, strict=True)]
        shapes = [transpose_if(like, transposed=True).shape for like in gradients]
        return [transpose_if(d.reshape(x), transposed=True) for d, x in zip(directions[0], shapes, strict=True)]
    out = []
    factors = [x.factor / plan.factor for x in plan.block_plans or (plan,)]  # `apply` has the first one's factor
    for like, *ds in zip(gradients, *directions, strict=True):
        whole = torch.empty_like(like, dtype=ds[0].dtype)
        for block, d, factor in zip(plan.blocks, ds, factors, strict=True):
            where = block.view_of(whole, plan.transposed)
            where.copy_((d if factor == 1 else d * factor).reshape(where.shape))
        out.append(whole)
    return out


def _noise(
    group: GroupStep, chunk: Sequence[ParamStep], frame: StackSharding | None, letters: str, stream: int = 0
) -> Tensor:
    """This rank's part of standard normal numbers for a stack: `s.noise` of a rule."""
    plan, dims = chunk[0].plan, chunk[0].plan.dims
    whole = StateSpec(letters, rank=min(getattr(group.rule, "rank", 1), *dims[1:])).shape(*dims[1:])
    numbers = [_normal(group.group["seed"], s, stream, (dims[0], *whole)) for s in chunk]
    out = torch.cat(numbers).to(plan.compute_dtype)
    return out if frame is None else frame.to_dtensor(frame.part(out, letters), letters)


def _normal(seed: int, step: ParamStep, stream: int, shape: StackShape) -> Tensor:
    """Standard normal numbers that depend on the seed, the parameter and the step only."""
    plan = step.plan
    key = hash_key(seed, step.t, plan.index, stream, *[plan.block_index] * (plan.block_index > 0))
    return normal(shape, key, device=step.local().device)


def needs_param(rule: Rule) -> bool:
    """Whether `update` gets the parameters as a stack, or weight decay in the L2 form needs them.

    Args:
        rule: of the group.

    Returns:
        True if so.
    """
    return rule.reads_param or (rule.decay == "coupled" and rule.weight_decay != 0)


def _identity(x: Tensor) -> Tensor:
    return x
