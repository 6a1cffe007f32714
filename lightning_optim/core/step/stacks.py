"""Parameters batched into stacks `[b, m, n]`: their state and gradients as a rule sees them, and its state stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import STACK_LIMIT, StackShape
from lightning_optim.core.parallel import collectives, element_positions
from lightning_optim.core.rule import Rule, StateSpec
from lightning_optim.core.state.formats import StateFormat, scale_key
from lightning_optim.core.state.quantized_view import QuantizedView
from lightning_optim.core.step.plan import ParamPlan
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.ops.rounding import hash_key

T = TypeVar("T")


def is_sharded_like_param(rule: Rule, plan: ParamPlan, fmt: StateFormat) -> bool:
    """Whether a state tensor is sharded like its parameter.

    Args:
        rule: of the group.
        plan: of the parameter.
        fmt: of the state tensor.

    Returns:
        False for tensors that are whole where they are, as are those of matrices with an owner.
    """
    return (rule.elementwise or rule.reduces) and plan.team is None and fmt.spec.letters == "mn"


def first_index(rule: Rule, plan: ParamPlan, fmt: StateFormat) -> int:
    """Index, within a state tensor, of its first element on this rank: blocks of scales begin at multiples.

    Args:
        rule: of the group.
        plan: of the parameter.
        fmt: of the state tensor.

    Returns:
        0 for a tensor that is not quantized.
    """
    if not fmt.is_quantized or not is_sharded_like_param(rule, plan, fmt):
        return 0
    return element_positions.start_of(plan.param, plan.name)


def quantized_views(group: GroupStep, step: ParamStep) -> dict[str, QuantizedView]:
    """The state tensors of a parameter of which a rule sees other values than are stored.

    Args:
        group: of the parameter.
        step: the parameter.

    Returns:
        Views by key.
    """
    plan = step.plan
    if plan.is_compute_format:
        return {}
    out, device = {}, step.local().device
    step.views = out
    for i, (key, fmt) in enumerate(plan.formats.items()):
        if not fmt.is_compute_format(device):
            out[key] = QuantizedView(
                fmt,
                step.local_state(key),
                step.local_state(scale_key(key)) if fmt.is_quantized else None,
                start=first_index(group.rule, plan, fmt),
                key=hash_key(group.group["seed"], step.t, plan.index, 1 + i),
                device=device,
                param=plan.param if is_sharded_like_param(group.rule, plan, fmt) else None,
                divided=plan.divided if is_sharded_like_param(group.rule, plan, fmt) else (),
                name=key,
            )
    return out


def share_scales(steps: Sequence[ParamStep]) -> None:
    """Store blocks that are divided between ranks by one scale, which is that of one process; a collective call.

    Args:
        steps: parameters whose quantized state was stored; the same on every rank.
    """
    divided = [s for s in steps if s.plan.divided and s.plan.team is None]
    if not divided:
        return
    parts = {(id(s), x.key, x.block): x for s in divided for v in s.views.values() for x in v.divided_parts}
    sizes = dict(zip(parts, torch.stack([x.size() for x in parts.values()]).tolist(), strict=True)) if parts else {}
    blocks = [
        (id(s), key, block)
        for s in divided
        for key, fmt in s.plan.formats.items()
        for block in (s.plan.divided if fmt.is_quantized else ())
    ]
    whole = collectives.all_reduce_max([sizes.get(x, 0.0) for x in blocks], [s.plan.param for s in divided])
    for key, size in zip(blocks, whole, strict=True):
        if key in parts:
            parts[key].store(size)


def with_values(step: ParamStep, views: Mapping[str, QuantizedView]) -> ParamStep:
    """A parameter's step with the values of its state in the place of what is stored.

    Args:
        step: the parameter.
        views: as `quantized_views` gives them.

    Returns:
        The step itself, where there are no views.
    """
    if not views:
        return step
    out = copy.copy(step)
    out.state = {**step.state, **{key: view.load(view.part) for key, view in views.items()}}
    return out


def stacked_state(
    chunk: Sequence[ParamStep], specs: Mapping[str, StateSpec], dims: StackShape
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The state of parameters with one `stack_id`.

    Args:
        chunk: the parameters.
        specs: of each.
        dims: of each on this rank.

    Returns:
        (stored tensors by key, one per parameter; stacks by key).
    """
    plan = chunk[0].plan
    entries, stacks = {}, {}
    for key, spec in specs.items():
        tensors = [s.local_state(key) for s in chunk] if plan.is_sharded else [s.state[key] for s in chunk]
        if spec.letters == "mn":
            tensors, shape = views_of(plan, tensors), dims
        else:
            rows, columns = tensors[0].shape[-2:]
            shape = dims[0], rows, columns
        entries[key], stacks[key] = tensors, stack(tensors, shape, tensors[0].dtype)
    return entries, stacks


