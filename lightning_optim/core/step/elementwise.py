"""Steps of elementwise rules: a fused kernel of torch's, a compiled graph, or a walk in blocks that stay in cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import cache_blocks, same_strides
from lightning_optim.core.rule import Rule
from lightning_optim.core.state.formats import QUANTIZED_DTYPES
from lightning_optim.core.state.quantized_view import ElementIndex, QuantizedView, no_index, offset
from lightning_optim.core.step import compiled
from lightning_optim.core.step.apply import ParamWriter, Transaction, apply_direction, surely
from lightning_optim.core.step.records import GroupStep, ParamStep, state_of
from lightning_optim.core.step.recovery import PartlyWritten, restoring, try_again
from lightning_optim.core.step.stacks import copy_aliased, quantized_views, share_scales


def step_elementwise(
    group: GroupStep, steps: Sequence[ParamStep], max_temp_bytes: int, transaction: Transaction
) -> None:
    """Step parameters of an elementwise rule.

    Args:
        group: of the parameters.
        steps: parameters with a gradient.
        max_temp_bytes: bound for copies of clipped gradients.
        transaction: keeps a parameter whose step needs communication, which fails, as it was.
    """
    is_quantized = group.group["state_storage"] in QUANTIZED_DTYPES
    divided = [s for s in steps if s.plan.divided] if is_quantized else []
    transaction.keep(divided)
    for s in _step_by_kernel(group, steps, max_temp_bytes, transaction) if group.plan.has_kernel else steps:
        if s.plan.replicas is not None or (group.plan.has_constraint and s.plan.is_sharded):
            work, backup = functools.partial(step_param, group, s), functools.partial(_all_of, s)
            transaction.run(work, [s], backup, collective=True)
            continue
        try:
            step_param(group, s)
        except Exception as error:
            transaction.fail([s], error)
    if divided:
        transaction.run(functools.partial(share_scales, divided), divided, collective=True)


def _all_of(step: ParamStep) -> list[Tensor]:
    return [step.local(), *state_of(step)]


def step_param(group: GroupStep, step: ParamStep) -> None:
    """Step one parameter: by a graph, and by a walk in flat blocks over what that leaves.

    Args:
        group: of the parameter.
        step: the parameter.
    """
    done, count = compiled.step_param(group, step), step.local().numel()
    for part in (None,) if done is None else (slice(0, done.start), slice(done.stop, count)):
        if part is None or part.stop > part.start:
            _walk(group, step, part)


def _step_by_kernel(
    group: GroupStep, steps: Sequence[ParamStep], max_temp_bytes: int, transaction: Transaction
) -> list[ParamStep]:
    """Step what a fused kernel of torch's can take; return the rest."""
    rest: list[ParamStep] = []
    batches: dict[tuple[int, int], list[ParamStep]] = {}
    for s in steps:
        if s.plan.has_kernel and s.plan.is_compute_format:
            batches.setdefault((s.t, s.plan.kernel_id), []).append(s)
        else:
            rest.append(s)
    for batch in batches.values():
        for portion in portions(batch, max_temp_bytes):
            # what a kernel needs is there before it writes
            transaction.run(functools.partial(_step_portion, group, portion, rest), portion)
    return rest


def _step_portion(group: GroupStep, portion: Sequence[ParamStep], rest: list[ParamStep]) -> None:
    """Step parameters by one call of a kernel; put those that it cannot take behind the `rest`."""
    keys, taken, left = group.plan.kernel_state, list[ParamStep](), list[ParamStep]()
    columns: list[list[Tensor]] = [[] for _ in range(2 + len(keys))]
    for s in portion:
        row = [s.plan.param, s.grad, *[s.state[k] for k in keys]]
        if s.plan.is_sharded:
            row = [s.local(), s.grad, *[s.local_state(k) for k in keys]]
        if s.clip != 1:
            row[1] = s.gradient()
        tensors = cast("list[Tensor]", row)
        if same_strides(tensors):
            taken.append(s)
            for column, t in zip(columns, tensors, strict=True):
                column.append(t)
        else:
            left.append(s)
    if taken:
        p, g, *state = columns
        if group.rule.kernel(p, g, dict(zip(keys, state, strict=True)), taken[0].t) is None:
            left += taken
    rest += left


