"""What is true of a group and of a parameter between steps.

A plan holds everything that follows from a group's settings and a parameter's shape, dtype, device and placement. It is
computed once; `core.step.records` compares at every step what it follows from, so that engines may replace parameters,
layers may be frozen and embeddings resized. Learning rate and weight decay are no part of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.matrix_views import MatrixBlock, StackShape
from lightning_optim.core.parallel import element_positions, sharding, stack_sharding
from lightning_optim.core.parallel.exchange import Team
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.param_groups import matrix_view_options
from lightning_optim.core.rule import ADAMW_RMS, Rule, StateSpec
from lightning_optim.core.state import formats
from lightning_optim.core.state.formats import StateFormat


@dataclass(slots=True, eq=False)
class ParamPlan:
    """One parameter of a group, as long as its settings, shape, dtype, device and placement stay the same."""

    param: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    name: str
    """Group and parameter, for messages."""
    index: int
    """Place among all parameters of the optimizer: part of the seed of random numbers."""
    blocks: tuple[MatrixBlock, ...]
    """The matrices of the parameter, one entry per size."""
    transposed: bool
    """Matrices are stored as columns x rows."""
    is_vector: bool
    kind: type
    """Class of the parameter."""
    placement: Hashable
    """Mesh and placements of a DTensor; None for a plain tensor."""
    is_sharded: bool
    """The parameter is a DTensor: its part on this rank is another tensor."""
    team: Team | None
    """Ranks of which one owns the parameter's matrices and steps them; None where every rank steps what it has."""
    replicas: Replicas | None
    """Ranks with gradients of their own, for a rule that reduces what it needs of them."""
    compute_dtype: torch.dtype
    specs: dict[str, StateSpec]
    """State by its key in `state[p]`."""
    formats: dict[str, StateFormat]
    """Storage format of each state tensor."""
    is_compute_format: bool
    """Rules work on all stored state tensors themselves."""
    is_compensated: bool
    """The rounding error of the weights is kept (Kahan summation)."""
    keeps_radius: bool
    """The norms of the matrices are kept."""
    factor: float
    """By which the learning-rate convention multiplies the direction."""
    has_kernel: bool
    """A fused kernel of torch's does what the group asks for, if dtypes and strides agree."""
    refresh_cost: float
    """Multiply-adds of one refresh of all preconditioners, up to a constant; 0 where there are none."""
    divided: tuple[int, ...]
    """Blocks of scales of its quantized state that are divided between ranks."""
    elements_beside: list[int]
    """Elements of each state tensor that is not shaped like the parameter: factors, bases, statistics."""
    stack_id: int
    """Equal for parameters that can be batched into one `[b, m, n]` stack."""
    kernel_id: int
    """Equal for parameters of one dtype and device."""
    block_plans: tuple[ParamPlan, ...] = ()
    """One plan per size of matrix, where there are several."""
    block_index: int = 0
    """Which of `block_plans` this is."""
    stored: tuple[tuple[str, torch.Size, torch.dtype], ...] | None = None
    """Key, shape and dtype of each state tensor, once they were checked; None before."""

    @property
    def dims(self) -> StackShape:
        """The parameter as a stack of matrices; its first block, where they differ in size."""
        return self.blocks[0].dims


@dataclass(slots=True, eq=False)
class GroupPlan:
    """One param group, as long as its settings stay the same; its rule has the present learning rate."""

    rule: Rule
    values: tuple[Any, ...]
    """Hyperparameters, learning rate and weight decay first."""
    settings: tuple[Any, ...]
    """Everything else that the plans of its parameters follow from."""
    params: list[ParamPlan | None]
    has_constraint: bool
    """The norms of matrices influence the step."""
    may_skip: bool
    """The rule has steps that only update state."""
    has_kernel: bool
    """The rule has a fused kernel of torch's, and no option of the group needs more than it does."""
    kernel_state: list[str]
    """State tensors that kernel takes."""
    ids: dict[Hashable, int]
    """Numbers equal keys alike, so that comparing keys takes one comparison of integers."""