def stacked_gradient(chunk: Sequence[ParamStep], gradients: Sequence[Tensor], dims: StackShape) -> Tensor:
    """Gradients of parameters with one `stack_id`, as one stack in the dtype of the arithmetic.

    Args:
        chunk: the parameters.
        gradients: of each.
        dims: of each on this rank.

    Returns:
        `[len(chunk) * b, m, n]`.
    """
    plan = chunk[0].plan
    return stack(views_of(plan, gradients), dims, plan.compute_dtype)


def views_of(plan: ParamPlan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of the first block of parameter-shaped tensors.

    Args:
        plan: of the parameters.
        tensors: one per parameter.

    Returns:
        Views that reshape to the block's `dims`.
    """
    block = plan.blocks[0]
    if block.rows is None and not plan.transposed:
        return list(tensors)
    return [block.view_of(t, plan.transposed) for t in tensors]


def stack(tensors: Sequence[Tensor], dims: StackShape, dtype: torch.dtype) -> Tensor:
    """One stack `[len(tensors) * b, m, n]` out of equally shaped tensors; a view where there is one of this dtype.

    Returns:
        The stack.
    """
    if len(tensors) == 1:
        return tensors[0].reshape(dims).to(dtype)
    return torch.cat([t.reshape(dims) for t in tensors]).to(dtype)


def stacks(items: Sequence[T], elements: int, max_temp_bytes: int, beside: Sequence[int] = ()) -> Iterator[Sequence[T]]:
    """Cut items of one shape into chunks that become one stack each.

    Args:
        items: of one shape.
        elements: of one item.
        max_temp_bytes: bound for a stack and the temporaries of its update, counted as four float32 copies.
        beside: elements of state of another shape (factors, bases) that is stacked with an item.

    Yields:
        Runs of `items`; single ones from `STACK_LIMIT` elements on, of the item or of one of its states.
    """
    large = max(elements, *beside, 1) >= STACK_LIMIT
    size = 1 if large else max(1, max_temp_bytes // (16 * max(elements + sum(beside), 1)))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def copy_aliased(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a rule left in its state, safe to store one by one: `s.prev = s.cur` must not see the new `cur`.

    Args:
        before: the stored tensors, or stacks of them, by key.
        after: what the rule left under each key.

    Returns:
        `after`, with copies of tensors that share memory with the stored tensor of another key.
    """
    for key, value in after.items():
        if value is not before[key]:
            break
    else:
        return after
    homes = {k: t.untyped_storage().data_ptr() for k, t in before.items()}
    out = {}
    for key, value in after.items():
        home = value.untyped_storage().data_ptr()
        aliased = any(home == other for k, other in homes.items() if k != key)
        out[key] = value.clone() if aliased else value
    return out


def store_stack(entries: Sequence[Tensor], after: Tensor) -> None:
    """Store what a rule left in a stack.

    Args:
        entries: one per parameter.
        after: what `stack_state` gave, mutated in place, or another tensor.
    """
    if len(entries) == 1 and after.data_ptr() == entries[0].data_ptr():
        return
    for entry, piece in zip(entries, after.split(after.shape[0] // len(entries)), strict=True):
        entry.copy_(piece.reshape(entry.shape))


def version(t: Tensor) -> int | None:
    """How often a tensor, or another view of its memory, was written in place.

    Args:
        t: any.

    Returns:
        torch's count; None for a tensor of inference mode, which has none.
    """
    return None if t.is_inference() else t._version
