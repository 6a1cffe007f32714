"""Allocation of the state of parameters: complete, in its final shape, from what their rules declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.parallel.stack_sharding import StackSharding
from lightning_optim.core.rule import Rule
from lightning_optim.core.state.checks import note_complete
from lightning_optim.core.state.formats import COMPENSATION, RADIUS, STEP_DTYPE, StateFormat, scale_key
from lightning_optim.core.state.initial_values import initial_scale, initial_value
from lightning_optim.core.state.quantized_view import convert
from lightning_optim.core.step.plan import step_cost
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import first_index

States = Mapping[Tensor, dict[str, Tensor]]


def assign_owners(groups: Iterable[GroupStep], owners: Owners, all_params: Iterable[Tensor]) -> None:
    """Give every parameter that is stepped by one rank an owner.

    Args:
        groups: of this step.
        owners: of the optimizer.
        all_params: all parameters of the optimizer.
    """
    steps = [s for group in groups for s in group.params if s.plan.team is not None]
    owners.assign([(s.plan.param, s.plan.team, step_cost(s.plan.blocks)) for s in steps if s.plan.team], all_params)


def allocate_state(
    groups: Sequence[GroupStep],
    owners: Owners,
    state_of: Callable[[Tensor], dict[str, Tensor]],
    also: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
) -> None:
    """Allocate what parameters lack of their state, and convert what is stored in another format.

    Args:
        groups: of this step; their owners are assigned.
        owners: of the optimizer.
        state_of: gives, and makes if need be, the entry of a parameter in the optimizer's state.
        also: allocates more, for averaging methods.

    Raises:
        ValueError: a mesh on which the group's storage format does not work.
    """
    for group in groups:
        for s in group.params:
            if s.plan.stored is not None:
                continue
            if not s.state:
                s.state = state_of(s.plan.param)
            counter = s.state.get("step")
            if counter is None or counter.dtype != STEP_DTYPE:
                counter = torch.zeros((), device="cpu") if counter is None else counter.cpu()
                s.state["step"] = counter.to(STEP_DTYPE)
            for key, fmt in s.plan.formats.items():
                stored = s.state.get(key)
                if stored is None or stored.dtype != fmt.dtype:
                    _allocate(group.rule, s, key, fmt, owners)
            if s.plan.is_compensated and COMPENSATION not in s.state:
                s.state[COMPENSATION] = torch.zeros_like(s.plan.param, requires_grad=False)
            if s.plan.keeps_radius and RADIUS not in s.state:
                count = sum(block.dims[0] for block in s.plan.blocks)
                s.state[RADIUS] = torch.zeros(count, device=s.local().device)
            if also is not None:
                also(s.plan.param, s.state)
            note_complete(s)


def _allocate(rule: Rule, step: ParamStep, key: str, fmt: StateFormat, owners: Owners) -> None:
    """Give a state tensor its start value, or what it held in another format.

    It is empty on a rank that does not own the matrix, so that all ranks have all keys.

    Raises:
        ValueError: a mesh on which the storage format does not work.
    """
    plan, part = step.plan, step.local()
    cut = sharding.sharding_of(plan.param, plan.name) if fmt.is_quantized or not rule.elementwise else None
    if cut is not None and fmt.name == "host" and not fmt.is_compute_format(part.device):
        raise ValueError(f"{plan.name}: state_storage='host' needs whole parameters; FSDP2 has its CPUOffloadPolicy")
    if plan.team is not None:
        here = owners.owns(plan.param, plan.team)
        like = torch.empty(plan.shape if here else 0, dtype=plan.dtype, device=part.device)
        # the shape of an empty tensor tells of which whole one, see `state.checks`
        new = initial_value(fmt, like, fmt.shape) if here else like.new_empty((0, *fmt.shape), dtype=fmt.dtype)
    elif rule.reduces:
        new = StackSharding(plan.param, plan.dims, plan.name, plan.transposed).allocate(fmt)
    elif cut is None and not fmt.is_quantized:
        new = initial_value(fmt, plan.param, fmt.shape)
    else:
        new = initial_value(fmt, part, part.shape if rule.elementwise else fmt.shape)
        new = sharding.placed_like(new, plan.param) if rule.elementwise else new
    old, old_scale = step.state.get(key), step.state.get(scale_key(key))
    start = first_index(rule, plan, fmt)
    scale = initial_scale(fmt, sharding.local(new), start) if fmt.is_quantized else None
    if old is not None:
        convert(fmt, sharding.local(old), old_scale, sharding.local(new), scale, start)
    step.state[key] = new
    if scale is not None:
        step.state[scale_key(key)] = scale
    else:
        step.state.pop(scale_key(key), None)