def portions(steps: Sequence[ParamStep], max_temp_bytes: int) -> Iterator[Sequence[ParamStep]]:
    """Divide parameters into runs whose clipped gradients, which are copies, fit into `max_temp_bytes`.

    Args:
        steps: the parameters.
        max_temp_bytes: the bound; single parameters may exceed it.

    Yields:
        Consecutive parameters.
    """
    start = size = 0
    for i, s in enumerate(steps):
        if s.clip == 1:
            continue
        nbytes = s.plan.param.numel() * s.plan.param.element_size()
        size += nbytes
        if size > max_temp_bytes and i > start:
            yield steps[start:i]
            start, size = i, nbytes
    yield steps[start:]


def _walk(group: GroupStep, step: ParamStep, part: slice | None) -> None:
    """Walk over one parameter in flat blocks, or over some elements of a contiguous one without stochastic rounding."""
    rule, plan, p = group.rule, step.plan, step.local()
    write, views = ParamWriter(group, step), quantized_views(group, step)
    rounded = write.is_stochastic or any(view.fmt.name == "bf16" for view in views.values())
    where = ElementIndex(p, plan.param) if rounded else None
    # a constraint needs the whole direction
    whole = [torch.empty_like(p, dtype=plan.compute_dtype)] if group.plan.has_constraint else []
    grad = cast("Tensor", step.grad)
    tensors = [p, grad, *(step.local_state(k) for k in plan.formats), *(whole or write.compensation)]
    tensors += where.tensors if where else []
    quantized = next((view for view in views.values() if view.fmt.is_quantized), None)
    first = 0
    if part is not None:
        first, tensors = part.start, [t.reshape(-1)[part] for t in tensors]
    align, start = (quantized.fmt.block, quantized.start + first) if quantized else (1, 0)
    count, aside = len(plan.formats), len(whole or write.compensation)
    copies = not views and getattr(rule, "momentum_kernel", None) is not None  # several means are summed up at the end
    for k, ((pb, gb, *rest), cut) in enumerate(cache_blocks(tensors, align, start)):
        stored, beside = dict(zip(plan.formats, rest, strict=False)), rest[count : count + aside]
        at, block_index = first + offset(pb, cut), rest[count + aside :]
        index = no_index if where is None else functools.cache(functools.partial(where, pb, cut, block_index))
        work = group, step, write, views, pb, gb, stored, beside, index, at
        try:
            restoring(list(stored.values()), _step_block, *work, copies=copies)
        except PartlyWritten:
            raise
        except Exception as error:
            if k == 0 and part is None:
                raise
            try_again(_step_block, *work, error=error)
    if whole and not (group.plan.may_skip and rule.skips_update(step.t)):
        apply_direction(group, step, whole[0])


def _step_block(
    group: GroupStep,
    step: ParamStep,
    write: ParamWriter,
    views: Mapping[str, QuantizedView],
    p: Tensor,
    g: Tensor,
    stored: Mapping[str, Tensor],
    beside: Sequence[Tensor],
    index: Callable[[], Tensor],
    at: int,
) -> None:
    """Step one block; where a constraint needs the whole direction, which then is `beside`, only find the direction."""
    rule, plan = group.rule, step.plan
    values = {k: views[k].load(x, at) if k in views else x for k, x in stored.items()}
    g = g.to(plan.compute_dtype) if step.clip == 1 else g.to(plan.compute_dtype) * step.clip
    if not (views and plan.has_kernel and _kernel(rule, p, g, values, step.t)):
        d = _update_block(group, step, p, g, values)
        if group.plan.has_constraint:
            beside[0].copy_(d)
        elif not (group.plan.may_skip and rule.skips_update(step.t)):
            surely(write, p, d, index, *beside)
    for key, view in views.items():
        surely(view.store, stored[key], values[key], index, at)


def _update_block(group: GroupStep, step: ParamStep, p: Tensor, g: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Call a rule on one block, and keep the state it leaves in `values`; its direction."""
    rule, replicas = group.rule, step.plan.replicas
    if rule.decay == "coupled" and rule.weight_decay:
        g = g.add(p, alpha=rule.weight_decay)
    s = SimpleNamespace(**values)
    s.vote = torch.sign if replicas is None else replicas.vote
    d = rule.update(g, s, p.to(step.plan.compute_dtype) if rule.reads_param else None, step.t)
    for key, value in copy_aliased(values, {k: getattr(s, k) for k in values}).items():
        if value is not values[key]:
            values[key].copy_(value)
    return cast("Tensor", d)


def _kernel(rule: Rule, p: Tensor, g: Tensor, s: Mapping[str, Tensor], t: int) -> bool:
    """Try the rule's fused kernel on one block."""
    return same_strides([p, g, *s.values()]) and rule.kernel([p], [g], {k: [x] for k, x in s.items()}, t) is not None