def plan_param(
    plan: GroupPlan,
    group: Mapping[str, Any],
    p: Tensor,
    name: str,
    index: int,
    sharers: Replicas | None = None,
    replicas: Replicas | None = None,
) -> ParamPlan:
    """Compute what is true of a parameter between steps.

    Args:
        plan: of its group.
        group: its settings.
        p: the parameter.
        name: for messages.
        index: among all parameters.
        sharers: replicas that share the work on whole matrices.
        replicas: ranks with gradients of their own.

    Returns:
        The plan.

    Raises:
        ValueError: its rows do not divide into the group's blocks.
    """
    rule = plan.rule
    option, transposed = matrix_view_options(rule, group)
    try:
        blocks = matrix_views.split_blocks(tuple(p.shape), option, conv=not rule.last_two, transposed=transposed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    fmts = state_formats(rule, group, p, blocks)
    dtype, device = formats.compute_dtype_of(p.dtype), sharding.local(p).device
    is_compute_format = all(fmt.is_compute_format(device) for fmt in fmts.values())
    factor = direction_factor(rule, group, blocks[0].dims)
    key, vector = (blocks, transposed, p.ndim, p.dtype, p.device), p.ndim < 2
    out = ParamPlan(
        param=p,
        shape=p.shape,
        dtype=p.dtype,
        device=p.device,
        name=name,
        index=index,
        blocks=blocks,
        transposed=transposed,
        is_vector=vector,
        kind=p.__class__,
        placement=sharding.placement_of(p),
        is_sharded=sharding.placement_of(p) is not None,
        team=_team(rule, p, blocks, transposed, name, sharers),
        replicas=replicas,
        compute_dtype=dtype,
        specs=state_specs(rule, blocks, p.ndim),
        formats=fmts,
        is_compute_format=is_compute_format,
        is_compensated=formats.compensated(p.dtype, group),
        keeps_radius=formats.keeps_radius(p.dtype, group),
        factor=factor,
        has_kernel=plan.has_kernel and p.dtype == dtype and factor == 1.0,
        refresh_cost=refresh_cost(rule, blocks, vector=vector),
        divided=_divided_blocks(rule, p, fmts),
        elements_beside=[math.prod(fmt.shape) for fmt in fmts.values() if fmt.spec.letters != "mn"],
        stack_id=plan.ids.setdefault(key, len(plan.ids)),
        kernel_id=plan.ids.setdefault((p.dtype, p.device), len(plan.ids)),
    )
    out.block_plans = block_plans_of(out, rule, group)
    return out


def _divided_blocks(rule: Rule, p: Tensor, fmts: Mapping[str, StateFormat]) -> tuple[int, ...]:
    """Blocks of scales that are divided between ranks, where state is sharded like its parameter."""
    block = next((fmt.block for fmt in fmts.values() if fmt.is_quantized), 0)
    return element_positions.divided_blocks(p, block) if block and (rule.elementwise or rule.reduces) else ()


def block_plans_of(plan: ParamPlan, rule: Rule, group: Mapping[str, Any]) -> tuple[ParamPlan, ...]:
    """One plan per size of matrix of a parameter.

    Args:
        plan: of the parameter.
        rule: of its group.
        group: its settings.

    Returns:
        Plans without stored state of their own; none where all matrices have one size.
    """
    if len(plan.blocks) == 1:
        return ()
    out = []
    for i, block in enumerate(plan.blocks):
        specs, cost = rule.state_specs(*block.dims[1:]), refresh_cost(rule, (block,), vector=False)
        factor = direction_factor(rule, group, block.dims)
        out.append(replace(plan, blocks=(block,), specs=specs, refresh_cost=cost, factor=factor, block_index=i))
    return tuple(out)


def _team(
    rule: Rule, p: Tensor, blocks: Sequence[MatrixBlock], transposed: bool, name: str, sharers: Replicas | None
) -> Team | None:
    """Ranks of which one owns the matrices of a parameter; None where every rank steps what it has."""
    if rule.elementwise or rule.needs_all_gradients:
        return None
    cut = sharding.sharding_of(p, name)
    if cut is None:
        return None if rule.reduces else sharers
    return None if rule.reduces and stack_sharding.sums_on_shards(p, blocks, transposed) else cut


def state_key(key: str, spec: StateSpec, i: int) -> str:
    """Key in `state[p]` of a state tensor of the i-th size of matrix; an `m x n` one is shared by all sizes.

    Returns:
        `factor_left`, and `factor_left.1` for the second size.
    """
    return key if i == 0 or spec.letters == "mn" else f"{key}.{i}"


def state_specs(rule: Rule, blocks: Sequence[MatrixBlock], ndim: int) -> dict[str, StateSpec]:
    """The state of a parameter by its key in `state[p]`.

    Args:
        rule: of the group.
        blocks: of the parameter.
        ndim: of the parameter.

    Returns:
        Declarations; an `m x n` state tensor has the parameter's shape, others are there once per size of matrix.
    """
    out: dict[str, StateSpec] = {}
    for i, block in enumerate(blocks):
        for key, spec in rule.state_specs(*block.dims[1:], vector=ndim < 2).items():
            out[state_key(key, spec, i)] = spec if len(blocks) == 1 else replace(spec, dims=block.dims)
    return out


def state_formats(
    rule: Rule, group: Mapping[str, Any], p: Tensor, blocks: Sequence[MatrixBlock]
) -> dict[str, StateFormat]:
    """Storage format of each state tensor of a parameter.

    Args:
        rule: of the group.
        group: its settings.
        p: the parameter.
        blocks: of the parameter.

    Returns:
        Formats by key in `state[p]`.
    """
    specs, dims = state_specs(rule, blocks, p.ndim), blocks[0].dims
    return {k: formats.format_of(s, p.shape, dims, p.dtype, group, sums=rule.reduces) for k, s in specs.items()}


def refresh_cost(rule: Rule, blocks: Sequence[MatrixBlock], *, vector: bool) -> float:
    """Cost of one refresh of all preconditioners of a parameter.

    Args:
        rule: of the group.
        blocks: of the parameter.
        vector: whether it has fewer than two dimensions.

    Returns:
        Multiply-adds, up to a constant.
    """
    return sum(b * rule.refresh_cost(m, n, vector=vector) for b, m, n in (block.dims for block in blocks))


def step_cost(blocks: Iterable[MatrixBlock]) -> float:
    """Cost of one step of a whole-matrix rule, by which matrices are balanced over ranks.

    Returns:
        Multiplications of a product of each matrix with a square one of its shorter side.
    """
    return sum(float(b * m * n * min(m, n)) for b, m, n in (block.dims for block in blocks))


def direction_factor(rule: Rule, group: Mapping[str, Any], dims: StackShape) -> float:
    """By which the learning-rate convention multiplies the direction: a constant of the matrix's shape.

    Args:
        rule: of the group.
        group: its settings.
        dims: of the matrices.

    Returns:
        1 for `"native"`, and for rules whose direction has no fixed RMS.
    """
    rms = None if group["lr_convention"] == "native" else rule.rms(*dims[1:])
    return 1.0 if rms is None else ADAMW_RMS / rms
